"""Derivatives through one model call by one number per sample, with the memory of sampling.

A training interval has one call through which a gradient flows, and at most two unknowns: where its
midpoint lies, and how the noise level told to the model is scaled. So two directional derivatives
replace autograd through the model, from finite differences or from forward mode.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..types import Denoiser, Sample, Sigma

Gradient = Literal["reverse", "finite difference", "forward"]
GRADIENTS: tuple[Gradient, ...] = ("reverse", "finite difference", "forward")
AGREES = 0.05  # relative difference of a forward-mode derivative from finite differences that passes
STEPS = (3e-2, 1e-2, 3e-3, 1e-3, 3e-4)  # of finite differences: rough models need a small one, half precision a large


def directional(denoiser: Denoiser, x: Sample, sigma: Sigma, dx: Sample, dsigma: Sigma) -> tuple[Sample, Sample]:
    """The denoised sample and its derivative along (dx, dsigma), by forward mode: one call, no stored activations.

    A denoiser that must prepare for it offers `jvp` with these arguments. Raises RuntimeError where an
    operation of the model has no forward derivative.
    """
    own = getattr(denoiser, "jvp", None)
    if own is not None:
        answer: tuple[Tensor, Tensor] = own(x, sigma, dx, dsigma)
        return answer
    with forward_ad.dual_level():
        made = denoiser(_dual(x, dx), _dual(sigma, dsigma))
        denoised, derivative = _parts(made[0] if isinstance(made, tuple) else made)
        if derivative is None:
            raise RuntimeError("the model's answer carries no forward derivative")
        return denoised, derivative


def tangents(place: Callable[[Tensor], tuple[Sample, Sigma]], at: Tensor) -> tuple[Sample, Sigma, Sample, Sigma]:
    """What `place` makes of a number per sample, x and sigma, and the derivatives of both by that number."""
    with forward_ad.dual_level():
        (x, dx), (sigma, dsigma) = (_parts(made) for made in place(_dual(at, torch.ones_like(at))))
        x_too = torch.zeros_like(x) if dx is None else dx
        return x, sigma, x_too, torch.zeros_like(sigma) if dsigma is None else dsigma


def central(ask: Callable[[Tensor], Sample], at: Tensor, low: float, high: float, step: float) -> Sample:
    """The derivative of `ask` by a number per sample, from two calls inside [low, high]; error of order step^2."""
    below, above = (at - step).clamp(min=low), (at + step).clamp(max=high)
    return (ask(above) - ask(below)) / (above - below)


def disagreement(derivative: Sample, other: Sample) -> float:
    """How far one derivative is from another, relative to the other."""
    return float((derivative - other).norm() / other.norm().clamp(min=torch.finfo(other.dtype).tiny))


def _dual(value: Tensor, tangent: Tensor) -> Tensor:
    dual: Tensor = forward_ad.make_dual(value, tangent.expand_as(value))  # type: ignore[no-untyped-call]
    return dual


def _parts(dual: Tensor) -> tuple[Tensor, Tensor | None]:
    primal, tangent = forward_ad.unpack_dual(dual)  # type: ignore[no-untyped-call]
    return primal, tangent
