"""The vocabulary of the core: shape names, values and roles.

Sigma is ComfyUI's and EDM's noise level throughout: x = x0 + sigma * noise for eps, v and EDM
models, and the same slope dx/dsigma = (x - denoised) / sigma holds for flow models.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

Sample = Tensor  # (batch, *shape), a noisy or clean sample of any rank
Sigma = Tensor  # scalar, or (batch, 1, ..., 1) when a predictor chose it per sample
Features = Tensor  # (batch, height, width), the denoiser's bottleneck averaged over channels; raw, it is pooled later


@dataclass(frozen=True)
class Evaluation:
    """One call of the denoiser, as the solvers see it.

    `sigma` is the noise level the trajectory assigns to `x`. The network may have been asked at
    another level (AMED's time scaling), and that is not recorded here. `analytic` marks the
    network-free first evaluation, which is no model call.
    """

    x: Sample
    sigma: Sigma
    denoised: Sample
    features: Features | None = None
    analytic: bool = False
    guidance: Sample | None = None  # of a guided model: its conditional denoised sample less the unconditional one

    @property
    def slope(self) -> Sample:
        """dx/dsigma (batch, ...) of the probability-flow ODE at this point (EDM, eq. 3)."""
        return (self.x - self.denoised) / self.sigma

    @property
    def guidance_slope(self) -> Sample:
        """By how much the slope (batch, ...) changes with the guidance scale (Ho and Salimans 2022).

        Raises ValueError if the model did not show its two answers.
        """
        if self.guidance is None:
            raise ValueError(
                "This predictor steps along what guidance adds, but the model did not show its two answers. Ask it at "
                "the guidance scale (cfg) that the predictor was made for."
            )
        return -self.guidance / self.sigma

    def _moved(self, each: Callable[[Tensor], Tensor]) -> "Evaluation":
        features, guidance = (None if v is None else each(v) for v in (self.features, self.guidance))
        x, sigma, denoised = each(self.x), each(self.sigma), each(self.denoised)
        return Evaluation(x, sigma, denoised, features, self.analytic, guidance)

    def detach(self) -> "Evaluation":
        """The same evaluation, cut off from autograd."""
        return self._moved(Tensor.detach)

    def to(self, device: torch.device | str) -> "Evaluation":
        """The same evaluation on another device."""
        return self._moved(lambda values: values.to(device))


History = tuple[Evaluation, ...]  # oldest first, newest last, never mutated


COLUMNS = ("r", "scale_dir", "scale_time")  # of a plan, what may be learned


@dataclass(frozen=True)
class StepPlan:
    """What a planner decides about one interval. Tensors are (batch, 1, ..., 1)."""

    r: Tensor | float  # log-space position of the midpoint, 0 = start, 1 = end
    scale_dir: Tensor | float = 1.0  # multiplies the second update
    scale_time: Tensor | float = 1.0  # multiplies sigma when the network is asked at the midpoint
    sigma_floor: float = 0.0  # stands in for the end of an interval that ends below it (at 0)

    def midpoint(self, sigma: Sigma, sigma_next: Sigma) -> Sigma:
        """sigma_next^r * sigma^(1 - r), the geometric mean of AMED-Solver (Zhou et al. 2024).

        It is (batch, 1, ..., 1) where r is, else ().
        """
        end = sigma_next.clamp(min=self.sigma_floor).minimum(sigma)
        r = torch.as_tensor(self.r, dtype=sigma.dtype, device=sigma.device)
        return end**r * sigma ** (1 - r)

    def detach(self) -> "StepPlan":
        """The same plan, cut off from autograd."""
        values: dict[str, Any] = {n: v.detach() for n in COLUMNS if isinstance(v := getattr(self, n), Tensor)}
        return replace(self, **values)

    def mean(self) -> "StepPlan":
        """The same plan in floats, averaged over the batch."""
        return replace(self, **{n: float(torch.as_tensor(getattr(self, n)).detach().mean()) for n in COLUMNS})


@dataclass(frozen=True)
class Stage:
    """Which solver update of a run this is."""

    interval: int  # from 0
    index: int  # among all updates, from 1; a planned interval has two
    count: int  # of all updates
    to_zero: bool = False  # it ends at sigma = 0


@dataclass(frozen=True)
class Step:
    """One finished interval, handed to whoever is iterating."""

    index: int
    x: Sample
    start: Evaluation
    mid: Evaluation | None
    plan: StepPlan | None
    history: History

    @property
    def model_calls(self) -> int:
        """How often this interval asked the model."""
        return (not self.start.analytic) + (self.mid is not None)


# The denoised sample; with its features; or with both its features and its guidance (see Evaluation).
Answer = Sample | tuple[Sample, Features | None] | tuple[Sample, Features | None, Sample | None]


class Denoiser(Protocol):
    """A pretrained diffusion model. The only thing in the core that costs time.

    A guided one may also have `conditional(x, sigma)`: its answer without the negative, which is one pass of the
    network where a guided call is two.
    """

    def __call__(self, x: Sample, sigma: Sigma) -> Answer:
        """The denoised sample (batch, ...) and, if the model exposes them, bottleneck features and guidance.

        `x` (batch, ...) is at the level `sigma`, () or (batch, 1, ..., 1).
        """


class Solver(Protocol):
    """An immutable update rule. Reads history, returns a sample, keeps nothing, never calls the model.

    A solver that subclasses it writes `to_next`, and of the others what is not as here.
    """

    @property
    def memory(self) -> int:
        """How many evaluations from before an interval its updates may look at."""
        return 0

    @property
    def multistep(self) -> bool:
        """Whether an update looks past its own interval, so that training must follow the student's own path."""
        return self.memory > 0

    @property
    def divides_by_r(self) -> bool:
        """Whether an update divides by the midpoint's position, which then must not be 0."""
        return False

    def to_mid(self, history: History, sigma: Sigma, stage: Stage) -> Sample:
        """Carry the newest evaluation to the midpoint `sigma`, as to an interval's end: the sample (batch, ...)."""
        return self.to_next(history, sigma, None, stage)

    def to_next(self, history: History, sigma: Sigma, plan: StepPlan | None, stage: Stage) -> Sample:
        """Finish the interval at `sigma`: the sample (batch, ...) there. `plan` is None if there was no midpoint."""


class Planner(Protocol):
    """Decides where the midpoint of each interval goes.

    `NoMidpoint()` serves multistep teachers and plain Euler, `FixedMidpoint(0.5)` is DPM-Solver-2,
    `FixedMidpoint(1.0)` is Heun, and a predictor's `method` brings the learned one.
    """

    def updates(self, interval: int) -> Literal[1, 2]:
        """Solver updates in interval `interval` (from 0): 1 without a midpoint, 2 with one."""

    def __call__(self, start: Evaluation, sigma_next: Sigma, interval: int) -> StepPlan | None:
        """Plan interval `interval`, which begins at `start`; None exactly where `updates` says 1."""

    def told(self, interval: int, sigma: Sigma) -> Sigma:
        """The noise level that the model is told at an interval's start: `sigma`, unless another was learned."""
        del interval
        return sigma

    def asks_negative(self, interval: int) -> bool:
        """Whether a guided model is asked for its negative, too, at an interval's start: yes, unless it was learned."""
        del interval
        return True

    def carried(self, interval: int, x: Sample, sigma: Sigma) -> tuple[Sample, Sigma]:
        """Where the model is asked at the start of an interval: the sample (batch, ...) and its noise level.

        They are those that the interval starts with, unless a first step without a call leads on.
        """
        del interval
        return x, sigma


First = Callable[[Sample, Sigma], Evaluation]  # an evaluation that asks no model


@dataclass(frozen=True)
class Method:
    """A way to spend model calls; `driver.trajectory(denoiser, x, method)` runs it."""

    sigmas: tuple[float, ...]  # the grid, largest first; the last may be 0
    solver: Solver
    planner: Planner
    first: First | None = None  # stands in for the first model call
    name: str = ""

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """The last update of every interval."""
        updates = [self.planner.updates(interval) for interval in range(len(self.sigmas) - 1)]
        done = [sum(updates[: interval + 1]) for interval in range(len(updates))]
        return tuple(Stage(k, done[k], sum(updates), self.sigmas[k + 1] == 0) for k in range(len(updates)))

    @property
    def calls(self) -> int:
        """Model calls of a run, per sample."""
        return (self.stages[-1].count if self.stages else 0) - (self.first is not None)


@dataclass(frozen=True)
class Run:
    """A list of levels, read as intervals."""

    sigmas: tuple[float, ...]  # the grid
    plain: frozenset[int]  # intervals that take one model call, at their start
    analytic_first_step: bool  # then the first interval is planned and takes one call, at its midpoint
    own_grid: bool  # the predictor was made for exactly these intervals

    @property
    def planned(self) -> int:
        """How many of its intervals have a midpoint."""
        return len(self.sigmas) - 1 - len(self.plain)

    @property
    def calls(self) -> int:
        """Model calls of the run, per sample."""
        return 2 * (len(self.sigmas) - 1) - len(self.plain) - self.analytic_first_step


class Source(Protocol):
    """Where the starting points of trajectories come from."""

    def __call__(self, rows: range) -> tuple[Sample, Denoiser]:
        """Noisy samples (rows, ...) of trajectories at the grid's first level, and the denoiser conditioned for them.

        The same trajectory is the same noise and the same condition at every call, whichever others are asked for.
        """


class Model(Denoiser, Protocol):
    """What can be benched: a denoiser that says what it denoises, and where.

    It may also have `data(n)`, n real samples, which the Frechet distance needs; `for_rows(rows)`,
    the denoiser conditioned for samples number `rows`; and `sigmas`, a discrete model's table.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample, without the batch: (channels, ...)."""

    @property
    def sigma_min(self) -> float:
        """The smallest noise level that it was trained at."""

    @property
    def sigma_max(self) -> float:
        """The largest noise level that it was trained at."""
