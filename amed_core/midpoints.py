"""A predictor without a network: one plan per interval for all samples."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from .multistep import MultistepTable
from .predictor import (
    AMEDPredictor,
    Look,
    PredictorConfig,
    PredictorPlanner,
    at_guidance,
    look_at_none,
    neighbours_along,
    untrained_table,
)
from .types import Solver, StepPlan

COLUMNS = ("r", "scale_dir", "scale_time")


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


AnyPredictor = AMEDPredictor | TablePredictor | MultistepTable


def build(config: PredictorConfig, generator: torch.Generator | None = None) -> AnyPredictor:
    """The predictor of these settings, not trained; the generator draws a network's weights."""
    if config.kind == "multistep":
        return MultistepTable(config)
    return TablePredictor(config) if config.kind == "table" else AMEDPredictor(config, generator)


def table_config(config: PredictorConfig, scale_dir: float = 0.5, scale_time: float = 0.5) -> PredictorConfig:
    """The settings of a table in place of a network, with wider ranges than the paper's."""
    return replace(config, kind="table", features="none", scale_dir=scale_dir, scale_time=scale_time)


def centred_config(table: PredictorConfig, features: Literal["bottleneck", "latent", "none"]) -> PredictorConfig:
    """The settings of a network that corrects such a table, sample by sample."""
    return replace(table, kind="network", features=features, centred=True)


def centred_on(
    table: TablePredictor, config: PredictorConfig, generator: torch.Generator | None = None
) -> AMEDPredictor:
    """A network that, before training, plans exactly as the table does."""
    network = AMEDPredictor(config, generator)
    network.centre.copy_(table.plans)
    return network
