"""Predictor files and training states: safetensors with a JSON header. Nothing is ever unpickled."""

import contextlib
import datetime
import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .config import PredictorConfig
from .contents import (
    FORMAT,
    LARGEST_FILE,
    LARGEST_HEADER,
    VERSION,
    described,
    missing,
    read_all,
    read_header,
    refusal,
)
from .predictor import Predictor, PredictorSet
from .version import __version__

STATE_FORMAT, STATE_VERSION = "amed_training_state", 1
TEMPORARY = ".amed-{}.tmp"  # names of files that are being written
LEFT_BEHIND = 24 * 60 * 60  # seconds after which nobody writes them any more


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

    Of several processes that save at once each gets a path of its own. All paths are in one folder.
    """
    number = first
    with _whole(path_of(number).parent, _predictor_bytes(predictor, notes)) as temporary:
        while True:
            try:
                return _published(temporary, path_of(number))
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
    return load_with_notes(path)[0]


def load_with_notes(path: Path) -> tuple[PredictorSet, dict[str, Any]]:
    """All predictors of a file, and how they were made, from one look at it.

    Raises PredictorFileError if the file is damaged or holds none.
    """
    found = read_all(Path(path))
    return found.every, found.notes


def read_notes(path: Path) -> dict[str, Any]:
    """How what is in `path` was made: teacher, training summary, seed, version, date; no weight is read.

    Raises PredictorFileError if the file is damaged or not a predictor.
    """
    return read_header(Path(path)).notes


def read_configs(path: Path) -> tuple[PredictorConfig, ...]:
    """The settings of all predictors of a file; no weight is read.

    Raises PredictorFileError if the file is damaged or not a predictor.
    """
    return tuple(one.config for one in read_header(Path(path)).every.predictors)


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a nested dict of tensors and JSON values (the state of a fit), whole or not at all."""
    tensors: dict[str, Tensor] = {}

    def split(value: Any) -> Any:
        """The value as JSON, in which a tensor is its number."""
        if isinstance(value, Tensor):
            tensors[str(len(tensors))] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
            return {"tensor": len(tensors) - 1}
        if isinstance(value, Mapping):
            return {"items": [[key, split(item)] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            return [split(item) for item in value]
        return value

    described = split(state)
    header = {"version": VERSION, "state_version": STATE_VERSION, "state": described}
    _write(path, _tensor_bytes(tensors, STATE_FORMAT, {**header, "checksum": _checksum(described, tensors)}))


def load_state(path: Path) -> dict[str, Any]:
    """Read what `save_state` wrote. Raises PredictorFileError if the file is damaged or something else."""
    header, tensors = _read(path, STATE_FORMAT)

    def join(value: Any) -> Any:
        """The inverse of `save_state`'s `split`. Tensors are copied, so that nothing holds on to the file."""
        if isinstance(value, dict) and "tensor" in value:
            return tensors[str(value["tensor"])].clone()
        if isinstance(value, dict):
            return {key: join(item) for key, item in value["items"]}
        return [join(item) for item in value] if isinstance(value, list) else value

    if header.get("state_version") != STATE_VERSION:
        raise refusal(path, "was written by another version of this pack", "Remove it.")
    try:
        if header["checksum"] != _checksum(header["state"], tensors):
            raise ValueError("its checksum is that of other content")
        state: dict[str, Any] = join(header["state"])
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise refusal(path, f"is damaged ({error})", "Remove it.") from error
    return state


def _checksum(described: Any, tensors: Mapping[str, Tensor]) -> str:
    """A digest of a state: of what its header says, and of every tensor to the bit."""
    content = hashlib.sha256(json.dumps(described).encode())
    for name, tensor in sorted(tensors.items()):
        content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return content.hexdigest()


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
    data = _tensor_bytes(weights, FORMAT, header)
    if len(data) > LARGEST_FILE or int.from_bytes(data[:8], "little") > LARGEST_HEADER:
        raise ValueError("These predictors are too many for one file, which could not be read again. Save fewer.")
    return data


def _tensor_bytes(tensors: Mapping[str, Tensor], kind: str, header: Mapping[str, Any]) -> bytes:
    return save(dict(tensors), metadata={"format": kind, "header": json.dumps(header)})


def _write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    with _whole(Path(path).parent, data) as temporary:
        os.replace(temporary, path)


@contextlib.contextmanager
def _whole(folder: Path, data: bytes) -> Iterator[Path]:
    """A file of this data in a folder, under a name that nobody looks for and that is free again at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    temporary = folder / TEMPORARY.format(secrets.token_hex(8))
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _sweep(folder: Path) -> None:
    """Remove what was left in a folder by processes that died while they wrote."""
    for left in folder.glob(TEMPORARY.format("*")):
        with contextlib.suppress(OSError):  # another process was faster
            if time.time() - left.stat().st_mtime > LEFT_BEHIND:
                left.unlink()


def _published(temporary: Path, path: Path) -> Path:
    """Give a whole file its name, which is returned. Raises FileExistsError if there is one of this name."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except (OSError, NotImplementedError):  # a file system without hard links
        # So that no half file is seen, what is claimed is not the name itself, but one that stands for it.
        claim = path.with_name(TEMPORARY.format(hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]))
        claim.open("xb").close()
        try:
            if path.exists():
                raise FileExistsError(path) from None
            os.replace(temporary, path)
        finally:
            claim.unlink()
    return path


def _read(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors of a file of ours. Raises PredictorFileError if it is damaged or of another kind."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise missing(path) from error
    except (SafetensorError, OSError) as error:
        raise refusal(path, f"is damaged or is no safetensors file ({error})") from error
    return described(path, kind, metadata), found
