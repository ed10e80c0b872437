"""What all fits have in common: their states, and how they are judged."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ..types import Sample, StepPlan
from .call_derivative import GRADIENTS, Gradient
from .teacher import TEACHERS


def refuse_other_settings(state: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raise ValueError if a state was made with other settings than these dataclasses."""

    def plain(value: Any) -> Any:
        return [plain(v) for v in value] if isinstance(value, (tuple, list)) else value

    for part, values in settings.items():
        saved = state.get(part, {})
        if differing := [k for k, v in asdict(values).items() if plain(saved.get(k)) != plain(v)]:
            raise ValueError(f"This training state was made with other settings: {', '.join(differing)} differ.")


def verdict(summary: Mapping[str, Any]) -> str:
    """What a fit gained on noise that it never saw, in plain words; empty where that was not measured."""
    if "error" not in summary:
        return ""
    error, base = summary["error"], summary["base_solver_error"]
    if error >= base:
        return (
            f"It is NOT better than its base solver at equal model calls: error {error:.4g} against {base:.4g}. "
            "Try another sampler, more trajectories or another number of calls."
        )
    return f"error {error:.4g}, {1 - error / base:.0%} less than its base solver's at equal model calls"


def outcome(summary: Mapping[str, Any]) -> str:
    """The same in a few words, for where there is little room."""
    if "error" not in summary:
        return ""
    error, base = summary["error"], summary["base_solver_error"]
    return (
        "NOT better than its base solver"
        if error >= base
        else f"{1 - error / base:.0%} less error than its base solver"
    )


@dataclass(frozen=True)
class TrainConfig:
    """How to fit. The defaults are the published settings, for one device."""

    trajectories: int = 10_000  # starting noises in all
    epochs: int = 1  # how often each crosses the whole grid; the teacher crosses it once
    batch_size: int = 32
    teacher: str = ""  # a name in TEACHERS; empty chooses the student's own family
    teacher_points: int = 0  # grid points the teacher adds inside each interval; 0 chooses the published number
    learning_rate: float = 5e-3
    seed: int = 0  # of a network's weights; the source has its own
    gradient: Gradient = "reverse"  # how the one model call is differentiated
    step: float = (
        1e-2  # of r and of scale_time, for finite differences; 0 finds one that the model is smooth enough for
    )
    held_out: int = 0  # other trajectories, on whose final error the best weights are chosen; 0: the last are kept
    validations: int = 10  # how often that is measured
    teacher_calls: int = 40  # of the converged teacher that it is measured against
    keep_bytes: int = 2**32  # of the teacher's samples, on the CPU between epochs; what exceeds it is made again

    def __post_init__(self) -> None:
        if self.teacher and self.teacher not in TEACHERS:
            raise ValueError(f"There is no teacher {self.teacher!r}. Choose one of: {', '.join(TEACHERS)}.")
        counts = (self.trajectories, self.epochs, self.batch_size, self.validations)
        if min(counts) < 1 or min(self.teacher_points, self.held_out, self.step) < 0 or self.learning_rate <= 0:
            raise ValueError(
                "Training needs at least 1 trajectory, 1 epoch, a batch of at least 1, no negative number of teacher "
                f"points and a positive learning rate, but found {self.trajectories}, {self.epochs}, "
                f"{self.batch_size}, {self.teacher_points} and {self.learning_rate}."
            )
        if self.gradient not in GRADIENTS:
            raise ValueError(f"gradient is one of {', '.join(GRADIENTS)}, but found {self.gradient!r}.")


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
    held_out: float | None = None  # the final sample's error, where it was just measured


@dataclass(frozen=True)
class FitConfig:
    """How to fit to the end of the trajectory."""

    trajectories: int = 32  # that it is fitted on, at every guidance scale
    held_out: int = 32  # others, that choose the best of its iterations
    batch_size: int = 16  # trajectories per model call
    teacher_calls: int = 40
    iterations: int = 8  # at most
    tolerance: float = 1e-3  # stop when an iteration gains less of the error than this part of it
    network_steps: int = 100  # of Adam per iteration, on expanded errors
    gradient: Literal["finite difference", "reverse"] = "finite difference"  # reverse: autograd, checkpointed per call
    learning_rate: float = 5e-3  # of Adam, with reverse
    budget: int = 0  # stop before an iteration that would exceed so many sample calls; 0: no limit
    keep_bytes: int = 2**32  # of sampling runs, on the CPU; those that exceed it are run again for their derivatives
    seed: int = 0  # of a network's weights; the source has its own

    def __post_init__(self) -> None:
        if min(self.trajectories, self.held_out, self.batch_size, self.iterations) < 1 or self.teacher_calls < 2:
            raise ValueError(
                "Fitting to the end needs at least 1 trajectory, 1 held out, a batch of 1, 1 iteration and 2 teacher "
                f"calls, but found {self.trajectories}, {self.held_out}, {self.batch_size}, {self.iterations} and "
                f"{self.teacher_calls}."
            )
        if self.gradient not in ("finite difference", "reverse"):
            raise ValueError(f'gradient is "finite difference" or "reverse", but found {self.gradient!r}.')


@dataclass(frozen=True)
class FitEvent:
    """What one iteration has to report. Errors are RMSE to the teacher, over all elements."""

    iteration: int  # 0 is the base solver, before any
    error: float  # on the trajectories that are fitted
    held_out: float  # on those that are not
    plans: tuple[StepPlan, ...]  # of the last batch that was held out: floats, averaged over it
    model_calls: int  # single-sample model calls so far
    student: Sample  # that batch, for a preview
    teacher: Sample
