"""Fitting a multistep table to the end of the trajectory, with no gradient through the model.

It starts from the unlearned solver that does best on this very model, among the usual grids and those searched on the
teacher's paths, so that it can only get better. The first iteration takes the weights in closed form, interval by
interval and band by band, on several grids, most of which begin after a first step that asks no model, and goes on
with the one that does best on what is held out. Those after it move weights and told levels together, by Levenberg's
and Marquardt's method. The grid's own levels stay where the search put them: what the model answers depends on the told
ones alone, and all else that a level does, weights can do. A number's derivative is the difference of two sampling runs
that part where it acts. Expansions of the error age slowly, so that in an iteration only some of the trajectories are
expanded anew.

Samples near a fork of the ODE end far from the teacher whatever the solver, and a few of them would outweigh all
others: what is minimised grows only linearly beyond some times the usual distance (Huber's loss).
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from .driver import Resume, evaluate
from .end_to_end import ATTEMPTS, DAMPING, EASIER, HARDER, FitConfig, FitEvent, moved_to
from .goals import IPNDM, Goal, Goals, ends
from .grids import ONE_CALL, Rule, first_levels, searched
from .least_squares import Sums, least_squares
from .multistep import MultistepTable, multistep_config, together
from .parallel import ALONE, Workers
from .paths import ORDER, Gram, Path, below, gram, levels, path, sum_of
from .predictor import Look, PredictorConfig
from .solvers import Ipndm, multistep_vectors
from .sources import HELD_OUT, Metered
from .spectrum import BANDS, gains, moments, shows_frequencies
from .starts import Start, solvers, start
from .states import refuse_other_settings
from .types import Sample, Source, Stage, Step

DIFFERENCE = 1e-2  # of a weight, and of the logarithm of a told level, for the derivatives
TRIED = 2  # trajectories that all starts are tried on,
RUNNERS, FINALISTS = 8, 2  # and how many of them are tried on the first batch, and on all
FIRST_RATIOS = (0.03, 0.05, 0.07, 0.09, 0.11, 0.135, 0.16)  # signal to noise where a first step without a call may lead
SOLVED_FOR: tuple[Rule, ...] = ("weights", "ipndm")  # rules whose grids are worth solving for,
QUICK, SOLVED = 16, 2  # trajectories that they all are solved on, and judged by, and how many of them on all
FAR = 3.0  # times the geometric mean of all distances: beyond it they count linearly
# Sample calls for derivatives in an iteration, as far as whole batches or one part of a batch allow; in the first one,
# which knows none of earlier iterations, twice as many.
SPENT = 2000
NEWEST = {"weight": 4, "guided": 2}  # slopes whose weights are moved end to end; in the last interval all, at no call


Kind = Literal["weight", "guided", "first", "scale_time"]
Part = Literal["first step", "bands"]


@dataclass(frozen=True)
class Number:
    """One number of a table: what it is, and which interval it acts in."""

    kind: Kind
    interval: int
    slope: int = 0  # of a weight, also of one of guidance


@dataclass(frozen=True)
class Expansion:
    """A batch's summed loss near `numbers`, but for constants: 2 gradient delta + delta normal delta, in float64."""

    group: int
    numbers: Tensor  # (count,), of its own guidance scale
    normal: Tensor  # J^T J (count, count)
    gradient: Tensor  # J^T e (count,)


class MultistepFit:
    """Fits a multistep table to where the converged teacher takes the same noise.

    `sources` are one per guidance scale of the predictor's config: they share the grid, all else is their own.
    `starts` are what it may begin with. `predictor` is always the best so far. `without` leaves parts of the method
    out, to measure what they are good for.
    """

    def __init__(
        self,
        predictor: MultistepTable,
        sources: Source | Sequence[Source],
        config: FitConfig,
        starts: Sequence[Start],
        look: Look | None = None,
        workers: Workers = ALONE,
        without: Collection[Part] = (),
    ) -> None:
        del look
        settings = predictor.config
        listed = (sources,) if callable(sources) else tuple(sources)
        if len(listed) != max(len(settings.guidances), 1):
            raise ValueError(f"There are {len(listed)} sources for guidance scales {list(settings.guidances)}.")
        if config.gradient == "reverse":
            raise ValueError('A multistep table is fitted without autograd: set gradient to "finite difference".')
        self.config = config
        self.settings = settings
        self.workers = workers
        self.starts = tuple(starts)
        self.metered = [Metered(source) for source in listed]
        shared = (config.batch_size, settings, config.teacher_calls, workers, IPNDM)
        self.fitted = Goals(self.metered, range(config.trajectories), *shared)
        self.judged = Goals(self.metered, range(HELD_OUT, HELD_OUT + config.held_out), *shared)
        self.layout = layout(settings.intervals, guided=settings.guided)
        # What a state holds: the table under way, how it does, and the best so far.
        self.predictor = self.current = predictor
        self.start = ""
        self.iteration = 0
        self.damping = DAMPING
        # Every sample's distance to its goal, (groups, rows): the table's under way; the best's and base's, and those
        # that are held out after those that are fitted.
        self.distances: Tensor = torch.empty(0)
        self.best: Tensor = torch.empty(0)
        self.base: Tensor = torch.empty(0)
        self.done = False
        self.history: list[list[float]] = []
        self.spent = 0  # model calls of all workers, when last judged
        self.expansions: dict[int, Expansion] = {}
        self.tried: list[Start] = []  # all that it could have begun with, once it has begun in this process
        self.gains: dict[float, Tensor] = {}  # of first steps without a call, by the level that they lead to
        shape = listed[0](range(1))[0].shape[1:]
        self._bands = shows_frequencies(shape) and "bands" not in without
        self._channels = shape[0] if shows_frequencies(shape) and "first step" not in without else 0
        # How many grids are solved for on the first batches; at first, the most that there may be.
        self.solved_quickly = 1 + len(SOLVED_FOR) + len(FIRST_RATIOS) * bool(self._channels)
        self._earlier_calls = 0
        self._runs: dict[int, list[Step]] = {}

    @property
    def model_calls(self) -> int:
        """Single-sample model calls so far, of this process."""
        return self._earlier_calls + sum(metered.calls for metered in self.metered)

    @property
    def floor(self) -> int:
        """The fewest model calls, on paper, of this fit's iterations so far (at least 1), for all workers."""
        return self.calls_of(max(self.iteration, 1))

    def calls_of(self, iterations: int) -> int:
        """The fewest model calls that so many iterations take, for all workers together.

        The teacher, the choice of a start; per iteration, for the batches that are expanded, every number's calls
        that come after it, and for all trajectories one attempt at a smaller error.
        """
        calls, config, groups = self.settings.calls, self.config, len(self.metered)
        count, held_out = groups * config.trajectories, groups * config.held_out
        tried = len(self.starts) + len(ONE_CALL) * len(solvers(self.settings.flow))
        once = self.fitted.teacher.calls(config.teacher_calls) * (count + held_out)
        first = min(config.batch_size, config.trajectories)
        once += calls * (tried * min(TRIED, first) + RUNNERS * first + FINALISTS * count + held_out)
        once += calls * self.solved_quickly * groups * sum(g.beginning(QUICK) for g in (self.fitted, self.judged))
        total = once + calls * (SOLVED * (count + held_out) + count + held_out)  # with the first iteration
        for iteration in range(1, iterations):
            batches = [place % self._per_group for place in self._due(iteration)]
            rows = [min(self._each, config.trajectories - n * config.batch_size) for n in batches]
            again = calls if self._each < config.batch_size else 0  # parts of batches are run once more
            total += sum(rows) * (self._derivatives + again) + calls * (count + held_out)
        return total

    @property
    def _derivatives(self) -> int:
        """The model calls of a trajectory's expansion: for every number, those that come after it."""
        return sum(self.settings.calls - number.interval - (number.kind != "scale_time") for number in self.layout)

    @property
    def _each(self) -> int:
        """How many of a batch's trajectories are expanded: with many calls, a part of it."""
        return min(self.config.batch_size, max(1, SPENT // self._derivatives))

    @property
    def _per_group(self) -> int:
        """The batches of a guidance scale."""
        return -(-self.config.trajectories // self.config.batch_size)

    def _due(self, iteration: int) -> set[int]:
        """Which batches, of all guidance scales', are expanded anew in an iteration: some, in turn."""
        total = self._per_group * len(self.metered)
        count = max(1, SPENT // (self._derivatives * self._each))
        begin = count * iteration if iteration > 1 else 0
        return {place % total for place in range(begin, count * (iteration + 1))}

    def _covered(self, iteration: int) -> bool:
        """Whether every batch was expanded in the iterations up to this one."""
        expanded = {place for n in range(1, iteration + 1) for place in self._due(n)}
        return len(expanded) == self._per_group * len(self.metered)

    def _mine(self, iteration: int) -> dict[int, range]:
        """Those of this worker's batches that are expanded anew in an iteration, with the trajectories that are."""
        due, size = self._due(iteration), self.config.batch_size
        mine = {}
        for number, (group, rows) in enumerate(self.fitted.batches()):
            place, within = divmod(rows.start, size)
            few = range(rows.start, min(rows.stop, rows.start - within + self._each))
            if group * self._per_group + place in due and few:
                mine[number] = few
        return mine

    @torch.no_grad()
    def events(self) -> Iterator[FitEvent]:
        """Fit, one iteration per event; the predictor is the best so far.

        Leave the loop to cancel; call again to go on. Raises FloatingPointError if the teacher's samples are not
        finite.
        """
        if not self.history:
            paths = self._passed()
            grids = self._begin(paths)
            unlearned = self._judge()
            self._solve(grids, paths)
            self.iteration = 1
            closed = self._judge()
            yield unlearned
            yield closed
        while not self.done and self.iteration < self.config.iterations:
            following = self.calls_of(self.iteration + 1) - self.calls_of(self.iteration)
            if self.config.budget and self.spent + following > self.config.budget:
                self.done = True
                return
            improved = self._improve()
            # A step that gains nothing may be the fault of the few batches that it was made of.
            self.done = not improved and self._covered(self.iteration)
            if not improved and not self.done:
                self.damping = DAMPING
            self.iteration += 1
            yield self._judge()

    def _held_out_errors(self, distances: Tensor) -> tuple[float, float]:
        """These distances' error on what is held out, and the start's; both by the limit of the start's."""
        held_out, base = (d[:, self.config.trajectories :] for d in (distances, self.base))
        error, base_error = (float(huber(d, far(base)).mean().sqrt()) for d in (held_out, base))
        return error, base_error

    def _passed(self) -> dict[int, Path]:
        """The teacher's paths toward the goals, as many as memory allows; the goals keep their ends."""
        low, high, calls = self.settings.sigma_min, self.settings.sigmas[0], self.config.teacher_calls
        passed: dict[int, Path] = {}
        kept = 0
        for number, (group, rows) in enumerate(self.fitted.batches()):
            x, denoiser = self.metered[group](rows)
            kept += 2 * (calls + 1) * x.numel() * x.element_size()
            if kept > self.config.keep_bytes and any(self.fitted.batches()[n][0] == group for n in passed):
                continue
            passed[number] = path(denoiser, x, levels(low, high, calls, self.settings.flow))
            self.fitted.targets[str(number)] = passed[number].end
        return passed

    def _products(self, paths: Mapping[int, Path]) -> Gram:
        """What grids are searched on: all that the teacher's paths passed."""
        total = sum_of([gram(passed) for passed in paths.values()])
        if not bool(total.products.isfinite().all()):
            raise FloatingPointError(
                "The slow sampler's pictures are not finite. Check the model's precision (try --force-fp32 or another "
                "weight dtype) and its LoRAs."
            )
        elements = int(self.workers.sum(torch.tensor(total.elements)))
        return replace(total, products=self.workers.sum(total.products), elements=elements)

    def _first_gains(self, paths: Mapping[int, Path], level: float) -> Tensor:
        """The gains ([guidances,] channels, BANDS) of a first step without a call that leads to a level."""
        batches, made = self.fitted.batches(), []
        for group in range(len(self.metered)):
            total = torch.zeros(2, self._channels, BANDS, dtype=torch.float64)
            for number, passed in paths.items():
                if batches[number][0] == group:
                    total += moments(passed.x[0], passed.at(level)[0])
            made.append(gains(self.workers.sum(total), level, self.settings.sigmas[0]))
        return torch.stack(made) if self.settings.guidances else made[0]

    def _begin(self, paths: Mapping[int, Path]) -> list[Start]:
        """Take the start that does best, first on a few trajectories, then, of the best, on more and on all.

        Returns the grids whose weights are worth solving for, with iPNDM's: the best start's, and those that are
        searched, from the first level on and from where a first step without a call may lead.
        """
        total, flow, calls = self._products(paths), self.settings.flow, self.settings.calls
        grids = {rule: searched(total, calls, rule, flow=flow) for rule in ONE_CALL}
        starts = list(self.starts)
        for rule, grid in grids.items():
            starts += [start(f"{name} searched for {rule}", s, grid) for name, s in solvers(flow).items()]
        self.tried = starts
        quick = self._first_distances(starts, TRIED).log().mean(1)
        runners = [starts[n] for n in quick.argsort(stable=True)[:RUNNERS].tolist()]
        nearer = self._first_distances(runners, self.config.batch_size)
        ranked = torch.tensor([compared(each[None], nearer[:1]) for each in nearer]).argsort(stable=True)
        finalists = [runners[n] for n in ranked[:FINALISTS].tolist()]
        for finalist in finalists:
            table, runs = self.written(finalist), dict[int, list[Step]]()
            distances = self._distances(table, runs)
            if finalist is finalists[0] or compared(distances, self.distances) < 1:
                self.start, self.predictor, self.current = finalist.name, table, table
                self.distances, self._runs = distances, runs
        worth = [self.current.config.sigmas, *(grids[rule] for rule in SOLVED_FOR)]
        listed = [start("", Ipndm(ORDER), grid) for grid in worth]
        for level in self._first_levels(total):
            self.gains[level] = self._first_gains(paths, level)
            grid = searched(below(total, level), calls, "weights", flow=flow)
            listed.append(start("", Ipndm(ORDER), (total.levels[0], *grid[1:]), level))
        known = {(one.first_sigma, one.levels): one for one in listed}
        self.solved_quickly = len(known)
        return list(known.values())

    def _first_levels(self, total: Gram) -> list[float]:
        """Where a first step without a call may lead, if samples show the frequencies that it looks at."""
        found = first_levels(total, FIRST_RATIOS, flow=self.settings.flow) if self._channels else []
        return [level for level in found if len(below(total, level).levels) > self.settings.calls]

    def _solve(self, listed: Sequence[Start], paths: Mapping[int, Path]) -> None:
        """Take the weights that lead nearest to the teacher at every level, on the grid where they do best."""
        goals = [goal for goal in self.fitted if goal.number in paths]
        batches = self.fitted.batches()
        few = [goal for goal in goals if batches[goal.number][1].start < QUICK]
        solved = [self._solved(one, few, paths)[0] for one in listed]
        quick = torch.stack([self.judged.distances(self._ends_of(table), QUICK) for table in solved])
        ranked = quick.log().mean((1, 2)).argsort(stable=True)  # of few, one odd sample would decide otherwise
        best, least = self.current, torch.empty(0)
        for number in ranked[:SOLVED].tolist():
            table, distances = self._solved(listed[number], goals, paths)
            distances = torch.cat([distances, self.judged.distances(self._ends_of(table))], 1)
            if not least.numel() or compared(distances, least) < 1:
                best, least = table, distances
        runs: dict[int, list[Step]] = {}
        distances = self._distances(best, runs)
        if compared(distances, self.distances) < 1:
            self.current, self.distances, self._runs = best, distances, runs

    def _solved(self, begin: Start, goals: Sequence[Goal], paths: Mapping[int, Path]) -> tuple[MultistepTable, Tensor]:
        """The weights of a grid in closed form, and the distances (groups, rows) of these goals that they end with."""
        table, solved = self.written(begin, spectral=self._bands), []
        batches = self.fitted.batches()
        squares = torch.zeros(len(self.metered), self.config.trajectories, dtype=torch.float64)
        for group, alone in enumerate(table.alone()):
            own = [(goal, paths[goal.number]) for goal in goals if goal.group == group]
            made, finished = least_squares(alone, own, self.workers)
            solved.append(made)
            for (goal, _), end in zip(own, finished, strict=True):
                rows = batches[goal.number][1]
                apart = (end - goal.target).double().square().flatten(1).mean(1).cpu()
                squares[group, rows.start : rows.stop] = apart.nan_to_num(torch.inf)
        squares = self.workers.sum(squares)
        return together(table.config, solved), squares[:, (squares > 0).any(0)].sqrt()

    def _ends_of(self, table: MultistepTable) -> Callable[[Goal], Sample]:
        return lambda goal: self._run(goal, table)[-1].x

    def written(self, start: Start, *, spectral: bool = False) -> MultistepTable:
        """A start as a table, the same at every guidance scale."""
        level, channels = start.first_sigma, self._channels if start.first_sigma else 0
        config = multistep_config(self.settings, start.levels, first_sigma=level, channels=channels, spectral=spectral)
        table = MultistepTable(config)
        table.weights.copy_(torch.tensor(start.weights, dtype=torch.float64).expand_as(table.weights))
        if start.first_sigma:
            table.gains.copy_(self.gains[start.first_sigma])
        return table

    def _first_distances(self, starts: Sequence[Start], count: int) -> Tensor:
        """The distances (starts, rows) of the very first trajectories, of all workers."""
        first = range(min(count, self.config.batch_size, self.config.trajectories))
        squares = torch.zeros(len(starts), len(first), dtype=torch.float64)
        goal, (group, rows) = next(iter(self.fitted)), self.fitted.batches()[0]
        rows = range(rows.start, min(rows.stop, first.stop))
        if group == 0 and rows:
            few = self._few(goal, rows)
            for n, start in enumerate(starts):
                end = self._run(few, self.written(start))[-1].x
                squares[n, rows.start : rows.stop] = (end - few.target).double().square().flatten(1).mean(1).cpu()
        return self.workers.sum(squares.nan_to_num(torch.inf)).sqrt()

    def _few(self, goal: Goal, rows: range) -> Goal:
        """The first trajectories of a batch."""
        x, denoiser = self.metered[goal.group](rows)
        return replace(goal, x=x, denoiser=denoiser, target=goal.target[: len(rows)])

    def _judge(self) -> FitEvent:
        """Measure the table under way, and keep it if it is the best so far on all trajectories there are.

        There are many more of them than numbers, and the more, the less a few odd ones decide. But on what is held
        out it must be better than the start.
        """
        last: list[tuple[Sample, Sample]] = []

        def draw(goal: Goal) -> Sample:
            end = self._run(goal, self.current)[-1].x
            last[:] = [(end, goal.target)]
            return end

        judged = self.judged.distances(draw)
        self.spent = int(self.workers.sum(torch.tensor(self.model_calls)))
        both = torch.cat([self.distances, judged], 1)
        if not self.history:
            self.best = self.base = both
        elif compared(both, self.best) < 1:
            error, base = self._held_out_errors(both)
            if error < base:
                self.best, self.predictor = both, self.current
        error, held_out = (float(values.square().mean().sqrt()) for values in (self.distances, judged))
        self.history.append([error, held_out])
        return FitEvent(self.iteration, error, held_out, (), self.model_calls, *last[0])

    def _improve(self) -> bool:
        """One iteration of Levenberg and Marquardt; whether it gained anything."""
        mine = self._mine(self.iteration)
        for goal in self.fitted:
            if goal.number in mine:
                self.expansions[goal.number] = self._expanded(goal, mine[goal.number])
        here = numbers_of(self.current)
        for attempt in range(ATTEMPTS):
            if attempt and not self._affords_another():
                break
            trial = table_of(self.current, self._minimum(here))
            runs: dict[int, list[Step]] = {}
            distances = self._distances(trial, runs)
            if (left := compared(distances, self.distances)) < 1:
                self.current, self.distances, self._runs = trial, distances, runs
                self.damping *= EASIER
                if self._bands:
                    self._polish()
                return left < (1 - self.config.tolerance) ** 2
            self.damping *= HARDER
        return False

    def _polish(self) -> None:
        """Solve for the last interval's bands again, from where its start is now: that takes no model call."""
        goals = list(self.fitted)
        missing = torch.tensor(sum(goal.number not in self._runs for goal in goals))
        if int(self.workers.sum(missing)):  # memory was short
            return
        runs = {goal.number: moved_to(self._runs[goal.number], goal.x.device) for goal in goals}
        last, tables = self.settings.calls - 1, self.current.alone()
        for group, table in enumerate(tables):
            sums = Sums.zeros(BANDS, len(table.vectors(last)))
            for goal in goals:
                if goal.group == group:
                    start = runs[goal.number][-1].start
                    slope = (goal.target - start.x) / -start.sigma
                    history = tuple(step.start for step in runs[goal.number])
                    sums.add([*multistep_vectors(history, guided=self.settings.guided), slope])
            sums.products, sums.sizes = self.workers.sum(sums.products), self.workers.sum(sums.sizes)
            table.spectral[last, table.vectors(last)] = sums.solved_apart(table.row(last)).to(table.spectral)
        polished, ends = together(self.current.config, tables), {}
        for goal in goals:
            *before, step = runs[goal.number]
            history, solver = tuple(s.start for s in [*before, step]), polished.solver(guidance=self._guidance(goal))
            x = solver.to_next(history, torch.zeros_like(step.start.sigma), None, Stage(last + 1, last + 1, True))
            ends[goal.number] = [*before, replace(step, x=x)]
        distances = self.fitted.distances(lambda goal: ends[goal.number][-1].x)
        if compared(distances, self.distances) < 1:
            self.current, self.distances = polished, distances
            self._runs = {number: moved_to(steps, "cpu") for number, steps in ends.items()}

    def _affords_another(self) -> bool:
        """Whether the budget allows one more attempt, judged as every iteration is."""
        config, groups = self.config, len(self.metered)
        spent = int(self.workers.sum(torch.tensor(self.model_calls)))
        attempt = self.settings.calls * groups * (config.trajectories + config.held_out)
        return not config.budget or spent + attempt <= config.budget

    def _minimum(self, here: Tensor) -> Tensor:
        """Where the expanded error is smallest, not straying far from `here` where the damping is large."""
        groups, count = here.shape
        normal, gradient = torch.zeros(groups, count, count).double(), torch.zeros(groups, count).double()
        for expansion in self.expansions.values():
            group = expansion.group
            normal[group] += expansion.normal
            gradient[group] += expansion.gradient + expansion.normal @ (here[group] - expansion.numbers)
        normal, gradient = self.workers.sum(normal), self.workers.sum(gradient)
        diagonal = normal.diagonal(dim1=1, dim2=2)
        floor = 1e-9 * diagonal.amax(1, keepdim=True) + torch.finfo(torch.float64).tiny
        damped = normal + (self.damping * diagonal + floor).diag_embed()
        change: Tensor = torch.linalg.solve(damped, gradient)
        return here - change

    def _expanded(self, goal: Goal, rows: range) -> Expansion:
        """Run these rows of a batch once, and once more for every number from where it acts on."""
        steps = moved_to(self._runs.get(goal.number, []), goal.x.device)
        if len(rows) < len(goal.x):
            goal, steps = self._few(goal, rows), []
        steps = steps or self._run(goal, self.current)
        end, here = steps[-1].x, numbers_of(self.current)
        columns = []
        for place, number in enumerate(self.layout):
            step = -DIFFERENCE if number == Number("scale_time", 0) else DIFFERENCE  # the model knows nothing above
            changed = here.clone()
            changed[goal.group, place] += step
            varied = table_of(self.current, changed)
            moved = self._run(goal, varied, self._resume(goal, varied, steps, number))[-1].x
            columns.append(((moved - end) / step).flatten(1))
        jacobian = torch.stack(columns, 1)
        residual = (end - goal.target).flatten(1)
        counts = (float(far(self.distances)[goal.group]) / residual.square().mean(1).sqrt()).clamp(max=1)
        normal = (counts[:, None, None] * (jacobian @ jacobian.mT)).double().sum(0).cpu()
        gradient = (counts[:, None] * (jacobian @ residual[..., None]).squeeze(-1)).double().sum(0).cpu()
        return Expansion(goal.group, here[goal.group], normal, gradient)

    def _resume(self, goal: Goal, varied: MultistepTable, steps: Sequence[Step], number: Number) -> Resume | None:
        """Where the run with another number leaves the one that is known."""
        k = number.interval
        if number.kind != "scale_time":
            return Resume(k, steps[k].start, steps[k - 1].history if k else ())
        guidance = self._guidance(goal)
        sigma = steps[k].start.sigma
        start = evaluate(goal.denoiser, steps[k].start.x, sigma, varied.planner(guidance=guidance).told(k, sigma))
        return Resume(k, start, steps[k - 1].history if k else ())

    def _guidance(self, goal: Goal) -> float | None:
        return self.settings.guidances[goal.group] if self.settings.guidances else None

    def _run(self, goal: Goal, table: MultistepTable, resume: Resume | None = None) -> list[Step]:
        grid = torch.tensor(table.config.sigmas, dtype=torch.float64)
        guidance = self._guidance(goal)
        return ends(goal, grid, table.solver(guidance=guidance), table.planner(guidance=guidance), None, resume)

    def _distances(self, table: MultistepTable, runs: dict[int, list[Step]]) -> Tensor:
        """How far every sample ends from its goal; `runs` keeps the runs that showed it, as many as memory allows."""
        kept = 0

        def draw(goal: Goal) -> Sample:
            nonlocal kept
            steps = self._run(goal, table)
            kept += 2 * len(steps) * goal.x.numel() * goal.x.element_size()
            if kept <= self.config.keep_bytes:
                runs[goal.number] = moved_to(steps, "cpu")
            return steps[-1].x

        return self.fitted.distances(draw)

    def state_dict(self) -> dict[str, Any]:
        """All that continues this fit exactly; `files.save_state` writes it. An iteration begun is begun again."""
        return {
            "config": asdict(self.config),
            "predictor_config": asdict(self.settings),
            "starts": [start.name for start in self.starts],
            "start": self.start,
            "tables": [[asdict(t.config), t.state_dict()] for t in (self.predictor, self.current)],
            "solved_quickly": self.solved_quickly,
            "iteration": self.iteration,
            "damping": self.damping,
            "distances": {"distances": self.distances, "best": self.best, "base": self.base},
            "done": self.done,
            "history": [list(errors) for errors in self.history],
            "expansions": {str(n): [e.group, e.numbers, e.normal, e.gradient] for n, e in self.expansions.items()},
            "model_calls": self.model_calls,
            "spent": self.spent,
            "goals": [self.fitted.state_dict(), self.judged.state_dict()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. Raises ValueError if it belongs to a fit with other settings."""
        refuse_other_settings(state, {"config": self.config, "predictor_config": self.settings})
        if state["starts"] != [start.name for start in self.starts]:
            raise ValueError("This training state was made with other starts.")
        tables = []
        for header, learned in state["tables"]:
            tables.append(MultistepTable(PredictorConfig.from_header(header)))
            tables[-1].load_state_dict(learned)
        self.solved_quickly = state["solved_quickly"]
        self.predictor, self.current = tables
        self.start, self.iteration, self.damping = state["start"], state["iteration"], state["damping"]
        for name, value in state["distances"].items():
            setattr(self, name, value)
        self.done = state["done"]
        self.history = [list(errors) for errors in state["history"]]
        self.expansions = {int(n): Expansion(*values) for n, values in state["expansions"].items()}
        self._earlier_calls, self.spent = state["model_calls"], state["spent"]
        for goals, saved in zip((self.fitted, self.judged), state["goals"], strict=True):
            goals.load_state_dict(saved)

    def summary(self) -> dict[str, Any]:
        """How this predictor came about, for the header of its file; errors are of what is held out.

        The base solver is the start: the best unlearned solver and grid on the fitted trajectories. Errors are RMSEs,
        but that those far beyond the usual one count as in Huber's loss: a single odd sample of few says little.
        """
        error, base = self._held_out_errors(self.best)
        return {
            **asdict(self.config),
            "objective": "end to end",
            "teacher": f"converged, {self.config.teacher_calls} calls",
            "start": self.start,
            "iterations": self.iteration,
            "model_calls": self.spent,
            "model_calls_on_paper": self.floor,
            "error": error,
            "base_solver_error": base,
            "gain": 1 - error / base,
        }


def far(distances: Tensor) -> Tensor:
    """From which distance on samples count linearly (groups,), in a set of distances (groups, rows)."""
    return FAR * distances.clamp(min=torch.finfo(torch.float64).tiny).log().mean(1).exp()


def huber(distances: Tensor, limit: Tensor) -> Tensor:
    """Huber's loss (groups,) of distances (groups, rows): their mean square, but beyond the limit they count linearly.

    Huber 1964, "Robust estimation of a location parameter", twice its equation.
    """
    limit = limit[:, None]
    return torch.where(distances <= limit, distances**2, limit * (2 * distances - limit)).mean(1)


def compared(distances: Tensor, others: Tensor) -> float:
    """Huber's loss of distances (groups, rows) over that of others, the mean of all groups; below 1 they are better."""
    limit = torch.minimum(far(distances), far(others))
    return float((huber(distances, limit) / huber(others, limit)).nan_to_num(nan=math.inf).mean())


def layout(intervals: int, *, guided: bool) -> list[Number]:
    """The numbers of a table at one guidance scale, but for its first step's gains, which stay as they are."""
    triangles: tuple[Kind, ...] = ("weight", "guided") if guided else ("weight",)
    vectors: tuple[Kind, ...] = ("first", "scale_time")
    weights = [
        Number(kind, k, slope)
        for kind in triangles
        for k in range(intervals)
        for slope in range(0 if k == intervals - 1 else max(0, k + 1 - NEWEST[kind]), k + 1)
    ]
    return weights + [Number(kind, k) for kind in vectors for k in range(intervals)]


def numbers_of(table: MultistepTable) -> Tensor:
    """The numbers (guidances, count) in the layout's order, of scale_time the logarithm, in float64."""
    places = _places(table)
    return torch.cat([values.double().cpu()[:, where] for values, where in zip(_values(table), places, strict=True)], 1)


def table_of(like: MultistepTable, numbers: Tensor) -> MultistepTable:
    """The inverse: a table of the same settings and first step, with these numbers."""
    table = MultistepTable(like.config)
    table.load_state_dict(like.state_dict())
    begin = 0
    for values, where in zip(_values(table), _places(table), strict=True):
        values[:, where] = numbers[:, begin : begin + len(where)].to(values)
        begin += len(where)
    table.scale_time.copy_(values.exp().reshape(table.scale_time.shape))
    return table


def _values(table: MultistepTable) -> list[Tensor]:
    """What its numbers are kept in, a row for each guidance scale; the last is a copy, the logarithm of scale_time."""
    n = table.config.intervals
    kept = [table.weights, *([table.guided] if table.config.guided else [])]
    rows = [values.view(-1, n * n) for values in kept]
    return [*rows, table.first.view(-1, n), table.scale_time.log().reshape(-1, n)]


def _places(table: MultistepTable) -> list[list[int]]:
    """Where in those rows the layout's numbers are."""
    n, numbers = table.config.intervals, layout(table.config.intervals, guided=table.config.guided)
    kinds = dict.fromkeys(number.kind for number in numbers)
    return [
        [number.interval * (n if kind in NEWEST else 1) + number.slope for number in numbers if number.kind == kind]
        for kind in kinds
    ]
