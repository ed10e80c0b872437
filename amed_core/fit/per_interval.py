"""Fitting the paper's predictor: a student interval is pulled toward a teacher on a finer grid.

Training crosses intervals with the same `advance` that sampling uses. It prints nothing, writes
nothing and stops when its caller stops iterating.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..driver import Decided, advance, evaluate, midpoint, stages, trajectory
from ..features import Look
from ..network import AMEDPredictor
from ..samplers import RECIPES
from ..types import Denoiser, Evaluation, History, Sample, Sigma, Source, Stage, StepPlan
from .call_derivative import AGREES, STEPS, central, directional, disagreement, tangents
from .protocol import TrainConfig, TrainEvent, refuse_other_settings
from .targets import Goals, ends
from .teacher import TEACHERS, refine
from .trajectories import HELD_OUT, Metered, out_of_memory
from .workers import ALONE, Workers


@dataclass(frozen=True)
class TeacherRun:
    """What the teacher leaves of a batch of trajectories."""

    targets: list[Sample]  # its sample at the end of every interval
    starts: list[Evaluation]  # its evaluations where the student asks the same: at the beginnings of intervals

    @property
    def bytes(self) -> int:
        tensors = [*self.targets, *(t for e in self.starts for t in (e.x, e.denoised, e.features) if t is not None)]
        return sum(t.numel() * t.element_size() for t in tensors)

    def to(self, device: torch.device | str) -> "TeacherRun":
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


class Trainer:
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
        self.look = look
        self.config = config
        self.workers = workers
        if config.trajectories % workers.count or config.batch_size % workers.count:
            raise ValueError(
                f"{workers.count} processes need batches and trajectories that they can share evenly, but found "
                f"batch_size {config.batch_size} and {config.trajectories} trajectories."
            )
        recipe, points = RECIPES[predictor.config.solver]
        self.teacher = config.teacher or recipe
        self.teacher_points = config.teacher_points or points
        self.solver = predictor.config.build_solver()
        self.sigmas = torch.tensor(predictor.config.sigmas, dtype=torch.float64)
        self.teacher_sigmas = refine(predictor.config, self.teacher_points)
        self.optimizer = torch.optim.Adam(predictor.parameters(), lr=config.learning_rate)
        self.gradient = config.gradient  # forward mode gives way to finite differences if it fails its check
        self.trajectory = 0
        self.losses: list[list[float]] = [[] for _ in range(predictor.config.planned)]
        held_out = range(HELD_OUT, HELD_OUT + config.held_out)
        self.judged = Goals(
            [self.metered], held_out, config.batch_size, predictor.config, config.teacher_calls, workers
        )
        self.errors: list[float] = []  # held out, at every validation
        self.base: float | None = None
        self._best: dict[str, Tensor] | None = None
        self._batch: Batch | None = None
        self._kept: dict[int, TeacherRun] = {}
        self.step = config.step
        self._checked = config.gradient == "reverse" or (config.gradient != "forward" and config.step > 0)
        self._earlier_calls = 0

    @property
    def model_calls(self) -> int:
        """Single-sample model calls so far, of this process."""
        return self._earlier_calls + self.metered.calls

    @property
    def total(self) -> int:
        """Trajectories to cross in all."""
        return self.config.trajectories * self.config.epochs

    @property
    def floor(self) -> int:
        """The fewest model calls that this training takes on paper, for this worker's trajectories.

        The teacher crosses every trajectory once. Where it has not asked the student's first call of an interval, the
        student does, and its midpoint is one call, or one and two per unknown with finite differences, or one
        per unknown in forward mode. Every validation is one run; the base solver's are two.
        """
        config, settings = self.predictor.config, self.config
        _, planner = TEACHERS[self.teacher](config)
        teacher = sum(planner.updates(k) for k in range(len(self.teacher_sigmas) - 1))
        starts = config.planned - 1 if self.solver.multistep else 0
        count = 1 + (config.scale_time > 0)
        mids = {"reverse": 1, "finite difference": 1 + 2 * count, "forward": count}[self.gradient]
        calls = settings.trajectories * (teacher + settings.epochs * (starts + config.planned * mids))
        if settings.held_out:
            calls += settings.held_out * config.calls * (settings.validations + 2)
        return calls // self.workers.count + self.judged.floor

    def events(self) -> Iterator[TrainEvent]:
        """Train, one optimiser step per event. Leave the loop to cancel; call again to go on.

        With trajectories held out, the predictor has the weights that did best on them once all events are over.
        Raises FloatingPointError, naming the interval, if a loss is not finite; the predictor then
        is as it was before that step.
        """
        while self._batch is not None or self.trajectory < self.total:
            if self._batch is None:
                self._batch = self.begin()
            batch = self._batch
            event = self._fit(batch)
            if batch.interval == self.predictor.config.planned:
                self._batch = None
                event = replace(event, held_out=self._validated(len(batch.rows)))
            yield event
        self.keep_best()

    def keep_best(self) -> None:
        """Give the predictor the weights that did best on what is held out, if that was measured."""
        if self._best is not None:
            self.predictor.load_state_dict(self._best)

    @torch.no_grad()
    def _validated(self, count: int) -> float | None:
        """Measure the final error if it is time to."""
        if not self.config.held_out:
            return None
        every = self.total / self.config.validations
        if int(self.trajectory / every) == int((self.trajectory - count) / every):
            return None
        if self.base is None:
            self.base = float(self.judged.base_errors())
        config, planner = self.predictor.config, self.predictor.planner(look=self.look)
        way = (self.sigmas, self.solver, planner, config.first)
        error = float(self.judged.errors(lambda goal: ends(goal, *way)[-1].x))
        if not self.errors or error < min(self.errors):
            self._best = {name: weight.detach().clone() for name, weight in self.predictor.state_dict().items()}
        self.errors.append(error)
        return error

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
        targets, starts = [], []
        for step in trajectory(denoiser, x, self.teacher_sigmas, *TEACHERS[self.teacher](self.predictor.config)):
            if step.index % (self.teacher_points + 1) == 0:
                starts.append(step.start)
            if (step.index + 1) % (self.teacher_points + 1) == 0:
                targets.append(step.x)
        # A multistep student follows its own path, which leaves the teacher's after the first call.
        return TeacherRun(targets, starts[:1] if self.solver.multistep else starts)

    def _fit(self, batch: Batch) -> TrainEvent:
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
                self.workers.sum(weight.grad)
        self.optimizer.step()
        target = batch.teacher.targets[interval]
        batch.x, batch.history, batch.interval = student, history, interval + 1
        self.losses[interval].append(total)
        return TrainEvent(self.trajectory, interval, total, plan.mean(), self.model_calls, student, target)

    def loss(self, batch: Batch) -> tuple[Tensor, Sample, StepPlan, History]:
        """The loss of the batch's next interval with its graph, the student there, its plan and its history.

        The loss is this worker's part of the mean over the whole batch.
        """
        interval = batch.interval
        sigmas = self.sigmas.to(batch.x)
        stage = stages(self.sigmas, self.predictor.planner())[interval]
        with torch.no_grad():
            start = self._start(batch, sigmas[interval])
        plan = self.predictor.planner(look=self.look).plan(start, interval)
        denoiser = batch.denoiser
        if not self._checked:
            self._check_derivatives(batch, start, sigmas[interval + 1], plan, stage)
        if self.gradient != "reverse":
            denoiser = self._linearised(batch, start, sigmas[interval + 1], plan, stage)
        given = Decided((plan,) * (interval + 1))
        step = advance(denoiser, start, batch.history, sigmas[interval + 1], self.solver, given, interval, stage)
        loss = (step.x - batch.teacher.targets[interval]).square().sum() / len(batch.rows)
        return loss, step.x.detach(), plan, tuple(e.detach() for e in step.history)

    def _start(self, batch: Batch, sigma: Tensor) -> Evaluation:
        if batch.interval == 0 and (first := self.predictor.config.first) is not None:
            return first(batch.x, sigma)
        if batch.interval < len(batch.teacher.starts):  # the teacher has already asked the model here
            return batch.teacher.starts[batch.interval]
        return evaluate(batch.denoiser, batch.x, sigma)

    @torch.no_grad()
    def _linearised(self, batch: Batch, start: Evaluation, sigma_next: Sigma, plan: StepPlan, stage: Stage) -> Denoiser:
        """The model at the midpoint, to first order in r and scale_time.

        D + J_r (r - r0) + J_t (t - t0) has the value and the gradient of the model itself, and no
        autograd runs through the model: memory is that of sampling.
        """
        ask, place, at = self._around(batch, start, sigma_next, plan, stage)
        denoised = None
        terms = []
        for name, low, high in unknowns(plan):
            value = getattr(at, name)
            if self.gradient == "forward":
                denoised, slope = directional(batch.denoiser, *tangents(partial(place, name), value))
            else:
                slope = central(partial(ask, name), value, low, high, self.step)
            terms.append((slope, getattr(plan, name), value))
        if denoised is None:
            denoised = ask("r", at.r)
        zeroth: Sample = denoised

        def linearised(x: Sample, sigma: Sigma) -> Sample:
            del x, sigma
            return zeroth + sum((slope * (unknown - value) for slope, unknown, value in terms), torch.zeros(()))

        return linearised

    @torch.no_grad()
    def _check_derivatives(
        self, batch: Batch, start: Evaluation, sigma_next: Sigma, plan: StepPlan, stage: Stage
    ) -> None:
        """Give forward mode up where finite differences say otherwise, and find their step if none is set.

        An operation without a forward derivative may answer a wrong one silently. A step is good if the next
        smaller one says the same; if none does, as in half precision, the one that comes nearest is taken.
        """
        ask, place, at = self._around(batch, start, sigma_next, plan, stage)
        self._checked = True
        differences = [
            [central(partial(ask, name), getattr(at, name), low, high, step) for name, low, high in unknowns(plan)]
            for step in STEPS
        ]
        if self.config.step == 0:
            apart = [max(map(disagreement, *pair)) for pair in pairwise(differences)]
            good = [n for n, distance in enumerate(apart) if distance <= AGREES] or [apart.index(min(apart))]
            self.step = STEPS[good[0]]
        if self.gradient == "forward":
            try:
                tangent = [partial(place, name) for name, _, _ in unknowns(plan)]
                values = [getattr(at, name) for name, _, _ in unknowns(plan)]
                found = [directional(batch.denoiser, *tangents(*pair))[1] for pair in zip(tangent, values, strict=True)]
            except (RuntimeError, NotImplementedError) as error:
                if isinstance(error, RuntimeError) and out_of_memory(error):
                    raise
                self.gradient = "finite difference"
            else:
                distances = [max(map(disagreement, found, others)) for others in differences]
                if min(distances) > AGREES:
                    self.gradient = "finite difference"

    def _around(
        self, batch: Batch, start: Evaluation, sigma_next: Sigma, plan: StepPlan, stage: Stage
    ) -> tuple[Callable[[str, Any], Sample], Callable[[str, Tensor], tuple[Sample, Sigma]], StepPlan]:
        """The model's answer, and what it is asked, as functions of one number of the plan; and the plan itself."""
        history, at = (*batch.history, start), plan.detach()

        def place(name: str, value: Tensor) -> tuple[Sample, Sigma]:
            x, _, told = midpoint(history, sigma_next, self.solver, at.changed(name, value), stage)
            return x, told

        def ask(name: str, value: Any) -> Sample:
            return evaluate(batch.denoiser, *place(name, value)).denoised

        return ask, place, at

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
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "trajectory": self.trajectory,
            "model_calls": self.model_calls,
            "losses": [list(losses) for losses in self.losses],
            "errors": list(self.errors),
            "base": self.base,
            "checked": [self.gradient, self.step] if self._checked else None,
            "goals": self.judged.state_dict(),
            "batch": None
            if batch is None
            else {
                "rows": [batch.rows.start, batch.rows.stop],
                "targets": batch.teacher.targets,
                "starts": [_fields(e) for e in batch.teacher.starts],
                "x": batch.x,
                "history": [_fields(e) for e in batch.history],
                "interval": batch.interval,
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. Raises ValueError if it belongs to a training with other settings."""
        refuse_other_settings(state, {"config": self.config, "predictor_config": self.predictor.config})
        self.predictor.load_state_dict(state["predictor"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.trajectory, self._earlier_calls = state["trajectory"], state["model_calls"]
        self.losses = [list(losses) for losses in state["losses"]]
        self.errors, self.base, self._best = list(state["errors"]), state["base"], state["best"]
        if state["checked"] is not None:
            self.gradient, self.step = state["checked"]
            self._checked = True
        self.judged.load_state_dict(state["goals"])
        self._batch = None
        if (saved := state["batch"]) is not None:
            rows = range(*saved["rows"])
            # Only the denoiser is not in the state: the source gives it again.
            x, denoiser = self.metered(self.workers.share(rows))
            starts = [_evaluation(e, x) for e in saved["starts"]]
            self._batch = Batch(
                rows,
                denoiser,
                TeacherRun([target.to(x) for target in saved["targets"]], starts),
                saved["x"].to(x),
                tuple(_evaluation(e, x) for e in saved["history"]),
                saved["interval"],
            )

    def summary(self) -> dict[str, Any]:
        """How this predictor came about, for the header of its file; errors are of what is held out."""
        summary = {
            **asdict(self.config),
            "objective": "per interval",
            "gradient": self.gradient,
            "step": self.step,
            "teacher": self.teacher,
            "teacher_points": self.teacher_points,
            "crossed": self.trajectory,
            "model_calls": self.model_calls * self.workers.count,
            "model_calls_on_paper": self.floor * self.workers.count,
            "final_loss_per_interval": [sum(recent := v[-20:]) / max(len(recent), 1) for v in self.losses],
        }
        if self.errors and self.base is not None:
            best = min(self.errors)
            summary |= {"error": best, "base_solver_error": self.base, "gain": 1 - best / self.base}
        return summary


def unknowns(plan: StepPlan) -> list[tuple[str, float, float]]:
    """The numbers of a plan that the model's answer depends on, with the ranges that make sense."""
    ranges = (("r", 0.0, 1.0), ("scale_time", 0.0, math.inf))
    return [one for one in ranges if isinstance(getattr(plan, one[0]), Tensor)]


def _fields(evaluation: Evaluation) -> dict[str, Any]:
    return {f.name: getattr(evaluation, f.name) for f in fields(evaluation)}


def _evaluation(saved: Mapping[str, Any], like: Tensor) -> Evaluation:
    values: dict[str, Any] = {k: v.to(like) if isinstance(v, Tensor) else v for k, v in saved.items()}
    return Evaluation(**values)
