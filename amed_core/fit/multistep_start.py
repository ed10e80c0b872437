"""The table a multistep fit begins with: the best baseline, and then weights in closed form on several grids."""

import copy
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Literal

import torch
from torch import Tensor

from ..config import PredictorConfig
from ..multistep import MultistepTable, lacking_guidance, multistep_config
from ..predictor import Predictor
from ..schedules import fine
from ..solvers import Ipndm
from ..spectrum import BANDS, gains, moments, shows_frequencies
from .baselines import Baseline, baseline, solvers
from .closed_form import (
    NormalEquations,
    Walk,
    along,
    cost_on_paper,
    least_squares,
)
from .end_to_end import Found
from .grid_search import FIRST_RATIOS, RULES, first_levels, searched
from .huber import compared, squares
from .last_interval import LastInterval
from .protocol import FitConfig
from .runs import RunCache, Runs
from .targets import Target, Targets, beginning, rmse
from .teacher import PathProducts, TeacherPath, below, own_errors, products_of, refined_calls, sum_of

SCREENING_TRAJECTORIES = 2  # on which baselines run before the best of them run on all
ORDER = 3  # of iPNDM, at whose weights those in closed form are held

Part = Literal["first step", "bands"]


class MultistepStart:
    """Chooses among baselines, the same solvers on searched grids, and weights in closed form.

    `on` is a grid that must be taken, that of another guidance scale's table. `without` leaves parts of the method
    out, to measure what they are good for.
    """

    def __init__(
        self,
        runs: Runs,
        baselines: Sequence[Baseline],
        on: PredictorConfig | None = None,
        without: Collection[Part] = (),
    ) -> None:
        self.runs = runs
        self.baselines = tuple(baselines)
        self.on = on
        shape = runs.source(range(1))[0].shape[1:]
        self.last = LastInterval(runs)
        self.spectral = shows_frequencies(shape) and "bands" not in without
        # The second of two models must not be the first one that is asked, and an image says much from the beginning.
        without_call = shows_frequencies(shape) and "first step" not in without and not runs.config.switch_sigma
        without_call = without_call and runs.config.from_noise
        self.channels = shape[0] if without_call else 0
        self.gains: dict[float, Tensor] = {}  # of first steps without a call, by the level that they lead to
        # At least; how many there are is known when they were searched.
        self.solved_grids = min(runs.settings.grids, len({one.levels for one in self.baselines}))
        self.error = math.inf  # on held-out trajectories, of the closed form
        self.refused = 0  # sample calls, of all workers, that a teacher led to which was not good enough

    @property
    def names(self) -> list[str]:
        """The given baselines; those on searched grids follow from the targets."""
        return [one.name for one in self.baselines]

    @property
    def model_calls(self) -> int:
        """Sample calls, of all workers: targets, every baseline on a few trajectories, and the best on all.

        Every grid that is solved for then takes a few, the best of them all, and the table is judged.
        """
        return self._calls_with(0 if self.on is not None else self.solved_grids)

    @property
    def _calls_so_far(self) -> int:
        """Of them those that it has taken itself: not the fit's, to judge, nor targets that nobody asked for yet."""
        settings, judged = self.runs.settings, self.runs.judged
        unjudged = 2 * settings.held_out * self.runs.config.calls
        return self.model_calls - unjudged - (0 if judged.ends else judged.model_calls)

    def _calls_with(self, grids: int) -> int:
        """The same, if it solves for so many grids, 0 being one that is given."""
        settings, calls = self.runs.settings, self.runs.config.calls
        taught = 0 if self.runs.shared else self.runs.fitted.model_calls + self.runs.judged.model_calls
        return self.refused + taught + calls_to_begin(settings, calls, grids)

    def found(self) -> Iterator[Found]:
        """The best baseline, and then the table with weights in closed form, if it is better.

        Raises FloatingPointError if the teacher's samples are not finite.
        """
        while True:
            paths = self.runs.fitted.taught()
            total = self._products(paths)
            paper = OnPaper(self, next(iter(paths.values()), None))
            best = self._best_baseline(total, paper)
            grids = self._worth_solving(total, paths, paper)
            self.solved_grids = len(grids)
            closed = self._closed_form(best, grids, paths)
            own = self._own_error(paths)
            teacher = self.runs.fitted.teacher
            calls = refined_calls(teacher.calls, own**2, self.error**2)
            another = teacher.in_calls(calls) != teacher and not self.runs.shared  # others count on the shared one
            if self.refused or not another or not self._affordable(calls):
                break
            self.refused = self._calls_so_far
            for targets in self._targets:
                targets.refine(calls)
        yield best
        yield replace(closed, teacher_error=own)

    @property
    def _on_all(self) -> bool:
        """Whether the few trajectories that grids are tried on are all there are."""
        return _tried_on_all(self.runs.settings)

    @property
    def _targets(self) -> tuple[Targets, Targets]:
        return self.runs.fitted, self.runs.judged

    def _affordable(self, teacher_calls: int) -> bool:
        """Whether the budget allows to begin anew with a teacher of so many calls."""
        settings = self.runs.settings
        # There may be more grids the next time.
        spent = self._calls_with(0 if self.on is not None else settings.grids)
        more = (teacher_calls - self.runs.fitted.teacher.calls) * (settings.trajectories + settings.held_out)
        return not settings.budget or 2 * spent + more <= settings.budget

    def _own_error(self, paths: Mapping[int, TeacherPath]) -> float:
        """The teacher's own error, as its paths show it: an RMSE over those of all workers."""
        parts = [own_errors(passed, self.runs.config.flow) for passed in paths.values()]
        sums = torch.stack([torch.cat(parts).sum(), torch.tensor(sum(map(len, parts)))])
        total, count = self.runs.workers.sum(sums).tolist()
        return float((total / count) ** 0.5)

    def _products(self, paths: Mapping[int, TeacherPath]) -> PathProducts:
        """What grids are searched on: all that the teacher's paths passed."""
        total = sum_of([products_of(passed) for passed in paths.values()])
        elements = int(self.runs.workers.sum(torch.tensor(total.elements)))
        return replace(total, products=self.runs.workers.sum(total.products), elements=elements)

    def _best_baseline(self, total: PathProducts, paper: "OnPaper") -> Found:
        """The baseline that does best: of those that do on paper, first on a few trajectories, then on all."""
        flow, switch = self.runs.config.flow, self.runs.config.switch_sigma
        listed = list(self.baselines)
        for rule in RULES:
            grid = searched(total, self.runs.config.calls, rule, flow=flow)
            for name, solver in solvers(flow).items():
                listed.append(baseline(f"{name} searched for {rule}", solver, grid, switch_sigma=switch))
        costs = self.runs.workers.sum(torch.tensor([paper.plain(one) for one in listed])).tolist()
        ranked = [listed[n] for n in sorted(range(len(listed)), key=costs.__getitem__)]
        # A path shows nothing of overshooting: of every solver the best grid comes first.
        of_solver: dict[str, Baseline] = {}
        for one in ranked:
            of_solver.setdefault(one.solver, one)
        firsts = list(of_solver.values())
        settings = self.runs.settings
        tried = [*firsts, *(one for one in ranked if one not in firsts)][: settings.baselines]
        if len(tried) > settings.plain_finalists:
            screened = self._screened(tried).log().mean(1)
            tried = [tried[n] for n in screened.argsort(stable=True)[: settings.plain_finalists].tolist()]
        return best_of(self._measured(one.name, self.written(one)) for one in tried)

    def best_on_paper(self, paths: Mapping[int, TeacherPath]) -> Baseline:
        """The grid whose weights promise most along the teacher's paths, with those that weights are held at."""
        total, paper = self._products(paths), OnPaper(self, next(iter(paths.values()), None))
        return self._worth_solving(total, paths, paper)[0]

    def asking(self, negatives: tuple[int, ...]) -> "MultistepStart":
        """The same for a student that asks the negative in these intervals alone."""
        made = copy.copy(self)
        made.runs = replace(self.runs, config=replace(self.runs.config, negatives=negatives))
        return made

    def _worth_solving(self, total: PathProducts, paths: Mapping[int, TeacherPath], paper: "OnPaper") -> list[Baseline]:
        """Grids whose weights are worth solving for, with iPNDM's: of all usual ones, those that are searched, from the
        first level on and from where a first step without a call may lead, and the teacher's shape, the best on paper.
        """
        config, flow = self.runs.config, self.runs.config.flow
        if self.on is not None:
            if self.on.first_sigma:
                self.gains[self.on.first_sigma] = self._gains(paths, self.on.first_sigma)
            return [self.ipndm(self.on.sigmas, self.on.first_sigma)]
        listed = [self.ipndm(searched(total, config.calls, rule, flow=flow)) for rule in RULES]
        listed += [self.ipndm(one.levels) for one in self.baselines]
        listed.append(self.ipndm((*fine(config.calls, config.sigma_min, config.sigmas[0], flow).tolist(), 0.0)))
        firsts = first_levels(total.levels, total.variance, FIRST_RATIOS, flow=flow) if self.channels else []
        for level in firsts:
            if len(below(total, level).levels) > config.calls:
                self.gains[level] = self._gains(paths, level)
                grid = searched(below(total, level), config.calls, "weights", flow=flow)
                listed.append(self.ipndm((total.levels[0], *grid[1:]), level))
        unique = list(
            {_rounded(one): one for one in listed}.values()
        )  # schedules that meet differ in their last digits
        costs = self.runs.workers.sum(torch.tensor([paper.learned(one) for one in unique]))
        ranked = costs.argsort(stable=True).tolist()
        return [unique[n] for n in _in_turns(ranked, unique)[: self.runs.settings.grids]]

    def ipndm(self, grid: Sequence[float], first_sigma: float = 0.0) -> Baseline:
        """What weights on a grid are held at."""
        return baseline("", Ipndm(ORDER), grid, first_sigma, self.runs.config.switch_sigma)

    def _closed_form(self, best: Found, grids: Sequence[Baseline], paths: Mapping[int, TeacherPath]) -> Found:
        """The weights that lead nearest to the teacher at every level, on the grid where they do best, or `best`."""
        batches, settings = self.runs.fitted.batches(), self.runs.settings
        few = [number for number in paths if batches[number].start < settings.few]
        if self.on is not None:
            return self._measured(best.name, self.solved(grids[0], list(paths), paths)[0])
        tried = [self.solved(one, few, paths) for one in grids]
        judged = [self.runs.judged_distances(t.method(), settings.few) for t, _ in tried]
        ranked = torch.stack(judged).log().mean(1).argsort(stable=True)  # of few, one odd sample would decide otherwise
        table, least, nearest, apart = None, torch.empty(0), torch.empty(0), torch.empty(0)
        for number in _in_turns(ranked.tolist(), grids)[: settings.finalists]:
            (trial, ends), held_out = tried[number], judged[number]
            if not self._on_all:
                trial, ends = self.solved(grids[number], list(paths), paths)
                held_out = self.runs.judged_distances(trial.method())
            both = torch.cat([ends, held_out])
            if table is None or compared(both, least) < 1:
                table, least, nearest, apart = trial, both, ends, held_out
        assert table is not None
        self.error = rmse(apart)
        if settings.iterations == 1:  # nobody needs its runs
            return best_of([best, Found(best.name, table.method(), nearest, RunCache(0), table)])
        return best_of([best, self._measured(best.name, table)])

    def refined(self, table: Predictor, distances: Tensor, cache: RunCache) -> tuple[Predictor, Tensor, RunCache]:
        """The table with the bands of its last interval solved for again, if it is better (`LastInterval`)."""
        return self.last.refined(table, distances, cache)

    @property
    def finishing_calls(self) -> int:
        """At most those of `finished`, and of judging what it makes."""
        config = self.runs.config
        return finishing_calls(self.runs.settings, config.calls) if self.spectral and config.from_noise else 0

    def finished(self, table: Predictor, cache: RunCache) -> tuple[Predictor, Tensor] | None:
        """The table with the teacher's energy in every band of its samples, where calls are few (`LastInterval`)."""
        return self.last.finished(table, cache) if self.finishing_calls else None

    def solved(
        self, begin: Baseline, numbers: Sequence[int], paths: Mapping[int, TeacherPath]
    ) -> tuple[MultistepTable, Tensor]:
        """The weights of a grid in closed form from these batches, and how far their samples then end (rows,)."""
        rows, walks = [self.runs.fitted.of_path(number) for number in numbers], []
        for number, some in zip(numbers, rows, strict=True):
            x, denoiser = self.runs.source(some)
            walks.append(Walk(denoiser, x, paths[number]))
        table = least_squares(self.written(begin, spectral=self.spectral), walks, self.runs.workers)
        errors = torch.zeros(self.runs.settings.trajectories, dtype=torch.float64)
        for some, walk in zip(rows, walks, strict=True):
            errors[some.start : some.stop] = squares(walk.x, walk.path.end.to(walk.x))
        errors = self.runs.workers.sum(errors)
        return table, errors[errors > 0].sqrt()

    def _measured(self, name: str, table: MultistepTable) -> Found:
        method = table.method()
        return Found(name, method, *self.runs.fitted_distances(method), table)

    def written(self, one: Baseline, *, spectral: bool = False, guided: bool = True) -> MultistepTable:
        """A baseline as a table: its weights, and the gains of its first step if that asks no model.

        With `guided` it has room for weights of guidance if the settings say so.
        """
        channels = self.channels if one.first_sigma else 0
        config = multistep_config(
            self.runs.config, one.levels, first_sigma=one.first_sigma, channels=channels, spectral=spectral
        )
        if not guided:
            config = replace(config, guided=False, negatives=())
        table = MultistepTable(config)
        table.weights.copy_(torch.tensor(one.weights, dtype=torch.float64))
        if config.guided:
            table.guided.copy_(lacking_guidance(config, table.weights))
        if one.first_sigma:
            table.gains.copy_(self.gains[one.first_sigma])
        return table

    def _gains(self, paths: Mapping[int, TeacherPath], level: float) -> Tensor:
        """The gains (channels, BANDS) of a first step without a call that leads to a level."""
        total = torch.zeros(2, self.channels, BANDS, dtype=torch.float64)
        for passed in paths.values():
            total += moments(passed.at(passed.levels[0])[0], passed.at(level)[0])
        return gains(self.runs.workers.sum(total), level, self.runs.config.sigmas[0])

    def _screened(self, listed: Sequence[Baseline]) -> Tensor:
        """The distances (baselines, rows) of the very first trajectories, of all workers."""
        settings, targets = self.runs.settings, self.runs.fitted
        count = min(SCREENING_TRAJECTORIES, settings.batch_size, settings.trajectories)
        errors = torch.zeros(len(listed), count, dtype=torch.float64)
        first: Target = next(iter(targets))
        rows = range(first.rows.start, min(first.rows.stop, count))
        if rows:
            few = first.few(self.runs.source, len(rows))
            for n, one in enumerate(listed):
                end = self.runs.run(few, self.written(one).method())[-1].x
                errors[n, rows.start : rows.stop] = squares(end, few.end)
        return self.runs.workers.sum(errors).sqrt()


def calls_to_begin(settings: FitConfig, calls: int, grids: int) -> int:
    """The sample calls that a start takes beside its teacher's, of a student of so many calls.

    It solves for so many grids, 0 being one that is given.
    """
    fitted, held_out = settings.trajectories, settings.held_out
    finalists, first = min(settings.plain_finalists, settings.baselines), min(settings.batch_size, fitted)
    screened = settings.baselines * min(SCREENING_TRAJECTORIES, first) if settings.baselines > finalists else 0
    tried = sum(beginning(settings.few, count, settings.batch_size) for count in (fitted, held_out))
    solved = min(settings.finalists, grids) * (fitted + held_out) if grids else fitted
    solved = 0 if grids and _tried_on_all(settings) else solved
    again = 0 if grids and settings.iterations == 1 else fitted  # the runs of the table that was chosen
    return calls * (screened + finalists * fitted + grids * tried + solved + again + 2 * held_out)


def finishing_calls(settings: FitConfig, calls: int) -> int:
    """At most the sample calls that it takes to give samples of pure noise the teacher's energy, and to judge that."""
    return calls * (settings.trajectories + settings.held_out) if calls <= settings.energy_calls else 0


def _in_turns(ranked: Sequence[int], grids: Sequence[Baseline]) -> list[int]:
    """Numbers of grids as ranked, but those with a first step that asks no model and those without by turns.

    Neither paper nor few noises tell well which kind is better: where a first step decides a sample wrongly, that is a
    few samples' great error.
    """
    best = bool(grids[ranked[0]].first_sigma)
    kinds = ([n for n in ranked if bool(grids[n].first_sigma) is kind] for kind in (best, not best))
    return [n for pair in zip_longest(*kinds) for n in pair if n is not None]


def _rounded(one: Baseline) -> tuple[float, ...]:
    """The levels of a baseline, as far as they matter."""
    return tuple(round(level, 5 - math.floor(math.log10(level))) for level in (one.first_sigma, *one.levels) if level)


def _tried_on_all(settings: FitConfig) -> bool:
    """Whether the few trajectories that grids are tried on are all there are."""
    counts = (settings.trajectories, settings.held_out)
    return all(beginning(settings.few, count, settings.batch_size) == count for count in counts)


class OnPaper:
    """What methods cost along a teacher's path, at no call; nothing without one, of a worker that has no trajectory."""

    def __init__(self, start: MultistepStart, passed: TeacherPath | None) -> None:
        self.start = start
        self.passed = passed
        self.known: dict[tuple[float, tuple[float, ...]], tuple[MultistepTable, list[NormalEquations]]] = {}

    def learned(self, one: Baseline) -> float:
        """Of a grid with weights in closed form."""
        return 0.0 if self.passed is None else cost_on_paper(*self._solved(one, self.passed), self.passed)

    def plain(self, one: Baseline) -> float:
        """Of a baseline as it is."""
        if self.passed is None:
            return 0.0
        _, equations = self._solved(one, self.passed)
        return cost_on_paper(self.start.written(one, guided=False), equations, self.passed)

    def _solved(self, one: Baseline, passed: TeacherPath) -> tuple[MultistepTable, list[NormalEquations]]:
        grid = (one.first_sigma, one.levels)
        if grid not in self.known:
            begun = self.start.ipndm(one.levels, one.first_sigma)
            self.known[grid] = along(self.start.written(begun, guided=False), passed)
        return self.known[grid]


def best_of(found: Iterable[Found]) -> Found:
    """The one whose fitted samples end nearest to their targets; the first of equals. No more than two are held."""
    every = iter(found)
    best = next(every)
    for other in every:
        best = other if compared(other.distances, best.distances) < 1 else best
    return best
