"""Derivatives through one model call by one number per sample, with the memory of sampling.

A training interval has one call through which a gradient flows, and at most two unknowns: where its
midpoint lies, and how the noise level told to the model is scaled. So two directional derivatives
replace autograd through the model.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ..types import Sample
from .finite import finite

Gradient = Literal["reverse", "finite difference"]
GRADIENTS: tuple[Gradient, ...] = ("reverse", "finite difference")
AGREES = 0.05  # relative difference of two derivatives that passes
STEPS = (3e-2, 1e-2, 3e-3, 1e-3, 3e-4)  # of finite differences: rough models need a small one, half precision a large

Ask = Callable[[Tensor], Sample]  # the denoised sample, by a number per sample (batch, 1, ...)


def central(ask: Ask, at: Tensor, low: float, high: float, step: float) -> Sample:
    """The derivative (batch, ...) of `ask` by a number per sample, at the numbers `at` (batch, 1, ..., 1).

    It takes two calls, inside [low, high]. Its error is of order step^2.
    """
    below, above = (at - step).clamp(min=low), (at + step).clamp(max=high)
    return (ask(above) - ask(below)) / (above - below)


def disagreement(derivative: Sample, other: Sample) -> float:
    """How far a derivative (batch, ...) is from another, relative to the other."""
    return float((derivative - other).norm() / other.norm().clamp(min=torch.finfo(other.dtype).tiny))


def reverse_disagreement(ask: Ask, at: Tensor, derivative: Sample) -> float:
    """How far autograd's derivative at `at` (batch, 1, ..., 1) is from another (batch, ...), along and relative to it.

    Raises RuntimeError where an operation of the model has no derivative, FloatingPointError for NaN or infinity.
    """
    with torch.enable_grad():
        value = at.detach().requires_grad_(True)
        answer = ask(value)
        finite(answer.detach(), "The model's answers")
        (along,) = torch.autograd.grad(answer, value, derivative)
    squared = derivative.square().sum().clamp(min=torch.finfo(derivative.dtype).tiny)
    return abs(float(along.sum() / squared) - 1)
