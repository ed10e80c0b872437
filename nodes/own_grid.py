"""The scheduler "amed" where no predictor has a grid: a list that says where pictures start and end, and in how many
calls, and that is known again by its levels between.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..amed_core.predictor import PredictorSet
from ..amed_core.schedules import time_uniform

MARK = 1 - 2e-4  # what tells the list from ComfyUI's "simple", which somebody may have chosen for its own sake
EVENLY = 1e-2  # relative, of levels in float32
ROUNDING = 2e-5  # relative, of lists in float32
MOST_STEPS = 1000  # of a whole list, of which a run is a piece


def placeholder(model_sampling: Any, steps: int) -> Tensor:
    """Levels (steps + 1,) as "simple" has them, so that denoise means what it means there, and marked.

    EDM's continuous models list their levels evenly in ln(sigma), by which half of the steps lie where pictures have
    long been decided; a run in two parts would change over there. Theirs are uniform in diffusion time.
    """
    table = model_sampling.sigmas.detach().cpu().double()
    return _whole(table, steps, even=_even(table)).float()


def is_own(levels: Sequence[float], model_sampling: Any, made_for: PredictorSet | None = None) -> bool:
    """Whether levels came from the scheduler "amed": a whole list, or a piece of one.

    `made_for` are the predictors that the scheduler took its grids from, if there are any.
    """
    calls, asked = len(levels) - 1, torch.tensor(levels, dtype=torch.float64)
    return any(_has_piece(whole, asked) for whole in _wholes(calls, model_sampling, made_for))


def _wholes(calls: int, model_sampling: Any, made_for: PredictorSet | None) -> Iterable[Tensor]:
    """What the scheduler gives for every number of steps from this on."""
    if made_for is not None:
        for steps in range(calls, MOST_STEPS // 5 + 1):
            yield torch.tensor(made_for.sigmas(steps), dtype=torch.float64)
        return
    table = model_sampling.sigmas.detach().cpu().double()
    even = _even(table)
    for steps in range(calls, MOST_STEPS + 1):
        yield _whole(table, steps, even=even)


def _even(table: Tensor) -> bool:
    """Whether levels, the smallest first, are even in ln(sigma)."""
    apart = table.log().diff()
    return bool((apart - apart.mean()).abs().max() < EVENLY * apart.mean())


def _whole(table: Tensor, steps: int, *, even: bool) -> Tensor:
    """A list (steps + 1,) for a model with these levels, the smallest first."""
    if even:
        whole = time_uniform(steps + 1, float(table[0]), float(table[-1]))[:-1]
    else:
        falling = torch.arange(steps, dtype=torch.float64) * (len(table) / steps)
        whole = table[-1 - falling.long()]
    whole[1:] *= MARK
    return torch.cat([whole, torch.zeros(1, dtype=torch.float64)])


def _has_piece(whole: Tensor, asked: Tensor) -> bool:
    """Whether the asked levels are there, one after the other; a piece may have its last one set to 0."""
    begins = ((whole - asked[0]).abs() < ROUNDING * asked[0]).nonzero().flatten().tolist()
    for begin in begins:
        piece = whole[begin : begin + len(asked)].clone()
        if len(piece) == len(asked):
            if asked[-1] == 0:
                piece[-1] = 0
            if torch.allclose(piece, asked, rtol=ROUNDING, atol=1e-9):
                return True
    return False
