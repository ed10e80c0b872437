"""What every fit offers: its settings, what it tells while it runs, what came of it, and how it goes on."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

from ..predictor import Predictor, PredictorSet
from ..types import Sample, StepPlan
from .call_derivative import GRADIENTS, Gradient
from .teacher import TEACHERS


@dataclass(frozen=True)
class TrainConfig:
    """How to fit a network interval by interval. The defaults are the published settings, for one device.

    Raises ValueError for counts that no training could follow.
    """

    trajectories: int = 10_000  # starting noises in all
    epochs: int = 1  # how often each crosses the whole grid; the teacher crosses it once
    batch_size: int = 32  # trajectories per model call
    teacher: str = ""  # a name in TEACHERS; empty chooses the student's own family
    teacher_points: int = 0  # grid points the teacher adds inside each interval; 0 chooses the published number
    learning_rate: float = 5e-3  # of Adam
    gradient: Gradient = "reverse"  # how the one model call is differentiated
    step: float = 1e-2  # of r and of scale_time, for finite differences; 0 finds one that suits the model
    held_out: int = 0  # other trajectories, on whose final error the best weights are chosen; 0: the last are kept
    validations: int = 10  # how often that is measured
    teacher_calls: int = 40  # of the converged sampler that it is measured against
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
class FitConfig:
    """How to fit a table to the end of the trajectory. Raises ValueError for counts that no fit could follow."""

    trajectories: int = 64  # that it is fitted on
    held_out: int = 32  # others, on which it must be better than its baseline
    batch_size: int = 16  # trajectories per model call
    teacher_calls: int = 24  # of the slow sampler whose samples are the targets
    iterations: int = 6  # at most
    tolerance: float = 1e-3  # stop when an iteration gains less of the error than this part of it
    budget: int = 16_000  # stop before an iteration that would exceed so many sample calls; 0: no limit
    # On the CPU, beside the targets' ends: 3/8 of it for the teacher's paths, the rest for sampling runs; those that
    # exceed it are run again for their derivatives. It does not follow the machine's memory, as what is learned depends
    # on how many paths there are.
    keep_bytes: int = 2**33
    per_iteration: int = 2000  # sample calls for derivatives, as far as whole batches or one part of a batch allow
    # Of multistep weights: baselines that run on two trajectories, if there are several, best on paper first, which is
    # no sure sign; grids that are solved for, also best on paper first. They are solved on a few trajectories, and
    # judged on as many held-out ones. Finalists are the grids, and the baselines, that then run on all.
    baselines: int = 12
    grids: int = 12
    few: int = 16
    finalists: int = 2
    plain_finalists: int = 2
    # Up to so many calls students are so far from their teacher that least squares, which aims at the mean, blurs them:
    # the last of their steps then keeps the energy of bands of frequency, if that costs hardly any error.
    energy_calls: int = 4
    moves_grid: bool = False  # whether levels move with the weights, where one table has a grid of its own

    def __post_init__(self) -> None:
        counts = (
            *(self.trajectories, self.held_out, self.batch_size, self.iterations),
            *(self.baselines, self.grids, self.few, self.finalists, self.plain_finalists),
        )
        if min(counts) < 1 or self.teacher_calls < 2:
            raise ValueError(
                "Fitting to the end needs at least 1 trajectory, 1 held out, a batch of 1, 1 iteration, 1 baseline, 1 "
                "grid, 1 trajectory to try it on, 1 finalist of each and 2 teacher calls, but found "
                f"{', '.join(map(str, counts))} and {self.teacher_calls}."
            )


@dataclass(frozen=True)
class FitEvent:
    """One step of a fit. Samples are those of one batch, for a preview."""

    iteration: int  # of a fit to the end, 0 being its baseline; of one per interval, the trajectories begun
    loss: float  # RMSE on the fitted trajectories; per interval, squared distance to the teacher, summed over a sample
    held_out: float | None  # RMSE of finished held-out samples, where it was just measured
    plans: tuple[StepPlan, ...]  # of floats, averaged over the batch
    model_calls: int  # single-sample model calls of this process so far
    student: Sample
    teacher: Sample
    interval: int | None = None  # of a fit per interval
    finished: bool = True  # whether the samples are finished ones, worth a preview
    use: str = ""  # of fits for several uses, which

    def __str__(self) -> str:
        held_out = "" if self.held_out is None else f", held out {self.held_out:.4g}"
        kind, use = "error" if self.interval is None else "loss", f"{self.use}: " if self.use else ""
        return f"{use}{kind} {self.loss:.4g}{held_out}"


@dataclass(frozen=True)
class FitSummary:
    """What came of a fit. Errors are of held-out trajectories; None where they were not measured."""

    objective: str
    teacher: str
    baseline: str  # the unlearned method at equal model calls that it is compared with
    model_calls: int  # single-sample model calls, of all workers
    error: float | None
    baseline_error: float | None
    settings: Mapping[str, Any] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    not_finite: int = 0  # samples to which the model answered NaN or infinity

    @property
    def gain(self) -> float | None:
        """The part of the baseline's error that is gone."""
        if self.error is None or not self.baseline_error:
            return None
        return 1 - self.error / self.baseline_error

    def sentence(self) -> str:
        """What was gained on noise that the fit never saw, in plain words; empty where that was not measured."""
        if self.error is None or self.gain is None:
            return ""
        if self.gain <= 0:
            return (
                f"It is NOT better than {self.baseline} at equal model calls: error {self.error:.4g} against "
                f"{self.baseline_error:.4g}. Try another number of calls, or more trajectories."
            )
        return f"error {self.error:.4g}, {self.gain:.0%} less than that of {self.baseline} at equal model calls"

    def headline(self) -> str:
        """The same in a few words, for where there is little room."""
        if self.gain is None:
            return ""
        return "NOT better than its base solver" if self.gain <= 0 else f"{self.gain:.0%} less error than unlearned"

    def warnings(self) -> list[str]:
        """What was wrong with the model's answers or its derivatives, as sentences."""
        found = []
        if self.not_finite:
            found.append(
                f"The model answered NaN or infinity to {self.not_finite:,} samples: methods that met it counted as "
                "infinitely bad, so that another one may have been chosen. Check the model's precision."
            )
        if self.settings.get("gradient") == "reverse" and self.details.get("gradient") == "finite difference":
            found.append("Autograd failed its check on this model, so finite differences took its place.")
        return found

    def header(self) -> dict[str, Any]:
        """The same as JSON values, for the header of a predictor file."""
        found = {one.name: getattr(self, one.name) for one in fields(FitSummary)}
        return {**found.pop("settings"), **found.pop("details"), **found, "gain": self.gain}


@dataclass(frozen=True)
class PassesSummary(FitSummary):
    """What came of a fit for a number of passes, which may ask the negative at some calls only."""

    passes: int = 0  # of the predictor
    calls: int = 0
    negatives: int = 0  # calls that ask the negative
    guided_error: float | None = None  # of the fit that asks it at all of its calls, in no more passes

    def sentence(self) -> str:
        """What was gained on noise that the fit never saw, in plain words; empty where that was not measured."""
        first = super().sentence().replace("equal model calls", "equal passes")
        if self.error is None or not self.guided_error:
            return first
        if self.negatives == self.calls:
            return f"{first}. All {self.calls} calls ask the negative: to ask it less often was no better"
        less = 1 - self.error / self.guided_error
        return (
            f"{first}. {self.negatives} of {self.calls} calls ask the negative, which is {self.passes} passes: "
            f"{less:.0%} less error than where all of {self.passes // 2} calls ask it"
        )

    def header(self) -> dict[str, Any]:
        """The same as JSON values, for the header of a predictor file."""
        return {**super().header(), "passes": self.passes, "guided_error": self.guided_error}


@dataclass(frozen=True)
class SetSummary(FitSummary):
    """What came of a fit for several uses: of the first one, and of all."""

    uses: Mapping[str, FitSummary] = field(default_factory=dict)  # by name

    @property
    def gains(self) -> list[float]:
        """The parts of the baselines' errors that are gone, rising."""
        return sorted(one.gain for one in self.uses.values() if one.gain is not None)

    def sentence(self) -> str:
        """What was gained on noise that the fit never saw, in plain words; empty where that was not measured."""
        first, gains = super().sentence(), self.gains
        if len(gains) < 2:
            return first
        worse = [name for name, one in self.uses.items() if one.gain is not None and one.gain <= 0]
        some = f"; NOT better in {', '.join(worse)}" if worse else ""
        return f"{first}. In all {len(gains)} uses {gains[0]:.0%} to {gains[-1]:.0%} less{some}"

    def headline(self) -> str:
        """The same in a few words, for where there is little room."""
        gains = self.gains
        if len(gains) < 2 or gains[0] <= 0:
            return super().headline()
        return f"{gains[0]:.0%} to {gains[-1]:.0%} less error than unlearned"

    def header(self) -> dict[str, Any]:
        """The same as JSON values, for the header of a predictor file."""
        found = {**super().header(), "uses": {}}
        for name, one in self.uses.items():
            found["uses"][name] = {"error": one.error, "baseline": one.baseline, "baseline_error": one.baseline_error}
        return found


class Fit(Protocol):
    """A fit under way: iterate `events` to go on, leave the loop to stop, at any moment."""

    @property
    def predictor(self) -> Predictor:
        """The best so far, always usable."""

    @property
    def predictors(self) -> PredictorSet:
        """The best so far, of all uses that it is for."""

    @property
    def begun(self) -> bool:
        """Whether they have learned anything."""

    @property
    def losses(self) -> list[float]:
        """One loss per batch, summed over its intervals, or one error per iteration."""

    @property
    def model_calls(self) -> int:
        """Single-sample model calls so far, of this process."""

    @property
    def expected_calls(self) -> int:
        """The fewest there will be at the end, as far as that is known now: for progress bars."""

    def events(self) -> Iterator[FitEvent]:
        """Fit, one step per event; call again to go on. Raises FloatingPointError for samples that are not finite."""

    def state_dict(self) -> dict[str, Any]:
        """All that continues this fit exactly; `files.save_state` writes it. A step begun is begun again."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. Raises StateError, and changes nothing, if it is damaged or of other settings."""

    def summary(self) -> FitSummary:
        """What came of it so far."""


class _Predicts(Protocol):
    @property
    def predictor(self) -> Predictor:
        """The best so far."""


class ForOneUse:
    """What a fit whose predictor is for one use says of all."""

    @property
    def predictors(self: _Predicts) -> PredictorSet:
        """Its predictor alone."""
        return PredictorSet((self.predictor,))


class StateError(ValueError):
    """A training state is damaged, or of another fit. The message says which."""
