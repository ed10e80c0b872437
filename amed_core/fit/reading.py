"""Reading a state that a file held: whatever is wrong with it becomes one short StateError, before anything changes.

A state is only as good as its file. So every part of it is looked at: its kind, its size, and whether a fit could have
left it. What passes can be gone on from.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..config import LONGEST_TEXT
from ..contents import in_short
from .protocol import StateError

REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # kinds of numbers that can be calculated with
LARGEST_COUNT = 2**53  # of calls, samples and iterations: what JSON holds exactly everywhere
LONGEST_REASON = 150  # characters of what went wrong
ROUNDING = 1e-6  # relative: by which sums of squares may seem to be below 0

# What reading comes upon; a model that answers NaN, and a user who stops it, raise others.
UNREADABLE = (AttributeError, LookupError, OverflowError, RuntimeError, TypeError, ValueError, ZeroDivisionError)

Value = TypeVar("Value")


@contextmanager
def reading_state() -> Iterator[None]:
    """Turn whatever goes wrong where a state is read into a StateError.

    Change no fit before all of the state is read.
    """
    try:
        yield
    except StateError:
        raise
    except UNREADABLE as error:
        why = in_short(f"{type(error).__name__}: {error}", LONGEST_REASON)
        raise StateError(f"This training state cannot be used ({why}): begin the training anew.") from error


def of_kind(value: Any, kind: type[Value]) -> Value:
    """A value of a state, if it is of the kind that belongs there. Raises TypeError if it is not."""
    if type(value) is not kind:
        raise TypeError(f"a {kind.__name__} was expected, but found a {type(value).__name__}")
    return value


def of_text(value: Any) -> str:
    """A name in a state, as it may be shown to people. Raises TypeError or ValueError for anything else."""
    if len(of_kind(value, str)) > LONGEST_TEXT or not value.isprintable():
        raise ValueError(f"a name of {len(value)} characters")
    return str(value)


def of_count(value: Any, most: int = LARGEST_COUNT) -> int:
    """A whole number of a state from 0 on. Raises TypeError or ValueError for anything else."""
    if not 0 <= of_kind(value, int) <= most:
        raise ValueError(f"a number from 0 to {most:,} was expected")
    return int(value)


def of_number(value: Any, least: float = -math.inf, most: float = math.inf) -> float:
    """A number of a state, which may be infinite where `most` is. Raises TypeError or ValueError for anything else."""
    if not least <= of_kind(value, float) <= most:
        raise ValueError(f"a number from {least:g} to {most:g} was expected, but found {value:g}")
    return float(value)


def of_errors(values: Any) -> list[float]:
    """Errors of a state: from 0 on, and infinite where samples were. Raises TypeError or ValueError for others."""
    return [of_number(value, 0.0) for value in of_kind(values, list)]


def of_shape(value: Any, shape: Sequence[int]) -> Tensor:
    """A tensor of a state, if it has the shape that belongs there, and real numbers. Raises TypeError if not."""
    if not isinstance(value, Tensor) or value.shape != tuple(shape) or value.dtype not in REAL:
        found = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"a tensor of shape {tuple(shape)} was expected, but found {found}")
    return value


def of_finite(value: Any, shape: Sequence[int]) -> Tensor:
    """A tensor of a state, if it has the shape that belongs there and is finite. Raises TypeError or ValueError."""
    if not bool(of_shape(value, shape).isfinite().all()):
        raise ValueError("some of its values are NaN or infinite")
    return of_shape(value, shape)


def of_distances(value: Any, count: int) -> Tensor:
    """Distances (count,) of a state: from 0 on, and infinite where samples were. Raises TypeError or ValueError."""
    if not bool((of_shape(value, (count,)) >= 0).all()):
        raise ValueError("some of its distances are negative or NaN")
    return of_shape(value, (count,))


def of_squares(value: Any, shape: Sequence[int]) -> Tensor:
    """Sums of squares (..., n, n) of a state: symmetric, and nowhere below 0. Raises TypeError or ValueError."""
    found = of_finite(value, shape).double()
    values = torch.linalg.eigvalsh(found)
    highest = found.abs().amax((-2, -1))
    askew = (found - found.mT).abs().amax((-2, -1))
    if bool(((values < -ROUNDING * values[..., -1:].abs()).any(-1) | (askew > ROUNDING * highest)).any()):
        raise ValueError("some of its sums of squares are none")
    return found


def refuse_other_settings(state: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raise StateError if a state was made with other settings than these dataclasses."""

    def plain(value: Any) -> Any:
        return [plain(v) for v in value] if isinstance(value, (tuple, list)) else value

    for part, values in settings.items():
        saved = state[part]
        if differing := [k for k, v in asdict(values).items() if plain(saved.get(k)) != plain(v)]:
            names = in_short(", ".join(differing), LONGEST_REASON)
            raise StateError(f"This training state was made with other settings: {names} differ.")
