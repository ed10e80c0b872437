"""Grids as users of a sampler write them: one noise level per model call, and a last one for the end.

A planned interval costs two model calls, so it spans two entries of such a list, and the entry
between them only says nominally where the second call happens: the predictor decides. The list for
`n` calls has n + 1 entries, as the lists of every other sampler have for n steps. An analytic first
interval and a plain one cost one call and span one entry.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from .config import TOLERANCE, PredictorConfig, same_levels
from .midpoints import length, longest
from .types import Run

SHOWN = 12  # levels, in an error
SLACK = 0.25  # how much longer than its own, in ln(sigma), an interval may be that a predictor plans


def call_sigmas(config: PredictorConfig, calls: int) -> tuple[float, ...]:
    """The levels of `calls` model calls on the predictor's grid, or on one that interpolates it in ln(sigma).

    A number of the other parity than whole intervals have leaves one call for the first interval. Raises ValueError for
    fewer calls than 1.
    """
    if calls < 1:
        raise ValueError(f"Sampling needs at least 1 model call, but {calls} were asked for. Raise steps.")
    if config.kind == "multistep":
        return config.sigmas if calls == config.intervals else _one_call_each(config, calls)
    grid = [math.log(max(sigma, config.sigma_min)) for sigma in config.sigmas]
    intervals = -(-(calls + config.plain_last) // 2)
    halves = [half for half in range(2 * intervals + 1) if not (config.plain_last and half == 2 * intervals - 1)]
    if len(halves) > calls + 1:
        halves.remove(1)
    points = np.array(halves) / (2 * intervals) * config.intervals
    levels = np.exp(np.interp(points, np.arange(len(grid)), grid)).tolist()
    # Grid points themselves are exact, and the list ends where the grid ends.
    exact = [config.sigmas[int(p)] if p == int(p) else level for p, level in zip(points.tolist(), levels, strict=True)]
    return tuple(exact)


def _one_call_each(config: PredictorConfig, calls: int) -> tuple[float, ...]:
    """Levels that interpolate a multistep table's in ln(sigma), down to sigma_min, and 0."""
    levels = np.log([*config.sigmas[:-1], config.sigma_min])
    reached = int(np.argmax(levels <= levels[-1] + TOLERANCE))  # its own last level may be sigma_min already
    positions = np.arange(calls) * (config.intervals / calls)
    if reached < config.intervals:
        positions = np.linspace(0, reached, calls)
    return (config.sigmas[0], *np.exp(np.interp(positions, np.arange(len(levels)), levels)).tolist()[1:], 0.0)


def run_of(sigmas: Sequence[float], config: PredictorConfig) -> Run:
    """Group a list of levels into the predictor's intervals.

    A piece of the predictor's own list keeps the predictor's intervals. Any other list is paired
    from its end (before a plain last call, if the predictor has one and the list ends at 0), and a pair is
    planned if it is no longer than what the predictor learned at such levels. An odd first call is analytic
    if the predictor has the analytic first step and the list starts where the predictor's does. All other
    calls are plain ones of the base solver; so are all calls of a multistep student off its own grid,
    whose plans hold only along the path that they were fitted on.
    Raises ValueError for a list that no sampler could follow, and for one that the predictor's own
    schedule gives for another number of calls.
    """
    levels = [float(sigma) for sigma in sigmas]
    calls = len(levels) - 1
    if calls < 1:
        raise ValueError(f"SIGMAS has {len(levels)} noise levels, but sampling needs at least 2. Raise steps.")
    if any(not math.isfinite(s) for s in levels) or any(a <= b for a, b in pairwise(levels)) or levels[-1] < 0:
        some = ", ".join(f"{s:.4g}" for s in levels[:SHOWN]) + (", ..." if len(levels) > SHOWN else "")
        raise ValueError(
            f"SIGMAS must fall from the first noise level to the last, but found {some}. "
            'Use "AMED Scheduler" or another scheduler for this model.'
        )
    if levels[0] > config.sigmas[0] * (1 + TOLERANCE):
        raise ValueError(
            f"SIGMAS starts at {levels[0]:.4g}, above {config.sigmas[0]:.4g} where this predictor's training started. "
            'Use "AMED Scheduler" with the same predictor, or train a predictor on this model.'
        )
    own = call_sigmas(config, config.calls)
    if calls != config.calls and same_levels(levels, call_sigmas(config, calls)):
        raise ValueError(
            f"This predictor was made for {config.calls} model calls, but steps asks for {calls}. "
            f"Set steps to {config.calls}, or train a predictor for {calls} calls."
        )
    if config.kind == "multistep":  # its weights are for slopes from the beginning, of each of its models
        own_grid = config.begins_at(levels) is not None
        return _group(levels, list(range(calls + 1)), analytic=False, own_grid=own_grid)
    for offset in range(len(own) - calls):
        if same_levels(levels, own[offset : offset + calls + 1]):
            boundaries = [b - offset for b in boundaries_of(config.calls, config.plain_last)]
            return _group(levels, boundaries, config.analytic_first_step and offset == 0, own_grid=True)
    if config.build_solver().multistep:
        return _group(levels, list(range(calls + 1)), analytic=False, own_grid=False)
    boundaries = boundaries_of(calls, config.plain_last and levels[-1] == 0)
    starts_like_own = math.isclose(levels[0], own[0], rel_tol=TOLERANCE)
    analytic = config.analytic_first_step and starts_like_own and boundaries[1] == 1 and calls > 1
    for begin, end in pairwise(tuple(boundaries)):
        interval = (config, levels[begin], levels[end])
        if end - begin == 2 and length(*interval) > (1 + SLACK) * longest(*interval):
            boundaries = sorted({*boundaries, begin + 1})
    return _group(levels, boundaries, analytic, own_grid=False)


def all_plain(sigmas: Sequence[float]) -> Run:
    """A list of levels of which every call is a plain one of the base solver."""
    return Run(tuple(float(sigma) for sigma in sigmas), frozenset(range(len(sigmas) - 1)), False, own_grid=False)


def boundaries_of(calls: int, plain_last: bool) -> list[int]:
    """Where intervals begin and end in a list for `calls` calls: pairs from the end, what is left over first."""
    return sorted({0, calls, *range(calls - plain_last, -1, -2)})


def _group(levels: list[float], boundaries: list[int], analytic: bool, own_grid: bool) -> Run:
    """Intervals between the boundaries inside the list; what a cut leaves of an interval is plain."""
    last = len(levels) - 1
    points = sorted({0, last, *(i for i in boundaries if 0 <= i <= last)})
    plain = {n for n, (a, b) in enumerate(pairwise(points)) if b - a == 1 and not (n == 0 and analytic)}
    return Run(tuple(levels[i] for i in points), frozenset(plain), analytic, own_grid)
