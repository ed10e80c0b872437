"""Where trajectories should end: the converged teacher's samples, made once and kept on the CPU."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from ..call_list import call_sigmas
from ..config import PredictorConfig
from ..driver import First, FixedMidpoint, NoMidpoint, Resume, trajectory
from ..types import Denoiser, Planner, Sample, Solver, Step
from .teacher import heun_calls, heun_samples, ipndm_samples
from .trajectories import Metered
from .workers import ALONE, Workers


@dataclass(frozen=True)
class Goal:
    """A batch of trajectories: where they start, and where the converged teacher takes them."""

    number: int  # of the batch
    group: int  # which of the sources they come from: one per guidance scale
    x: Sample
    denoiser: Denoiser
    target: Sample


class Converged(Protocol):
    """A slow sampler from x at sigma_max to 0."""

    def __call__(
        self,
        denoiser: Denoiser,
        x: Sample,
        sigma_min: float,
        sigma_max: float,
        calls: int,
        *,
        flow: bool = False,
        switch_sigma: float = 0.0,
    ) -> Sample: ...


@dataclass(frozen=True)
class Teacher:
    """Where goals come from, and how many model calls that really takes."""

    run: Converged
    calls: Callable[[int], int]


HEUN = Teacher(heun_samples, heun_calls)
IPNDM = Teacher(ipndm_samples, lambda calls: calls)


@dataclass
class Goals:
    """The goals of trajectories `rows` of every source, `batch_size` at a time.

    Noise is cheap to draw again, so that only the teacher's samples are kept, and those on the CPU.
    """

    sources: Sequence[Metered]
    rows: range
    batch_size: int
    config: PredictorConfig
    teacher_calls: int
    workers: Workers = ALONE
    teacher: Teacher = HEUN
    targets: dict[str, Tensor] = field(default_factory=dict)  # by the batch's number

    def batches(self) -> list[tuple[int, range]]:
        """Group and trajectories of every batch that is this worker's to run.

        Batches begin at multiples of their size, so that however many workers there are, none has parts of two.
        """
        mine, first, size = self.workers.share(self.rows), self.rows.start, self.batch_size
        edges = sorted({mine.start, mine.stop, *range(first, mine.stop, size)} & set(range(mine.start, mine.stop + 1)))
        chunks = [range(begin, end) for begin, end in pairwise(edges)]
        return [(group, rows) for group in range(len(self.sources)) for rows in chunks]

    def __iter__(self) -> Iterator[Goal]:
        for number, (group, rows) in enumerate(self.batches()):
            x, denoiser = self.sources[group](rows)
            target = self.targets.get(str(number))
            if target is None:
                ends = (self.config.sigma_min, self.config.sigmas[0])
                flow, switch = self.config.flow, self.config.switch_sigma
                target = self.teacher.run(denoiser, x, *ends, self.teacher_calls, flow=flow, switch_sigma=switch).cpu()
                self.targets[str(number)] = target
            yield Goal(number, group, x, denoiser, target.to(x))

    def beginning(self, count: int) -> int:
        """How many trajectories the batches hold that begin before number `count`."""
        return min(-(-count // self.batch_size) * self.batch_size, len(self.rows))

    def distances(self, draw: Callable[[Goal], Sample], count: int | None = None) -> Tensor:
        """The RMSE (groups, rows) of each sample that `draw` makes, of all workers; infinite where not finite.

        With a `count`, of the batches of every group that begin before it.
        """
        columns = len(self.rows) if count is None else self.beginning(count)
        squares = torch.zeros(len(self.sources), columns, dtype=torch.float64)
        for goal, (_, rows) in zip(self, self.batches(), strict=True):
            begin = rows.start - self.rows.start
            if begin >= columns:
                continue
            each = (draw(goal) - goal.target).cpu().double().square().flatten(1).mean(1)
            squares[goal.group, begin : begin + len(rows)] = each.nan_to_num(nan=torch.inf)
        return self.workers.sum(squares).sqrt()

    def errors(self, draw: Callable[[Goal], Sample]) -> Tensor:
        """The RMSE (groups,) of what `draw` makes of every goal; infinite where a sample is not finite."""
        return rmse(self.distances(draw))

    @property
    def floor(self) -> int:
        """The model calls of the teacher, for this worker's trajectories."""
        return sum(len(rows) for _, rows in self.batches()) * self.teacher.calls(self.teacher_calls)

    def base_errors(self, midpoints: Tensor | None = None) -> Tensor:
        """What the base solver reaches at equal model calls (groups,): with midpoints at r = 0.5, or, if that is
        nearer, with plain calls at the levels a user would sample with. `midpoints` is the first of these, if known.
        """
        config = self.config
        if midpoints is None:
            plain = frozenset(range(config.planned, config.intervals))
            midpoints = self.errors(self._run(config.sigmas, FixedMidpoint(0.5, config.sigma_min, plain)))
        return torch.minimum(midpoints, self.errors(self._run(call_sigmas(config, config.calls), NoMidpoint())))

    def _run(self, levels: Sequence[float], planner: Planner) -> Callable[[Goal], Sample]:
        grid, config = torch.tensor(levels, dtype=torch.float64), self.config
        # A plain run has one call for every level, so it starts with a real one.
        first = config.first if len(levels) == len(config.sigmas) else None
        return lambda goal: ends(goal, grid, config.build_solver(), planner, first)[-1].x

    def state_dict(self) -> dict[str, Any]:
        """The teacher's samples, which need not be made again."""
        return dict(self.targets)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the teacher's samples from a state."""
        self.targets = dict(state)


def rmse(distances: Tensor) -> Tensor:
    """The RMSE (groups,) over all samples from theirs (groups, rows)."""
    return distances.square().mean(1).sqrt()


def ends(
    goal: Goal, grid: Tensor, solver: Solver, planner: Planner, first: First | None, resume: Resume | None = None
) -> list[Step]:
    """The goal's trajectories on a way of sampling, step by step; no more than the rest of them with `resume`."""
    return list(trajectory(goal.denoiser, goal.x, grid, solver, planner, first=first, resume=resume))
