"""What Levenberg-Marquardt moves in a table, as one vector of numbers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from ..config import PredictorConfig
from ..midpoints import MidpointTable
from ..multistep import MultistepTable, asked_at, known_to
from ..predictor import Predictor
from ..types import COLUMNS

# From which point of its interval a number acts on: the level told at the start, the midpoint, or the last update.
Acts = Literal["start", "mid", "update"]
WEIGHT_DIFFERENCE = 1e-2  # of a weight, and of the logarithm of a told level, for derivatives
MIDPOINT_DIFFERENCE = 2e-2  # of r and of the scales
LEVEL_ROOM = 0.4  # of the way to the levels beside it: how far a step may move a level
NEWEST = {"weight": 4, "guided": 2}  # slopes whose weights are moved; in the last interval, at no call, all


class Parameters(Protocol):
    """The numbers (count,) of the tables of some settings, at one guidance scale, in float64."""

    @property
    def low(self) -> Tensor:
        """(count,), -inf where there is no bound."""

    @property
    def high(self) -> Tensor:
        """(count,), inf where there is no bound."""

    def of(self, table: Predictor) -> Tensor:
        """A table's numbers (count,)."""

    def table(self, like: Predictor, numbers: Tensor) -> Predictor:
        """A copy of a table with these numbers (count,); what no number stands for stays."""

    def differences(self, numbers: Tensor) -> Tensor:
        """By how much to change each (count,) for its derivative, with the sign that stays inside its bounds."""

    def acts(self) -> list[tuple[int, Acts]]:
        """Of every number the interval, and where in it it acts."""

    def calls_after(self) -> list[int]:
        """Of every number how many model calls depend on it."""


@dataclass(frozen=True)
class MidpointParameters:
    """r, scale_dir and scale_time of every planned interval, where they have a range."""

    config: PredictorConfig

    @property
    def free(self) -> list[int]:
        """Columns that have a range; the others keep their values."""
        return [n for n, (low, high) in enumerate(self.config.bounds) if low < high]

    @property
    def low(self) -> Tensor:
        """The lowest of the free columns, again for every interval (count,)."""
        return self._each([self.config.bounds[n][0] for n in self.free])

    @property
    def high(self) -> Tensor:
        """The highest of the free columns, again for every interval (count,)."""
        return self._each([self.config.bounds[n][1] for n in self.free])

    def _each(self, values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).repeat(self.config.planned)

    def of(self, table: Predictor) -> Tensor:
        """The free columns (count,), interval by interval."""
        numbers: Tensor = dict(table.named_parameters())["plans"][:, self.free].flatten().cpu().double()
        return numbers

    def table(self, like: Predictor, numbers: Tensor) -> Predictor:
        """A copy with these numbers (count,) in the free columns, on the device of `like`."""
        made = MidpointTable(self.config).to(next(like.parameters()))
        made.load_state_dict(like.state_dict())
        made.plans[:, self.free] = numbers.reshape(self.config.planned, -1).to(made.plans)
        return made

    def differences(self, numbers: Tensor) -> Tensor:
        """MIDPOINT_DIFFERENCE (count,), downward where it would leave the range."""
        inside = numbers + MIDPOINT_DIFFERENCE <= self.high
        return torch.where(inside, MIDPOINT_DIFFERENCE, -MIDPOINT_DIFFERENCE).double()

    def acts(self) -> list[tuple[int, Acts]]:
        """r and scale_time act on the midpoint, scale_dir on the last update."""
        where: dict[str, Acts] = {"r": "mid", "scale_dir": "update", "scale_time": "mid"}
        return [(k, where[COLUMNS[n]]) for k in range(self.config.planned) for n in self.free]

    def calls_after(self) -> list[int]:
        """From the midpoint's call on; of scale_dir from the next interval's."""
        begins = [2 * k - self.config.analytic_first_step for k in range(self.config.planned)]  # an interval's calls
        return [self.config.calls - begins[k] - 1 - (where == "update") for k, where in self.acts()]


@dataclass(frozen=True)
class Number:
    """One number of a multistep table: what it is, and which interval it acts in."""

    kind: Literal["weight", "guided", "first", "scale_time", "level"]
    interval: int  # of a level, the one that it ends
    slope: int = 0  # of a weight, also of one of guidance


@dataclass(frozen=True)
class MultistepParameters:
    """The newest slopes' weights and those of the first denoised sample; of the told levels' scales the logarithms.

    With `grid` also the logarithms of the levels between the first and the last. A first step's level and gains, and
    what bands differ by, stay as they are.
    """

    config: PredictorConfig
    grid: bool = False

    @property
    def layout(self) -> list[Number]:
        """What the numbers are, in their order."""
        n, config = self.config.intervals, self.config
        weights = [
            Number(kind, k, slope)
            for kind in (("weight", "guided") if config.guided else ("weight",))
            for k in range(n)
            for slope in _slopes(config, kind, k)[0 if k == n - 1 else -NEWEST[kind] :]
        ]
        numbers = weights + [Number(kind, k) for kind in ("first", "scale_time") for k in range(n)]
        return numbers + [Number("level", k) for k in range(n - 1)] * self.grid

    @property
    def low(self) -> Tensor:
        """Of levels, LEVEL_ROOM of the way to the next one below; the others have no bound (count,)."""
        logs, ways = self._levels
        return self._with_levels(-math.inf, logs[1:] - LEVEL_ROOM * ways[1:])

    @property
    def high(self) -> Tensor:
        """Of levels, LEVEL_ROOM of the way to the next one above; the others have no bound (count,)."""
        logs, ways = self._levels
        return self._with_levels(math.inf, logs[1:] + LEVEL_ROOM * ways[:-1])

    @property
    def _levels(self) -> tuple[Tensor, Tensor]:
        """The logarithms of the levels where the model is asked (intervals,), and how far each is above the next.

        Of the last one this is where the model knows nothing lower, but at most at half of it.
        """
        *asked, _ = asked_at(self.config.sigmas, self.config.first_sigma)
        end = min(max(self.config.sigma_min, asked[-1] / 2), asked[-1])
        logs = torch.tensor([*asked, end], dtype=torch.float64).log()
        return logs[:-1], -logs.diff()

    def _with_levels(self, others: float, levels: Tensor) -> Tensor:
        """A vector (count,) of one number, but for the levels, which stand at its end."""
        vector = torch.full((len(self.layout),), others, dtype=torch.float64)
        if self.grid:
            vector[-len(levels) :] = levels
        return vector

    def of(self, table: Predictor) -> Tensor:
        """The numbers (count,) in the order of `layout`."""
        parts = {name: values.detach().cpu() for name, values in table.named_parameters()}
        parts["scale_time"] = parts["scale_time"].log()
        parts = {name: values.double() for name, values in parts.items()}
        parts["level"] = torch.tensor(table.config.sigmas[1:-1], dtype=torch.float64).log()
        return torch.stack([_place(parts, number) for number in self.layout])

    def table(self, like: Predictor, numbers: Tensor) -> Predictor:
        """A copy with these numbers (count,), on the CPU."""
        made = MultistepTable(self._on(numbers))
        made.load_state_dict(like.state_dict())
        made.scale_time.log_()
        parts = dict(made.named_parameters())
        for number, value in zip(self.layout, numbers, strict=True):
            if number.kind != "level":
                _place(parts, number).copy_(value)
        made.scale_time.exp_()
        return made

    def _on(self, numbers: Tensor) -> PredictorConfig:
        """The settings with the levels among the numbers (count,)."""
        if not self.grid:
            return self.config
        first, *between, last = self.config.sigmas
        logs = torch.tensor(between, dtype=torch.float64).log()  # what is as it was stays to the bit
        moved = numbers[-len(between) :]
        levels = torch.where(moved == logs, torch.tensor(between, dtype=torch.float64), moved.exp())
        return replace(self.config, sigmas=(first, *levels.tolist(), last))

    def differences(self, numbers: Tensor) -> Tensor:
        """WEIGHT_DIFFERENCE (count,), downward for the very first told level.

        Levels go to where there is more room, and at most half of it.
        """
        steps = torch.full_like(numbers, WEIGHT_DIFFERENCE)
        steps[self.layout.index(Number("scale_time", 0))] *= -1  # the model may know no level above
        if self.grid:
            levels = slice(1 - self.config.intervals, None)
            below, above = (numbers - self.low)[levels], (self.high - numbers)[levels]
            room = torch.maximum(below, above).div(2).clamp(max=WEIGHT_DIFFERENCE)
            steps[levels] = torch.where(below >= above, -room, room)
        return steps

    def acts(self) -> list[tuple[int, Acts]]:
        """Told levels act at an interval's start; weights, and the level where it ends, on its update."""
        return [(number.interval, "start" if number.kind == "scale_time" else "update") for number in self.layout]

    def calls_after(self) -> list[int]:
        """The calls of later intervals; of a told level its own, too."""
        return [self.config.calls - k - (where != "start") for k, where in self.acts()]


def _slopes(config: PredictorConfig, kind: str, k: int) -> list[int]:
    """The intervals whose slopes interval k adds up, or whose guidance slopes."""
    return [j for j in known_to(k, config.switch) if kind == "weight" or j in config.asking]


def _place(parts: Mapping[str, Tensor], number: Number) -> Tensor:
    """Where a table keeps a number: a view."""
    if number.kind in ("weight", "guided"):
        return parts["weights" if number.kind == "weight" else "guided"][number.interval, number.slope]
    return parts[number.kind][number.interval]
