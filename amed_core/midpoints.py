"""Plans of midpoints: which plan serves which interval, and a table with one plan per interval for all samples."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from .config import PredictorConfig, at_guidance
from .features import MAPS, POOLED, Look, look_at_none
from .types import COLUMNS, Evaluation, Method, Planner, Run, Sigma, StepPlan

UNTRAINED = (0.5, 1.0, 1.0)  # of every column


def plans_text(config: PredictorConfig, planner: "PredictorPlanner") -> str:
    """The plan of every planned interval, as it is without features, to read."""
    lines = ["plan of every planned interval, as it is without features:"]
    blind = torch.zeros(1, MAPS[config.features], POOLED, POOLED)
    for interval, (start, end) in enumerate(list(pairwise(config.sigmas))[: config.planned]):
        plan = planner.own(interval, blind).detach()
        sigma = float(plan.midpoint(torch.tensor(start), torch.tensor(end)))
        values = ", ".join(f"{name} {float(getattr(plan, name)):.4f}" for name in COLUMNS)
        lines.append(f"  {start:.4g} to {end:.4g}: {values}, the midpoint at sigma {sigma:.4g}")
    return "\n".join(lines)


@dataclass(frozen=True)
class PredictorPlanner(Planner):
    """Asks the predictor once per interval, and gives its plan the shape and dtype of the sample.

    It knows beforehand which of its own intervals each interval of the run resembles, so that planning
    never waits for a GPU.
    """

    own: Callable[[int, Tensor], StepPlan]  # the plan of one of the predictor's own intervals, from what it sees
    plain: frozenset[int]
    look: Look
    made_of: tuple["Neighbours", ...]  # per interval of the run

    def updates(self, interval: int) -> Literal[1, 2]:
        """One in plain intervals, else two."""
        return 1 if interval in self.plain else 2

    def __call__(self, start: Evaluation, sigma_next: Sigma, interval: int) -> StepPlan | None:
        del sigma_next
        return None if interval in self.plain else self.plan(start, interval)

    def plan(self, start: Evaluation, interval: int) -> StepPlan:
        """The plan of a planned interval, in numbers (batch or 1, 1, ..., 1) of the sample's dtype."""
        features = self.look(start)
        plans = [(weight, self.own(k, features)) for weight, k in self.made_of[interval]]

        def blended(name: str) -> Tensor | float:
            """A column of the plan: its mean over neighbours, by their weights."""
            values = [getattr(plan, name) for _, plan in plans]
            if not isinstance(values[0], Tensor):  # the same in every interval
                return float(values[0])
            value = values[0] if len(plans) == 1 else sum(w * v for (w, _), v in zip(plans, values, strict=True))
            return value.to(start.x).reshape(-1, *[1] * (start.x.ndim - 1))

        return StepPlan(**{name: blended(name) for name in COLUMNS}, sigma_floor=plans[0][1].sigma_floor)


Neighbours = tuple[tuple[float, int], ...]  # weights, summing to 1, and numbers of a predictor's own intervals


def neighbours(config: PredictorConfig, sigma: float, sigma_next: float) -> Neighbours:
    """Of which of its own intervals a predictor makes the plan of any other.

    Its network was only ever asked at its own grid points, and in between it may answer anything. So
    another interval gets a mean of the plans of the two whose centres in ln(sigma) enclose its own.
    """
    centres = [_centre(config, *interval) for interval in pairwise(config.sigmas)][: config.planned]
    centre = _centre(config, sigma, sigma_next)
    position = float(np.interp(-centre, [-c for c in centres], range(len(centres))))  # interp wants them to rise
    low, part = int(position), position % 1
    if min(part, 1 - part) < 1e-3:  # its own interval, but for rounding
        return ((1.0, round(position)),)
    return ((1 - part, low), (part, low + 1))


def planner_of(
    config: PredictorConfig, run: Run | None, own: Callable[[int, Tensor], StepPlan], look: Look
) -> PredictorPlanner:
    """The planner of a run, or of a predictor's own grid, that blends the plans of its `own` intervals.

    `own` plans interval k from what `look` sees, (batch or 1, [maps,] 8, 8).
    """
    sigmas = config.sigmas if run is None else run.sigmas
    plain = frozenset(range(config.planned, config.intervals)) if run is None else run.plain
    return PredictorPlanner(own, plain, look, tuple(neighbours(config, *interval) for interval in pairwise(sigmas)))


def length(config: PredictorConfig, sigma: float, sigma_next: float) -> float:
    """How long an interval is, in ln(sigma), and down to the model's smallest level."""
    return math.log(sigma) - math.log(max(sigma_next, config.sigma_min))


def longest(config: PredictorConfig, sigma: float, sigma_next: float) -> float:
    """How long, in ln(sigma), the predictor's own intervals are where this one lies."""
    own = list(pairwise(config.sigmas))
    return sum(weight * length(config, *own[k]) for weight, k in neighbours(config, sigma, sigma_next))


def _centre(config: PredictorConfig, sigma: float, sigma_next: float) -> float:
    return (math.log(sigma) + math.log(max(sigma_next, config.sigma_min))) / 2


class MidpointTable(nn.Module):
    """`plans` ([guidances,] planned intervals, 3): r, scale_dir and scale_time of every planned interval.

    All samples share them. Before any fit the midpoints are at r = 0.5, and nothing is scaled.
    """

    def __init__(self, config: PredictorConfig) -> None:
        super().__init__()
        self.config = config
        several = (len(config.guidances),) if config.guidances else ()
        self.plans = nn.Parameter(torch.empty(*several, config.planned, len(COLUMNS)), requires_grad=False)
        if not self.plans.is_meta:  # those have a shape, and no numbers
            self.plans.copy_(torch.tensor(UNTRAINED))

    def planner(self, run: Run | None = None, *, guidance: float | None = None) -> PredictorPlanner:
        """The plans along a run, or along its own grid."""
        plans = at_guidance(self.config, self.plans, guidance)

        def plan(interval: int, features: Tensor) -> StepPlan:
            del features
            columns = dict(zip(COLUMNS, plans[interval].reshape(-1, 1, 1), strict=True))
            return StepPlan(**columns, sigma_floor=self.config.sigma_min)

        return planner_of(self.config, run, plan, look_at_none)

    def method(self, run: Run | None = None, *, guidance: float | None = None, look: Look | None = None) -> Method:
        """How it samples a run, or its own grid. `guidance` is the cfg scale, if it was fitted at several."""
        del look
        grid = self.config.sigmas if run is None else run.sigmas
        planner = self.planner(run, guidance=guidance)
        return Method(grid, self.config.build_solver(), planner, self.config.first(run))

    def text(self) -> str:
        """What it learned, to read."""
        return plans_text(self.config, self.planner())
