"""How much a fit of multistep weights may cost: settings by effort and number of calls.

What was measured is in benchmarks/efforts.json. Few trajectories need a teacher that is only a little better than their
student; many deserve a better one.
"""

from dataclasses import replace
from typing import Literal, get_args

from .multistep_start import calls_to_begin, finishing_calls
from .protocol import FitConfig

Effort = Literal["quick", "standard", "thorough"]
EFFORTS: tuple[Effort, ...] = get_args(Effort)
MOST_CALLS: dict[Effort, int] = {"quick": 250, "standard": 2500, "thorough": 40_000}  # for each number of calls
FEW = 5  # calls, up to which an error is far above a short teacher's
ITERATION = 800  # sample calls of a standard fit's one iteration


def settings_of(effort: Effort, calls: int, uses: int = 1) -> FitConfig:
    """The settings of a fit for so many calls, which shares its teacher's paths with fits for other uses.

    Raises ValueError for an unknown effort.
    """
    if effort not in EFFORTS:
        raise ValueError(f"There is no effort {effort!r}. Choose one of: {', '.join(EFFORTS)}.")
    most = MOST_CALLS[effort]
    if effort == "thorough":
        own = FitConfig(96 if calls <= 3 else 64, 32, 8, iterations=8, budget=most, grids=30, few=8)
        return replace(own, finalists=3, plain_finalists=3, energy_calls=FEW, moves_grid=True)
    if effort == "quick":
        slow = 11 if calls < FEW else 12 if calls == FEW else 3 * calls  # what the energy of bands leaves
        own = FitConfig(8, 1, 8, teacher_calls=slow, iterations=1, budget=most, grids=4, few=8)
        own = replace(own, baselines=1, plain_finalists=1, finalists=1)
        return _affordable(own, calls, uses, most, least_grids=2)
    if calls <= FEW:
        own = FitConfig(16, 8, 4, iterations=2, budget=most, per_iteration=360, grids=8, finalists=3)
        own = replace(own, energy_calls=FEW)
    else:
        # Of many calls the errors are small, but for a few samples': trajectories count more than an iteration.
        slow = max(24, -(-5 * calls // 2))
        own = FitConfig(32, 4, 4, teacher_calls=slow, iterations=2, budget=most, per_iteration=300, grids=6)
        own = replace(own, finalists=1)
    own = replace(own, baselines=4, plain_finalists=1, few=4)
    return _affordable(own, calls, uses, most - ITERATION * (calls <= FEW), least_grids=4)


def of_images(settings: FitConfig) -> FitConfig:
    """The same for runs that start in the middle, where paths are short: from few trajectories of known paths."""
    few = min(8, settings.trajectories)
    grids, held_out = min(2, settings.grids), min(2, settings.held_out)
    own = replace(settings, baselines=1, plain_finalists=1, finalists=1, iterations=1, budget=0)
    return replace(own, trajectories=few, few=few, held_out=held_out, grids=grids)


def _affordable(wanted: FitConfig, calls: int, uses: int, most: int, least_grids: int) -> FitConfig:
    """The settings with fewer grids and then fewer trajectories, as far as the calls before an iteration demand it."""
    whole = wanted.few >= wanted.trajectories  # grids are tried on all
    for count in range(wanted.trajectories, 0, -1 if whole else -4):
        for grids in range(wanted.grids, least_grids - 1, -1):
            batch, few = (count, count) if whole else (wanted.batch_size, wanted.few)
            found = replace(wanted, trajectories=count, batch_size=batch, few=few, grids=grids)
            taught = found.teacher_calls * (count + found.held_out)
            own = calls_to_begin(found, calls, grids) + finishing_calls(found, calls)
            if own + taught / uses <= most:
                return found
    return found
