"""Predictor files and training states: safetensors with a JSON header. Nothing is ever unpickled."""

import datetime
import json
import os
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .config import PredictorConfig
from .predictor import Predictor, PredictorSet, build
from .version import __version__

FORMAT, VERSION = "amed_predictor", 2
STATE_FORMAT = "amed_training_state"


class PredictorFileError(ValueError):
    """The file is damaged, or is no predictor. The message names the file and what to do."""


def save_predictor(predictor: Predictor | PredictorSet, path: Path, notes: Mapping[str, Any] | None = None) -> None:
    """Write a predictor, or several, with everything that rebuilds their samplers; `notes` say how they were made.

    The file appears whole or not at all: an existing file survives any failure.
    """
    _write(path, _predictor_bytes(predictor, notes))


def save_new(
    predictor: Predictor | PredictorSet,
    path_of: Callable[[int], Path],
    notes: Mapping[str, Any] | None = None,
    first: int = 1,
) -> Path:
    """Write a predictor to the first path of `path_of(number)`, from number `first` on, that is not there yet.

    Of several processes that save at once each gets a path of its own.
    """
    data, number = _predictor_bytes(predictor, notes), first
    while True:
        try:
            _write(path := path_of(number), data, new=True)
            return path
        except FileExistsError:
            number += 1


def provenance(training: Mapping[str, Any]) -> dict[str, Any]:
    """Notes for a file: `training` (the summary of a fit), the version of this package and the date."""
    now = datetime.datetime.now(datetime.timezone.utc)
    return {"training": dict(training), "version": __version__, "date": now.isoformat(timespec="seconds")}


def load_predictor(path: Path) -> Predictor:
    """The first predictor of a file. Raises PredictorFileError if the file is damaged or holds none."""
    return load_predictors(path).main


def load_predictors(path: Path) -> PredictorSet:
    """All predictors of a file. Raises PredictorFileError if the file is damaged or holds none."""
    header, weights = _read(path, FORMAT)
    try:
        every = PredictorSet(tuple(build(PredictorConfig.from_header(config)) for config in header["configs"]))
    except (KeyError, TypeError, ValueError) as error:
        raise PredictorFileError(f"{path} cannot be used as a predictor: {error}") from error
    if not all(weight.isfinite().all() for weight in weights.values()):
        raise PredictorFileError(f"{path} is damaged: some of its weights are NaN or infinite. Train it again.")
    dtypes = {weight.dtype for weight in weights.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    try:
        if unknown := {name.partition(".")[0] for name in weights} - set(map(str, range(len(every.predictors)))):
            raise RuntimeError(f"there are weights of unknown predictors: {sorted(unknown)[:3]}")
        for number, one in enumerate(every.predictors):
            own = {name.partition(".")[2]: w for name, w in weights.items() if name.startswith(f"{number}.")}
            one.to(dtype).load_state_dict(own)
            one.requires_grad_(False)
    except RuntimeError as error:
        raise PredictorFileError(
            f"{path} is damaged: its weights do not fit its header. Train or download it again. ({error})"
        ) from error
    return every


def read_notes(path: Path) -> dict[str, Any]:
    """How what is in `path` was made: teacher, training summary, seed, version, date.

    Raises PredictorFileError if the file is damaged or not a predictor.
    """
    notes: dict[str, Any] = _read(path, FORMAT)[0].get("notes", {})
    return notes


def read_configs(path: Path) -> tuple[PredictorConfig, ...]:
    """The settings of all predictors of a file; no weight is read.

    Raises PredictorFileError if the file is damaged or not a predictor.
    """
    try:
        return tuple(PredictorConfig.from_header(config) for config in _read(path, FORMAT, tensors=False)[0]["configs"])
    except (KeyError, TypeError, ValueError) as error:
        raise PredictorFileError(f"{path} cannot be used as a predictor: {error}") from error


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a nested dict of tensors and JSON values (the state of a fit), whole or not at all."""
    tensors: dict[str, Tensor] = {}

    def split(value: Any) -> Any:
        """The value as JSON, in which a tensor is its number."""
        if isinstance(value, Tensor):
            tensors[str(len(tensors))] = value.detach().cpu().contiguous().clone()
            return {"tensor": len(tensors) - 1}
        if isinstance(value, Mapping):
            return {"items": [[key, split(item)] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            return [split(item) for item in value]
        return value

    _write(path, _tensor_bytes(tensors, STATE_FORMAT, {"version": VERSION, "state": split(state)}))


def load_state(path: Path) -> dict[str, Any]:
    """Read what `save_state` wrote. Raises PredictorFileError if the file is damaged or something else."""
    header, tensors = _read(path, STATE_FORMAT)

    def join(value: Any) -> Any:
        """The inverse of `save_state`'s `split`."""
        if isinstance(value, dict):
            return tensors[str(value["tensor"])] if "tensor" in value else {k: join(v) for k, v in value["items"]}
        return [join(item) for item in value] if isinstance(value, list) else value

    state: dict[str, Any] = join(header["state"])
    return state


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all. Raises ValueError for NaN and infinity, which JSON does not have."""
    _write(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def _predictor_bytes(predictor: Predictor | PredictorSet, notes: Mapping[str, Any] | None) -> bytes:
    every = predictor.predictors if isinstance(predictor, PredictorSet) else (predictor,)
    header = {"version": VERSION, "configs": [asdict(one.config) for one in every], "notes": dict(notes or {})}
    weights = {
        f"{number}.{name}": weight.detach().cpu().contiguous()
        for number, one in enumerate(every)
        for name, weight in one.state_dict().items()
    }
    return _tensor_bytes(weights, FORMAT, header)


def _tensor_bytes(tensors: Mapping[str, Tensor], kind: str, header: Mapping[str, Any]) -> bytes:
    return save(dict(tensors), metadata={"format": kind, "header": json.dumps(header)})


def _write(path: Path, data: bytes, *, new: bool = False) -> None:
    """Write a file whole or not at all; a new one is refused with FileExistsError where there is one already."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if new:
            _publish(temporary, path)
        else:
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _publish(temporary: Path, path: Path) -> None:
    """Give a whole file its name, or raise FileExistsError."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except (OSError, NotImplementedError):  # a file system without hard links: the name is claimed first
        path.open("xb").close()
        os.replace(temporary, path)
    else:
        temporary.unlink()


def _read(path: Path, kind: str, *, tensors: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A file's header, and its tensors if they are wanted."""
    found = {}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if tensors:
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise PredictorFileError(f"There is no file {path}.") from error
    except (SafetensorError, OSError) as error:
        raise PredictorFileError(
            f"{path} is damaged or is no safetensors file ({error}). Train or download it again."
        ) from error
    if metadata.get("format") != kind:
        found = metadata.get("format", "no format mark")
        raise PredictorFileError(f"{path} is a safetensors file, but no {kind} (found: {found}). Choose another file.")
    try:
        header: dict[str, Any] = json.loads(metadata["header"])
    except (KeyError, json.JSONDecodeError) as error:
        raise PredictorFileError(f"{path} is damaged: its header is unreadable ({error}).") from error
    if not isinstance(header, dict) or header.get("version") != VERSION:
        older = isinstance(header, dict) and header.get("version") == 1
        remedy = (
            "an older version of this pack. Train it again." if older else "a newer version of this pack. Update it."
        )
        raise PredictorFileError(f"{path} was made by {remedy}")
    return header, found
