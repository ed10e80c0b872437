"""The one loop. Sampling iterates it; training takes a gradient of what it yields."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .types import (
    Answer,
    Denoiser,
    Evaluation,
    Features,
    History,
    Method,
    Planner,
    Sample,
    Sigma,
    Stage,
    Step,
    StepPlan,
)


@dataclass(frozen=True)
class NoMidpoint(Planner):
    """One update per interval: Euler, and the multistep solvers without a predictor."""

    def updates(self, interval: int) -> Literal[1, 2]:
        """One in every interval."""
        del interval
        return 1

    def __call__(self, start: Evaluation, sigma_next: Sigma, interval: int) -> None:
        del start, sigma_next, interval


@dataclass(frozen=True)
class FixedMidpoint(Planner):
    """The same midpoint in every interval but the `plain` ones: r = 0.5 is DPM-Solver-2 and r = 1 Heun's method."""

    r: float
    sigma_floor: float = 0.0
    plain: frozenset[int] = frozenset()

    def updates(self, interval: int) -> Literal[1, 2]:
        """One in plain intervals, else two."""
        return 1 if interval in self.plain else 2

    def __call__(self, start: Evaluation, sigma_next: Sigma, interval: int) -> StepPlan | None:
        del start, sigma_next
        return None if interval in self.plain else StepPlan(self.r, sigma_floor=self.sigma_floor)


@dataclass(frozen=True)
class Decided(Planner):
    """Plans that were made before; None where an interval has no midpoint."""

    plans: tuple[StepPlan | None, ...]

    def updates(self, interval: int) -> Literal[1, 2]:
        """One where there is no plan, else two."""
        return 1 if self.plans[interval] is None else 2

    def __call__(self, start: Evaluation, sigma_next: Sigma, interval: int) -> StepPlan | None:
        del start, sigma_next
        return self.plans[interval]


def evaluate(
    denoiser: Denoiser, x: Sample, sigma: Sigma, ask_at: Sigma | None = None, *, negative: bool = True
) -> Evaluation:
    """Call the model once at `x` (batch, ...), whose noise level is `sigma`, () or (batch, 1, ..., 1).

    `ask_at` is the noise level that the network is told, where that is not sigma. Without its `negative` a guided model
    gives the conditional answer alone. Raises ValueError if it cannot.
    """
    ask = denoiser if negative else conditional(denoiser)
    denoised, features, guidance = in_full(ask(x, sigma if ask_at is None else ask_at))
    return Evaluation(x, sigma, denoised, features, guidance=guidance if negative else None)


def conditional(denoiser: Denoiser) -> Denoiser:
    """A guided model without its negative. Raises ValueError if it has no `conditional`."""
    found: Denoiser | None = getattr(denoiser, "conditional", None)
    if found is None:
        raise ValueError(
            "This predictor asks the negative at some calls only, but the model does not answer without it. Give the "
            "denoiser a method conditional(x, sigma), or take a predictor that asks the negative at every call."
        )
    return found


def asked(denoiser: Denoiser, planner: Planner, interval: int, x: Sample, sigma: Sigma) -> Evaluation:
    """Call the model at an interval's start as the planner says: `x` (batch, ...) is there, and `sigma` its level."""
    return evaluate(denoiser, x, sigma, planner.told(interval, sigma), negative=planner.asks_negative(interval))


def in_full(answer: Answer) -> tuple[Sample, Features | None, Sample | None]:
    """A model's answer (batch, ...) with its features and its guidance (batch, ...), None where it gave none.

    Features are (batch, height, width), or raw (batch, channels, [frames,] height, width).
    """
    if not isinstance(answer, tuple):
        return answer, None, None
    return answer if len(answer) == 3 else (*answer, None)


def analytic_first(x: Sample, sigma: Sigma) -> Evaluation:
    """The network-free first evaluation at x (batch, ...): slope x / sqrt(1 + sigma^2) (AFS; Dockhorn et al. 2022).

    For unit-variance data the slope is sigma x / (1 + sigma^2): a relative 1 / (2 sigma^2) away, so
    this is for a large sigma only, where the data is negligible.
    """
    return Evaluation(x, sigma, x - sigma * x / (1 + sigma**2).sqrt(), analytic=True)


def analytic_first_flow(x: Sample, sigma: Sigma) -> Evaluation:
    """The same for flow models, x = (1 - sigma) x0 + sigma noise (batch, ...), whose sigma ends at 1.

    The denoiser of unit-variance Gaussian data is (1 - sigma) x / ((1 - sigma)^2 + sigma^2): x0 and x have the
    covariance 1 - sigma, and x has the variance (1 - sigma)^2 + sigma^2. At sigma = 1 it is 0, the mean of any data
    that is centred, so there the slope x - 0 is right whatever the data's shape.
    """
    signal = 1 - sigma
    return Evaluation(x, sigma, signal / (signal**2 + sigma**2) * x, analytic=True)


def advance(
    denoiser: Denoiser,
    method: Method,
    interval: int,
    start: Evaluation,
    history: History,
    sigma_next: Sigma,
    known_mid: Evaluation | None = None,
) -> Step:
    """Cross one interval. Sampling and training both call this and nothing else.

    `start` is the evaluation at the interval's beginning, `history` what came before it. `sigma_next` () is the
    interval's end, on the sample's device. `known_mid` is the planned midpoint's evaluation, if it was made before.
    """
    plan = method.planner(start, sigma_next, interval)
    history = (*history, start)
    mid = None
    if plan is not None:
        mid = known_mid or evaluate(denoiser, *midpoint(method, interval, history, sigma_next, plan))
        history = (*history, mid)
    x = method.solver.to_next(history, sigma_next, plan, method.stages[interval])
    return Step(interval, x, start, mid, plan, history[max(len(history) - method.solver.memory, 0) :])


def midpoint(
    method: Method, interval: int, history: History, sigma_next: Sigma, plan: StepPlan
) -> tuple[Sample, Sigma, Sigma]:
    """The sample (batch, ...) at the planned midpoint, its noise level, and the level to ask the network at.

    `history` ends with the evaluation at the interval's start.
    """
    sigma, last = plan.midpoint(history[-1].sigma, sigma_next), method.stages[interval]
    x = method.solver.to_mid(history, sigma, Stage(interval, last.index - 1, last.count))
    return x, sigma, plan.scale_time * sigma


@dataclass(frozen=True)
class Resume:
    """Where to go on in a trajectory that was run before: at the start of an interval."""

    interval: int
    start: Evaluation
    history: History  # before the start
    mid: Evaluation | None = None  # the interval's midpoint, if it is the same as before


def trajectory(denoiser: Denoiser, x: Sample, method: Method, *, resume: Resume | None = None) -> Iterator[Step]:
    """Yield every interval of a method's grid, largest level first. Stop iterating to stop sampling.

    `x` (batch, ...) is the noisy sample at the first level, and keeps its dtype and device. `resume` skips what was run
    before.
    """
    sigmas = torch.tensor(method.sigmas, dtype=torch.float64).to(x)
    history: History = () if resume is None else resume.history
    begin = 0 if resume is None else resume.interval
    for interval in range(begin, len(method.sigmas) - 1):
        known_mid = None
        if resume is not None and interval == begin:
            start, known_mid = resume.start, resume.mid
        else:
            x, sigma = method.planner.carried(interval, x, sigmas[interval])
            first = method.first if interval == 0 else None
            start = asked(denoiser, method.planner, interval, x, sigma) if first is None else first(x, sigma)
        step = advance(denoiser, method, interval, start, history, sigmas[interval + 1], known_mid)
        yield step
        x, history = step.x, step.history
        del start, step  # their samples need not live through the next model call


@torch.no_grad()
def sample(denoiser: Denoiser, x: Sample, method: Method) -> Sample:
    """Run a method to its end from noise `x` (batch, ...) at its first level, and return the sample there.

    Raises FloatingPointError that names the interval and the call if the model answered NaN or infinity, and if the
    sample itself is not finite.
    """
    answers: list[Total] = []
    for step in trajectory(denoiser, x, method):
        answers += answers_of(step)
        x = step.x
        del step  # its evaluations need not live through the next model call
    raise_if_not_finite(answers, x)
    return x


Total = tuple[int, int, Tensor]  # interval, call within it (both from 0), the sum of the answer


def answers_of(step: Step) -> list[Total]:
    """What to remember of a step's model calls; nothing here waits for a GPU."""
    calls = [e for e in (step.start, step.mid) if e is not None and not e.analytic]
    # One bad element makes the sum bad; in float32, where a sum of half-precision numbers does not overflow.
    return [(step.index, call, e.denoised.sum(dtype=torch.float32)) for call, e in enumerate(calls)]


def raise_if_not_finite(answers: Sequence[Total], finished: Sample | None = None) -> None:
    """Raise FloatingPointError for the first bad answer, or for the finished sample (batch, ...).

    Call it once, after the loop: it waits for the GPU, once.
    """
    totals = [total for _, _, total in answers]
    if finished is not None:
        totals.append(finished.sum(dtype=torch.float32))
    finite = torch.stack(totals).isfinite().tolist() if totals else []
    for (interval, call, _), fine in zip(answers, finite, strict=False):
        if not fine:
            raise FloatingPointError(
                f"The model answered NaN or infinity in interval {interval + 1}, model call {call + 1} of that "
                "interval. Check the model's precision (try --force-fp32 or another weight dtype), its VAE and "
                "LoRAs, and whether this sampler's predictor was made for this model."
            )
    if not all(finite):
        raise FloatingPointError(
            "The finished sample is NaN or infinite, though the model answered well. Choose another predictor, or "
            "train one for this model: the weights of this one lead too far."
        )
