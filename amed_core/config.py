"""The settings of a predictor: the header of its file."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

from . import solvers
from .driver import FixedMidpoint, NoMidpoint, analytic_first, analytic_first_flow
from .features import MAPS
from .schedules import SEARCHED, schedule
from .types import First, Method, Run, Solver

LONGEST_TEXT, MOST_FACTS, LARGEST_NUMBER, LARGEST_WEIGHT = 200, 32, 1e12, 1e4  # in a file
MOST_LEVELS, MOST_GUIDANCES, MOST_UNITS, MOST_CHANNELS = 1000, 64, 4096, 4096  # of one predictor
TOLERANCE = 5e-3  # relative, of levels: lists arrive rounded to float32, or to half precision
NOISE = 1e-3  # relative, below the model's highest level: where a start is pure noise
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
    # Of a guided one: the intervals whose calls ask the negative, rising; none are all. The others are one pass each.
    negatives: tuple[int, ...] = ()
    # Of a multistep table: the noise level below which a second model answers, maybe in a run of its own, so that its
    # steps know nothing of what the first one answered; 0 if there is but one model.
    switch_sigma: float = 0.0
    guidance: float = 1.0  # the cfg scale it was trained at
    guidances: tuple[float, ...] = ()  # of a table that was fitted at several, rising; between them it interpolates
    model: Mapping[str, str | int | float] = field(default_factory=dict)  # fingerprint of the model it was made for

    def __post_init__(self) -> None:
        if self.schedule != SEARCHED:
            schedule(self.schedule)  # raises for an unknown name
        self.build_solver()
        self._check_sizes()
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
        if self.guidances and self.kind == "network":
            raise ValueError("The paper's network knows one guidance scale. Fit a table for several.")
        if self.flow and grid[0] > 1 + 1e-6:
            raise ValueError(f"The noise levels of a flow model end at 1, but the grid begins at {grid[0]}.")

    def _check_sizes(self) -> None:
        """How large a predictor may be: more than any of use, and little enough for every computer."""
        for what, found, most in (
            ("noise levels", len(self.sigmas), MOST_LEVELS),
            ("guidance scales", len(self.guidances), MOST_GUIDANCES),
            ("channels", self.channels, MOST_CHANNELS),
            ("hidden units", self.hidden, MOST_UNITS),
        ):
            if found > most:
                raise ValueError(f"A predictor has at most {most:,} {what}, but found {found:,}.")
        if self.hidden < 1 or self.channels < 0:
            raise ValueError(f"hidden is at least 1 and channels 0, but found {self.hidden} and {self.channels}.")

    def _check_multistep(self) -> None:
        """What only multistep tables have, and what they cannot have."""
        grid = self.sigmas
        if self.kind == "multistep" and (self.analytic_first_step or self.plain_last):
            raise ValueError("A multistep predictor calls the model once per interval, the first and the last, too.")
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

        known = range(self.intervals)
        if any(a >= b for a, b in pairwise(self.negatives)) or any(k not in known for k in self.negatives):
            raise ValueError(
                f"Intervals that ask the negative rise, from 0 to {self.intervals - 1} at most, but found "
                f"{list(self.negatives)}."
            )
        if self.negatives and not self.guided:
            raise ValueError("Only a predictor with weights for what guidance adds can leave out the negative.")

    @property
    def switch(self) -> int:
        """The number of the first interval that the second model begins; 0 if one model answers all calls."""
        return switch_of(self.sigmas, self.switch_sigma)

    @property
    def from_noise(self) -> bool:
        """Whether runs start at the model's highest level, where it has next to nothing to say."""
        return self.sigmas[0] >= (1 - NOISE) * self.sigma_max

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
    def asking(self) -> tuple[int, ...]:
        """The intervals of a multistep predictor whose calls ask the negative."""
        return self.negatives or tuple(range(self.intervals))

    @property
    def passes(self) -> int:
        """How many passes of the network the calls cost: two each under guidance, but one where no negative is asked.

        Guidance is plain classifier-free guidance here, at a scale other than 1; other kinds may take more.
        """
        if self.guidance == 1 and not self.guidances:
            return self.calls
        return self.calls + (len(self.negatives) or self.calls)

    @property
    def planned(self) -> int:
        """How many of the intervals, from the first, have a midpoint."""
        return 0 if self.kind == "multistep" else self.intervals - self.plain_last

    def first(self, run: Run | None = None) -> First | None:
        """The evaluation that stands in for the first model call of a run, or of its own grid, if there is one."""
        if not (self if run is None else run).analytic_first_step:
            return None
        return analytic_first_flow if self.flow else analytic_first

    def begins_at(self, sigmas: Sequence[float]) -> int | None:
        """The interval that a list of levels begins with as this grid goes on: 0, or a second model's; else None."""
        begins = dict.fromkeys((0, self.switch))
        return next((k for k in begins if same_levels(sigmas, self.sigmas[k : k + len(sigmas)])), None)

    def base_method(self) -> Method:
        """The base solver at the same model calls: its midpoints at r = 0.5, or iPNDM in place of learned weights."""
        if self.kind == "multistep":
            return Method(self.sigmas, solvers.restarted(self.build_solver(), self.switch), NoMidpoint())
        plain = frozenset(range(self.planned, self.intervals))
        return Method(self.sigmas, self.build_solver(), FixedMidpoint(0.5, self.sigma_min, plain), self.first())

    def plain_method(self, sigmas: Sequence[float] = ()) -> Method:
        """The base solver with one call per interval of a grid, or of its own."""
        return Method(tuple(sigmas or self.sigmas), self.build_solver(), NoMidpoint())

    @property
    def bounds(self) -> tuple[tuple[float, float], tuple[float, float], tuple[float, float]]:
        """The lowest and the highest r, scale_dir and scale_time of a table.

        r may be 0, which asks the model at the interval's start again, where no update divides by it.
        """
        lowest = 100 * R_MARGIN if self.build_solver().divides_by_r else 0.0
        scales = [(1 - width, 1 + width) for width in (self.scale_dir, self.scale_time)]
        return (lowest, 1 - R_MARGIN), scales[0], scales[1]

    @property
    def limits(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The lowest and the highest that the numbers in a file may be: of all, or of each column of a table."""
        if self.kind == "table":
            return tuple(low for low, _ in self.bounds), tuple(high for _, high in self.bounds)
        return (-LARGEST_WEIGHT,), (LARGEST_WEIGHT,)

    def build_solver(self) -> Solver:
        """The update rule these settings name; for a multistep predictor, the one that it takes on other grids."""
        return solvers.solver(self.solver, vars(self))

    @classmethod
    def from_header(cls, header: Mapping[str, Any]) -> "PredictorConfig":
        """The inverse of `dataclasses.asdict` after JSON.

        Raises ValueError for unknown, missing or impossible settings.
        """
        if not isinstance(header, Mapping):
            raise ValueError("its settings are no JSON object")
        if header.get("centred"):
            raise ValueError("it holds a network that corrects a table, which no longer exists here: train it again")
        header = {name: value for name, value in header.items() if name != "centred"}
        known = {f.name for f in fields(cls)}
        if unknown := set(header) - known:
            raise ValueError(f"unknown settings {sorted(unknown)}: it was made by a newer version; update this pack")
        kinds = get_type_hints(cls)
        try:
            found = {name: typed(name, value, kinds[name]) for name, value in header.items() if name != "model"}
            return cls(**found, model=plain_facts(header.get("model", {})))
        except TypeError as error:
            raise ValueError(f"its settings are incomplete ({error})") from error


def typed(name: str, value: Any, kind: Any) -> Any:
    """A value of JSON as a setting of this kind: a number, a text, whether something is so, or a list of numbers.

    Raises ValueError for anything else, and for numbers that are not finite, or larger than any of use.
    """
    if get_origin(kind) is tuple:
        if not isinstance(value, list | tuple) or len(value) > MOST_LEVELS:
            raise ValueError(f"{name} must be a list of at most {MOST_LEVELS:,} numbers")
        return tuple(typed(name, one, get_args(kind)[0]) for one in value)
    if kind in (int, float):
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not (whole or (kind is float and isinstance(value, float))) or not abs(value) <= LARGEST_NUMBER:  # nor NaN
            raise ValueError(f"{name} must be a {'number' if kind is float else 'whole number'} of a usual size")
        return kind(value)
    if not isinstance(value, bool if kind is bool else str):
        raise ValueError(f"{name} must be {'true or false' if kind is bool else 'a text'}")
    if isinstance(value, str) and plain_text(value) != value:
        raise ValueError(f"{name} must be a text of at most {LONGEST_TEXT} plain characters")
    return value


def switch_of(sigmas: Sequence[float], switch_sigma: float) -> int:
    """The first interval of a grid at whose start a second model answers, which is asked below a level; 0 if none."""
    above = sum(sigma >= switch_sigma for sigma in sigmas[:-1])
    return above if switch_sigma and above < len(sigmas) - 1 else 0


def same_levels(sigmas: Sequence[float], others: Sequence[float]) -> bool:
    """Whether two lists of noise levels are the same, but for TOLERANCE."""
    pairs = zip(sigmas, others, strict=False)
    return len(sigmas) == len(others) and all(math.isclose(a, b, rel_tol=TOLERANCE) for a, b in pairs)


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
        elif isinstance(value, (int, float)) and abs(value) < LARGEST_NUMBER:  # NaN is not
            plain[name] = value
        else:
            raise ValueError(f"model holds something else than a text or a usual number as {name}")
    return plain


def at_guidance(config: PredictorConfig, table: Tensor, guidance: float | None) -> Tensor:
    """Numbers of a table, (guidances, ...), for one cfg scale: (...).

    They are linear between the scales it was fitted at, and constant outside. A table of one scale has no first
    axis, and is returned as it is.
    """
    if not config.guidances:
        return table
    wanted = config.guidance if guidance is None else guidance
    position = float(np.interp(wanted, config.guidances, range(len(config.guidances))))
    low = min(int(position), len(config.guidances) - 2)
    return torch.lerp(table[low], table[low + 1], position - low)
