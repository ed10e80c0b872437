"""Where a multistep fit begins: the best unlearned solver, and then weights in closed form on several grids."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .goals import Goal
from .grids import ONE_CALL, Rule, first_levels, searched
from .least_squares import least_squares
from .multistep import MultistepTable, multistep_config, together
from .paths import ORDER, Gram, Path, below, gram, levels, path, sum_of
from .robust import compared
from .solvers import Ipndm
from .spectrum import BANDS, gains, moments, shows_frequencies
from .starts import Start, solvers, start
from .table_runs import TableRuns
from .types import Step

TRIED = 2  # trajectories that all starts are tried on,
RUNNERS, FINALISTS = 8, 2  # and how many of them are tried on the first batch, and on all
FIRST_RATIOS = (0.03, 0.05, 0.07, 0.09, 0.11, 0.135, 0.16)  # signal to noise where a first step without a call may lead
SOLVED_FOR: tuple[Rule, ...] = ("weights", "ipndm")  # rules whose grids are worth solving for,
QUICK, SOLVED = 16, 2  # trajectories that they all are solved on, and judged by, and how many of them on all

Part = Literal["first step", "bands", "polish", "middle round"]


@dataclass(frozen=True)
class Found:
    """A table, how far the fitted samples end from their goals with it (groups, rows), and the runs that showed it."""

    name: str  # of the start
    table: MultistepTable
    distances: Tensor
    runs: dict[int, list[Step]]


class Beginning:
    """What a fit may begin with: `starts`, these solvers on searched grids, and weights in closed form.

    `without` leaves parts of the method out, to measure what they are good for.
    """

    def __init__(self, on: TableRuns, starts: Sequence[Start], without: Collection[Part] = ()) -> None:
        self.on = on
        self.without = frozenset(without)
        self.starts = tuple(starts)
        shape = on.metered[0](range(1))[0].shape[1:]
        self.bands = shows_frequencies(shape) and "bands" not in without
        # The second of two models must not be the first one that is asked.
        without_call = shows_frequencies(shape) and "first step" not in without and not on.settings.switch_sigma
        self.channels = shape[0] if without_call else 0
        self.tried: list[Start] = []  # all unlearned ones, once they were
        self.gains: dict[float, Tensor] = {}  # of first steps without a call, by the level that they lead to

    @property
    def most_grids(self) -> int:
        """How many grids there may be at most that weights are solved for."""
        return 1 + len(SOLVED_FOR) + len(FIRST_RATIOS) * bool(self.channels)

    def calls(self, grids: int) -> int:
        """The fewest model calls, of all workers, that it takes to choose one if `grids` are solved for.

        The teacher, for what is held out too; the unlearned starts; grids on few trajectories and on all.
        """
        config, calls, groups = self.on.config, self.on.settings.calls, len(self.on.metered)
        count, held_out = groups * config.trajectories, groups * config.held_out
        first = min(config.batch_size, config.trajectories)
        tried = len(self.starts) + len(ONE_CALL) * len(solvers(self.on.settings.flow))
        teacher = self.on.fitted.teacher.calls(config.teacher_calls) * (count + held_out)
        unlearned = tried * min(TRIED, first) + RUNNERS * first + FINALISTS * count
        few = groups * sum(goals.beginning(QUICK) for goals in (self.on.fitted, self.on.judged))
        return teacher + calls * (unlearned + grids * few + SOLVED * (count + held_out))

    def paths(self) -> dict[int, Path]:
        """The teacher's paths toward the goals, as many as memory allows; the goals keep their ends."""
        low, high, calls = self.on.settings.sigma_min, self.on.settings.sigmas[0], self.on.config.teacher_calls
        passed: dict[int, Path] = {}
        kept = 0
        for number, (group, rows) in enumerate(self.on.fitted.batches()):
            x, denoiser = self.on.metered[group](rows)
            kept += 2 * (calls + 1) * x.numel() * x.element_size()
            if kept > self.on.config.keep_bytes and any(self.on.fitted.batches()[n][0] == group for n in passed):
                continue
            grid = levels(low, high, calls, self.on.settings.flow)
            passed[number] = path(denoiser, x, grid, self.on.settings.switch_sigma)
            self.on.fitted.targets[str(number)] = passed[number].end
        return passed

    def unlearned(self, paths: Mapping[int, Path]) -> tuple[Found, list[Start]]:
        """The start that does best, first on a few trajectories, then, of the best, on more and on all.

        Also the grids whose weights are worth solving for, with iPNDM's: the best start's, and those that are searched,
        from the first level on and from where a first step without a call may lead.
        """
        total, flow, calls = self._products(paths), self.on.settings.flow, self.on.settings.calls
        switch = {"switch_sigma": self.on.settings.switch_sigma}
        grids = {rule: searched(total, calls, rule, flow=flow) for rule in ONE_CALL}
        starts = list(self.starts)
        for rule, grid in grids.items():
            starts += [start(f"{name} searched for {rule}", s, grid, **switch) for name, s in solvers(flow).items()]
        self.tried = starts
        quick = self._first_distances(starts, TRIED).log().mean(1)
        screened = FINALISTS if "middle round" in self.without else RUNNERS
        runners = [starts[n] for n in quick.argsort(stable=True)[:screened].tolist()]
        again = TRIED if "middle round" in self.without else self.on.config.batch_size
        nearer = self._first_distances(runners, again)
        ranked = torch.tensor([compared(each[None], nearer[:1]) for each in nearer]).argsort(stable=True)
        finalists = [self._found(runners[n].name, self.written(runners[n])) for n in ranked[:FINALISTS].tolist()]
        best = finalists[0]
        for other in finalists[1:]:
            best = other if compared(other.distances, best.distances) < 1 else best
        worth = [best.table.config.sigmas, *(grids[rule] for rule in SOLVED_FOR)]
        listed = [start("", Ipndm(ORDER), grid, **switch) for grid in worth]
        for level in self._first_levels(total):
            self.gains[level] = self._first_gains(paths, level)
            grid = searched(below(total, level), calls, "weights", flow=flow)
            listed.append(start("", Ipndm(ORDER), (total.levels[0], *grid[1:]), level))
        known = {(one.first_sigma, one.levels): one for one in listed}
        return best, list(known.values())

    def solved(self, best: Found, listed: Sequence[Start], paths: Mapping[int, Path]) -> Found:
        """The weights that lead nearest to the teacher at every level, on the grid where they do best, or `best`."""
        goals = [goal for goal in self.on.fitted if goal.number in paths]
        batches = self.on.fitted.batches()
        few = [goal for goal in goals if batches[goal.number][1].start < QUICK]
        solved = [self._solved(one, few, paths)[0] for one in listed]
        quick = torch.stack([self.on.judged.distances(self.on.ends_of(table), QUICK) for table in solved])
        ranked = quick.log().mean((1, 2)).argsort(stable=True)  # of few, one odd sample would decide otherwise
        table, least = best.table, torch.empty(0)
        for number in ranked[:SOLVED].tolist():
            trial, distances = self._solved(listed[number], goals, paths)
            distances = torch.cat([distances, self.on.judged.distances(self.on.ends_of(trial))], 1)
            if not least.numel() or compared(distances, least) < 1:
                table, least = trial, distances
        closed = self._found(best.name, table)
        return closed if compared(closed.distances, best.distances) < 1 else best

    def _found(self, name: str, table: MultistepTable) -> Found:
        runs: dict[int, list[Step]] = {}
        return Found(name, table, self.on.distances(table, runs), runs)

    def written(self, start: Start, *, spectral: bool = False) -> MultistepTable:
        """A start as a table, the same at every guidance scale."""
        level, channels = start.first_sigma, self.channels if start.first_sigma else 0
        config = multistep_config(
            self.on.settings, start.levels, first_sigma=level, channels=channels, spectral=spectral
        )
        table = MultistepTable(config)
        table.weights.copy_(torch.tensor(start.weights, dtype=torch.float64).expand_as(table.weights))
        if start.first_sigma:
            table.gains.copy_(self.gains[start.first_sigma])
        return table

    def _products(self, paths: Mapping[int, Path]) -> Gram:
        """What grids are searched on: all that the teacher's paths passed."""
        total = sum_of([gram(passed) for passed in paths.values()])
        if not bool(total.products.isfinite().all()):
            raise FloatingPointError(
                "The slow sampler's pictures are not finite. Check the model's precision (try --force-fp32 or another "
                "weight dtype) and its LoRAs."
            )
        elements = int(self.on.workers.sum(torch.tensor(total.elements)))
        return replace(total, products=self.on.workers.sum(total.products), elements=elements)

    def _first_gains(self, paths: Mapping[int, Path], level: float) -> Tensor:
        """The gains ([guidances,] channels, BANDS) of a first step without a call that leads to a level."""
        batches, made = self.on.fitted.batches(), []
        for group in range(len(self.on.metered)):
            total = torch.zeros(2, self.channels, BANDS, dtype=torch.float64)
            for number, passed in paths.items():
                if batches[number][0] == group:
                    total += moments(passed.x[0], passed.at(level)[0])
            made.append(gains(self.on.workers.sum(total), level, self.on.settings.sigmas[0]))
        return torch.stack(made) if self.on.settings.guidances else made[0]

    def _first_levels(self, total: Gram) -> list[float]:
        """Where a first step without a call may lead, if samples show the frequencies that it looks at."""
        found = first_levels(total, FIRST_RATIOS, flow=self.on.settings.flow) if self.channels else []
        return [level for level in found if len(below(total, level).levels) > self.on.settings.calls]

    def _solved(self, begin: Start, goals: Sequence[Goal], paths: Mapping[int, Path]) -> tuple[MultistepTable, Tensor]:
        """The weights of a grid in closed form, and the distances (groups, rows) of these goals that they end with."""
        table, solved = self.written(begin, spectral=self.bands), []
        batches = self.on.fitted.batches()
        squares = torch.zeros(len(self.on.metered), self.on.config.trajectories, dtype=torch.float64)
        for group, alone in enumerate(table.alone()):
            own = [(goal, paths[goal.number]) for goal in goals if goal.group == group]
            made, finished = least_squares(alone, own, self.on.workers)
            solved.append(made)
            for (goal, _), end in zip(own, finished, strict=True):
                rows = batches[goal.number][1]
                apart = (end - goal.target).cpu().double().square().flatten(1).mean(1)
                squares[group, rows.start : rows.stop] = apart.nan_to_num(torch.inf)
        squares = self.on.workers.sum(squares)
        return together(table.config, solved), squares[:, (squares > 0).any(0)].sqrt()

    def _first_distances(self, starts: Sequence[Start], count: int) -> Tensor:
        """The distances (starts, rows) of the very first trajectories, of all workers."""
        first = range(min(count, self.on.config.batch_size, self.on.config.trajectories))
        squares = torch.zeros(len(starts), len(first), dtype=torch.float64)
        goal, (group, rows) = next(iter(self.on.fitted)), self.on.fitted.batches()[0]
        rows = range(rows.start, min(rows.stop, first.stop))
        if group == 0 and rows:
            few = self.on.few(goal, rows)
            for n, start in enumerate(starts):
                end = self.on.run(few, self.written(start))[-1].x
                squares[n, rows.start : rows.stop] = (end - few.target).cpu().double().square().flatten(1).mean(1)
        return self.on.workers.sum(squares.nan_to_num(torch.inf)).sqrt()
