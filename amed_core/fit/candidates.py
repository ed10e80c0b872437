"""What a learner tries: grids to cross the noise levels on, and candidates on them, most of which learn."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

from ..config import PredictorConfig
from ..multistep import MultistepTable, asked_at, multistep_config
from ..schedules import fine
from ..solvers import Ipndm
from ..spectrum import gains, moments, shows_frequencies
from ..types import Solver
from .baselines import baseline
from .baselines import grids as usual
from .grid_search import FIRST_RATIOS, RULES, first_levels, searched
from .lessons import NOTHING_APART, Learns, Lessons
from .teacher import TeacherPath, below, products_of

PRIOR = Ipndm(2)  # weights are held at those of Adams and Bashforth, order 2
FAR = 9.0  # times the median: what an outlier's squared error counts at most where candidates are compared
LOWEST_FLOW = 0.02  # where the usual grids of a flow model may end, beside its smallest level


@dataclass(frozen=True)
class Grid:
    """The levels of a candidate's calls, and the last one. With `first` a step without a call leads there at first."""

    levels: tuple[float, ...]
    first: float = 0.0

    @property
    def asked(self) -> tuple[float, ...]:
        """Where it calls the model, and its end."""
        return asked_at(self.levels, self.first)


@dataclass(eq=False)  # two are the same only if they are one
class Candidate:
    """A grid with weights: learned, or those of a plain solver."""

    name: str
    table: MultistepTable
    lessons: Lessons | None = None  # None of a plain solver
    moments: Tensor | None = None  # (2, channels, BANDS) of a first step without a call: all that its gains need
    seen: list[float] = field(default_factory=list)  # squared errors of pictures that it had learned from
    held_out: list[float] = field(default_factory=list)  # of pictures that it had not
    ends: list[float] = field(default_factory=list)  # squared errors at the very end, of what it had learned from

    @property
    def plain(self) -> bool:
        """Whether it learns nothing."""
        return self.lessons is None

    @property
    def new(self) -> bool:
        """Whether it is to learn, and knows nothing yet."""
        return self.lessons is not None and not len(self.lessons.products)

    @property
    def grid(self) -> Grid:
        """Its levels."""
        return Grid(self.table.config.sigmas, self.table.config.first_sigma)

    @property
    def learns(self) -> Learns:
        """What its table holds beside weights of slopes."""
        return Learns(self.table.config.guided, self.table.config.spectral)

    @property
    def calls(self) -> int:
        """The calls of its run on a picture whose first call at the first level is known: the teacher's."""
        return self.table.config.calls - (not self.grid.first)

    @property
    def score(self) -> float:
        """The squared error by which candidates are compared, infinite without any picture.

        Of what was learned and of what was held out the geometric mean, by numbers of pictures: the first is low for
        all learned candidates alike, but the last has few pictures at first.
        """
        parts = [(len(errors), capped_mean(errors)) for errors in (self.seen, self.held_out) if errors]
        if not parts or any(not math.isfinite(mean) for _, mean in parts):
            return math.inf
        logs = sum(count * math.log(max(mean, 1e-30)) for count, mean in parts)
        return math.exp(logs / sum(count for count, _ in parts))


Cost = Callable[[Candidate], float]


def capped_mean(errors: Sequence[float]) -> float:
    """The mean of squared errors, of which none counts more than some times the median."""
    squares = torch.tensor(errors, dtype=torch.float64)
    return float(squares.clamp(max=FAR * float(squares.median())).mean())


@dataclass(frozen=True)
class Span:
    """From where to where pictures are drawn, and in how many calls.

    `config` is a multistep table's before any fit, for the model, the number of calls and the level that pictures start
    at. `levels` is a list that the user chose, if there is one. `end` is the level where pictures end. `model_sigmas`
    (levels,) are a discrete model's. `first_steps` says whether a first step without a call may be taken.
    """

    config: PredictorConfig
    levels: tuple[float, ...]
    end: float
    model_sigmas: Tensor | None
    first_steps: bool

    def table(
        self, grid: Grid, solver: Solver = PRIOR, shown: Tensor | None = None, learns: Learns = NOTHING_APART
    ) -> MultistepTable:
        """A solver's table on a grid, before anything is learned but the gains of its first step.

        Those follow from what was `shown`, by `moments_of`.
        """
        one = baseline("", solver, grid.levels, grid.first, self.config.switch_sigma)
        channels = 0 if shown is None else shown.shape[1]
        config = replace(self.config, guided=learns.guided)
        config = multistep_config(
            config, grid.levels, first_sigma=grid.first, channels=channels, spectral=learns.spectral
        )
        table = MultistepTable(config)
        table.weights.copy_(torch.tensor(one.weights, dtype=torch.float64))
        if shown is not None:
            table.gains.copy_(gains(shown, grid.first, grid.levels[0]))
        return table

    def grids(self, passed: TeacherPath) -> dict[str, Grid]:
        """Candidate grids by name: the user's, or the usual, the searched ones, and those of the teacher's shape.

        From pure noise there are some more, whose first call asks lower than pictures start.
        """
        config, n, high = self.config, self.config.calls, self.config.sigmas[0]
        if self.levels or self.end > 0:
            firsts = self._firsts(passed, passed.levels)
            if self.levels:
                begun = [0.0, *(level for level in firsts if level > self.levels[1])]
                return {f"these levels{_from(level)}": Grid(self.levels, level) for level in begun}
            return self._to_end([0.0, *(level for level in firsts if level > self.end)])
        total, found = products_of(passed), dict[str, Grid]()
        firsts = self._firsts(passed, total.levels)
        for low in sorted({config.sigma_min, max(config.sigma_min, LOWEST_FLOW if config.flow else 0.0)}):
            if low < high:
                found |= {f"{name}, {low:g}": Grid(grid) for name, grid in usual(n, low, high, self.model_sigmas)}
                found[f"teacher's, {low:g}"] = Grid((*fine(n, low, high, config.flow).tolist(), 0.0))
        found |= {f"searched for {rule}": Grid(searched(total, n, rule, flow=config.flow)) for rule in RULES}
        for level in firsts:
            rest = below(total, level)
            if len(rest.levels) > n:
                grid = searched(rest, n, "weights", flow=config.flow)
                found[f"searched for weights{_from(level)}"] = Grid((high, *grid[1:]), level)
        unique: dict[str, Grid] = {}
        for name, one in found.items():
            asked = one.asked
            if all(a > b for a, b in pairwise(asked)) and not any(_alike(asked, o.asked) for o in unique.values()):
                unique[name] = one
        return unique

    def _to_end(self, begun: Sequence[float]) -> dict[str, Grid]:
        """Those of a run that ends in the middle, with first calls at these levels, 0 being where pictures start."""
        n, high, found = self.config.calls, self.config.sigmas[0], dict[str, Grid]()
        for level in begun:
            begin = level or high
            even = torch.linspace(begin, self.end, n + 1)
            log = torch.linspace(math.log(begin), math.log(self.end), n + 1).exp()
            shapes = {"teacher's": fine(n + 1, self.end, begin, self.config.flow), "even": even, "log": log}
            for name, spaced in shapes.items():
                found[name + _from(level)] = Grid((high, *spaced.tolist()[1:-1], self.end), level)
        return found

    def _firsts(self, passed: TeacherPath, listed: Sequence[float]) -> list[float]:
        """Which of these levels a first step without a call may lead to."""
        if not (self.first_steps and self.config.from_noise and shows_frequencies(passed.x.shape[2:])):
            return []
        variance = float(passed.end.double().square().mean())
        return first_levels(listed, variance, FIRST_RATIOS, flow=self.config.flow)


def best_of(candidates: Sequence[Candidate], count: int, cost: Cost = lambda one: one.score) -> list[Candidate]:
    """Those whose score, or another cost, is least, so many of them."""
    return sorted(candidates, key=cost)[:count]


def best_of_kinds(candidates: Sequence[Candidate], count: int, cost: Cost = lambda one: one.score) -> list[Candidate]:
    """The same, but at least two of those with a first step without a call, and of those without, where there are."""
    kinds = [[one for one in candidates if bool(one.grid.first) is kind] for kind in (False, True)]
    kept = [one for kind in kinds for one in best_of(kind, 2, cost)]
    others = best_of([one for one in candidates if one not in kept], count - len(kept), cost)
    return best_of([*kept, *others], count, cost)


def over_plain(one: Candidate, candidates: Sequence[Candidate], count: int) -> float:
    """A candidate's error on the newest pictures over that of the best plain one."""
    plain = min(capped_mean(c.held_out[-count:]) for c in candidates if c.plain)
    return math.sqrt(capped_mean(one.held_out[-count:]) / max(plain, 1e-30))


def moments_of(grid: Grid, passed: TeacherPath) -> Tensor | None:
    """What gains of a first step without a call need to know of a path; None of a grid that has no such step."""
    if not grid.first:
        return None
    return torch.cat([moments(one.at(grid.levels[0])[0], one.at(grid.first)[0]) for one in passed.channels()], 1)


def _from(level: float) -> str:
    """What a candidate's name says of where its first call asks."""
    return f" from {level:.3g}" if level else ""


def _alike(grid: Sequence[float], other: Sequence[float]) -> bool:
    return all(abs(math.log(a / b)) < 0.02 for a, b in zip(grid[:-1], other[:-1], strict=True))
