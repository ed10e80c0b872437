"""The paper's predictor: about nine thousand weights that plan each interval, and the settings that go with them."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from . import solvers
from .driver import First, analytic_first, analytic_first_flow
from .schedules import refuse_unknown
from .types import Evaluation, Features, Planner, Sample, Sigma, Solver, StepPlan

POOLED = 8  # what the predictor looks at is pooled to 8x8 at any resolution
MAPS = {"bottleneck": 1, "latent": 2, "none": 1}  # of 8x8, per kind of features
NOISE_CHANNELS = 8  # of the embedding of one noise level
ENCODED = 4  # what is left of the bottleneck
Look = Callable[[Evaluation], Tensor]  # what the predictor sees of an interval's start: (batch or 1, [maps,] 8, 8)
LONGEST_TEXT, MOST_FACTS, LARGEST_FACT = 200, 32, 1e12  # of the fingerprint in a file
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
    flow: bool = False  # the model's x is (1 - sigma) x0 + sigma noise, else x0 + sigma noise
    scale_dir: float = 0.0  # half-width of its range around 1; 0 removes the output
    scale_time: float = 0.0
    features: Literal["bottleneck", "latent", "none"] = "bottleneck"  # what the predictor looks at
    hidden: int = 128
    # The paper's network, constants for every interval, or the weights of a multistep method (multistep.py).
    kind: Literal["network", "table", "multistep"] = "network"
    # Of a multistep table (spectrum.py): the level that a first step without a call leads to, for samples of so many
    # channels, or 0 and 0; whether it weighs bands of frequency apart; whether it has weights for what guidance adds.
    first_sigma: float = 0.0
    channels: int = 0
    spectral: bool = False
    guided: bool = False
    # Of a multistep table: the noise level below which a second model answers, maybe in a run of its own, so that its
    # steps know nothing of what the first one answered; 0 if there is but one model.
    switch_sigma: float = 0.0
    centred: bool = False  # the network's answers are corrections of a table that it carries
    guidance: float = 1.0  # the cfg scale it was trained at
    guidances: tuple[float, ...] = ()  # of a table that was fitted at several, rising; between them it interpolates
    model: Mapping[str, str | int | float] = field(default_factory=dict)  # fingerprint of the model it was made for

    def __post_init__(self) -> None:
        refuse_unknown(self.schedule)
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
        if self.kind not in ("network", "table", "multistep"):
            raise ValueError(f'kind is "network", "table" or "multistep", but found {self.kind!r}.')
        self._check_multistep()
        if self.features not in MAPS:
            raise ValueError(f"features is one of {', '.join(MAPS)}, but found {self.features!r}.")
        if self.guidances and (len(self.guidances) < 2 or any(a >= b for a, b in pairwise(self.guidances))):
            raise ValueError(f"Several guidance scales must rise, but found {list(self.guidances)}.")
        if self.guidances and self.kind == "network" and not self.centred:
            raise ValueError("The paper's network knows one guidance scale. Fit a table for several.")
        if self.flow and grid[0] > 1 + 1e-6:
            raise ValueError(f"The noise levels of a flow model end at 1, but the grid begins at {grid[0]}.")

    def _check_multistep(self) -> None:
        """What only multistep tables have, and what they cannot have."""
        grid = self.sigmas
        if self.kind == "multistep" and (grid[-1] != 0 or self.analytic_first_step or self.plain_last):
            raise ValueError(
                f"A multistep predictor calls the model once per interval and ends at 0, not {list(grid)}."
            )
        if bool(self.first_sigma) != bool(self.channels) or not 0 <= self.first_sigma < grid[0]:
            raise ValueError(
                f"A first step without a call leads from {grid[0]} to a lower level, for samples of some channels, but "
                f"found {self.first_sigma} and {self.channels}."
            )
        if (self.first_sigma or self.spectral or self.guided or self.switch_sigma) and self.kind != "multistep":
            raise ValueError(
                "Only a multistep predictor has a learned first step, weights for bands or guidance, or a second model."
            )
        if not 0 <= self.switch_sigma < grid[0] or (self.switch_sigma and self.first_sigma):
            raise ValueError(
                f"A second model takes over below {grid[0]}, after a first step that asks the first one, but found "
                f"switch_sigma {self.switch_sigma} and first_sigma {self.first_sigma}."
            )
        if self.first_sigma and self.first_sigma <= grid[1]:
            raise ValueError(f"The first step must not lead beyond the first interval, {grid[0]} to {grid[1]}.")

    @property
    def switch(self) -> int:
        """The first interval that the second model begins; 0 if one model answers all calls."""
        return switch_of(self.sigmas, self.switch_sigma)

    @property
    def intervals(self) -> int:
        """How many steps the sampler takes."""
        return len(self.sigmas) - 1

    @property
    def calls(self) -> int:
        """How many model calls those steps cost: two each, but one in an analytic first and in a plain last one.

        A multistep predictor takes one for each.
        """
        if self.kind == "multistep":
            return self.intervals
        return 2 * self.intervals - self.analytic_first_step - self.plain_last

    @property
    def planned(self) -> int:
        """How many of the intervals, from the first, have a midpoint."""
        return 0 if self.kind == "multistep" else self.intervals - self.plain_last

    @property
    def first(self) -> First | None:
        """The evaluation that stands in for the first model call, if there is one."""
        if not self.analytic_first_step:
            return None
        return analytic_first_flow if self.flow else analytic_first

    @property
    def bounds(self) -> tuple[tuple[float, float], tuple[float, float], tuple[float, float]]:
        """The lowest and the highest r, scale_dir and scale_time of a table.

        r may be 0, which asks the model at the interval's start again, where no update divides by it.
        """
        lowest = 0.0 if self.solver in ("amed", "euler", "ipndm") else 100 * R_MARGIN
        scales = [(1 - width, 1 + width) for width in (self.scale_dir, self.scale_time)]
        return (lowest, 1 - R_MARGIN), scales[0], scales[1]

    def build_solver(self) -> Solver:
        """The update rule these settings name; for a multistep predictor, the one that it takes on other grids."""
        if self.solver == "ipndm":
            return solvers.solver("ipndm", max_order=self.max_order)
        if self.solver == "dpmpp":
            return solvers.solver(
                "dpmpp",
                max_order=self.max_order,
                prediction=self.prediction,
                lower_order_final=self.lower_order_final,
                thresholding=self.thresholding,
                flow=self.flow,
            )
        return solvers.solver(self.solver)

    @classmethod
    def from_header(cls, header: Mapping[str, Any]) -> "PredictorConfig":
        """The inverse of `dataclasses.asdict` after JSON. Raises ValueError for unknown or missing settings."""
        known = {f.name for f in fields(cls)}
        if unknown := set(header) - known:
            raise ValueError(f"unknown settings {sorted(unknown)}: it was made by a newer version; update this pack")
        try:
            lists = {name: tuple(header.get(name, ())) for name in ("sigmas", "guidances")}
            return cls(**{**header, **lists, "model": plain_facts(header.get("model", {}))})
        except (KeyError, TypeError) as error:
            raise ValueError(f"its settings are incomplete or of the wrong type ({error})") from error


def switch_of(sigmas: Sequence[float], switch_sigma: float) -> int:
    """The first interval of a grid at whose start a second model answers, which is asked below a level; 0 if none."""
    above = sum(sigma >= switch_sigma for sigma in sigmas[:-1])
    return above if switch_sigma and above < len(sigmas) - 1 else 0


def plain_text(text: str, longest: int | None = LONGEST_TEXT) -> str:
    """A text of letters, digits, spaces and `_.,+()-`, which no program takes for anything else; cut if too long."""
    return re.sub(r"[^\w .,+()-]", "", text)[:longest]


def plain_facts(facts: Any) -> dict[str, str | int | float]:
    """A fingerprint that a file brought: finite numbers, and texts that are shown to people and so made plain.

    Raises ValueError for anything else.
    """
    if not isinstance(facts, Mapping) or len(facts) > MOST_FACTS:
        raise ValueError(f"model must hold at most {MOST_FACTS} facts by name")
    plain: dict[str, str | int | float] = {}
    for name, value in facts.items():
        if not re.fullmatch(r"[A-Za-z_]{1,40}", str(name)):
            raise ValueError("model holds a fact whose name is no name")
        if isinstance(value, str):
            plain[name] = plain_text(value)
        elif isinstance(value, (int, float)) and abs(value) < LARGEST_FACT:  # NaN is not
            plain[name] = value
        else:
            raise ValueError(f"model holds something else than a text or a usual number as {name}")
    return plain


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


def untrained_table(config: PredictorConfig) -> Tensor:
    """The base solver with its midpoints at r = 0.5 as a table ([guidances,] planned intervals, 3)."""
    table = torch.tensor([[0.5, 1.0, 1.0]]).repeat(config.planned, 1)
    return table.repeat(len(config.guidances), 1, 1) if config.guidances else table


def at_guidance(config: PredictorConfig, table: Tensor, guidance: float | None) -> Tensor:
    """A table (planned intervals, 3) for one cfg scale: linear between those it was fitted at, constant outside."""
    if not config.guidances:
        return table
    wanted = config.guidance if guidance is None else guidance
    position = float(np.interp(wanted, config.guidances, range(len(config.guidances))))
    low = min(int(position), len(config.guidances) - 2)
    return torch.lerp(table[low], table[low + 1], position - low)


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


def embedding(sigmas: Sequence[float]) -> Tensor:
    """Sinusoidal embedding (levels, 8) of sigma itself in float64, sines before cosines as in EDM's networks."""
    half = NOISE_CHANNELS // 2
    frequencies = (1 / 10000) ** (torch.arange(half, dtype=torch.float64) / (half - 1))
    angles = torch.tensor(sigmas, dtype=torch.float64)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def look_at_bottleneck(start: Evaluation) -> Tensor:
    """The U-Net's bottleneck (batch, 8, 8), as in the paper; zeros where no model was asked, as in its code."""
    if start.analytic:
        return start.x.new_zeros(len(start.x), POOLED, POOLED)
    if start.features is None:
        raise ValueError(
            "This predictor reads the model's bottleneck, but the model gave none. Train a predictor on this "
            'model, with features set to "latent".'
        )
    return pool(start.features)


def look_at_latent(start: Evaluation) -> Tensor:
    """The sample, at unit scale, and its denoised version (batch, 2, 8, 8): every model has both."""
    x = start.x / (1 + start.sigma**2).sqrt()
    return torch.stack([pooled_latent(x), pooled_latent(start.denoised)], dim=1)


def look_at_none(start: Evaluation) -> Tensor:
    """Nothing (1, 8, 8): the plan depends on the interval alone, and is the same for all samples."""
    return start.x.new_zeros(1, POOLED, POOLED)


LOOKS: dict[str, Look] = {"bottleneck": look_at_bottleneck, "latent": look_at_latent, "none": look_at_none}


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


def pooled_latent(x: Sample) -> Features:
    """Average a latent of any rank to (batch, 8, 8): images, video (over its frames) and audio (in 64 pieces)."""
    if x.ndim >= 4:
        return pool(x)
    pieces: Tensor = functional.adaptive_avg_pool1d(x.reshape(len(x), -1, x.shape[-1]).mean(1, True), POOLED**2)
    return pieces.reshape(len(x), POOLED, POOLED)


def _around_one(head: nn.Linear | None, joined: Tensor, width: float) -> Tensor | float:
    """A value in (1 - width, 1 + width)."""
    if head is None:
        return 1.0
    value: Tensor = 1 + width * (2 * head(joined).sigmoid() - 1)
    return value
