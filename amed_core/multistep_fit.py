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

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .beginnings import Beginning, Found, Part
from .driver import Resume, evaluate
from .end_to_end import ATTEMPTS, DAMPING, EASIER, HARDER, FitConfig, FitEvent, moved_to
from .goals import IPNDM, Goal, Goals
from .least_squares import Sums
from .multistep import MultistepTable, together
from .parallel import ALONE, Workers
from .predictor import Look, PredictorConfig
from .robust import compared, far, huber
from .solvers import multistep_vectors
from .sources import HELD_OUT, Metered
from .spectrum import BANDS
from .starts import Start
from .states import refuse_other_settings
from .table_numbers import Number, layout, numbers_of, table_of
from .table_runs import TableRuns
from .types import Sample, Source, Stage, Step

DIFFERENCE = 1e-2  # of a weight, and of the logarithm of a told level, for the derivatives
# Sample calls for derivatives in an iteration, as far as whole batches or one part of a batch allow; in the first one,
# which knows none of earlier iterations, twice as many.
SPENT = 2000


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
        self.metered = metered = [Metered(source) for source in listed]
        shared = (config.batch_size, settings, config.teacher_calls, workers, IPNDM)
        fitted = Goals(metered, range(config.trajectories), *shared)
        judged = Goals(metered, range(HELD_OUT, HELD_OUT + config.held_out), *shared)
        self.on = TableRuns(settings, config, metered, fitted, judged, workers)
        self.beginning = Beginning(self.on, starts, without)
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
        self.solved_quickly = self.beginning.most_grids  # grids that are solved for on the first batches
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

        Those of the beginning, which is the first; in each of the others, for the batches that are expanded, every
        number's calls that come after it, and for all trajectories one attempt at a smaller error.
        """
        calls, config, groups = self.settings.calls, self.config, len(self.metered)
        count, held_out = groups * config.trajectories, groups * config.held_out
        total = self.beginning.calls(self.solved_quickly) + calls * (2 * held_out + count)  # with the first iteration
        for iteration in range(1, iterations):
            batches = [place % self._per_group for place in self._due(iteration)]
            rows = [min(self._each, config.trajectories - n * config.batch_size) for n in batches]
            again = calls if self._each < config.batch_size else 0  # parts of batches are run once more
            total += sum(rows) * (self._derivatives + again) + calls * (count + held_out)
        return total

    @property
    def _derivatives(self) -> int:
        """The model calls of a trajectory's expansion: for every number, those that come after it."""
        # A second model only leaves numbers out.
        numbers = layout(self.settings.intervals, guided=self.settings.guided)
        return sum(self.settings.calls - number.interval - (number.kind != "scale_time") for number in numbers)

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
        for number, (group, rows) in enumerate(self.on.fitted.batches()):
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
            paths = self.beginning.paths()
            found, grids = self.beginning.unlearned(paths)
            self.solved_quickly = len(grids)
            self._take(found)
            unlearned = self._judge()
            self._take(self.beginning.solved(found, grids, paths))
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

    def _take(self, found: Found) -> None:
        """Go on from here."""
        self.start, self.current, self.distances, self._runs = found.name, found.table, found.distances, found.runs

    def _held_out_errors(self, distances: Tensor) -> tuple[float, float]:
        """These distances' error on what is held out, and the start's; both by the limit of the start's."""
        held_out, base = (d[:, self.config.trajectories :] for d in (distances, self.base))
        error, base_error = (float(huber(d, far(base)).mean().sqrt()) for d in (held_out, base))
        return error, base_error

    def _judge(self) -> FitEvent:
        """Measure the table under way, and keep it if it is the best so far on all trajectories there are.

        There are many more of them than numbers, and the more, the less a few odd ones decide. But on what is held
        out it must be better than the start.
        """
        last: list[tuple[Sample, Sample]] = []

        def draw(goal: Goal) -> Sample:
            end = self.on.run(goal, self.current)[-1].x
            last[:] = [(end, goal.target)]
            return end

        judged = self.on.judged.distances(draw)
        self.spent = int(self.workers.sum(torch.tensor(self.model_calls)))
        both = torch.cat([self.distances, judged], 1)
        if not self.history:
            self.best = self.base = both
            self.predictor = self.current
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
        for goal in self.on.fitted:
            if goal.number in mine:
                self.expansions[goal.number] = self._expanded(goal, mine[goal.number])
        here = numbers_of(self.current)
        for attempt in range(ATTEMPTS):
            if attempt and not self._affords_another():
                break
            trial = table_of(self.current, self._minimum(here))
            runs: dict[int, list[Step]] = {}
            distances = self.on.distances(trial, runs)
            if (left := compared(distances, self.distances)) < 1:
                self.current, self.distances, self._runs = trial, distances, runs
                self.damping *= EASIER
                if self.current.config.spectral and "polish" not in self.beginning.without:  # an unlearned start has no bands
                    self._polish()
                return left < (1 - self.config.tolerance) ** 2
            self.damping *= HARDER
        return False

    def _polish(self) -> None:
        """Solve for the last interval's bands again, from where its start is now: that takes no model call."""
        goals = list(self.on.fitted)
        missing = torch.tensor(sum(goal.number not in self._runs for goal in goals))
        if int(self.workers.sum(missing)):  # memory was short
            return
        runs = {goal.number: moved_to(self._runs[goal.number], goal.x.device) for goal in goals}
        last, tables = self.settings.calls - 1, self.current.alone()
        known = self.current.known(last)
        for group, table in enumerate(tables):
            sums = Sums.zeros(BANDS, len(table.vectors(last)))
            for goal in goals:
                if goal.group == group:
                    start = runs[goal.number][-1].start
                    slope = (goal.target - start.x) / -start.sigma
                    history = tuple(step.start for step in runs[goal.number])
                    sums.add([*multistep_vectors(history[known.start :], guided=self.settings.guided), slope])
            sums.products, sums.sizes = self.workers.sum(sums.products), self.workers.sum(sums.sizes)
            table.spectral[last, table.vectors(last)] = sums.solved_apart(table.row(last)).to(table.spectral)
        polished, ends = together(self.current.config, tables), {}
        for goal in goals:
            *before, step = runs[goal.number]
            history, solver = tuple(s.start for s in [*before, step]), polished.solver(guidance=self.on.guidance(goal))
            x = solver.to_next(history, torch.zeros_like(step.start.sigma), None, Stage(last + 1, last + 1, True))
            ends[goal.number] = [*before, replace(step, x=x)]
        distances = self.on.fitted.distances(lambda goal: ends[goal.number][-1].x)
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
            goal, steps = self.on.few(goal, rows), []
        steps = steps or self.on.run(goal, self.current)
        end, here = steps[-1].x, numbers_of(self.current)
        columns = []
        config = self.current.config
        for place, number in enumerate(layout(config.intervals, guided=config.guided, switch=config.switch)):
            step = -DIFFERENCE if number == Number("scale_time", 0) else DIFFERENCE  # the model knows nothing above
            changed = here.clone()
            changed[goal.group, place] += step
            varied = table_of(self.current, changed)
            moved = self.on.run(goal, varied, self._resume(goal, varied, steps, number))[-1].x
            columns.append(((moved - end) / step).flatten(1))
        jacobian = torch.stack(columns, 1)
        residual = (end - goal.target).flatten(1)
        counts = (float(far(self.distances)[goal.group]) / residual.square().mean(1).sqrt()).clamp(max=1)
        normal = (counts[:, None, None] * (jacobian @ jacobian.mT)).cpu().double().sum(0)
        gradient = (counts[:, None] * (jacobian @ residual[..., None]).squeeze(-1)).cpu().double().sum(0)
        return Expansion(goal.group, here[goal.group], normal, gradient)

    def _resume(self, goal: Goal, varied: MultistepTable, steps: Sequence[Step], number: Number) -> Resume | None:
        """Where the run with another number leaves the one that is known."""
        k = number.interval
        if number.kind != "scale_time":
            return Resume(k, steps[k].start, steps[k - 1].history if k else ())
        guidance = self.on.guidance(goal)
        sigma = steps[k].start.sigma
        start = evaluate(goal.denoiser, steps[k].start.x, sigma, varied.planner(guidance=guidance).told(k, sigma))
        return Resume(k, start, steps[k - 1].history if k else ())

    def state_dict(self) -> dict[str, Any]:
        """All that continues this fit exactly; `files.save_state` writes it. An iteration begun is begun again."""
        return {
            "config": asdict(self.config),
            "predictor_config": asdict(self.settings),
            "starts": [start.name for start in self.beginning.starts],
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
            "goals": [self.on.fitted.state_dict(), self.on.judged.state_dict()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. Raises ValueError if it belongs to a fit with other settings."""
        refuse_other_settings(state, {"config": self.config, "predictor_config": self.settings})
        if state["starts"] != [start.name for start in self.beginning.starts]:
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
        for goals, saved in zip((self.on.fitted, self.on.judged), state["goals"], strict=True):
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
