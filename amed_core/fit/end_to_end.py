"""Fitting a table to the end of the trajectory: the error of the finished sample, with no gradient through the model.

A table has a handful of numbers, and a number's derivative is the difference of two sampling runs that part where it
acts. With the derivatives J of every sample's end, the squared error |e + J delta|^2 is known for all small changes,
with no further model call. Levenberg and Marquardt's damped step leads to where it is smallest, and there all is
measured again. What was linearised ages slowly. So an iteration expands only some of the trajectories anew.

Samples near a fork of the ODE end far from the teacher whatever the solver. A few of them would outweigh all others, so
what is minimised grows only linearly beyond some times the usual distance (Huber's loss).
"""

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from scipy.optimize import lsq_linear
from torch import Tensor

from ..config import PredictorConfig
from ..driver import Resume, asked
from ..predictor import Predictor, build, check_numbers
from ..types import Method, Sample, Step
from .closed_form import inner_products
from .finite import finite
from .huber import compared, huber, linear_from
from .parameters import Acts, Parameters
from .protocol import (
    FitEvent,
    FitSummary,
    ForOneUse,
    StateError,
)
from .reading import (
    of_count,
    of_distances,
    of_finite,
    of_kind,
    of_number,
    of_squares,
    of_text,
    reading_state,
    refuse_other_settings,
)
from .runs import RunCache, Runs
from .targets import Target, rmse
from .teacher import MOST_CALLS
from .turns import Turns

DAMPING, EASIER, HARDER = 1e-2, 0.2, 5.0  # Levenberg's and Marquardt's: at first, after a gain, after a failure
ATTEMPTS = 5  # at a smaller error, per iteration
LEAST_DAMPING, MOST_DAMPING = 1e-100, 1e100  # in a state: no fit comes near to either
MUCH_NEARER = 0.8  # times the baseline's geometric mean of what is held out
TOLERATED = 1.02  # of the error, for what looks more like the teacher's samples


@dataclass(frozen=True)
class Found:
    """A method that a fit may begin with, how far fitted samples end from their targets (rows,), and the runs."""

    name: str
    method: Method
    distances: Tensor
    cache: RunCache
    table: Predictor | None  # None of a baseline that is no table
    teacher_error: float = 0.0  # the teacher's own, an RMSE, where a start knows it


class Start(Protocol):
    """How a fit finds the table that it begins with."""

    @property
    def names(self) -> list[str]:
        """What it chooses among, by which a state knows it again."""

    @property
    def model_calls(self) -> int:
        """The fewest sample calls, of all workers, up to the first iteration, with the targets."""

    refused: int
    """Sample calls, of all workers, that a teacher led to which was not good enough."""

    def found(self) -> Iterator[Found]:
        """The baseline, which learns nothing, and then tables, each of which may be better."""

    def refined(self, table: Predictor, distances: Tensor, cache: RunCache) -> tuple[Predictor, Tensor, RunCache]:
        """What can be had in closed form after a step, with no model call; the same if that is nothing.

        `distances` (rows,) are those of the table's fitted samples to their targets, of which `cache` has the runs.
        """

    @property
    def finishing_calls(self) -> int:
        """The most sample calls, of all workers, of `finished` and of judging what it makes."""

    def finished(self, table: Predictor, cache: RunCache) -> tuple[Predictor, Tensor] | None:
        """What looks more like the teacher's samples, at hardly more error, and its fitted distances (rows,).

        None if there is nothing to do. `cache` has runs of the table, if it has any.
        """


@dataclass(frozen=True)
class Linearised:
    """The summed loss of a batch near `numbers`, but for constants: 2 gradient delta + delta normal delta."""

    numbers: Tensor  # (count,), in float64 as all of these
    normal: Tensor  # J^T J (count, count)
    gradient: Tensor  # J^T e (count,)


@dataclass(frozen=True)
class FitState:
    """All that changes in a fit. It is replaced as a whole, so that a fit that is stopped inside a step repeats it."""

    best: Predictor  # what the fit hands over
    current: Predictor  # the table under way
    baseline: str = ""
    iteration: int = 0
    done: bool = False
    finished: bool = False  # nothing is left to do
    damping: float = DAMPING
    used: int = 0  # sample calls that this much takes if nothing is repeated: what the budget is compared with
    fitted: Tensor = field(default_factory=lambda: torch.empty(0))  # distances (fitted,) of the current table
    best_distances: Tensor = field(default_factory=lambda: torch.empty(0))  # (fitted + held_out,) of the best one
    base_distances: Tensor = field(default_factory=lambda: torch.empty(0))  # the same of the baseline
    begun_error: float = math.inf  # on held-out trajectories, of the table that the iterations began with
    teacher_error: float = 0.0  # the teacher's own, an RMSE; 0 if it is not known
    best_is_table: bool = True  # or the best distances are those of a baseline that is none
    history: tuple[tuple[float, float], ...] = ()  # RMSE on fitted and on held-out trajectories, of every table
    linearised: Mapping[int, Linearised] = field(default_factory=dict)  # by the batch's number

    def state_dict(self) -> dict[str, Any]:
        """All of it, as `files.save_state` writes it."""
        return {
            "tables": [[asdict(table.config), dict(table.state_dict())] for table in (self.best, self.current)],
            "progress": {name: getattr(self, name) for name in (*PLAIN, *DISTANCES)},
            "history": [list(errors) for errors in self.history],
            "linearised": {str(n): [one.numbers, one.normal, one.gradient] for n, one in self.linearised.items()},
        }

    @classmethod
    def of(
        cls, state: Mapping[str, Any], runs: Runs, parameters: Callable[[PredictorConfig], Parameters], like: Predictor
    ) -> "FitState":
        """That of a state, whose tables go where the table `like` is.

        Raises StateError if its tables are of other settings; of what else is wrong `reading_state` makes one.
        """

        def table(header: Mapping[str, Any], learned: Mapping[str, Tensor]) -> Predictor:
            """A table of a state, if it is of these settings but for what a start finds."""
            config, own = (PredictorConfig.from_header(one) for one in (header, asdict(runs.config)))
            found: dict[str, Any] = {name: of_kind(getattr(config, name), kind) for name, kind in FOUND.items()}
            if config != replace(own, **found) or config.calls != own.calls:
                raise StateError("This training state holds a table of other settings.")
            made = build(config).to(next(like.parameters()))
            made.load_state_dict(learned)
            check_numbers(made, made.state_dict())
            return made

        saved, settings = state["progress"], runs.settings
        history = tuple((of_number(fitted, 0.0), of_number(held_out, 0.0)) for fitted, held_out in state["history"])
        fitted, both = (settings.trajectories, settings.trajectories + settings.held_out) if history else (0, 0)
        best, current = (table(*one) for one in state["tables"])
        count = len(parameters(current.config).of(current))
        batches = {str(number): number for number in range(len(runs.fitted.batches()))}
        linearised = {}
        for number, (numbers, normal, gradient) in state["linearised"].items():
            vectors = (of_finite(one, (count,)).double() for one in (numbers, gradient))
            linearised[batches[number]] = Linearised(next(vectors), of_squares(normal, (count, count)), next(vectors))
        sizes = dict(zip(DISTANCES, (fitted, both, both), strict=True))
        values: dict[str, Any] = {name: read(saved[name]) for name, read in PLAIN.items()}
        values |= {name: of_distances(saved[name], size) for name, size in sizes.items()}
        of_finite(values["base_distances"], (both,))
        return cls(best, current, history=history, linearised=linearised, **values)


# What of it a state holds as it is, and how each is read.
PLAIN: Mapping[str, Callable[[Any], Any]] = {
    "baseline": of_text,
    **dict.fromkeys(("iteration", "used"), of_count),
    **dict.fromkeys(("done", "finished", "best_is_table"), partial(of_kind, kind=bool)),
    "damping": partial(of_number, least=LEAST_DAMPING, most=MOST_DAMPING),
    "begun_error": partial(of_number, least=0.0),
    "teacher_error": partial(of_number, least=0.0, most=sys.float_info.max),
}
FOUND: Mapping[str, type] = {"sigmas": tuple, "first_sigma": float, "channels": int, "spectral": bool}  # by a start
DISTANCES = ("fitted", "best_distances", "base_distances")


class EndToEnd(ForOneUse):
    """Fits a table to where a slow sampler takes the same noise. Nothing but this object changes.

    `parameters` says for settings which numbers are moved. `start` finds the table it begins with.
    """

    def __init__(
        self, initial: Predictor, parameters: Callable[[PredictorConfig], Parameters], start: Start, runs: Runs
    ) -> None:
        self.parameters = parameters
        self.start = start
        self.runs = runs
        self.settings = runs.settings
        self.initial = initial
        self.at = FitState(initial, initial)
        self._turns = Turns(runs, lambda config: sum(parameters(config).calls_after()))
        self._cache = RunCache(0)  # runs of the current table
        self._earlier_calls = 0
        self._repeated = 0  # sample calls for targets that a state had no room for
        self._all_calls = 0  # of all workers, when last measured

    @property
    def predictor(self) -> Predictor:
        """The best table so far."""
        return self.at.best

    @property
    def begun(self) -> bool:
        """Whether its start was found."""
        return bool(self.at.history)

    @property
    def losses(self) -> list[float]:
        """RMSE on the fitted trajectories: of the baseline, then of every iteration's table."""
        return [fitted for fitted, _ in self.at.history]

    @property
    def model_calls(self) -> int:
        """Single-sample model calls so far, of this process."""
        return self._earlier_calls + self.runs.source.calls

    @property
    def expected_calls(self) -> int:
        """The fewest, of all workers, if no iteration fails at first."""
        if self.at.finished:
            return self.at.used + self._repeated
        finishing = self._least_finishing
        if self.at.done:
            return self.at.used + finishing + self._repeated
        total = self.start.model_calls + finishing
        for iteration in range(1, self.settings.iterations):
            following = self._turns.calls(iteration, self.at.current.config)
            if self.settings.budget and total + following > self.settings.budget:
                break
            total += following
        return max(total, self.at.used + finishing) + self._repeated

    @property
    def _least_finishing(self) -> int:
        """The fewest calls of finishing the best table so far."""
        settled = self.at.history and self.at.best.config.spectral and self.start.finishing_calls
        return self.runs.config.calls * self.settings.held_out if settled else 0

    @torch.no_grad()
    def events(self) -> Iterator[FitEvent]:
        """Fit, one iteration per event; the predictor is the best so far.

        Leave the loop to cancel; call again to go on. Raises FloatingPointError if the teacher's samples are not
        finite.
        """
        if not self.at.history:
            yield from self._begun()
        while not self.at.done and self.at.iteration < self.settings.iterations:
            following = self._turns.calls(self.at.iteration, self.at.current.config) + self.start.finishing_calls
            if self.settings.budget and self.at.used + following > self.settings.budget:
                self.at = replace(self.at, done=True)
                break
            yield self._improved()
        if not self.at.finished:
            yield from self._finished()

    def _begun(self) -> list[FitEvent]:
        """Find the baseline and the first table; it counts as the first iteration."""
        at, events, cache = FitState(self.initial, self.initial), [], self._cache
        for found in self.start.found():
            table, cache = found.table, found.cache
            at = replace(at, fitted=found.distances, current=at.current if table is None else table)
            if not at.history:
                at = replace(at, baseline=found.name)
            at, event = self._judged(at, found.method, is_table=table is not None)
            events.append(event)
            at = replace(at, iteration=at.iteration + 1, teacher_error=found.teacher_error)
        finite(at.fitted, "The pictures of the table to begin with")
        begun, _ = self._held_out_errors(at.best_distances, at.base_distances)
        at = replace(at, iteration=1, used=self.start.model_calls, begun_error=begun)
        events[-1] = replace(events[-1], iteration=1)
        self._commit(at, cache)
        self.runs.begun()
        return events

    def _commit(self, at: FitState, cache: RunCache) -> None:
        self._all_calls = int(self.runs.workers.sum(torch.tensor(self.model_calls)))
        self.at, self._cache = at, cache.within(self.runs.waiting_bytes)

    def _held_out_errors(self, distances: Tensor, base: Tensor) -> tuple[float, float]:
        """The error of distances (fitted + held_out,) on what is held out, and a base's; both by the base's limit."""
        held_out, base = (d[self.settings.trajectories :] for d in (distances, base))
        limit = linear_from(base)
        return float(huber(held_out, limit).sqrt()), float(huber(base, limit).sqrt())

    def _judged(self, at: FitState, method: Method, *, is_table: bool = True) -> tuple[FitState, FitEvent]:
        """Measure the current table on what is held out, and keep it if it is the best so far on all there is.

        There are many more trajectories than numbers, and the more, the less a few odd ones decide. But on what is
        held out it must be better than the baseline, if the best so far is, and no worse than what iterations began
        with.
        """
        both, event = self._measured(at, method)
        if not at.history:
            finite(both, "The base solver's pictures")
            at = replace(at, best_distances=both, base_distances=both, best=at.current, best_is_table=is_table)
        elif not at.best_is_table:
            at = replace(at, best_distances=both, best=at.current, best_is_table=True)
        elif compared(both, at.best_distances) < 1 and self._holds(both, at):
            at = replace(at, best_distances=both, best=at.current)
        return self._told(at, event), event

    def _holds(self, both: Tensor, at: FitState) -> bool:
        """Whether what is held out allows a table of these distances (fitted + held_out,).

        A first table may also be one that is much nearer in the geometric mean. A solver that decides one sample of
        eight otherwise than the teacher errs there by more than by all others together, so that this one sample would
        decide whether there is a table at all.
        """
        error, base = self._held_out_errors(both, at.base_distances)
        allowed = max(base, self._held_out_errors(at.best_distances, at.base_distances)[0])
        if error < allowed and error <= at.begun_error:
            return True
        ours, theirs = (d[self.settings.trajectories :].log().mean().exp() for d in (both, at.base_distances))
        return torch.equal(at.best_distances, at.base_distances) and bool(ours < MUCH_NEARER * theirs)

    def _measured(self, at: FitState, method: Method) -> tuple[Tensor, FitEvent]:
        """The distances (fitted + held_out,) of the current table, and what to tell of them."""
        last: list[tuple[list[Step], Sample]] = []

        def draw(target: Target) -> Sample:
            last[:] = [(self.runs.run(target, method), target.end)]
            return last[0][0][-1].x

        judged = self.runs.judged.distances(draw)
        steps, teacher = last[0]
        plans = tuple(step.plan.mean() for step in steps if step.plan is not None)
        errors = (rmse(at.fitted), rmse(judged))
        event = FitEvent(at.iteration, *errors, plans, self.model_calls, steps[-1].x, teacher)
        return torch.cat([at.fitted, judged]), event

    def _told(self, at: FitState, event: FitEvent) -> FitState:
        """The same with an event in its history."""
        assert event.held_out is not None
        return replace(at, history=(*at.history, (event.loss, event.held_out)))

    def _finished(self) -> Iterator[FitEvent]:
        """The best table as its start finishes it, unless that costs more than TOLERATED of the error."""
        at, begun = replace(self.at, finished=True), self.runs.source.calls
        found = self.start.finished(at.best, self._cache if at.best is at.current else RunCache(0))
        if found is None:
            self._commit(at, RunCache(0))
            return
        changed = replace(at, current=found[0], fitted=found[1])
        both, event = self._measured(changed, changed.current.method())
        if kept := compared(both, at.best_distances) <= TOLERATED**2:
            at = self._told(replace(changed, best=changed.current, best_distances=both), event)
        more = int(self.runs.workers.sum(torch.tensor(self.runs.source.calls - begun)))
        self._commit(replace(at, used=at.used + more), RunCache(0))
        if kept:
            yield event

    def _improved(self) -> FitEvent:
        """One iteration of Levenberg and Marquardt."""
        at, runs = self.at, self.runs
        parameters = self.parameters(at.current.config)
        linearised = dict(at.linearised)
        due = self._turns.rows(at.iteration)
        limit = linear_from(at.fitted)
        for target in runs.fitted:
            if target.number in due:
                linearised[target.number] = self._linearised(target, due[target.number], parameters, limit)
        at = replace(at, linearised=linearised, used=at.used + self._turns.calls(at.iteration, at.current.config))
        at, cache, gained = self._stepped(at, parameters)
        # A step that gains nothing may be the fault of the few batches that it was made of.
        covered = self._turns.covered(at.iteration)
        damping = at.damping if gained or covered else DAMPING
        at = replace(at, iteration=at.iteration + 1, done=not gained and covered, damping=damping)
        at, event = self._judged(at, at.current.method())
        self._commit(at, cache)
        return event

    def _stepped(self, at: FitState, parameters: Parameters) -> tuple[FitState, RunCache, bool]:
        """The first of some ever shorter steps that leads to a smaller loss, and whether it gained anything."""
        calls, settings, here = self.runs.config.calls, self.settings, parameters.of(at.current)
        normal, gradient = self._summed(at.linearised.values(), here)
        for attempt in range(ATTEMPTS):
            if attempt:
                used = at.used + calls * settings.trajectories
                if settings.budget and used + calls * settings.held_out + self.start.finishing_calls > settings.budget:
                    break
                at = replace(at, used=used)
            change = damped_step(here, normal, gradient, at.damping, parameters.low, parameters.high)
            trial = parameters.table(at.current, here + change)
            distances, cache = self.runs.fitted_distances(trial.method())
            if (left := compared(distances, at.fitted)) < 1:
                trial, distances, cache = self.start.refined(trial, distances, cache)
                better = replace(at, current=trial, fitted=distances, damping=at.damping * EASIER)
                return better, cache, left < (1 - settings.tolerance) ** 2
            at = replace(at, damping=at.damping * HARDER)
        return at, self._cache, False

    def _summed(self, linearised: Iterable[Linearised], here: Tensor) -> tuple[Tensor, Tensor]:
        """Normal matrix and gradient of all batches, of all workers, at the numbers `here`."""
        count = len(here)
        normal, gradient = torch.zeros(count, count).double(), torch.zeros(count).double()
        for one in linearised:
            normal += one.normal
            gradient += one.gradient + one.normal @ (here - one.numbers)
        return self.runs.workers.sum(normal), self.runs.workers.sum(gradient)

    def _linearised(self, target: Target, rows: range, parameters: Parameters, limit: Tensor) -> Linearised:
        """Run these rows of a batch once, and once more for every number from where it acts on."""
        table = self.at.current
        method = table.method()
        steps = self._cache.get(target.number, target.x.device)
        if len(rows) < len(target.rows):
            target, steps = target.few(self.runs.source, len(rows)), []
        steps = steps or self.runs.run(target, method)
        end, here = steps[-1].x, parameters.of(table)
        columns = []
        moves = zip(parameters.differences(here).tolist(), parameters.acts(), strict=True)
        for place, (step, (interval, where)) in enumerate(moves):
            changed = here.clone()
            changed[place] += step
            varied = parameters.table(table, changed).method()
            moved = self.runs.run(target, varied, resumed(target, varied, steps, interval, where))[-1].x
            columns.append(((moved - end) / step).cpu())  # a device may have no room for them all
        products = inner_products([*columns, (end - target.end).cpu()])
        counts = (float(limit) / (products[:, -1, -1] / end[0].numel()).sqrt()).clamp(max=1)
        summed = torch.einsum("t,tij->ij", counts, products)
        return Linearised(here, summed[:-1, :-1], summed[:-1, -1])

    def state_dict(self) -> dict[str, Any]:
        """All that continues this fit exactly. An iteration begun is begun again."""
        return {
            "config": asdict(self.settings),
            "predictor_config": asdict(self.runs.config),
            "starts": self.start.names,
            **self.at.state_dict(),
            "model_calls": self.model_calls,
            "not_finite": self.runs.source.not_finite,
            "all_calls": self._all_calls,
            "targets": [targets.state_dict() for targets in self.runs.own],
            "teacher_calls": self.runs.fitted.teacher.calls,
            "refused": self.start.refused,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. Raises StateError, and changes nothing, if it is damaged or of other settings."""
        shape = self.runs.source(range(1))[0].shape[1:]
        with reading_state():
            refuse_other_settings(state, {"config": self.settings, "predictor_config": self.runs.config})
            if state["starts"] != self.start.names:
                raise StateError("This training state was made with other starts.")
            at = FitState.of(state, self.runs, self.parameters, self.initial)
            calls = [of_count(state[name]) for name in ("model_calls", "not_finite", "all_calls", "refused")]
            slow = of_count(state["teacher_calls"], max(self.runs.fitted.teacher.calls, MOST_CALLS))
            ends = [targets.read(saved, shape) for targets, saved in zip(self.runs.own, state["targets"], strict=True)]
        self.at, self._cache = at, RunCache(0)
        self._earlier_calls, self.runs.source.earlier_not_finite, self._all_calls, self.start.refused = calls
        for targets, found in zip(self.runs.own, ends, strict=True):
            targets.refine(slow)
            targets.ends = found
        needed = self.begun and not self.at.finished
        self._repeated = sum(one.missing * one.teacher.model_calls for one in self.runs.own) if needed else 0

    def summary(self) -> FitSummary:
        """What came of it. Errors are RMSEs on what is held out, but that those far beyond the baseline's usual one
        count as in Huber's loss: a single odd sample of few says little.
        """
        errors: tuple[float | None, float | None] = (None, None)
        if self.at.history:
            errors = self._held_out_errors(self.at.best_distances, self.at.base_distances)
        teacher = self.runs.fitted.teacher.name
        details: dict[str, Any] = {"iterations": self.at.iteration}
        if self.at.teacher_error:
            details["teacher_error"] = self.at.teacher_error
        settings = asdict(self.settings)
        calls, faults = self._all_calls, self.runs.source.not_finite
        return FitSummary("end to end", teacher, self.at.baseline, calls, *errors, settings, details, faults)


def resumed(target: Target, varied: Method, steps: Sequence[Step], interval: int, where: Acts) -> Resume:
    """Where the run of a varied method leaves the known one, whose `steps` are all there: one model call, or none."""
    start, history = steps[interval].start, steps[interval - 1].history if interval else ()
    if where == "start":
        start = asked(target.denoiser, varied.planner, interval, start.x, start.sigma)
    return Resume(interval, start, history, steps[interval].mid if where == "update" else None)


def damped_step(here: Tensor, normal: Tensor, gradient: Tensor, damping: float, low: Tensor, high: Tensor) -> Tensor:
    """Levenberg and Marquardt's step (count,) from the numbers `here` (count,), inside [low, high].

    It minimises delta (normal + damping diag(normal)) delta + 2 gradient delta.
    """
    diagonal = normal.diagonal()
    floor = 1e-9 * diagonal.max() + torch.finfo(torch.float64).tiny
    damped = normal + (damping * diagonal + floor).diag_embed()
    if not bool((low.isfinite() | high.isfinite()).any()):
        step: Tensor = torch.linalg.solve(damped, -gradient)
        return step
    factor = torch.linalg.cholesky(damped)
    aim = torch.linalg.solve_triangular(factor, -gradient[:, None], upper=False).squeeze(-1)
    found = lsq_linear(factor.T.numpy(), aim.numpy(), ((low - here).numpy(), (high - here).numpy()), method="bvls")
    return torch.from_numpy(found.x)
