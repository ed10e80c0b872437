"""A predictor without a network: one plan per interval for all samples, fitted to the end of the trajectory.

A table of r, scale_dir and scale_time has a handful of numbers. So its fit needs no gradient through
the model: Gauss-Newton on the error of the final sample, with derivatives from differences of sampling runs.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import measures
from .driver import Resume, sample, trajectory
from .predictor import (
    R_MARGIN,
    AMEDPredictor,
    Look,
    PredictorConfig,
    PredictorPlanner,
    look_at_none,
    neighbours_along,
)
from .types import Denoiser, Features, Sample, Sigma, Source, Step, StepPlan

COLUMNS = ("r", "scale_dir", "scale_time")
DIFFERENCE = 2e-2  # of every number, for the derivatives
DAMPING, EASIER, HARDER = 1e-2, 0.2, 5.0  # Levenberg and Marquardt's


class TablePredictor(nn.Module):
    """`plans` (planned intervals, 3): r, scale_dir and scale_time of every planned interval."""

    def __init__(self, config: PredictorConfig) -> None:
        super().__init__()
        self.config = config
        self.plans = nn.Parameter(torch.tensor([[0.5, 1.0, 1.0]]).repeat(config.planned, 1), requires_grad=False)

    def planner(
        self, sigmas: Sequence[float] = (), plain: frozenset[int] | None = None, look: Look | None = None
    ) -> PredictorPlanner:
        """Use this table along the grid `sigmas`, or along its own; `plain` names intervals without a midpoint."""
        del look
        own = frozenset(range(self.config.planned, self.config.intervals))
        plans = self.plans.detach()

        def plan(interval: int, features: Tensor) -> StepPlan:
            del features
            r, scale_dir, scale_time = plans[interval].reshape(3, 1, 1)
            return StepPlan(r, scale_dir, scale_time, self.config.sigma_min)

        made_of = neighbours_along(self.config, sigmas)
        return PredictorPlanner(plan, own if plain is None else plain, look_at_none, made_of)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """The lowest and the highest of the three columns.

        r may be 0, which asks the model at the interval's start again, where no update divides by it.
        """
        config = self.config
        lowest = 0.0 if config.solver in ("amed", "euler", "ipndm") else 100 * R_MARGIN
        low = torch.tensor([lowest, 1 - config.scale_dir, 1 - config.scale_time])
        return low, torch.tensor([1 - R_MARGIN, 1 + config.scale_dir, 1 + config.scale_time])


AnyPredictor = AMEDPredictor | TablePredictor


def build(config: PredictorConfig, generator: torch.Generator | None = None) -> AnyPredictor:
    """The predictor of these settings, not trained; the generator draws a network's weights."""
    return TablePredictor(config) if config.kind == "table" else AMEDPredictor(config, generator)


@dataclass(frozen=True)
class FitConfig:
    """How to fit a table."""

    trajectories: int = 32  # that it is fitted on
    held_out: int = 32  # others, that choose the best of its iterations
    batch_size: int = 16  # trajectories per model call
    teacher_calls: int = 40
    iterations: int = 8  # at most
    tolerance: float = 1e-3  # stop when an iteration gains less of the error than this part of it
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.trajectories, self.held_out, self.batch_size, self.iterations) < 1 or self.teacher_calls < 2:
            raise ValueError(
                "Fitting a table needs at least 1 trajectory, 1 held out, a batch of 1, 1 iteration and 2 teacher "
                f"calls, but found {self.trajectories}, {self.held_out}, {self.batch_size}, {self.iterations} and "
                f"{self.teacher_calls}."
            )


@dataclass(frozen=True)
class FitEvent:
    """What one iteration has to report. Errors are RMSE to the teacher, over all elements."""

    iteration: int  # 0 is the base solver, before any
    error: float  # on the trajectories that are fitted
    held_out: float  # on those that are not
    plans: tuple[tuple[float, ...], ...]
    model_calls: int  # single-sample model calls so far
    student: Sample  # the last batch that was held out, for a preview
    teacher: Sample


@dataclass(frozen=True)
class Batch:
    """Trajectories with the teacher's end of each."""

    denoiser: Denoiser
    x: Sample
    target: Sample


class TableFit:
    """Gauss-Newton on the final sample's error, damped as by Levenberg and Marquardt.

    The teacher runs once per trajectory and is kept. A number of interval k is varied from the base run's
    own start of interval k on, so that nothing before it is computed again; scale_dir also leaves the
    midpoint's answer as it is.
    """

    def __init__(self, predictor: TablePredictor, source: Source, config: FitConfig) -> None:
        self.predictor = predictor
        self.source = source
        self.config = config
        self.solver = predictor.config.build_solver()
        self.sigmas = torch.tensor(predictor.config.sigmas, dtype=torch.float64)
        self.model_calls = 0
        low, high = predictor.bounds()
        self.low, self.high = (bound.expand(predictor.config.planned, 3) for bound in (low, high))
        self.free = (self.high > self.low).flatten()  # a column without a range keeps its 1
        self.reported: list[FitEvent] = []

    @torch.no_grad()
    def events(self) -> Iterator[FitEvent]:
        """Fit, one iteration per event; the table holds the best so far, judged on what is held out.

        Raises FloatingPointError if the teacher's or the base solver's samples are not finite.
        """
        count = self.config.trajectories
        generator = torch.Generator().manual_seed(self.config.seed)
        fitted, others = (
            self._batches(range(count), generator),
            self._batches(range(count, count + self.config.held_out), generator),
        )
        plans = self.predictor.plans.detach().cpu().clone()  # its algebra stays there, wherever the model is
        damping, error = DAMPING, self._error(fitted, plans)[0]
        best, student = self._error(others, plans)
        if not math.isfinite(error) or not math.isfinite(best):
            raise FloatingPointError(
                "The base solver's samples are not finite. Check the model's precision and its LoRAs, or fit a table "
                "for another solver."
            )
        yield self._event(0, error, best, plans, student, others)
        for iteration in range(1, self.config.iterations + 1):
            before = error
            normal, gradient = self._normal_equations(fitted, plans)
            for _ in range(5):
                trial = self._step(plans, normal, gradient, damping)
                if (trial_error := self._error(fitted, trial)[0]) < error:
                    plans, error, damping = trial, trial_error, damping * EASIER
                    break
                damping *= HARDER
            judged, student = self._error(others, plans)
            if judged < best:
                best = judged
                self.predictor.plans.copy_(plans)
            yield self._event(iteration, error, judged, plans, student, others)
            if error > (1 - self.config.tolerance) * before:
                return

    def _batches(self, trajectories: range, generator: torch.Generator) -> list[Batch]:
        batches = []
        for begin in range(trajectories.start, trajectories.stop, self.config.batch_size):
            rows = range(begin, min(begin + self.config.batch_size, trajectories.stop))
            x, model = self.source(rows, generator)
            denoiser = self._counted(model)
            low, high = self.predictor.config.sigma_min, float(self.sigmas[0])
            batches.append(Batch(denoiser, x, measures.converged(denoiser, x, low, high, self.config.teacher_calls)))
        return batches

    def _counted(self, model: Denoiser) -> Denoiser:
        def denoiser(x: Sample, sigma: Sigma) -> Sample | tuple[Sample, Features | None]:
            self.model_calls += len(x)
            return model(x, sigma)

        return denoiser

    def _planner(self, plans: Tensor) -> PredictorPlanner:
        table = TablePredictor(self.predictor.config)
        table.plans.copy_(plans)
        return table.planner()

    def _error(self, batches: Sequence[Batch], plans: Tensor) -> tuple[float, Sample]:
        """The RMSE over all batches, infinite where a sample is not finite, and the last batch's samples."""
        squares, elements, drawn = 0.0, 0, batches[0].x
        for batch in batches:
            try:
                first, planner = self.predictor.config.first, self._planner(plans)
                drawn = sample(batch.denoiser, batch.x, self.sigmas, self.solver, planner, first=first)
            except FloatingPointError:
                return math.inf, drawn
            squares += float((drawn - batch.target).double().square().sum())
            elements += drawn.numel()
        return math.sqrt(squares / elements), drawn

    def _normal_equations(self, batches: Sequence[Batch], plans: Tensor) -> tuple[Tensor, Tensor]:
        """J^T J and J^T residual, with the derivatives J of the final samples by the free numbers."""
        count = int(self.free.sum())
        normal, gradient = torch.zeros(count, count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
        for batch in batches:
            steps = self._run(batch, plans)
            end = steps[-1].x
            columns = torch.stack([self._derivative(batch, plans, steps, n) for n in self.free.nonzero().flatten()])
            flat = columns.flatten(1).double().cpu()
            normal += flat @ flat.T
            gradient += flat @ (end - batch.target).flatten().double().cpu()
        return normal, gradient

    def _run(self, batch: Batch, plans: Tensor, resume: Resume | None = None) -> list[Step]:
        parts = (self.sigmas, self.solver, self._planner(plans))
        return list(trajectory(batch.denoiser, batch.x, *parts, first=self.predictor.config.first, resume=resume))

    def _derivative(self, batch: Batch, plans: Tensor, steps: Sequence[Step], number: Tensor) -> Sample:
        """Of the final samples by one of the table's numbers, from one more run of what comes after it."""
        interval, column = divmod(int(number), 3)
        inward = plans[interval, column] + DIFFERENCE <= self.high[interval, column]
        step = DIFFERENCE if inward else -DIFFERENCE
        varied = plans.clone()
        varied[interval, column] += step
        base = steps[interval]
        same_mid = base.mid if COLUMNS[column] == "scale_dir" else None
        history = steps[interval - 1].history if interval else ()
        resume = Resume(interval, base.start, history, same_mid)
        return (self._run(batch, varied, resume)[-1].x - steps[-1].x) / step

    def _step(self, plans: Tensor, normal: Tensor, gradient: Tensor, damping: float) -> Tensor:
        damped = normal + damping * normal.diagonal().diag() + 1e-12 * normal.diagonal().max() * torch.eye(len(normal))
        change = torch.zeros(plans.numel(), dtype=torch.float64)
        change[self.free] = torch.linalg.solve(damped, -gradient)
        moved = plans.double() + change.reshape(plans.shape)
        return moved.to(plans).clamp(self.low, self.high)

    def _event(
        self, iteration: int, error: float, held_out: float, plans: Tensor, student: Sample, others: Sequence[Batch]
    ) -> FitEvent:
        numbers = tuple(tuple(row) for row in plans.tolist())
        event = FitEvent(iteration, error, held_out, numbers, self.model_calls, student, others[-1].target)
        self.reported.append(event)
        return event

    def summary(self) -> dict[str, Any]:
        """How this table came about, for the header of its file; errors are of what is held out."""
        held_out = [event.held_out for event in self.reported]
        return {
            **asdict(self.config),
            "teacher": f"converged, {self.config.teacher_calls} calls",
            "model_calls": self.model_calls,
            "error": min(held_out),
            "base_solver_error": held_out[0],
        }


def table_config(config: PredictorConfig, scale_dir: float = 0.5, scale_time: float = 0.5) -> PredictorConfig:
    """The settings of a table in place of a network, with wider ranges than the paper's."""
    return replace(config, kind="table", features="none", scale_dir=scale_dir, scale_time=scale_time)
