"""Fitting the paper's predictor: a student interval is pulled toward a teacher on a finer grid.

Training crosses intervals with the same `advance` that sampling uses. It prints nothing, writes
nothing and stops when its caller stops iterating.
"""

import copy
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import pairwise, zip_longest
from typing import Any

import torch
from torch import Tensor

from ..call_list import call_sigmas
from ..driver import Decided, advance, evaluate, midpoint, trajectory
from ..features import Look
from ..network import AMEDPredictor
from ..predictor import check_numbers
from ..samplers import TYPES, sampler_name
from ..types import Denoiser, Evaluation, History, Method, Sample, Sigma, Solver, Source, StepPlan
from .call_derivative import AGREES, GRADIENTS, STEPS, Gradient, central, disagreement, reverse_disagreement
from .finite import finite
from .protocol import (
    FitEvent,
    FitSummary,
    ForOneUse,
    StateError,
    TrainConfig,
)
from .reading import (
    of_count,
    of_errors,
    of_finite,
    of_kind,
    of_number,
    reading_state,
    refuse_other_settings,
)
from .targets import Target, Targets, rmse
from .teacher import Heun, papers_teacher
from .trajectories import HELD_OUT, Metered, out_of_memory
from .workers import ALONE, Workers

DERIVATIVES = "The derivatives of the model's answers"


@dataclass(frozen=True)
class TeacherRun:
    """What the teacher leaves of a batch of trajectories."""

    targets: list[Sample]  # its sample at the end of every interval
    starts: list[Evaluation]  # its evaluations where the student asks the same: at the beginnings of intervals

    @property
    def bytes(self) -> int:
        """The memory that it takes, in bytes."""
        tensors = [*self.targets, *(t for e in self.starts for t in (e.x, e.denoised, e.features) if t is not None)]
        return sum(t.numel() * t.element_size() for t in tensors)

    def to(self, device: torch.device | str) -> "TeacherRun":
        """The same run on another device."""
        return TeacherRun([t.to(device) for t in self.targets], [e.to(device) for e in self.starts])


@dataclass
class Batch:
    """The trajectories under way: what the remaining intervals need, and no more."""

    rows: range  # of all workers
    denoiser: Denoiser
    teacher: TeacherRun
    x: Sample  # the student's own sample
    history: History = ()
    interval: int = 0

    def state_dict(self) -> dict[str, Any]:
        """All but the denoiser."""
        return {
            "rows": [self.rows.start, self.rows.stop],
            "targets": self.teacher.targets,
            "starts": [_fields(e) for e in self.teacher.starts],
            "x": self.x,
            "history": [_fields(e) for e in self.history],
            "interval": self.interval,
        }

    @classmethod
    def of(
        cls, saved: Mapping[str, Any], rows: range, like: Sample, denoiser: Denoiser, planned: int, solver: Solver
    ) -> "Batch":
        """The batch of a state, with so many planned intervals that a solver crosses.

        `like` (rows, ...) are its noisy samples, drawn again. Raises StateError if it is of another grid, and
        TypeError for tensors of other shapes.
        """
        interval = of_count(saved["interval"], planned)
        found = (len(saved["targets"]), len(saved["starts"]), len(saved["history"]))
        if found != (planned, 1 if solver.multistep else planned, min(solver.memory, 2 * interval)):
            raise StateError("This training state holds a batch of another grid.")
        targets = [of_finite(target, like.shape).to(like) for target in saved["targets"]]
        run = TeacherRun(targets, [_evaluation(one, like) for one in saved["starts"]])
        history = tuple(_evaluation(one, like) for one in saved["history"])
        return cls(rows, denoiser, run, of_finite(saved["x"], like.shape).to(like), history, interval)


class PerInterval(ForOneUse):
    """Owns the predictor, its optimiser and its teacher's samples; nothing else is mutable.

    `source` draws starting points. The predictor's device and dtype are the caller's choice. `look` finds
    the features where an evaluation alone does not show them. Several `workers` share every batch.
    """

    def __init__(
        self,
        predictor: AMEDPredictor,
        source: Source,
        config: TrainConfig,
        look: Look | None = None,
        workers: Workers = ALONE,
    ) -> None:
        self.predictor = predictor.requires_grad_(True)
        self.metered = Metered(source)
        self.config = config
        self.workers = workers
        if config.trajectories % workers.count or config.batch_size % workers.count:
            raise ValueError(
                f"{workers.count} processes need batches and trajectories that they can share evenly, but found "
                f"batch_size {config.batch_size} and {config.trajectories} trajectories."
            )
        settings = predictor.config
        self.student = predictor.method(look=look)
        self.planner = predictor.planner(look=look)
        self.sigmas = torch.tensor(settings.sigmas, dtype=torch.float64)
        self.teacher, self.teacher_points = papers_teacher(settings, config.teacher, config.teacher_points)
        self.optimizer = torch.optim.Adam(predictor.parameters(), lr=config.learning_rate)
        self.gradient = config.gradient  # reverse mode gives way to finite differences if it fails its check
        self.trajectory = 0
        self.interval_losses: list[list[float]] = [[] for _ in range(settings.planned)]
        held_out = range(HELD_OUT, HELD_OUT + config.held_out)
        judge = Heun.of(settings, config.teacher_calls)
        self.judged = Targets(self.metered, held_out, config.batch_size, judge, workers)
        self.errors: list[float] = []  # held out, at every validation
        self.base: float | None = None
        self._best: dict[str, Tensor] | None = None
        self._batch: Batch | None = None
        self._kept: dict[int, TeacherRun] = {}
        self.step = config.step
        self._checked = config.gradient == "finite difference" and config.step > 0
        self._earlier_calls = 0

    @property
    def begun(self) -> bool:
        """Whether it has seen every interval of a batch."""
        return len(self.interval_losses[-1]) > 0

    @property
    def losses(self) -> list[float]:
        """The loss of every batch, summed over its intervals."""
        return [sum(batch) for batch in zip_longest(*self.interval_losses, fillvalue=0.0)]

    @property
    def model_calls(self) -> int:
        """Single-sample model calls so far, of this process."""
        return self._earlier_calls + self.metered.calls

    @property
    def total(self) -> int:
        """Trajectories to cross in all, those of later epochs again."""
        return self.config.trajectories * self.config.epochs

    @property
    def expected_calls(self) -> int:
        """The fewest model calls that this training takes on paper, for this worker's trajectories.

        The teacher crosses every trajectory once. Where it has not asked the student's first call of an interval, the
        student does. The midpoint is one call, or one and two per unknown with finite differences. Every
        validation is one run; the base solver's are two.
        """
        config, settings = self.predictor.config, self.config
        starts = config.planned - 1 if self.student.solver.multistep else 0
        mids = 1 if self.gradient == "reverse" else 1 + 2 * (1 + (config.scale_time > 0))
        calls = settings.trajectories * (self.teacher.calls + settings.epochs * (starts + config.planned * mids))
        if settings.held_out:
            calls += settings.held_out * config.calls * (settings.validations + 2)
        return (calls + self.judged.model_calls) // self.workers.count

    def events(self) -> Iterator[FitEvent]:
        """Train, one optimiser step per event, and one event per validation. Leave the loop to cancel.

        With trajectories held out, the predictor has the weights that did best on them once all events are over.
        Raises FloatingPointError, naming the interval, if a loss is not finite; the predictor then
        is as it was before that step.
        """
        while self._batch is not None or self.trajectory < self.total:
            if self._batch is None:
                self._batch = self.begin()
            batch = self._batch
            if batch.interval < self.predictor.config.planned:
                yield self._fit(batch)
                continue
            error = self._validated(len(batch.rows))
            self._batch = None
            if error is not None:
                yield self._event(batch, batch.interval - 1, self.losses[-1], (), error)
        if self._best is not None:
            self.predictor.load_state_dict(self._best)

    def _event(
        self, batch: Batch, interval: int, loss: float, plans: tuple[StepPlan, ...], held_out: float | None = None
    ) -> FitEvent:
        finished = interval == self.predictor.config.planned - 1
        samples = (batch.x, batch.teacher.targets[interval])
        return FitEvent(self.trajectory, loss, held_out, plans, self.model_calls, *samples, interval, finished)

    @torch.no_grad()
    def _validated(self, count: int) -> float | None:
        """Measure the final error if it is time to."""
        if not self.config.held_out:
            return None
        every = self.total / self.config.validations
        if int(self.trajectory / every) == int((self.trajectory - count) / every):
            return None
        config = self.predictor.config
        if self.base is None:
            plain = config.plain_method(call_sigmas(config, config.calls))
            base = min(self._error(config.base_method()), self._error(plain))
            self.base = float(finite(torch.tensor(base, dtype=torch.float64), "The base solver's pictures"))
        error = self._error(self.student)
        if not self.errors or error < min(self.errors):
            self._best = {name: weight.detach().clone() for name, weight in self.predictor.state_dict().items()}
        self.errors.append(error)
        return error

    def _error(self, method: Method) -> float:
        """The RMSE of what a method makes of the held-out trajectories."""

        def draw(target: Target) -> Sample:
            x = target.x
            for step in trajectory(target.denoiser, x, method):
                x = step.x
            return x

        return rmse(self.judged.distances(draw))

    @torch.no_grad()
    def begin(self) -> Batch:
        """Draw the next trajectories and run the teacher along them, if it has not been."""
        begin = self.trajectory % self.config.trajectories
        rows = range(begin, min(begin + self.config.batch_size, self.config.trajectories))
        x, denoiser = self.metered(self.workers.share(rows))
        teacher = self._kept.get(begin)
        if teacher is None:
            teacher = self._teach(x, denoiser)
            kept = sum(run.bytes for run in self._kept.values())
            if self.config.epochs > 1 and kept + teacher.bytes <= self.config.keep_bytes:
                self._kept[begin] = teacher.to("cpu")
        self.trajectory += len(rows)
        return Batch(rows, denoiser, teacher.to(x.device), x)

    def _teach(self, x: Sample, denoiser: Denoiser) -> TeacherRun:
        targets, starts = list[Sample](), list[Evaluation]()
        for step in trajectory(denoiser, x, self.teacher):
            if step.index % (self.teacher_points + 1) == 0:
                starts.append(step.start)
            if (step.index + 1) % (self.teacher_points + 1) == 0:
                targets.append(finite(step.x, f"The teacher's samples at the end of interval {len(targets) + 1}"))
        # A multistep student follows its own path, which leaves the teacher's after the first call.
        return TeacherRun(targets, starts[:1] if self.student.solver.multistep else starts)

    def _fit(self, batch: Batch) -> FitEvent:
        """One interval: loss, gradient, optimiser step. The student then goes on from where it arrived."""
        interval = batch.interval
        self.optimizer.zero_grad()
        loss, student, plan, history = self.loss(batch)
        total = float(self.workers.sum(loss.detach().clone()))
        if not math.isfinite(total):
            raise FloatingPointError(
                f"The loss is {total} in interval {interval + 1}: the model's answer there, or the update made "
                "of it, is not finite. Check the model's precision and its LoRAs; lower the learning rate if the loss "
                "had been rising. The predictor is kept as it was before this step."
            )
        # Only the predictor gets gradients: the model's parameters may be trainable, and are left as they are.
        loss.backward(inputs=list(self.predictor.parameters()))  # type: ignore[no-untyped-call]
        for weight in self.predictor.parameters():
            if weight.grad is not None:
                finite(self.workers.sum(weight.grad), DERIVATIVES)
        self.optimizer.step()
        batch.x, batch.history, batch.interval = student, history, interval + 1
        self.interval_losses[interval].append(total)
        return self._event(batch, interval, total, (plan.mean(),))

    def loss(self, batch: Batch) -> tuple[Tensor, Sample, StepPlan, History]:
        """The loss () of the batch's next interval with its graph, the student (batch, ...) there, plan and history.

        The loss is this worker's part of the mean over the whole batch: squared distances to the teacher, summed over
        a sample (Zhou et al. 2024).
        """
        interval = batch.interval
        sigmas = self.sigmas.to(batch.x)
        with torch.no_grad():
            start = self._start(batch, sigmas[interval])
        plan = self.planner.plan(start, interval)
        settings = self.predictor.config
        plans = (plan,) * settings.planned + (None,) * (settings.intervals - settings.planned)
        decided = replace(self.student, planner=Decided(plans))
        near = Neighbourhood(batch.denoiser, decided, interval, (*batch.history, start), sigmas[interval + 1], plan)
        if not self._checked:
            self._check_derivatives(near)
        denoiser = batch.denoiser if self.gradient == "reverse" else near.linearised(self.step)
        step = advance(denoiser, decided, interval, start, batch.history, sigmas[interval + 1])
        loss = (step.x - batch.teacher.targets[interval]).square().sum() / len(batch.rows)
        return loss, step.x.detach(), plan, tuple(e.detach() for e in step.history)

    def _start(self, batch: Batch, sigma: Tensor) -> Evaluation:
        if batch.interval == 0 and self.student.first is not None:
            return self.student.first(batch.x, sigma)
        if batch.interval < len(batch.teacher.starts):  # the teacher has already asked the model here
            return batch.teacher.starts[batch.interval]
        return evaluate(batch.denoiser, batch.x, sigma)

    @torch.no_grad()
    def _check_derivatives(self, near: "Neighbourhood") -> None:
        """Give reverse mode up where finite differences say otherwise, and find their step if none is set.

        An operation that was detached answers a wrong derivative silently. A step is good if the next
        smaller one says the same; if none does, as in half precision, the one that comes nearest is taken.
        """
        differences = [near.differences(step) for step in STEPS]
        if self.config.step == 0:
            apart = [max(map(disagreement, *pair)) for pair in pairwise(differences)]
            good = [n for n, distance in enumerate(apart) if distance <= AGREES] or [apart.index(min(apart))]
            self.step = STEPS[good[0]]
        if self.gradient == "reverse" and not near.reverse_agrees(differences):
            self.gradient = "finite difference"
        self._checked = True

    def state_dict(self) -> dict[str, Any]:
        """All that continues this training exactly, between any two events; `files.save_state` writes it.

        The teacher's samples that are kept for later epochs are not in it: they are made again.
        """
        batch = self._batch
        return {
            "config": asdict(self.config),
            "predictor_config": asdict(self.predictor.config),
            "predictor": {name: weight.detach().clone() for name, weight in self.predictor.state_dict().items()},
            "best": self._best,
            "optimizer": copy.deepcopy(self.optimizer.state_dict()["state"]),
            "trajectory": self.trajectory,
            "model_calls": self.model_calls,
            "not_finite": self.metered.not_finite,
            "losses": [list(losses) for losses in self.interval_losses],
            "errors": list(self.errors),
            "base": self.base,
            "checked": [self.gradient, self.step] if self._checked else None,
            "targets": self.judged.state_dict(),
            "batch": None if batch is None else batch.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. Raises StateError, and changes nothing, if it is damaged or of other settings."""
        with reading_state():
            refuse_other_settings(state, {"config": self.config, "predictor_config": self.predictor.config})
            saved = state["batch"]
            rows = range(1) if saved is None else rows_of(saved["rows"], self.config.trajectories)
        x, denoiser = self.metered(self.workers.share(rows))  # a denoiser is in no state: the source gives it again
        with reading_state():
            weights = loaded_weights(state["predictor"], self.predictor)
            best = None if state["best"] is None else loaded_weights(state["best"], self.predictor)
            optimizer = optimizer_state_of(state["optimizer"], self.predictor)
            trajectory = of_count(state["trajectory"], self.total)
            calls, faults = (of_count(state[name]) for name in ("model_calls", "not_finite"))
            planned, solver = self.predictor.config.planned, self.student.solver
            errors = of_errors(state["errors"])
            base = None if state["base"] is None else of_number(state["base"], 0.0, sys.float_info.max)
            checked = state["checked"] is not None
            gradient, step = derivatives_of(state["checked"], self.config) if checked else (self.gradient, self.step)
            targets = self.judged.read(state["targets"], x.shape[1:])
            batch = None if saved is None else Batch.of(saved, rows, x, denoiser, planned, solver)
            for start in () if batch is None else batch.teacher.starts:
                self.planner.look(start)  # which says what is wrong with it
            losses = losses_of(state["losses"], planned, 0 if batch is None else batch.interval)
        self.predictor.load_state_dict(weights)
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": optimizer})
        self.trajectory, self._earlier_calls, self.metered.earlier_not_finite = trajectory, calls, faults
        self.interval_losses, self.errors, self.base, self._best = losses, errors, base, best
        self.gradient, self.step, self._checked = gradient, step, self._checked or checked
        self.judged.ends, self._batch = targets, batch

    def summary(self) -> FitSummary:
        """What came of it; errors are RMSEs on what is held out, if anything is."""
        recent = [losses[-20:] for losses in self.interval_losses]
        details = {
            "gradient": self.gradient,
            "step": self.step,
            "teacher_points": self.teacher_points,
            "crossed": self.trajectory,
            "final_loss_per_interval": [sum(some) / max(len(some), 1) for some in recent],
        }
        teacher = self.config.teacher or TYPES[sampler_name(self.predictor.config)].teacher
        error = min(self.errors) if self.errors else None
        calls = self.model_calls * self.workers.count
        baseline = f"plain {self.predictor.config.solver}"
        errors, settings = (error, self.base), asdict(self.config)
        return FitSummary("per interval", teacher, baseline, calls, *errors, settings, details, self.metered.not_finite)


@dataclass(frozen=True)
class Neighbourhood:
    """The model call at an interval's midpoint, as a function of the numbers of its plan."""

    denoiser: Denoiser
    method: Method
    interval: int
    history: History  # with the interval's start
    sigma_next: Sigma
    plan: StepPlan  # with its graph

    @property
    def unknowns(self) -> list[tuple[str, Tensor, float, float]]:
        """The numbers of the plan that the answer depends on, (batch, 1, ..., 1), and the ranges that make sense."""
        plan = self.plan.detach()
        ranges = (("r", plan.r, 0.0, 1.0), ("scale_time", plan.scale_time, 0.0, math.inf))
        return [(name, value, low, high) for name, value, low, high in ranges if isinstance(value, Tensor)]

    def ask(self, name: str, value: Any) -> Sample:
        """The answer (batch, ...) with another value (batch, 1, ..., 1) of one number."""
        plan = replace(self.plan.detach(), **{name: value})
        asked = midpoint(self.method, self.interval, self.history, self.sigma_next, plan)
        return evaluate(self.denoiser, *asked).denoised

    def differences(self, step: float) -> list[Sample]:
        """The answer's derivatives (batch, ...) by every unknown, by finite differences.

        Raises FloatingPointError if they are not finite.
        """
        found = [central(partial(self.ask, name), value, low, high, step) for name, value, low, high in self.unknowns]
        return [finite(one, DERIVATIVES) for one in found]

    def reverse_agrees(self, differences: Sequence[Sequence[Sample]]) -> bool:
        """Whether autograd finds the derivatives (batch, ...) that finite differences of some step find.

        `differences` are lists of one for each unknown.
        """
        asks = [(partial(self.ask, name), value) for name, value, _, _ in self.unknowns]
        try:
            distances = [
                max(reverse_disagreement(*ask, one) for ask, one in zip(asks, found, strict=True))
                for found in differences
            ]
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            return False
        return min(distances) <= AGREES

    @torch.no_grad()
    def linearised(self, step: float) -> Denoiser:
        """The model at the midpoint, to first order in r and scale_time.

        D + J_r (r - r0) + J_t (t - t0) has the value and the gradient of the model itself, and no
        autograd runs through the model: memory is that of sampling.
        """
        zeroth = self.ask("r", self.plan.detach().r)
        unknown = [(getattr(self.plan, name), value) for name, value, _, _ in self.unknowns]
        terms = [(slope, *one) for slope, one in zip(self.differences(step), unknown, strict=True)]

        def linearised(x: Sample, sigma: Sigma) -> Sample:
            del x, sigma
            return zeroth + sum((slope * (unknown - value) for slope, unknown, value in terms), torch.zeros(()))

        return linearised


def _fields(evaluation: Evaluation) -> dict[str, Any]:
    return {f.name: getattr(evaluation, f.name) for f in fields(evaluation)}


def rows_of(saved: Any, trajectories: int) -> range:
    """The trajectories of a batch, from a state, of so many. Raises StateError if it has none, or others."""
    begin, end = map(of_count, saved)
    if not begin < end <= trajectories:
        raise StateError("This training state holds a batch of other trajectories.")
    return range(begin, end)


def derivatives_of(saved: Any, config: TrainConfig) -> tuple[Gradient, float]:
    """How the model call is differentiated, and the step of differences, from a state in which that is settled.

    Raises ValueError for what no check of derivatives leads to.
    """
    gradient, step = saved
    gradients, steps = (config.gradient, GRADIENTS[1]), (*STEPS, config.step)
    return gradients[gradients.index(gradient)], steps[steps.index(step)]


def losses_of(saved: Any, planned: int, crossed: int) -> list[list[float]]:
    """The losses of every planned interval, from a state whose batch has crossed so many of them.

    Raises ValueError if an interval has more of them than it was crossed.
    """
    found = [of_errors(losses) for losses in of_kind(saved, list)]
    batches = {len(losses) - (interval < crossed) for interval, losses in enumerate(found)}
    if len(found) != planned or len(batches) != 1:
        raise ValueError("its losses are not those of its batches")
    return found


def loaded_weights(saved: Mapping[str, Any], predictor: AMEDPredictor) -> dict[str, Tensor]:
    """The weights of a predictor, from a state. Raises TypeError for other shapes, ValueError for odd numbers."""
    found = {name: of_finite(saved[name], own.shape) for name, own in predictor.state_dict().items()}
    check_numbers(predictor, found)
    return found


def optimizer_state_of(saved: Mapping[int, Any], predictor: AMEDPredictor) -> dict[int, dict[str, Tensor]]:
    """What Adam knows of every weight, from a state; nothing before its first step.

    Raises TypeError for other shapes, and ValueError for squares and counts below 0.
    """
    shapes = [{"step": (), "exp_avg": weight.shape, "exp_avg_sq": weight.shape} for weight in predictor.parameters()]
    found = {
        number: {name: of_finite(saved[number][name], shape).clone() for name, shape in names.items()}
        for number, names in enumerate(shapes if of_kind(saved, dict) else ())
    }
    if not all(bool((one[name] >= 0).all()) for one in found.values() for name in ("step", "exp_avg_sq")):
        raise ValueError("its optimizer has squares or counts below 0")
    return found


def _evaluation(saved: Mapping[str, Any], like: Tensor) -> Evaluation:
    """An evaluation of samples like these, from a state."""

    def rows(name: str) -> Tensor | None:
        value = saved[name]
        return None if value is None else of_finite(value, (len(like), *value.shape[1:])).to(like)

    x, denoised = (of_finite(saved[name], like.shape).to(like) for name in ("x", "denoised"))
    of_each = saved["sigma"].ndim > 0
    sigma = of_finite(saved["sigma"], (len(like), *[1] * (like.ndim - 1)) if of_each else ()).to(like)
    return Evaluation(x, sigma, denoised, rows("features"), of_kind(saved["analytic"], bool), rows("guidance"))
