"""What is in a predictor file: read once, and checked by its header before any tensor is made of it.

Such files are shared, so that nothing in them is trusted. A header says what there is. It stands for settings, of
which every one has a kind and a size; and settings stand for tensors, whose names and shapes are known without them.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from .config import LONGEST_TEXT, PredictorConfig
from .predictor import MOST_PREDICTORS, PredictorSet, check_numbers, outline

FORMAT, VERSION = "amed_predictor", 2
LARGEST_FILE, LARGEST_HEADER = 64 << 20, 1 << 20  # bytes
DTYPES = ("F16", "BF16", "F32", "F64")  # of weights, as safetensors names them
LONGEST_ERROR, LONGEST_PATH = 300, 100  # characters
DEEPEST_NOTES, LARGEST_NOTE = 100, 1 << 64  # a seed has 64 bits
AGAIN = "Train or download it again."
ANOTHER = "Choose another file."


class PredictorFileError(ValueError):
    """The file is damaged, or is no predictor. The message names the file and what to do."""


def refusal(path: Path, why: str, remedy: str = AGAIN) -> PredictorFileError:
    """The error that says which file cannot be used, why, and what to do: LONGEST_ERROR characters without markup."""
    name = path_in_short(path)
    why = in_short(why.rstrip("."), LONGEST_ERROR - len(f"{name} . {remedy}"))
    return PredictorFileError(f"{name} {why}. {remedy}")


def missing(path: Path) -> PredictorFileError:
    """The error that says that there is no such file."""
    return PredictorFileError(f"There is no file {path_in_short(path)}.")


def path_in_short(path: Path) -> str:
    """The end of a path, which says most, in LONGEST_PATH characters without markup."""
    name = _printable(str(path))
    return name if len(name) <= LONGEST_PATH else f"...{name[3 - LONGEST_PATH :]}"


def in_short(text: str, longest: int) -> str:
    """The text without markup and control characters, cut to so many characters."""
    text = _printable(" ".join(text.split()))
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def _printable(text: str) -> str:
    return "".join(sign if sign.isprintable() and sign not in "<>" else "?" for sign in text)


@dataclass(frozen=True)
class Contents:
    """What the header of a predictor file says: predictors, which have no numbers yet, and how they were made."""

    every: PredictorSet
    notes: dict[str, Any]


def read_header(path: Path) -> Contents:
    """What a predictor file says of itself. Raises PredictorFileError if it is damaged or no predictor."""
    return _contents(path, _read(path, weights=False)[0])


def read_all(path: Path) -> Contents:
    """The predictors of a file with their numbers, and its notes, of one and the same version of it.

    Raises PredictorFileError if it is damaged or no predictor.
    """
    header, data = _read(path, weights=True)
    contents = _contents(path, header)
    try:
        weights = load(data)
        dtypes = {weight.dtype for weight in weights.values()}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        for number, one in enumerate(contents.every.predictors):
            own = {name: weights[f"{number}.{name}"] for name in one.state_dict()}
            check_numbers(one, own)
            one.load_state_dict(own, assign=True)
            one.to(dtype).requires_grad_(False)
    except (SafetensorError, ValueError) as error:
        raise refusal(path, f"is damaged: {error}") from error
    return contents


def described(path: Path, kind: str, metadata: Any) -> dict[str, Any]:
    """The header of a file of ours from its safetensors metadata.

    Raises PredictorFileError if it is of another kind or version, or no JSON.
    """
    found = metadata if isinstance(metadata, dict) else {}
    if found.get("format") != kind:
        mark = str(found.get("format", "no format mark"))[:40]
        raise refusal(path, f"is a safetensors file, but no {kind} (found: {mark})", ANOTHER)
    try:
        header = parsed(found.get("header"))
    except ValueError as error:
        raise refusal(path, f"is damaged: its header is unreadable ({error})") from error
    version = header.get("version")
    if isinstance(version, bool) or not isinstance(version, int):
        raise refusal(path, "is damaged: its header has no version")
    if version < VERSION:
        raise refusal(path, "was made by an older version of this pack", "Train it again.")
    if version > VERSION:
        raise refusal(path, "was made by a newer version of this pack", "Update it.")
    return header


def parsed(text: Any) -> dict[str, Any]:
    """A JSON object. Raises ValueError for anything else, however deep it is or long its numbers are."""
    if not isinstance(text, str | bytes):
        raise ValueError("it is no text")
    try:
        found = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")
    return found


def plain_notes(value: Any, depth: int = 0) -> Any:
    """Notes that a file brought, as they may be shown to people: short texts without markup, and usual numbers.

    Raises ValueError for anything else.
    """
    if depth > DEEPEST_NOTES:
        raise ValueError("its notes are nested too deeply")
    if isinstance(value, Mapping):
        return {_plain_note(str(name)): plain_notes(one, depth + 1) for name, one in value.items()}
    if isinstance(value, list):
        return [plain_notes(one, depth + 1) for one in value]
    if isinstance(value, str):
        return _plain_note(value)
    if isinstance(value, int) and abs(value) > LARGEST_NOTE:
        raise ValueError("its notes hold a number larger than any of use")
    return value


def _plain_note(text: str) -> str:
    return "".join(sign for sign in text[:LONGEST_TEXT] if sign.isprintable() and sign not in "<>&\"'`")


def _read(path: Path, *, weights: bool) -> tuple[dict[str, Any], bytes]:
    """The safetensors header of a file; and, if `weights` are wanted, all of its bytes."""
    try:
        if not path.is_file():
            raise missing(path)
        with path.open("rb") as file:
            size, begin = os.fstat(file.fileno()).st_size, file.read(8)
            length = int.from_bytes(begin, "little")
            if length > size - 8:
                raise refusal(path, "is damaged or is no safetensors file: it is shorter than it says")
            if size > LARGEST_FILE or length > LARGEST_HEADER:
                raise refusal(path, f"is too large for a predictor ({size:,} bytes)", ANOTHER)
            text = file.read(length)
            data = begin + text + file.read(size - 8 - length) if weights else b""
    except OSError as error:
        raise refusal(path, f"cannot be read ({error.strerror})", "Check its permissions.") from error
    try:
        return parsed(text), data
    except ValueError as error:
        raise refusal(path, f"is damaged or is no safetensors file ({error})") from error


def _contents(path: Path, entries: dict[str, Any]) -> Contents:
    """What the safetensors header of a file describes, after a look at everything in it."""
    header = described(path, FORMAT, entries.pop("__metadata__", {}))
    try:
        configs = header.get("configs")
        if not isinstance(configs, list) or not 0 < len(configs) <= MOST_PREDICTORS:
            raise ValueError(f"it must hold the settings of 1 to {MOST_PREDICTORS} predictors")
        every = PredictorSet(tuple(outline(PredictorConfig.from_header(config)) for config in configs))
        notes = plain_notes(header.get("notes", {}))
        if not isinstance(notes, dict):
            raise ValueError("its notes are no JSON object")
    except ValueError as error:
        raise refusal(path, f"cannot be used as a predictor: {error}") from error
    try:
        _check_entries(every, entries)
    except ValueError as error:
        raise refusal(path, f"is damaged: its weights do not fit its header ({error})") from error
    return Contents(every, notes)


def _check_entries(every: PredictorSet, entries: Mapping[str, Any]) -> None:
    """Raise ValueError unless a file has the very tensors of these predictors, by name, shape and kind of number."""
    shapes = {
        f"{number}.{name}": list(values.shape)
        for number, one in enumerate(every.predictors)
        for name, values in one.state_dict().items()
    }
    if strange := sorted(set(entries) - set(shapes)):
        raise ValueError(f"there are weights of unknown predictors: {', '.join(strange)[:60]}")
    for name, shape in shapes.items():
        entry = entries.get(name)
        if not isinstance(entry, Mapping):
            raise ValueError(f"{name} is missing")
        if entry.get("shape") != shape:
            raise ValueError(f"{name} is not of the shape {shape}")
        if entry.get("dtype") not in DTYPES:
            raise ValueError(f"{name} is of the type {str(entry.get('dtype'))[:20]}, and not of {', '.join(DTYPES)}")
