"""The paper's predictor: about nine thousand weights that plan each interval."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from .config import R_MARGIN, PredictorConfig, at_guidance
from .features import LOOKS, MAPS, POOLED, Look
from .midpoints import PredictorPlanner, TablePredictor, neighbours_along, untrained_table
from .types import Solver, StepPlan

NOISE_CHANNELS = 8  # of the embedding of one noise level
ENCODED = 4  # what is left of the bottleneck


class AMEDPredictor(nn.Module):
    """Plan an interval from the features at its start and both its noise levels (Zhou et al., section 3.3).

    A `centred` one corrects the table `centre` ([guidances,] planned intervals, 3) instead of answering from
    nothing; before training its corrections are 0.
    """

    centre: Tensor

    def __init__(self, config: PredictorConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        inputs = ENCODED + 2 * NOISE_CHANNELS
        with torch.random.fork_rng(devices=()):  # layers draw from the global generator; `reset` draws again
            self.encode_1 = nn.Linear(MAPS[config.features] * POOLED * POOLED, config.hidden)
            self.encode_2 = nn.Linear(config.hidden, ENCODED)
            self.embed_noise = nn.Linear(NOISE_CHANNELS, NOISE_CHANNELS)
            self.head_r = nn.Linear(inputs, 1)
            self.head_scale_dir = nn.Linear(inputs, 1) if config.scale_dir else None
            self.head_scale_time = nn.Linear(inputs, 1) if config.scale_time else None
        if config.centred:
            self.register_buffer("centre", untrained_table(config))
        self.reset(generator or torch.Generator().manual_seed(0))

    def reset(self, generator: torch.Generator) -> None:
        """PyTorch's own initialisation of linear layers, drawn from `generator`."""
        with torch.no_grad():
            for layer in self.modules():
                if isinstance(layer, nn.Linear):
                    bound = layer.in_features**-0.5
                    layer.weight.uniform_(-bound, bound, generator=generator)
                    layer.bias.uniform_(-bound, bound, generator=generator)
            if self.config.centred:
                for head in (self.head_r, self.head_scale_dir, self.head_scale_time):
                    if head is not None:
                        head.weight.zero_()
                        head.bias.zero_()

    def forward(self, features: Tensor, levels: Tensor, centre: Tensor | None = None) -> StepPlan:
        """Plan from pooled `features` (batch, [maps,] 8, 8) and both levels' `embedding` (2, 8).

        `centre` (3,) is what a centred predictor corrects. r and scales are (batch, 1).
        """
        hidden = functional.silu(self.encode_1(features.flatten(1)))
        noise = functional.silu(self.embed_noise(levels)).flatten().expand(len(features), -1)
        joined = torch.cat([self.encode_2(hidden), noise], dim=1)
        if centre is not None:
            heads = (self.head_r, self.head_scale_dir, self.head_scale_time)
            corrected = [
                (c.expand(len(joined), 1) if head is None else c + head(joined)).clamp(low, high)
                for c, head, (low, high) in zip(centre, heads, self.config.bounds, strict=True)
            ]
            r, scale_dir, scale_time = corrected
            return StepPlan(r, scale_dir, scale_time, self.config.sigma_min)
        return StepPlan(
            r=self.head_r(joined).sigmoid().clamp(R_MARGIN, 1 - R_MARGIN),
            scale_dir=_around_one(self.head_scale_dir, joined, self.config.scale_dir),
            scale_time=_around_one(self.head_scale_time, joined, self.config.scale_time),
            sigma_floor=self.config.sigma_min,
        )

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
    ) -> "PredictorPlanner":
        """Use this predictor along the grid `sigmas`, or along its own.

        `plain` names other intervals without a midpoint than its own grid's; `look` finds the features
        where an evaluation alone does not show them. `guidance` is the cfg scale to plan for, if it knows several.
        """
        own = frozenset(range(self.config.planned, self.config.intervals))
        made_of = neighbours_along(self.config, sigmas)
        levels = embedding(self.config.sigmas).to(self.head_r.weight)
        look = LOOKS[self.config.features] if look is None else look
        centre = at_guidance(self.config, self.centre, guidance) if self.config.centred else None

        def plan(interval: int, features: Tensor) -> StepPlan:
            corrected = () if centre is None else (centre[interval],)
            planned: StepPlan = self(features.to(levels), levels[interval : interval + 2], *corrected)
            return planned

        return PredictorPlanner(plan, own if plain is None else plain, look, made_of)


def embedding(sigmas: Sequence[float]) -> Tensor:
    """Sinusoidal embedding (levels, 8) of sigma itself in float64, sines before cosines as in EDM's networks."""
    half = NOISE_CHANNELS // 2
    frequencies = (1 / 10000) ** (torch.arange(half, dtype=torch.float64) / (half - 1))
    angles = torch.tensor(sigmas, dtype=torch.float64)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _around_one(head: nn.Linear | None, joined: Tensor, width: float) -> Tensor | float:
    """A value in (1 - width, 1 + width)."""
    if head is None:
        return 1.0
    value: Tensor = 1 + width * (2 * head(joined).sigmoid() - 1)
    return value


def centred_on(
    table: TablePredictor, config: PredictorConfig, generator: torch.Generator | None = None
) -> AMEDPredictor:
    """A network that, before training, plans exactly as the table does."""
    network = AMEDPredictor(config, generator)
    network.centre.copy_(table.plans)
    return network
