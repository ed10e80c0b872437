"""Denoisers with closed forms, and fits of them that take less than a second."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from amed_core import (
    Evaluation,
    FitConfig,
    ModelFacts,
    Predictor,
    PredictorConfig,
    TrainConfig,
    evaluate,
    make_fit,
    student_config,
)
from amed_core.driver import conditional
from amed_core.fit.end_to_end import EndToEnd
from amed_core.fit.per_interval import PerInterval
from amed_core.fit.trajectories import gaussian
from amed_core.fit.trajectories import noise as unit_noise
from amed_core.multistep import MultistepTable
from amed_core.network import AMEDPredictor
from amed_core.samplers import MULTISTEP_STUDENT
from amed_core.spectrum import bands, from_spectrum, spectrum
from amed_core.types import Denoiser, Method, Planner, Sample, Solver, Source

SIGMA_MIN, SIGMA_MAX = 0.002, 80.0
SHAPE = (1, 4, 4)  # of a sample of the mixture
FACTS = ModelFacts(SIGMA_MIN, SIGMA_MAX, bottleneck=True)
SMALL = FitConfig(trajectories=16, held_out=8, batch_size=4, teacher_calls=20, iterations=4, energy_calls=0)
SHORT = TrainConfig(trajectories=24, batch_size=8)
SCALES = (1.0, 2.0)  # of guidance
GRID = (80.0, 12.0, 3.0, 0.7, 0.2, 0.0)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def on(grid: Any, solver: Solver, planner: Planner, first: Any = None) -> Method:
    """A solver on a grid, be it a tensor or numbers."""
    return Method(tuple(torch.as_tensor(grid, dtype=torch.float64).tolist()), solver, planner, first)


X = SIGMA_MAX * noise(6, *SHAPE)


def evaluation() -> Evaluation:
    """Of the mixture, at the first level."""
    return evaluate(mixture, X, torch.tensor(SIGMA_MAX, dtype=torch.float64))


@dataclass
class Gaussian:
    """Data N(mean, std^2): the probability-flow ODE keeps (x - mean) / sqrt(std^2 + sigma^2) constant.

    Counts its calls and keeps the noise levels it was asked at.
    """

    mean: float = 0.3
    std: float = 0.5
    asked: list[Tensor] = field(default_factory=list)

    def __call__(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        self.asked.append(sigma)
        denoised = (self.std**2 * x + sigma**2 * self.mean) / (self.std**2 + sigma**2)
        return denoised, denoised.flatten(1)[:, :1, None].expand(-1, 8, 8)

    def exact(self, x: Tensor, sigma: float, sigma_next: float) -> Tensor:
        ratio = math.sqrt((self.std**2 + sigma_next**2) / (self.std**2 + sigma**2))
        return self.mean + ratio * (x - self.mean)


@dataclass
class FlowGaussian:
    """The same data as a flow model sees it: x = (1 - sigma) x0 + sigma noise, with sigma in [0, 1]."""

    mean: float = 0.0
    std: float = 1.0

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        signal = 1 - sigma
        gain = signal * self.std**2 / (signal**2 * self.std**2 + sigma**2)
        return self.mean + gain * (x - signal * self.mean)


def mixture(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Two isotropic Gaussians at +1 and -1; the bottleneck is the posterior and the mean of x."""
    dimensions = x[0].numel()
    v = 0.2**2 + sigma**2
    average = x.flatten(1).mean(1).reshape(-1, *[1] * (x.ndim - 1))
    posterior = torch.tanh(average * dimensions / v)
    features = torch.cat([posterior.flatten(1), average.flatten(1)], 1).mean(1)[:, None, None].expand(-1, 8, 8)
    return (0.2**2 * x + sigma**2 * posterior) / v, features


class Mixture:
    """The mixture as a whole model, whose answer depends on a guidance scale; at 1 it is the mixture's own."""

    shape, sigma_min, sigma_max = SHAPE, SIGMA_MIN, SIGMA_MAX

    def __init__(self, cfg: float = 1.0) -> None:
        self.cfg = cfg

    def __call__(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        denoised, features = mixture(x, sigma)
        return denoised * (1 + 0.05 * (self.cfg - 1) / (1 + sigma)), features

    def data(self, n: int) -> Tensor:
        """Samples of it."""
        return torch.randn(n, *SHAPE) * 0.2 + torch.arange(n).remainder(2).mul(2).sub(1).view(-1, 1, 1, 1)


class Guided:
    """A mixture under guidance, which shows both of its answers."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, None, Tensor]:
        cond = mixture(x, sigma)[0]
        uncond = cond + 0.1 * cond.roll(1, -1)
        return uncond + self.scale * (cond - uncond), None, cond - uncond

    def conditional(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The answer without guidance."""
        return mixture(x, sigma)[0]


class ConstantGuidance(Guided):
    """What guidance adds to the slope is the same everywhere."""

    def __call__(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, None, Tensor]:
        cond, guidance = mixture(x, sigma)[0], 0.2 * sigma * torch.ones_like(x)
        return cond + (self.scale - 1) * guidance, None, guidance


SWITCH = 2.0  # below it, the second of `two_models` answers


def two_models(x: Tensor, sigma: Tensor) -> Tensor:
    """Below a level another model answers."""
    usual = mixture(x, sigma)[0]
    return usual if float(sigma.max()) >= SWITCH else 0.9 * usual + 0.05


class Counting:
    """A denoiser that counts what it is asked, and is interrupted, as by a user, at one of its calls."""

    def __init__(self, denoiser: Denoiser, interrupted_at: int = 0) -> None:
        self.denoiser = denoiser
        self.interrupted_at = interrupted_at
        self.calls = 0
        self.samples = 0  # answered
        self.look: Callable[[], object] = lambda: None  # is called in every call
        self.answered: Callable[[Any], Any] = lambda answer: answer  # what it answers instead

    def __call__(self, x: Tensor, sigma: Tensor) -> Any:
        self.calls += 1
        self.look()
        if self.calls == self.interrupted_at:
            raise KeyboardInterrupt
        answer = self.denoiser(x, sigma)
        self.samples += len(x)
        return self.answered(answer)

    def conditional(self, x: Tensor, sigma: Tensor) -> Any:
        """The answer without guidance, counted as any."""
        whole, self.denoiser = self.denoiser, conditional(self.denoiser)
        try:
            return Counting.__call__(self, x, sigma)
        finally:
            self.denoiser = whole


def in_float64(denoiser: Denoiser = mixture, seed: int = 0) -> Source:
    """A source of starting noise in float64, so that gradients can be compared closely."""

    def draw(rows: range) -> tuple[Sample, Denoiser]:
        return SIGMA_MAX * unit_noise(rows, SHAPE, seed).double(), denoiser

    return draw


def per_interval_fit(
    name: str = "amed", calls: int = 5, settings: TrainConfig = SHORT, denoiser: Denoiser = mixture, **overrides: Any
) -> PerInterval:
    """The paper's fit of its network, in float64."""
    config = student_config(name, calls, FACTS, **overrides)
    return PerInterval(AMEDPredictor(config).double(), in_float64(denoiser), settings)


def end_to_end_fit(config: PredictorConfig, settings: FitConfig = SMALL, denoiser: Denoiser = mixture) -> EndToEnd:
    """A table's fit at one guidance scale."""
    fit = make_fit(config, settings, gaussian(denoiser, SHAPE, SIGMA_MAX))
    assert isinstance(fit, EndToEnd)
    return fit


def midpoint_config(name: str = "amed", calls: int = 5, **overrides: Any) -> PredictorConfig:
    """The settings of a table of midpoints."""
    return student_config(name, calls, FACTS, kind="table", **overrides)


def multistep_config(calls: int = 4, **overrides: Any) -> PredictorConfig:
    """The settings of a table of multistep weights."""
    return replace(student_config(MULTISTEP_STUDENT, calls, FACTS), **overrides)


def table_on(grid: tuple[float, ...] = GRID, **changes: Any) -> MultistepTable:
    """A table of multistep weights that was not fitted."""
    return MultistepTable(multistep_config(sigmas=grid, **changes))


def learned(predictor: Predictor) -> Iterator[Tensor]:
    """All that a predictor has learned, its grid included."""
    yield torch.tensor(predictor.config.sigmas, dtype=torch.float64)
    for _, values in sorted(predictor.state_dict().items()):
        yield values.detach().double()


def same(one: Predictor, other: Predictor) -> bool:
    """Whether two predictors are the same to the bit."""
    pairs = zip(learned(one), learned(other), strict=True)
    return one.config == other.config and all(a.shape == b.shape and bool((a == b).all()) for a, b in pairs)


def slope_of(errors: list[float]) -> float:
    """The observed order: how fast errors fall per halving of the step."""
    return math.log2(errors[0] / errors[-1]) / (len(errors) - 1)


class Smooth:
    """Two Gaussians of smooth pictures about a picture and its negative; guided toward the first."""

    def __init__(self, scale: float) -> None:
        self.scale = scale
        picture = torch.linspace(-1, 1, 16)
        self.mean = spectrum((picture[:, None] * picture - 0.3 * picture)[None, None].double())

    def __call__(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, None, Tensor]:
        coefficients, mean = spectrum(x), self.mean.to(x)
        variance = (2.0 * 0.5 ** bands(x) + 0.01).to(x)
        total = variance + sigma**2

        def about(mean: Tensor) -> Tensor:
            return mean + variance / total * (coefficients - mean)

        first = (2 * (coefficients * mean / total).flatten(1).sum(1)).sigmoid().reshape(-1, 1, 1, 1)
        cond, uncond = from_spectrum(about(mean)), from_spectrum(first * about(mean) + (1 - first) * about(-mean))
        return uncond + self.scale * (cond - uncond), None, cond - uncond
