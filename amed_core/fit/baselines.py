"""Solvers that learn nothing, on the usual grids: what fits begin with and are compared with."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from ..config import switch_of
from ..driver import FixedMidpoint, NoMidpoint, analytic_first
from ..multistep import asked_at, coefficients
from ..schedules import SCHEDULES, USUAL_RHO, Schedule, arctan, on_levels, polynomial
from ..solvers import Dpm2, DpmSolverPP, Ipndm, restarted
from ..types import Method, Model, Solver

SPACINGS: dict[str, tuple[Schedule, float]] = {name: (made, USUAL_RHO[name]) for name, made in SCHEDULES.items()}
SPACINGS |= {"arctan": (arctan, 1.0), "uniform": (polynomial, 1.0)}


@dataclass(frozen=True)
class Baseline:
    """A solver on a grid, as `multistep.coefficients` writes it out."""

    name: str
    levels: tuple[float, ...]  # one per model call, and 0
    weights: Sequence[Sequence[float]]
    first_sigma: float = 0.0  # where a first step without a call leads to

    @property
    def solver(self) -> str:
        """The first word of its name."""
        return self.name.partition(" ")[0]


def solvers(flow: bool) -> dict[str, Solver]:
    """The solvers with one call per interval."""
    listed: dict[str, Solver] = {"euler": Ipndm(1)}
    listed |= {f"ipndm-{order}": Ipndm(order) for order in (2, 3, 4)}
    return listed | {f"dpmpp-{order}": DpmSolverPP(order, flow=flow) for order in (2, 3)}


def grids(
    calls: int, sigma_min: float, sigma_max: float, model_sigmas: Tensor | None = None
) -> Iterator[tuple[str, tuple[float, ...]]]:
    """Grids of `calls` intervals that end at 0: after sigma_min, as ComfyUI's own do, or in place of it.

    They come with their names. `model_sigmas` (levels,) are a discrete model's, without which a model may be outside
    of the discrete schedule's range.
    """
    for spacing, (schedule, rho) in SPACINGS.items():
        for points, ending in ((calls + 1, "zero"), (calls, "then zero")):
            if points < 2:
                continue
            try:
                levels = on_levels(schedule, model_sigmas)(points, sigma_min, sigma_max, rho).tolist()
            except ValueError:  # the discrete schedule covers other levels
                continue
            grid = (*levels[:calls], 0.0)
            if all(a > b for a, b in pairwise(grid)):  # not every schedule suits a start far below the model's highest
                yield f"{spacing} {ending}", grid


def baselines(
    calls: int,
    sigma_min: float,
    sigma_max: float,
    *,
    flow: bool = False,
    model_sigmas: Tensor | None = None,
    switch_sigma: float = 0.0,
) -> list[Baseline]:
    """Every unlearned solver on every usual grid in `calls` model calls.

    They restart where a second model answers, below `switch_sigma`. `model_sigmas` (levels,) are a discrete model's.
    """
    made = []
    for grid_name, grid in grids(calls, sigma_min, sigma_max, model_sigmas):
        listed = solvers(flow).items()
        made += [baseline(f"{name} {grid_name}", solver, grid, switch_sigma=switch_sigma) for name, solver in listed]
    if calls % 2 == 1 and not switch_sigma:  # the last call is plain; a switch may lie within two calls
        for grid_name, grid in grids(calls // 2 + 1, sigma_min, sigma_max, model_sigmas):
            halves = Method(grid, Dpm2(), FixedMidpoint(0.5, plain=frozenset({calls // 2})))
            made.append(Baseline(f"dpm_2 {grid_name}", *coefficients(halves)))
    return made


def baseline(
    name: str, solver: Solver, grid: Sequence[float], first_sigma: float = 0.0, switch_sigma: float = 0.0
) -> Baseline:
    """A solver on a grid, with one call per interval.

    It may begin after a first step without a call, and restart where a second model answers.
    """
    solver = restarted(solver, switch_of(grid, switch_sigma))
    _, weights = coefficients(Method(asked_at(grid, first_sigma), solver, NoMidpoint()))
    return Baseline(name, tuple(grid), weights, first_sigma)


def bench_methods(model: Model, calls: int) -> Iterator[Method]:
    """Every solver without a predictor, on every schedule and ending, with and without the analytic first step.

    A grid ends at sigma_min, as published, or at 0 in place of it, as ComfyUI's grids do. DPM-Solver++
    of order 1 is left out: with either prediction it is Euler's method.
    """
    one_call = solvers(flow=False) | {f"dpmpp-{order} noise": DpmSolverPP(order, "noise") for order in (2, 3)}
    for spacing in SCHEDULES:
        for end in ("sigma_min", "zero"):
            for analytic in (False, True):
                first = analytic_first if analytic else None
                label = f"{spacing}{' zero' * (end == 'zero')}{' analytic' * analytic}"
                if (grid := _spaced(model, spacing, calls + analytic, end)) is not None:
                    for name, solver in one_call.items():
                        yield Method(grid, solver, NoMidpoint(), first, f"{name} {label}")
                # Two calls in every interval but an analytic first one and one that ends at 0.
                intervals, odd = divmod(calls + analytic + (end == "zero"), 2)
                grid = None if odd else _spaced(model, spacing, intervals, end)
                if grid is not None:
                    plain = frozenset({intervals - 1} if end == "zero" else ())
                    for name, r in (("heun", 1.0), ("dpm_2", 0.5)):
                        yield Method(grid, Dpm2(), FixedMidpoint(r, plain=plain), first, f"{name} {label}")


def _spaced(model: Model, spacing: str, intervals: int, end: str) -> tuple[float, ...] | None:
    """The grid, or None for the discrete schedule of a model whose levels it does not cover."""
    made = on_levels(SCHEDULES[spacing], getattr(model, "sigmas", None))
    try:
        sigmas = made(intervals + 1, model.sigma_min, model.sigma_max, USUAL_RHO[spacing])
    except ValueError:
        if spacing != "discrete":
            raise
        return None
    return tuple(sigmas[:-1].tolist()) + ((0.0,) if end == "zero" else (float(sigmas[-1]),))
