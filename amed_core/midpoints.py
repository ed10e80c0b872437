"""A predictor without a network: one plan per interval for all samples."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from .config import PredictorConfig, at_guidance
from .features import Look, look_at_none
from .types import Evaluation, Planner, Sigma, Solver, StepPlan

COLUMNS = ("r", "scale_dir", "scale_time")


def untrained_table(config: PredictorConfig) -> Tensor:
    """The base solver with its midpoints at r = 0.5 as a table ([guidances,] planned intervals, 3)."""
    table = torch.tensor([[0.5, 1.0, 1.0]]).repeat(config.planned, 1)
    return table.repeat(len(config.guidances), 1, 1) if config.guidances else table


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
        return 1 if interval in self.plain else 2

    def __call__(self, start: Evaluation, sigma_next: Sigma, interval: int) -> StepPlan | None:
        del sigma_next
        return None if interval in self.plain else self.plan(start, interval)

    def plan(self, start: Evaluation, interval: int) -> StepPlan:
        """The plan of a planned interval."""
        features = self.look(start)
        plans = [(weight, self.own(k, features)) for weight, k in self.made_of[interval]]

        def blended(name: str) -> Tensor | float:
            values = [getattr(plan, name) for _, plan in plans]
            if not isinstance(values[0], Tensor):  # the same in every interval
                return float(values[0])
            value = values[0] if len(plans) == 1 else sum(w * v for (w, _), v in zip(plans, values, strict=True))
            return value.to(start.x).reshape(-1, *[1] * (start.x.ndim - 1))

        return StepPlan(blended("r"), blended("scale_dir"), blended("scale_time"), plans[0][1].sigma_floor)


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


def neighbours_along(config: PredictorConfig, sigmas: Sequence[float] = ()) -> tuple[Neighbours, ...]:
    """The same for every interval of a grid; of its own grid if there is none."""
    return tuple(neighbours(config, *interval) for interval in pairwise(tuple(sigmas or config.sigmas)))


def longest(config: PredictorConfig, sigma: float, sigma_next: float) -> float:
    """How long, in ln(sigma), the predictor's own intervals are where this one lies."""
    own = list(pairwise(config.sigmas))
    return sum(weight * _length(config, *own[k]) for weight, k in neighbours(config, sigma, sigma_next))


def _centre(config: PredictorConfig, sigma: float, sigma_next: float) -> float:
    return (math.log(sigma) + math.log(max(sigma_next, config.sigma_min))) / 2


def _length(config: PredictorConfig, sigma: float, sigma_next: float) -> float:
    return math.log(sigma) - math.log(max(sigma_next, config.sigma_min))


class TablePredictor(nn.Module):
    """`plans` ([guidances,] planned intervals, 3): r, scale_dir and scale_time of every planned interval."""

    def __init__(self, config: PredictorConfig) -> None:
        super().__init__()
        self.config = config
        self.plans = nn.Parameter(untrained_table(config), requires_grad=False)

    def solver(self, sigmas: Sequence[float] = (), guidance: float | None = None) -> Solver:
        """The update rule, the same on every grid."""
        del sigmas, guidance
        return self.config.build_solver()

    def planner(
        self,
        sigmas: Sequence[float] = (),
        plain: frozenset[int] | None = None,
        look: Look | None = None,
        guidance: float | None = None,
    ) -> PredictorPlanner:
        """Use this table along the grid `sigmas`, or along its own; `plain` names intervals without a midpoint.

        `guidance` is the cfg scale to plan for, if it was fitted at several.
        """
        del look
        own = frozenset(range(self.config.planned, self.config.intervals))
        plans = at_guidance(self.config, self.plans, guidance)

        def plan(interval: int, features: Tensor) -> StepPlan:
            del features
            r, scale_dir, scale_time = plans[interval].reshape(3, 1, 1)
            return StepPlan(r, scale_dir, scale_time, self.config.sigma_min)

        made_of = neighbours_along(self.config, sigmas)
        return PredictorPlanner(plan, own if plain is None else plain, look_at_none, made_of)


def table_config(config: PredictorConfig, scale_dir: float = 0.5, scale_time: float = 0.5) -> PredictorConfig:
    """The settings of a table in place of a network, with wider ranges than the paper's."""
    return replace(config, kind="table", features="none", scale_dir=scale_dir, scale_time=scale_time)


def centred_config(table: PredictorConfig, features: Literal["bottleneck", "latent", "none"]) -> PredictorConfig:
    """The settings of a network that corrects such a table, sample by sample."""
    return replace(table, kind="network", features=features, centred=True)
