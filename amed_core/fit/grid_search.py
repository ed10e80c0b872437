"""Grids searched on the model itself, by dynamic programming over the levels that its teacher passed.

As in GITS (Chen et al. 2024, arXiv 2405.11326) a grid costs the sum of what its intervals cost, and the cheapest grid
of so many intervals is found exactly. Here an interval costs the squared error that the student's own rule makes in
it from the teacher's sample at its start, times what of such an error is left at the end. All of it follows
from inner products of the teacher's samples and slopes: there is no model call and no gradient.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from ..call_list import boundaries_of
from ..config import PredictorConfig
from ..samplers import TYPES, sampler_name
from ..schedules import SEARCHED
from ..types import Denoiser, Sample
from .teacher import PathProducts, left_of_errors, levels, path, products_of

# What crosses an interval: the slope at its start (Euler, DDIM), Adams' and Bashforth's two slopes (iPNDM), or the best
# two slopes (DPM-Solver++ and learned weights).
Rule = Literal["euler", "ipndm", "weights"]
RULES: tuple[Rule, ...] = get_args(Rule)
# Signal to noise, in amplitude, where a first step without a call may lead.
FIRST_RATIOS = (0.01, 0.02, 0.03, 0.05, 0.07, 0.09, 0.11, 0.135, 0.16)
SEARCH_CALLS, SEARCH_TRAJECTORIES = 24, 16  # of a search for a student's grid


def searched(passed: PathProducts, intervals: int, rule: str, *, flow: bool = False) -> tuple[float, ...]:
    """The cheapest grid of so many intervals, from the first level to the last.

    Raises ValueError for an unknown rule, and if there are
    fewer levels than intervals.
    """
    if rule not in RULES:
        raise ValueError(f"There is no rule {rule!r} to search a grid for. Choose one of: {', '.join(RULES)}.")
    n = len(passed.levels)
    if intervals > n - 1:
        raise ValueError(f"A grid of {intervals} intervals cannot be searched on {n} levels. Raise teacher_calls.")
    remains = left_at_end(passed, flow)
    first, cost = _one_slope(passed) * remains, _two_slopes(passed, rule) * remains
    # best[i, j]: the least cost of so many intervals, of which the last one leads from level i to level j.
    best = torch.full_like(first, torch.inf)
    best[0] = first[0]
    came_from = []
    for _ in range(intervals - 1):
        best, before = (best[:, :, None] + cost).min(0)
        came_from.append(before)
    i, j = int(best[:, -1].argmin()), n - 1
    points = [j, i]
    for before in reversed(came_from):
        i, j = int(before[i, j]), i
        points.append(i)
    return tuple(passed.levels[p] for p in reversed(points))


def on_cheapest_grid(config: PredictorConfig, passed: PathProducts) -> PredictorConfig:
    """The settings of a student with two calls per interval on the grid that is cheapest for it.

    It is searched call by call. Of those levels every second one is a grid point. Raises ValueError if its grid does
    not end at 0.
    """
    if config.sigmas[-1] != 0:
        raise ValueError(
            f"A searched grid ends at 0, but this student's ends at {config.sigmas[-1]:.4g}, as published."
        )
    rule = TYPES[sampler_name(config)].grid_rule
    calls = 2 * config.intervals - config.plain_last  # an analytic first interval is no shorter than the others
    every = searched(passed, calls, rule, flow=config.flow)
    grid = tuple(every[n] for n in boundaries_of(calls, config.plain_last))
    return replace(config, sigmas=grid, schedule=SEARCHED, rho=1.0)


def search(denoiser: Denoiser, x: Sample, config: PredictorConfig) -> PredictorConfig:
    """The same, from noisy samples `x` (batch, ...) at the grid's first level: SEARCH_CALLS model calls of each.

    Raises ValueError if the student's grid does not end at 0.
    """
    fine = levels(config.sigma_min, config.sigmas[0], SEARCH_CALLS, config.flow)
    return on_cheapest_grid(config, products_of(path(denoiser, x, fine)))


def first_levels(
    passed: Sequence[float], variance: float, ratios: Sequence[float], *, flow: bool = False
) -> list[float]:
    """The passed levels below the first one where signal to noise, in amplitude, is nearest to these ratios.

    `variance` is that of the data.
    """
    spread = variance**0.5
    wanted = [spread / (spread + ratio) if flow else spread / ratio for ratio in ratios]
    nearest = [min(passed, key=lambda level, w=w: abs(level - w)) for w in wanted]  # type: ignore[misc]
    return [level for level in dict.fromkeys(nearest) if passed[-2] < level < passed[0]]


def left_at_end(passed: PathProducts, flow: bool) -> Tensor:
    """What is left, squared, of an error at every level (levels,), if the data were Gaussian of its own variance.

    At sigma, v / (s^2 v + sigma^2), with the variance v and the signal's scale s.
    """
    return left_of_errors(passed.levels, passed.variance, flow)


def _errors(passed: PathProducts) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of intervals i to j: |x_j - x_i|^2, its inner product with every slope, of the slopes, and the step."""
    n, sigma = len(passed.levels), torch.tensor(passed.levels, dtype=torch.float64)
    samples, mixed, slopes = passed.products[:n, :n], passed.products[:n, n:], passed.products[n:, n:]
    own = samples.diagonal()
    moved = own[:, None] + own - 2 * samples
    along = mixed[None, :, :] - mixed[:, None, :]
    return moved, along, slopes, sigma - sigma[:, None]


def _only_downward(cost: Tensor) -> Tensor:
    """Infinite unless the last index comes after the one before it, and that after an earlier one."""
    n = cost.shape[-1]
    later = torch.ones(n, n, dtype=torch.bool).triu(1)
    allowed = later if cost.ndim == 2 else later[:, :, None] & later[None]
    return torch.where(allowed, cost.clamp(min=0), torch.inf)


def _one_slope(passed: PathProducts) -> Tensor:
    """Euler's error in every interval (i, j)."""
    moved, along, slopes, step = _errors(passed)
    at_start = along.diagonal(dim1=0, dim2=2).T  # <x_j - x_i, slope_i>
    return _only_downward(moved - 2 * step * at_start + step**2 * slopes.diagonal()[:, None])


def _two_slopes(passed: PathProducts, rule: str) -> Tensor:
    """The error in every interval (i, j) with the slope at an earlier level h, (h, i, j)."""
    moved, along, slopes, step = _errors(passed)
    here = step * along.diagonal(dim1=0, dim2=2).T  # (i, j)
    earlier = step[None] * along.permute(2, 0, 1)  # (h, i, j)
    length = slopes.diagonal()
    own, both, other = (step**2 * s for s in (length[:, None], slopes[:, :, None], length[:, None, None]))
    if rule == "weights":
        determinant = (own * other - both**2).clamp(min=1e-12 * own * other + torch.finfo(torch.float64).tiny)
        w_here, w_earlier = (here * other - earlier * both) / determinant, (earlier * own - here * both) / determinant
    else:
        fixed = (1.5, -0.5) if rule == "ipndm" else (1.0, 0.0)
        w_here, w_earlier = (torch.full_like(both, w) for w in fixed)
        w_here[..., -1], w_earlier[..., -1] = 1.0, 0.0  # to 0 iPNDM goes by the newest slope alone
    error = moved - 2 * (w_here * here + w_earlier * earlier)
    error = error + w_here**2 * own + 2 * w_here * w_earlier * both + w_earlier**2 * other
    return _only_downward(error)
