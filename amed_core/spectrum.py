"""Bands of spatial frequency: the steps of a multistep table may weigh them apart, and the first may ask no model.

At a large noise level the data looks Gaussian. For Gaussian data whose covariance is diagonal in cosines, with the
variance v, the ODE multiplies every cosine coefficient on its way from sigma to sigma' by
sqrt((s'^2 v + sigma'^2) / (s^2 v + sigma^2)), s being the signal's scale there: low frequencies, of which data has
much, shrink less than high ones. The analytic first step of AMED (Dockhorn et al. 2022) is the case v = 1 of this,
and analytical teleportation (Wang and Vastola 2024, arXiv 2412.09726) the one of the data's own covariance. Here the
gains are learned from where the teacher takes the same noise, for every channel and half octave of frequencies, so
that no model call is spent where a model has nothing to say.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .types import Sample

# By frequency, in half cycles per element along all axes together: the mean, what is below 1/128, and half octaves.
BANDS = 16
AT_ONCE = 1 << 22  # coefficients: larger samples are taken apart, so that they take little memory beside themselves
GAIN_RIDGE = 1.0  # in coefficients of pure noise: how strongly a gain is held at that of a model that answers 0


def shows_frequencies(shape: Sequence[int]) -> bool:
    """Whether samples of this shape (channels, ...) have axes along which there are frequencies.

    Latents of several shapes that were packed into one row, (1, elements), have none.
    """
    return len(shape) >= 2 and not (len(shape) == 2 and shape[0] == 1)


def cosines(size: int, like: Tensor) -> Tensor:
    """The orthonormal cosine basis (size, size), one frequency per row (DCT-II), made on the device of `like`."""
    places = torch.arange(size, device=like.device)
    quarters = (2 * places + 1) * places[:, None] % (4 * size)  # whole numbers, so that no angle is inexact
    basis: Tensor = (quarters.to(like.dtype) * (math.pi / (2 * size))).cos() * (2 / size) ** 0.5
    basis[0] /= 2**0.5
    return basis


def spectrum(x: Sample) -> Tensor:
    """The cosine coefficients of samples (batch, channels, ...), in the same shape."""
    for axis in range(2, x.ndim):
        x = torch.tensordot(x, cosines(x.shape[axis], x), dims=([axis], [1])).movedim(-1, axis)
    return x


def from_spectrum(coefficients: Tensor) -> Sample:
    """Samples (batch, channels, ...) from their cosine coefficients, in the same shape: the inverse."""
    x = coefficients
    for axis in range(2, x.ndim):
        x = torch.tensordot(x, cosines(x.shape[axis], x), dims=([axis], [0])).movedim(-1, axis)
    return x


def bands(x: Sample) -> Tensor:
    """Which band each cosine coefficient of samples (batch, channels, *shape) lies in, from 0 for the mean (*shape)."""
    axes = [torch.arange(size, device=x.device, dtype=torch.float32) / size for size in x.shape[2:]]
    squares = torch.stack(torch.meshgrid(*axes, indexing="ij")).square().sum(0)
    # Half octaves end a little above the powers of the square root of 2, where many coefficients lie.
    of_band = (squares.log2() + (BANDS - 2) - 0.2).ceil().clamp(1, BANDS - 1)
    return torch.where(squares == 0, torch.zeros_like(of_band), of_band).long()


def combined(vectors: Sequence[Sample], weights: Tensor) -> Sample:
    """The sum of vectors (batch, channels, ...) whose bands are multiplied by weights (vectors, BANDS)."""
    some, of_band, total = max(AT_ONCE // vectors[0].numel(), 1), bands(vectors[0]), torch.zeros_like(vectors[0])
    for begin in range(0, len(vectors), some):
        part = vectors[begin : begin + some]
        for row, one in zip(weights[begin:].to(total), spectrum(torch.cat(list(part))).chunk(len(part)), strict=False):
            total += row[of_band] * one
    return from_spectrum(total)


def filled(values: Tensor, empty: Tensor) -> Tensor:
    """Values (..., BANDS) in which bands that are `empty` (BANDS,) take those of the next one that is not.

    Larger samples than those of a fit have lower frequencies.
    """
    values = values.clone()
    for band in reversed(range(BANDS - 1)):
        if bool(empty[band]):
            values[..., band] = values[..., band + 1]
    return values


def moments(noise: Sample, there: Sample) -> Tensor:
    """Of every channel and band, summed over samples (2, channels, BANDS), in float64: all that `gains` need.

    They are the noise (batch, channels, ...) times where the teacher takes it, of the same shape, and its square.
    """
    of_band, some = bands(noise).flatten(), max(AT_ONCE // noise[0].numel(), 1)
    total = torch.zeros(2, noise.shape[1], BANDS, dtype=torch.float64, device=noise.device)
    for begin in range(0, len(noise), some):
        x, y = (spectrum(part[begin : begin + some].double()) for part in (noise, there))
        products = torch.stack([(x * y).sum(0), x.square().sum(0)]).flatten(2)
        total.index_add_(2, of_band, products)
    return total


def gains(moments: Tensor, sigma: float, sigma_max: float) -> Tensor:
    """The least-squares gain (channels, BANDS) of every channel and band, on the way from sigma_max to sigma.

    `moments` are (2, channels, BANDS). Held by a ridge at sigma / sigma_max, where a model that answers 0 would lead.
    """
    mixed, squares = moments
    held = GAIN_RIDGE * sigma_max**2
    return filled((mixed + held * sigma / sigma_max) / (squares + held), (squares == 0).all(0))


def carried(x: Sample, gains: Tensor) -> Sample:
    """Samples (batch, channels, ...) after a first step that asks no model, with gains (channels, BANDS).

    Raises ValueError for another number of channels.
    """
    if x.shape[1] != len(gains):
        raise ValueError(f"This predictor is for samples of {len(gains)} channels, but these have {x.shape[1]}.")
    return from_spectrum(spectrum(x) * gains.to(x)[:, bands(x)])
