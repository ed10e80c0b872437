"""The paper's predictor: about nine thousand weights that plan each interval."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from .config import R_MARGIN, PredictorConfig
from .features import LOOKS, MAPS, POOLED, Look
from .midpoints import PredictorPlanner, planner_of, plans_text
from .types import Method, Run, StepPlan

NOISE_CHANNELS = 8  # of the embedding of one noise level
ENCODED = 4  # what is left of the bottleneck


class AMEDPredictor(nn.Module):
    """Plan an interval from the features at its start and both its noise levels (Zhou et al., section 3.3)."""

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
        if not self.head_r.weight.is_meta:  # those have names and shapes, and no numbers
            self.reset(generator or torch.Generator().manual_seed(0))

    def reset(self, generator: torch.Generator) -> None:
        """PyTorch's own initialisation of linear layers, within 1 / sqrt(inputs), drawn from `generator`."""
        with torch.no_grad():
            for layer in self.modules():
                if isinstance(layer, nn.Linear):
                    bound = layer.in_features**-0.5
                    layer.weight.uniform_(-bound, bound, generator=generator)
                    layer.bias.uniform_(-bound, bound, generator=generator)

    def forward(self, features: Tensor, levels: Tensor) -> StepPlan:
        """Plan from pooled `features` (batch, [maps,] 8, 8) and both levels' `embedding` (2, 8).

        r and scales are (batch, 1).
        """
        hidden = functional.silu(self.encode_1(features.flatten(1)))
        noise = functional.silu(self.embed_noise(levels)).flatten().expand(len(features), -1)
        joined = torch.cat([self.encode_2(hidden), noise], dim=1)
        return StepPlan(
            r=self.head_r(joined).sigmoid().clamp(R_MARGIN, 1 - R_MARGIN),
            scale_dir=_around_one(self.head_scale_dir, joined, self.config.scale_dir),
            scale_time=_around_one(self.head_scale_time, joined, self.config.scale_time),
            sigma_floor=self.config.sigma_min,
        )

    def planner(self, run: Run | None = None, *, look: Look | None = None) -> PredictorPlanner:
        """Plans along a run, or along its own grid.

        `look` finds the features where an evaluation alone does not show them.
        """
        levels = embedding(self.config.sigmas).to(self.head_r.weight)

        def plan(interval: int, features: Tensor) -> StepPlan:
            planned: StepPlan = self(features.to(levels), levels[interval : interval + 2])
            return planned

        return planner_of(self.config, run, plan, LOOKS[self.config.features] if look is None else look)

    def method(self, run: Run | None = None, *, guidance: float | None = None, look: Look | None = None) -> Method:
        """How it samples a run, or its own grid."""
        del guidance
        grid = self.config.sigmas if run is None else run.sigmas
        return Method(grid, self.config.build_solver(), self.planner(run, look=look), self.config.first(run))

    def text(self) -> str:
        """What it learned, to read."""
        return plans_text(self.config, self.planner())


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
