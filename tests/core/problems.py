"""Denoisers with closed forms, in float64."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

SIGMA_MIN, SIGMA_MAX = 0.002, 80.0


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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


def slope_of(errors: list[float]) -> float:
    """The observed order: how fast errors fall per halving of the step."""
    return math.log2(errors[0] / errors[-1]) / (len(errors) - 1)
