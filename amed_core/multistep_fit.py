"""Fitting a multistep table to the end of the trajectory, with no gradient through the model.

It starts from the unlearned solver that does best on this very model, among the usual grids and those searched on the
teacher's paths, so that it can only get better. The first iteration takes the weights in closed form, interval by
interval. Those after it move weights and told levels together, by Levenberg's and Marquardt's method. The grid's own
levels stay where the search put them: what the model answers depends on the told ones alone, and all else that a level
does, weights can do. A number's derivative is the difference of two sampling runs that part where it acts.
Expansions of the error age slowly, so that in an iteration only some of the trajectories are expanded anew.

Samples near a fork of the ODE end far from the teacher whatever the solver, and a few of them would outweigh all
others: what is minimised grows only linearly beyond some times the usual distance (Huber's loss).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from .driver import Resume, evaluate
from .end_to_end import ATTEMPTS, DAMPING, EASIER, HARDER, FitConfig, FitEvent, moved_to
from .goals import IPNDM, Goal, Goals, ends
from .grids import ONE_CALL, Rule, searched
from .least_squares import least_squares
from .multistep import LEARNED, MultistepTable, multistep_config, together
from .parallel import ALONE, Workers
from .paths import ORDER, Path, gram, levels, path, sum_of
from .predictor import Look, PredictorConfig
from .solvers import Ipndm
from .sources import HELD_OUT, Metered
from .starts import Start, solvers, start
from .states import refuse_other_settings
from .types import Sample, Source, Step

DIFFERENCE = 1e-2  # of a weight, and of the logarithm of a told level, for the derivatives
TRIED = 4  # trajectories that all starts are tried on,
RUNNERS, FINALISTS = 8, 2  # and how many of them are tried on the first batch, and on all
FAR = 3.0  # times the geometric mean of all distances: beyond it they count linearly
SPENT = 2000  # sample calls for derivatives in an iteration, as far as whole batches or one part of a batch allow


Kind = Literal["weight", "first", "scale_time"]


@dataclass(frozen=True)
class Number:
    """One number of a table: what it is, and which interval it acts in."""

    kind: Kind
    interval: int
    slope: int = 0  # of a weight


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
    `starts` are what it may begin with. `predictor` is always the best so far.
    """

    def __init__(
        self,
        predictor: MultistepTable,
        sources: Source | Sequence[Source],
        config: FitConfig,
        starts: Sequence[Start],
        look: Look | None = None,
        workers: Workers = ALONE,
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
        self.layout = layout(settings.intervals)
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
        total = once + calls * (4 * count + held_out)  # with the first iteration
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
        count = min(max(1, SPENT // (self._derivatives * self._each)), total)
        return {(count * (iteration - 1) + n) % total for n in range(count)}

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
            self.done = not self._improve()
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

    def _searched(self, paths: Mapping[int, Path]) -> dict[Rule, tuple[float, ...]]:
        """The grids that are searched on the teacher's paths."""
        total = sum_of([gram(passed) for passed in paths.values()])
        if not bool(total.products.isfinite().all()):
            raise FloatingPointError(
                "The slow sampler's pictures are not finite. Check the model's precision (try --force-fp32 or another "
                "weight dtype) and its LoRAs."
            )
        total = replace(total, products=self.workers.sum(total.products), elements=total.elements * self.workers.count)
        return {rule: searched(total, self.settings.calls, rule, flow=self.settings.flow) for rule in ONE_CALL}

    def _begin(self, paths: Mapping[int, Path]) -> list[tuple[float, ...]]:
        """Take the start that does best, first on a few trajectories, then, of the best, on more and on all.

        Returns the grids whose weights are worth solving for: the best start's, and those that are searched.
        """
        grids = self._searched(paths)
        starts = list(self.starts)
        for rule, grid in grids.items():
            starts += [start(f"{name} searched for {rule}", s, grid) for name, s in solvers(self.settings.flow).items()]
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
        return list(dict.fromkeys([self.current.config.sigmas, grids["weights"], grids["ipndm"]]))

    def _solve(self, grids: Sequence[tuple[float, ...]], paths: Mapping[int, Path]) -> None:
        """Take the weights that lead nearest to the teacher at every level, on the grid where they do best."""
        goals = [goal for goal in self.fitted if goal.number in paths]
        best, least = self.current, math.inf
        for grid in grids:
            table = self.written(start("", Ipndm(ORDER), grid))
            solved, logs = [], torch.zeros(2, dtype=torch.float64)
            for group, alone in enumerate(table.alone()):
                batches = [(goal, paths[goal.number]) for goal in goals if goal.group == group]
                made, finished = least_squares(alone, batches, self.workers)
                solved.append(made)
                for (goal, _), end in zip(batches, finished, strict=True):
                    apart = (end - goal.target).double().square().flatten(1).mean(1)
                    logs += torch.stack([apart.nan_to_num(torch.inf).log().sum().cpu(), torch.tensor(len(apart))])
            total, count = self.workers.sum(logs)
            if float(total / count) < least:
                best, least = together(table.config, solved), float(total / count)
        runs: dict[int, list[Step]] = {}
        distances = self._distances(best, runs)
        if compared(distances, self.distances) < 1:
            self.current, self.distances, self._runs = best, distances, runs

    def written(self, start: Start) -> MultistepTable:
        """A start as a table, the same at every guidance scale."""
        table = MultistepTable(multistep_config(self.settings, start.levels))
        table.weights.copy_(torch.tensor(start.weights, dtype=torch.float64).expand_as(table.weights))
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
            trial = table_of(self.current.config, self._minimum(here))
            runs: dict[int, list[Step]] = {}
            distances = self._distances(trial, runs)
            if (left := compared(distances, self.distances)) < 1:
                self.current, self.distances, self._runs = trial, distances, runs
                self.damping *= EASIER
                return left < (1 - self.config.tolerance) ** 2
            self.damping *= HARDER
        return False

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
            varied = table_of(self.current.config, changed)
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
            "tables": [
                [list(table.config.sigmas), *(getattr(table, name).clone() for name in LEARNED)]
                for table in (self.predictor, self.current)
            ],
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
        for sigmas, *learned in state["tables"]:
            tables.append(MultistepTable(multistep_config(self.settings, sigmas)))
            for name, values in zip(LEARNED, learned, strict=True):
                getattr(tables[-1], name).copy_(values)
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


def layout(intervals: int) -> list[Number]:
    """The numbers of a table at one guidance scale."""
    weights = [Number("weight", k, slope) for k in range(intervals) for slope in range(k + 1)]
    kinds: tuple[Kind, ...] = ("first", "scale_time")
    return weights + [Number(kind, k) for kind in kinds for k in range(intervals)]


def numbers_of(table: MultistepTable) -> Tensor:
    """The numbers (guidances, count) in the layout's order, of scale_time the logarithm, in float64."""
    n = table.config.intervals
    weights = table.weights.double().cpu().reshape(-1, n, n)
    rows, columns = torch.tril_indices(n, n)
    first, scale_time = (values.double().cpu().reshape(-1, n) for values in (table.first, table.scale_time))
    return torch.cat([weights[:, rows, columns], first, scale_time.log()], 1)


def table_of(config: PredictorConfig, numbers: Tensor) -> MultistepTable:
    """The inverse: a table of these settings."""
    n = config.intervals
    table = MultistepTable(config)
    rows, columns = torch.tril_indices(n, n)
    table.weights.view(-1, n, n)[:, rows, columns] = numbers[:, : len(rows)].to(table.weights)
    table.first.copy_(numbers[:, len(rows) : -n].reshape(table.first.shape))
    table.scale_time.copy_(numbers[:, -n:].exp().reshape(table.scale_time.shape))
    return table
