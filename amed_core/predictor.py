"""The paper's predictor: about nine thousand weights that plan each interval, and the settings that go with them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import solvers
from .schedules import schedule
from .types import Evaluation, Features, Planner, Sigma, Solver, StepPlan

POOLED = 8  # the bottleneck is pooled to 8x8 at any resolution
NOISE_CHANNELS = 8  # of the embedding of one noise level
ENCODED = 4  # what is left of the bottleneck
R_MARGIN = 1e-4  # a saturated sigmoid would put the midpoint on an end, where multistep differences are 0 / 0


@dataclass(frozen=True)
class PredictorConfig:
    """Everything needed to rebuild and correctly use a predictor. It is the header of its file.

    Raises ValueError for settings that no sampler could follow.
    """

    solver: str  # a name in `solvers.SOLVERS`
    sigmas: tuple[float, ...]  # the grid it was made for, largest first; 0 may end it
    sigma_min: float  # the model's smallest level; the last midpoint is placed from it if the grid ends at 0
    sigma_max: float  # the model's largest level
    schedule: str = "polynomial"  # where the grid came from, and what other numbers of calls are derived from
    rho: float = 7.0
    analytic_first_step: bool = False
    plain_last: bool = False  # the last interval ends at 0 and is one plain call, whose answer is the sample
    max_order: int = 3  # of iPNDM and DPM-Solver++
    prediction: Literal["data", "noise"] = "data"  # of DPM-Solver++
    lower_order_final: bool = True  # of DPM-Solver++
    thresholding: bool = False  # of DPM-Solver++; for pixel models
    scale_dir: float = 0.0  # half-width of its range around 1; 0 removes the output
    scale_time: float = 0.0
    features: Literal["bottleneck", "none"] = "bottleneck"
    hidden: int = 128
    guidance: float = 1.0  # the cfg scale it was trained at
    model: Mapping[str, str | int | float] = field(default_factory=dict)  # fingerprint of the model it was made for

    def __post_init__(self) -> None:
        schedule(self.schedule)
        self.build_solver()
        grid = self.sigmas
        if len(grid) < 2:
            raise ValueError(f"A predictor needs a grid of at least 2 points (1 interval), but found {len(grid)}.")
        if not all(math.isfinite(s) for s in grid) or any(a <= b for a, b in pairwise(grid)):
            raise ValueError(f"The grid must fall from its first point to its last, but found {list(grid)}.")
        if not 0 < self.sigma_min < self.sigma_max or grid[-1] < 0:
            raise ValueError(
                f"Noise levels must be positive (only the last may be 0), but found sigma_min {self.sigma_min}, "
                f"sigma_max {self.sigma_max} and a grid that ends at {grid[-1]}."
            )
        if self.plain_last and (grid[-1] != 0 or len(grid) < 3):
            raise ValueError(
                f"A plain last interval needs a planned one before it and ends at 0, but found {list(grid)}."
            )
        for name in ("scale_dir", "scale_time"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is the half-width of a range around 1 in [0, 1), not {getattr(self, name)}.")
        if self.features not in ("bottleneck", "none"):
            raise ValueError(f'features is "bottleneck" or "none", but found {self.features!r}.')

    @property
    def intervals(self) -> int:
        """How many steps the sampler takes."""
        return len(self.sigmas) - 1

    @property
    def calls(self) -> int:
        """How many model calls those steps cost: two each, but one in an analytic first and in a plain last one."""
        return 2 * self.intervals - self.analytic_first_step - self.plain_last

    @property
    def planned(self) -> int:
        """How many of the intervals, from the first, have a midpoint."""
        return self.intervals - self.plain_last

    def build_solver(self) -> Solver:
        """The update rule these settings name."""
        if self.solver == "ipndm":
            return solvers.solver("ipndm", max_order=self.max_order)
        if self.solver == "dpmpp":
            return solvers.solver(
                "dpmpp",
                max_order=self.max_order,
                prediction=self.prediction,
                lower_order_final=self.lower_order_final,
                thresholding=self.thresholding,
            )
        return solvers.solver(self.solver)

    @classmethod
    def from_header(cls, header: Mapping[str, Any]) -> "PredictorConfig":
        """The inverse of `dataclasses.asdict` after JSON. Raises ValueError for unknown or missing settings."""
        known = {f.name for f in fields(cls)}
        if unknown := set(header) - known:
            raise ValueError(f"unknown settings {sorted(unknown)}: it was made by a newer version; update this pack")
        try:
            return cls(**{**header, "sigmas": tuple(header["sigmas"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"its settings are incomplete or of the wrong type ({error})") from error


class AMEDPredictor(nn.Module):
    """Plan an interval from the bottleneck at its start and both its noise levels (Zhou et al., section 3.3)."""

    def __init__(self, config: PredictorConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        inputs = ENCODED + 2 * NOISE_CHANNELS
        with torch.random.fork_rng(devices=()):  # layers draw from the global generator; `reset` draws again
            self.encode_1 = nn.Linear(POOLED * POOLED, config.hidden)
            self.encode_2 = nn.Linear(config.hidden, ENCODED)
            self.embed_noise = nn.Linear(NOISE_CHANNELS, NOISE_CHANNELS)
            self.head_r = nn.Linear(inputs, 1)
            self.head_scale_dir = nn.Linear(inputs, 1) if config.scale_dir else None
            self.head_scale_time = nn.Linear(inputs, 1) if config.scale_time else None
        self.reset(generator or torch.Generator().manual_seed(0))

    def reset(self, generator: torch.Generator) -> None:
        """PyTorch's own initialisation of linear layers, drawn from `generator`."""
        with torch.no_grad():
            for layer in self.modules():
                if isinstance(layer, nn.Linear):
                    bound = layer.in_features**-0.5
                    layer.weight.uniform_(-bound, bound, generator=generator)
                    layer.bias.uniform_(-bound, bound, generator=generator)

    def forward(self, features: Features, sigma: Sigma, sigma_next: Sigma) -> StepPlan:
        """Plan for pooled `features` (batch, 8, 8) and scalar noise levels; r and scales are (batch, 1)."""
        hidden = functional.silu(self.encode_1(features.flatten(1)))
        levels = [self._embed(s).expand(len(features), -1) for s in (sigma, sigma_next)]
        joined = torch.cat([self.encode_2(hidden), *levels], dim=1)
        return StepPlan(
            r=self.head_r(joined).sigmoid().clamp(R_MARGIN, 1 - R_MARGIN),
            scale_dir=_around_one(self.head_scale_dir, joined, self.config.scale_dir),
            scale_time=_around_one(self.head_scale_time, joined, self.config.scale_time),
            sigma_floor=self.config.sigma_min,
        )

    def _embed(self, sigma: Sigma) -> Tensor:
        """Sinusoidal embedding of sigma itself, its sines before its cosines as in EDM's networks."""
        weight = self.embed_noise.weight
        half = NOISE_CHANNELS // 2
        exponent = torch.arange(half, dtype=torch.float64, device=weight.device) / (half - 1)
        angles = sigma.to(weight.device, torch.float64).reshape(1, 1) * (1 / 10000) ** exponent
        embedded = torch.cat([angles.sin(), angles.cos()], dim=1).to(weight)
        return functional.silu(self.embed_noise(embedded))

    def planner(self, plain: frozenset[int] | None = None) -> Planner:
        """Use this predictor in a trajectory; `plain` names other intervals without a midpoint than its own grid's."""
        own = frozenset(range(self.config.planned, self.config.intervals))
        return PredictorPlanner(self, own if plain is None else plain)


@dataclass(frozen=True)
class PredictorPlanner:
    """Asks the predictor once per interval, and gives its plan the shape and dtype of the sample."""

    predictor: AMEDPredictor
    plain: frozenset[int] = frozenset()

    def updates(self, interval: int) -> Literal[1, 2]:
        return 1 if interval in self.plain else 2

    def __call__(self, start: Evaluation, sigma_next: Sigma, interval: int) -> StepPlan | None:
        return None if interval in self.plain else self.plan(start, sigma_next)

    def plan(self, start: Evaluation, sigma_next: Sigma) -> StepPlan:
        """The plan of a planned interval."""
        config, weight = self.predictor.config, self.predictor.head_r.weight
        batch = start.x.shape[0]
        if config.features == "none" or start.analytic:  # no model was asked: the published code feeds zeros
            features = weight.new_zeros(batch, POOLED, POOLED)
        elif start.features is None:
            raise ValueError(
                "This predictor reads the model's bottleneck, but the model gave none. Train a predictor on this "
                'model, with features set to "none".'
            )
        else:
            features = pool(start.features.to(weight))
        plan = self.predictor(features, start.sigma, sigma_next)

        def shaped(value: Tensor | float) -> Tensor | float:
            if isinstance(value, float):
                return value
            return value.to(start.x).reshape(-1, *[1] * (start.x.ndim - 1))

        return StepPlan(shaped(plan.r), shaped(plan.scale_dir), shaped(plan.scale_time), plan.sigma_floor)


def pool(features: Tensor) -> Features:
    """Average a bottleneck to (batch, 8, 8): from (batch, height, width), or raw (batch, channels, [frames,] h, w)."""
    if features.ndim >= 4:
        features = features.mean(1)
    if features.ndim == 4:  # video: frames are averaged, too
        features = features.mean(1)
    if features.ndim != 3:
        raise ValueError(
            "Bottleneck features must be (batch, height, width) or (batch, channels, height, width), "
            f"but the model gave {tuple(features.shape)}."
        )
    return functional.adaptive_avg_pool2d(features, POOLED)


def _around_one(head: nn.Linear | None, joined: Tensor, width: float) -> Tensor | float:
    """A value in (1 - width, 1 + width)."""
    if head is None:
        return 1.0
    value: Tensor = 1 + width * (2 * head(joined).sigmoid() - 1)
    return value
