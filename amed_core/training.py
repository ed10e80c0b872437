"""Fitting the paper's predictor: a student interval is pulled toward a teacher on a finer grid.

Training crosses intervals with the same `advance` that sampling uses. It prints nothing, writes
nothing and stops when its caller stops iterating.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from .driver import (
    FixedMidpoint,
    NoMidpoint,
    advance,
    evaluate,
    midpoint,
    stages,
    trajectory,
)
from .predictor import AMEDPredictor, Look, PredictorConfig
from .schedules import schedule
from .solvers import Dpm2, DpmSolverPP, Ipndm
from .types import Denoiser, Evaluation, History, Planner, Sample, Sigma, Solver, Source, Stage, StepPlan

Teacher = tuple[Solver, Planner]


def _two_calls(r: float) -> Callable[[PredictorConfig], Teacher]:
    return lambda student: (Dpm2(), FixedMidpoint(r, sigma_floor=student.sigma_min))


# A teacher takes the order and the prediction type of its student.
TEACHERS: dict[str, Callable[[PredictorConfig], Teacher]] = {
    "heun": _two_calls(1.0),
    "dpm_2": _two_calls(0.5),
    "ipndm": lambda student: (Ipndm(student.max_order), NoMidpoint()),
    "dpmpp": lambda student: (
        DpmSolverPP(student.max_order, student.prediction, student.lower_order_final, student.thresholding),
        NoMidpoint(),
    ),
    "euler": lambda student: (Ipndm(1), NoMidpoint()),
}

# The teacher of the student's own family is the best one (Zhou et al. 2024, table 4); its inner points as published.
RECIPES = {
    "amed": ("heun", 1),
    "euler": ("euler", 2),
    "dpm_2": ("dpm_2", 1),
    "ipndm": ("ipndm", 2),
    "dpmpp": ("dpmpp", 2),
}

STEP = 1e-2  # of r and of scale_time, for finite differences


@dataclass(frozen=True)
class TrainConfig:
    """How to fit. The defaults are the published settings, for one device."""

    trajectories: int = 10_000  # starting noises in all; each crosses the whole grid once
    batch_size: int = 32
    teacher: str = ""  # a name in TEACHERS; empty chooses the student's own family
    teacher_points: int = 0  # grid points the teacher adds inside each interval; 0 chooses the published number
    learning_rate: float = 5e-3
    seed: int = 0
    gradient: Literal["reverse", "finite difference"] = "reverse"  # how the one model call is differentiated

    def __post_init__(self) -> None:
        if self.teacher and self.teacher not in TEACHERS:
            raise ValueError(f"There is no teacher {self.teacher!r}. Choose one of: {', '.join(TEACHERS)}.")
        if min(self.trajectories, self.batch_size) < 1 or self.teacher_points < 0 or self.learning_rate <= 0:
            raise ValueError(
                "Training needs at least 1 trajectory, a batch of at least 1, no negative number of teacher points and "
                f"a positive learning rate, but found {self.trajectories}, {self.batch_size}, {self.teacher_points} "
                f"and {self.learning_rate}."
            )
        if self.gradient not in ("reverse", "finite difference"):
            raise ValueError(f'gradient is "reverse" or "finite difference", but found {self.gradient!r}.')


@dataclass(frozen=True)
class TrainEvent:
    """What one optimiser step has to report."""

    trajectory: int  # trajectories begun so far
    interval: int
    loss: float  # squared distance to the teacher, summed over the sample, averaged over the batch
    plan: StepPlan  # of floats, averaged over the batch
    model_calls: int  # single-sample model calls so far
    student: Sample  # where the interval ended, for a preview
    teacher: Sample


@dataclass
class Batch:
    """The trajectories under way: what the remaining intervals need, and no more."""

    rows: range
    denoiser: Denoiser
    targets: list[Sample]  # the teacher's sample at the end of every interval
    starts: list[Evaluation]  # the teacher's evaluation at the beginning of every interval; empty if not used
    x: Sample  # the student's own sample
    history: History = ()
    interval: int = 0


class Trainer:
    """Owns the predictor, its optimiser and a random generator; nothing else is mutable.

    `source` draws starting points. The predictor's device and dtype are the caller's choice. `look` finds
    the features where an evaluation alone does not show them.
    """

    def __init__(self, predictor: AMEDPredictor, source: Source, config: TrainConfig, look: Look | None = None) -> None:
        self.predictor = predictor.requires_grad_(True)
        self.source = source
        self.look = look
        self.config = config
        recipe, points = RECIPES[predictor.config.solver]
        self.teacher = config.teacher or recipe
        self.teacher_points = config.teacher_points or points
        self.solver = predictor.config.build_solver()
        self.sigmas = torch.tensor(predictor.config.sigmas, dtype=torch.float64)
        self.teacher_sigmas = refine(predictor.config, self.teacher_points)
        self.optimizer = torch.optim.Adam(predictor.parameters(), lr=config.learning_rate)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.trajectory = 0
        self.model_calls = 0
        self.losses: list[list[float]] = [[] for _ in range(predictor.config.planned)]
        self._batch: Batch | None = None

    def events(self) -> Iterator[TrainEvent]:
        """Train, one optimiser step per event. Leave the loop to cancel; call again to go on.

        Raises FloatingPointError, naming the interval, if a loss is not finite; the predictor then
        is as it was before that step.
        """
        while self._batch is not None or self.trajectory < self.config.trajectories:
            if self._batch is None:
                self._batch = self.begin()
            batch = self._batch
            event = self._fit(batch)
            if batch.interval == self.predictor.config.planned:
                self._batch = None
            yield event

    @torch.no_grad()
    def begin(self) -> Batch:
        """Draw the next trajectories and run the teacher along them."""
        count = min(self.config.batch_size, self.config.trajectories - self.trajectory)
        rows = range(self.trajectory, self.trajectory + count)
        x, denoiser = self.source(rows, self.generator)
        targets, starts = [], []
        for step in trajectory(denoiser, x, self.teacher_sigmas, *TEACHERS[self.teacher](self.predictor.config)):
            self.model_calls += count * step.model_calls
            if step.index % (self.teacher_points + 1) == 0:
                starts.append(step.start)
            if (step.index + 1) % (self.teacher_points + 1) == 0:
                targets.append(step.x)
        self.trajectory += count
        return Batch(rows, denoiser, targets, [] if self.solver.multistep else starts, x)

    def _fit(self, batch: Batch) -> TrainEvent:
        """One interval: loss, gradient, optimiser step. The student then goes on from where it arrived."""
        interval = batch.interval
        self.optimizer.zero_grad()
        loss, student, plan, history = self.loss(batch)
        if not loss.isfinite():
            raise FloatingPointError(
                f"The loss is {loss.item()} in interval {interval + 1}: the model's answer there, or the update made "
                "of it, is not finite. Check the model's precision and its LoRAs; lower the learning rate if the loss "
                "had been rising. The predictor is kept as it was before this step."
            )
        # Only the predictor gets gradients: the model's parameters may be trainable, and are left as they are.
        loss.backward(inputs=list(self.predictor.parameters()))  # type: ignore[no-untyped-call]
        self.optimizer.step()
        batch.x, batch.history, batch.interval = student, history, interval + 1
        self.losses[interval].append(loss.item())
        return TrainEvent(
            self.trajectory, interval, loss.item(), _mean(plan), self.model_calls, student, batch.targets[interval]
        )

    def loss(self, batch: Batch) -> tuple[Tensor, Sample, StepPlan, History]:
        """The loss of the batch's next interval with its graph, the student there, its plan and its history."""
        interval, count = batch.interval, len(batch.x)
        sigmas = self.sigmas.to(batch.x)
        stage = stages(self.sigmas, self.predictor.planner())[interval]
        with torch.no_grad():
            start = self._start(batch, sigmas[interval])
        plan = self.predictor.planner(look=self.look).plan(start, interval)
        denoiser = batch.denoiser
        if self.config.gradient == "finite difference":
            denoiser = self._linearised(batch, start, sigmas[interval + 1], plan, stage)
        else:
            self.model_calls += count
        given = Given(plan)
        step = advance(denoiser, start, batch.history, sigmas[interval + 1], self.solver, given, interval, stage)
        loss = (step.x - batch.targets[interval]).square().sum() / count
        return loss, step.x.detach(), plan, tuple(e.detach() for e in step.history)

    def _start(self, batch: Batch, sigma: Tensor) -> Evaluation:
        if batch.interval == 0 and (first := self.predictor.config.first) is not None:
            return first(batch.x, sigma)
        if batch.starts:  # the teacher has already asked the model here
            return batch.starts[batch.interval]
        self.model_calls += len(batch.x)
        return evaluate(batch.denoiser, batch.x, sigma)

    @torch.no_grad()
    def _linearised(self, batch: Batch, start: Evaluation, sigma_next: Sigma, plan: StepPlan, stage: Stage) -> Denoiser:
        """The model at the midpoint, to first order in r and scale_time, from central differences.

        D + J_r (r - r0) + J_t (t - t0) has the value and the gradient of the model itself, and no
        autograd runs through the model: memory is that of sampling.
        """
        history = (*batch.history, start)

        def ask(plan: StepPlan) -> Evaluation:
            self.model_calls += len(start.x)
            return evaluate(batch.denoiser, *midpoint(history, sigma_next, self.solver, plan, stage))

        at, terms = plan.detach(), []
        denoised = ask(at).denoised
        for name, low, high in (("r", 0.0, 1.0), ("scale_time", 0.0, math.inf)):
            unknown, value = getattr(plan, name), getattr(at, name)
            if isinstance(unknown, Tensor):
                below, above = (value - STEP).clamp(min=low), (value + STEP).clamp(max=high)
                difference = ask(replace(at, **{name: above})).denoised - ask(replace(at, **{name: below})).denoised
                terms.append((difference / (above - below), unknown, value))

        def linearised(x: Sample, sigma: Sigma) -> Sample:
            del x, sigma
            return denoised + sum((slope * (unknown - value) for slope, unknown, value in terms), torch.zeros(()))

        return linearised

    def state_dict(self) -> dict[str, Any]:
        """All that continues this training exactly, between any two events; `files.save_state` writes it."""
        batch = self._batch
        return {
            "config": asdict(self.config),
            "predictor_config": asdict(self.predictor.config),
            "predictor": {name: weight.detach().clone() for name, weight in self.predictor.state_dict().items()},
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "generator": self.generator.get_state(),
            "trajectory": self.trajectory,
            "model_calls": self.model_calls,
            "losses": [list(losses) for losses in self.losses],
            "batch": None
            if batch is None
            else {
                "rows": [batch.rows.start, batch.rows.stop],
                "targets": batch.targets,
                "starts": [_fields(e) for e in batch.starts],
                "x": batch.x,
                "history": [_fields(e) for e in batch.history],
                "interval": batch.interval,
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. Raises ValueError if it belongs to a training with other settings."""
        here = {"config": asdict(self.config), "predictor_config": asdict(self.predictor.config)}
        for part, settings in here.items():
            if differing := [k for k, v in settings.items() if _plain(state[part].get(k)) != _plain(v)]:
                raise ValueError(f"This training state was made with other settings: {', '.join(differing)} differ.")
        self.predictor.load_state_dict(state["predictor"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"].cpu())
        self.trajectory, self.model_calls = state["trajectory"], state["model_calls"]
        self.losses = [list(losses) for losses in state["losses"]]
        self._batch = None
        if (saved := state["batch"]) is not None:
            rows = range(*saved["rows"])
            # Only the denoiser is not in the state: the source gives it again, with a generator of no consequence.
            x, denoiser = self.source(rows, torch.Generator())
            self._batch = Batch(
                rows,
                denoiser,
                [target.to(x) for target in saved["targets"]],
                [_evaluation(e, x) for e in saved["starts"]],
                saved["x"].to(x),
                tuple(_evaluation(e, x) for e in saved["history"]),
                saved["interval"],
            )

    def summary(self) -> dict[str, Any]:
        """How this predictor came about, for the header of its file."""
        return {
            **asdict(self.config),
            "teacher": self.teacher,
            "teacher_points": self.teacher_points,
            "trajectories": self.trajectory,
            "model_calls": self.model_calls,
            "final_loss_per_interval": [sum(recent := v[-20:]) / max(len(recent), 1) for v in self.losses],
        }


@dataclass(frozen=True)
class Given:
    """A planner that has already decided."""

    plan: StepPlan

    def updates(self, interval: int) -> Literal[1, 2]:
        del interval
        return 2

    def __call__(self, start: Evaluation, sigma_next: Sigma, interval: int) -> StepPlan:
        del start, sigma_next, interval
        return self.plan


def gaussian(denoiser: Denoiser, shape: tuple[int, ...], sigma: float, device: torch.device | str = "cpu") -> Source:
    """A source of noise sigma * N(0, 1) for samples of `shape`, drawn on the CPU so that every device gets the same.

    A denoiser with `for_rows(rows)` is asked for the one that is conditioned for these trajectories.
    """

    def draw(rows: range, generator: torch.Generator) -> tuple[Sample, Denoiser]:
        conditioned: Denoiser = getattr(denoiser, "for_rows", lambda _: denoiser)(rows)
        return sigma * torch.randn(len(rows), *shape, generator=generator).to(device), conditioned

    return draw


def refine(config: PredictorConfig, points: int) -> Tensor:
    """The teacher's grid: `points` more inside every planned interval, all of whose ends it contains.

    The schedule gives them where it gave the student's whole grid; otherwise they are spaced evenly
    in ln(sigma), from the smallest level if the interval ends at 0.
    """
    sigmas = torch.tensor(config.sigmas, dtype=torch.float64)
    low = config.sigma_min if sigmas[-1] == 0 else float(sigmas[-1])
    ends = sigmas.clamp(min=low).log()
    inner = torch.arange(points + 1, dtype=torch.float64) / (points + 1)
    fine = torch.cat([(ends[:-1, None] + inner * ends.diff()[:, None]).flatten(), ends[-1:]]).exp()
    with contextlib.suppress(ValueError):  # of a discrete schedule whose timesteps only the model knows
        scheduled = schedule(config.schedule)(len(fine), low, float(sigmas[0]), config.rho)
        if torch.allclose(scheduled[:: points + 1][:-1], sigmas[:-1], rtol=1e-9):
            fine = scheduled
    fine[:: points + 1] = sigmas
    return fine[: config.planned * (points + 1) + 1]


def _mean(plan: StepPlan) -> StepPlan:
    plan = plan.detach()
    r, scale_dir, scale_time = (float(torch.as_tensor(v).mean()) for v in (plan.r, plan.scale_dir, plan.scale_time))
    return StepPlan(r, scale_dir, scale_time, plan.sigma_floor)


def _fields(evaluation: Evaluation) -> dict[str, Any]:
    return {f.name: getattr(evaluation, f.name) for f in fields(evaluation)}


def _evaluation(saved: Mapping[str, Any], like: Tensor) -> Evaluation:
    values: dict[str, Any] = {k: v.to(like) if isinstance(v, Tensor) else v for k, v in saved.items()}
    return Evaluation(**values)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
