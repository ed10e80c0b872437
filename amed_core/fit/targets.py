"""Where trajectories should end: a slow sampler's samples, made once and kept on the CPU."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..types import Denoiser, Sample
from .finite import finite
from .huber import squares
from .reading import of_finite
from .teacher import AsKnown, Teacher, TeacherPath, path_bytes
from .trajectories import Metered
from .workers import ALONE, Workers

STATE_BYTES = 400_000_000  # of ends in a state of training; those that exceed it are made again
SLOW = "The slow sampler's pictures"


@dataclass(frozen=True)
class Target:
    """A batch of trajectories: where they start, and where they should end."""

    number: int  # of the batch
    rows: range  # numbers of its trajectories
    x: Sample  # noisy, at the grid's first level
    denoiser: Denoiser
    end: Sample

    def few(self, source: Metered, count: int) -> "Target":
        """The first trajectories of the batch, conditioned by themselves."""
        x, denoiser = source(self.rows[:count])
        return replace(self, rows=self.rows[:count], x=x, denoiser=denoiser, end=self.end[:count])


@dataclass
class Targets:
    """The targets of trajectories `rows`, `batch_size` at a time.

    Noise is cheap to draw again, so that only the slow sampler's samples are kept, and those on the CPU.
    """

    source: Metered
    rows: range
    batch_size: int
    teacher: Teacher
    workers: Workers = ALONE
    path_bytes: int = 0  # of the teacher's paths, on the CPU, where these are asked for
    with_paths: bool = False  # they are, for other fits, so that they come with the ends
    state_bytes: int = STATE_BYTES  # of the ends in a state
    ends: dict[str, Tensor] = field(default_factory=dict)  # by the batch's number,
    paths: dict[int, TeacherPath] = field(default_factory=dict)  # of those whose whole path is kept

    def batches(self) -> list[range]:
        """The trajectories of every batch that is this worker's to run.

        Batches begin at multiples of their size, so that however many workers there are, none has parts of two.
        """
        mine, first, size = self.workers.share(self.rows), self.rows.start, self.batch_size
        edges = sorted({mine.start, mine.stop, *range(first, mine.stop, size)} & set(range(mine.start, mine.stop + 1)))
        return [range(begin, end) for begin, end in pairwise(edges)]

    def __iter__(self) -> Iterator[Target]:
        for number, rows in enumerate(self.batches()):
            if self.with_paths and str(number) not in self.ends:
                self.taught()
            x, denoiser = self.source(rows)
            end = self.ends.get(str(number))
            if end is None:
                end = self.teacher.samples(denoiser, x).cpu()
                self.ends[str(number)] = finite(end, SLOW)
            yield Target(number, rows, x, denoiser, end.to(x))

    def taught(self) -> dict[int, TeacherPath]:
        """The teacher's paths of this worker's first trajectories, by the batch's number: as many as `path_bytes` hold.

        There is one at least; of the last batch there may be a part. Where memory does not suffice for all, they are in
        half precision. They are made once, and with them the ends of whole batches. Raises FloatingPointError if one is
        not finite.
        """
        left = self.path_bytes
        for number, rows in enumerate(self.batches()):
            if number not in self.paths:
                x, denoiser = self.source(rows)
                calls, mine = self.teacher.calls, len(self.workers.share(self.rows))
                half = mine * path_bytes(x[:1], calls, half=False) > self.path_bytes
                count = min(len(rows), max(left // path_bytes(x[:1], calls, half=half), not number))
                if not count:
                    break
                if count < len(rows):
                    x, denoiser = self.source(rows[:count])
                path = self.teacher.path(denoiser, x, half=half)
                end, self.paths[number] = finite(path.end, SLOW), path
                if count == len(rows):
                    self.ends[str(number)] = end.clone()  # which outlives the path
            left -= self.paths[number].bytes
            if len(self.paths[number].end) < len(rows):
                break
        return self.paths

    def of_path(self, number: int) -> range:
        """The trajectories of a batch whose path is kept."""
        return self.batches()[number][: len(self.paths[number].end)]

    def beginning(self, count: int) -> int:
        """How many trajectories the batches hold that begin before number `count`."""
        return beginning(count, len(self.rows), self.batch_size)

    def distances(self, draw: Callable[[Target], Sample], count: int | None = None) -> Tensor:
        """The RMSE (rows,) of each sample that `draw` makes, of all workers; infinite where not finite.

        With a `count`, of the batches that begin before it.
        """
        columns = len(self.rows) if count is None else self.beginning(count)
        errors = torch.zeros(columns, dtype=torch.float64)
        for target in self:
            begin = target.rows.start - self.rows.start
            if begin >= columns:
                break
            errors[begin : begin + len(target.rows)] = squares(draw(target), target.end)
        return self.workers.sum(errors).sqrt()

    @property
    def model_calls(self) -> int:
        """Sample calls that the slow sampler takes for all of these trajectories, of all workers."""
        return len(self.rows) * self.teacher.model_calls

    def below(self, sigma: float, count: int, levels: int) -> "Targets":
        """Those of the first trajectories, up to so many, from where their teacher passes a level on.

        Only trajectories whose path is kept can be among them. Where a path has too few levels below, it is made anew.
        """
        kept = self.taught()
        listed, most = {number: self.of_path(number) for number in kept}, self.rows.start + count
        firsts = {number: rows[: most - rows.start] for number, rows in listed.items() if rows.start < most}
        paths = {number: kept[number].first(len(rows)) for number, rows in firsts.items()}

        def draw(rows: range) -> tuple[Sample, Denoiser]:
            x, denoiser = self.source(rows)
            number = (rows.start - self.rows.start) // self.batch_size
            return paths[number].at(sigma)[0][: len(rows)].to(x), denoiser

        rows = range(self.rows.start, max(rows.stop for rows in firsts.values()))
        lower = self.teacher.below(sigma, levels)
        made = Targets(Metered(draw), rows, self.batch_size, lower, path_bytes=self.path_bytes)
        if isinstance(made.teacher, AsKnown):
            made.paths = {number: path.below(sigma) for number, path in paths.items()}
            made.ends = {str(number): path.end for number, path in paths.items()}
        return made

    def refine(self, calls: int) -> None:
        """Begin anew with a slow sampler of so many calls, if it is another."""
        refined = self.teacher.in_calls(calls)
        if refined != self.teacher:
            self.teacher, self.ends, self.paths = refined, {}, {}

    def state_dict(self) -> dict[str, Any]:
        """The slow sampler's samples, which need not be made again: as many batches of them as `state_bytes` hold."""
        kept, left = {}, self.state_bytes
        for number, end in sorted(self.ends.items(), key=lambda one: int(one[0])):
            left -= end.numel() * end.element_size()
            if left < 0:
                break
            kept[number] = end
        return kept

    @property
    def missing(self) -> int:
        """How many of this worker's trajectories have no end yet."""
        return sum(len(rows) for number, rows in enumerate(self.batches()) if str(number) not in self.ends)

    def read(self, state: Mapping[str, Any], shape: Sequence[int]) -> dict[str, Tensor]:
        """The slow sampler's samples of a state, (rows of a batch, *shape) each, which `ends` may become.

        `shape` is that of one sample. Raises TypeError or KeyError if they are not of these trajectories, and
        ValueError if they are not finite.
        """
        rows = {str(number): len(rows) for number, rows in enumerate(self.batches())}
        return {number: of_finite(end, (rows[number], *shape)) for number, end in state.items()}


@contextmanager
def as_before(sources: Sequence[Metered], targets: Sequence[Targets]) -> Iterator[None]:
    """What several fits share is as it was if one of them raises an error inside."""
    counts = [source.earlier_not_finite for source in sources]
    known = [(one.teacher, dict(one.ends), dict(one.paths)) for one in targets]
    try:
        yield
    except BaseException:
        for source, count in zip(sources, counts, strict=True):
            source.earlier_not_finite = count
        for one, before in zip(targets, known, strict=True):
            one.teacher, one.ends, one.paths = before
        raise


def beginning(count: int, rows: int, batch_size: int) -> int:
    """How many of so many trajectories the batches hold that begin before number `count`."""
    return min(-(-count // batch_size) * batch_size, rows)


def rmse(distances: Tensor) -> float:
    """The RMSE over all samples from theirs (rows,)."""
    return float(distances.square().mean().sqrt())
