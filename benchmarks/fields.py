"""A video model of any size, denoised in closed form: moving pictures under moving textures, as a flow.

Its data are mixtures of Gaussian random fields over (channels, frames, height, width), periodic in every axis. A
component's mean is a smooth picture that moves, defined in parts of the frame, so that a larger video shows the same
things larger. Its texture has a power spectrum that falls as a power of the frequency, as in natural videos (Dong and
Atick 1995), counted in elements, so that a larger video has more of it and not a coarser one; it is concentrated where
a pattern of one velocity lies, f_t = -v . f.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1]))
from amed_core.types import Answer, Sample, Sigma

CHANNELS = 4
SHAPE = (CHANNELS, 6, 16, 24)  # that it is fitted at
CLASSES, PER_CLASS = 4, 4
NULL_CLASS = CLASSES
WAVES = 5  # of a mean picture
PICTURE, OTHER, TEXTURE = 0.7, 0.2, 0.5  # standard deviations: of a class's picture, what its own differ by, textures
COARSEST = 0.02  # cycles per element, below which a texture's spectrum is flat
SIGMA_MIN, SIGMA_MAX = 0.001, 1.0  # as of ComfyUI's flow models


class Fields:
    """The components at one size: spectra of means and powers, (components, channels or 1, frames, height, width)."""

    def __init__(self, shape: Sequence[int]) -> None:
        count, generator = CLASSES * PER_CLASS, torch.Generator().manual_seed(0)

        def uniform(low: float, high: float, *size: int) -> Tensor:
            return low + (high - low) * torch.rand(*size, generator=generator)

        self.classes = torch.arange(count) // PER_CLASS
        waves = torch.randint(-2, 3, (2 * count, 2, WAVES), generator=generator).float()
        heights = uniform(0.3, 1, 2 * count, CHANNELS, WAVES)
        phases = uniform(0, 2 * math.pi, 2 * count, CHANNELS, WAVES)
        speeds = uniform(-0.04, 0.04, 2 * count, 2)  # of pictures, in frames' sizes per frame
        alphas, drifts = uniform(2, 3.5, CLASSES), uniform(-0.6, 0.6, CLASSES, 2)  # of textures; elements per frame
        t = torch.arange(shape[1])
        y, x = (torch.arange(size) / size for size in shape[2:])
        pictures, powers = [], []
        for n in range(2 * count):
            places = (place[None] - speed * t[:, None] for place, speed in zip((y, x), speeds[n], strict=True))
            rows, columns = (waves[n, axis, :, None, None] * place for axis, place in enumerate(places))
            angles = 2 * math.pi * (rows[..., None] + columns[:, :, None]) + phases[n][..., None, None, None]
            waved = (heights[n][..., None, None, None] * angles.cos()).sum(1)
            pictures.append(waved * (2 / heights[n].square().sum(1)).sqrt()[:, None, None, None])
        of_class, own = torch.stack(pictures).split(count)
        means = PICTURE * of_class[self.classes] + OTHER * own
        for n in range(CLASSES):
            here, usual = (self.spectrum(size, float(alphas[n]), drifts[n]) for size in (shape[1:], SHAPE[1:]))
            powers.append(TEXTURE**2 * here / usual.mean())
        self.means = torch.fft.fftn(means, dim=(-3, -2, -1), norm="ortho")
        self.powers = torch.stack(powers)[:, None]

    @staticmethod
    def spectrum(size: Sequence[int], alpha: float, drift: Tensor) -> Tensor:
        """A texture's power (*size) at every frequency, not normalised."""
        f_t, f_y, f_x = torch.meshgrid(*(torch.fft.fftfreq(n) for n in size), indexing="ij")
        # Away from its velocity by less than half a cycle, in either direction.
        off = (f_t + drift[0] * f_y + drift[1] * f_x + 0.5) % 1 - 0.5
        return (COARSEST**2 + f_y**2 + f_x**2 + 4 * off**2) ** (-alpha / 2)

    def denoised(self, x: Sample, sigma: Tensor, numbers: Tensor) -> Sample:
        """E[x0 | x] of samples x (batch, ...) at sigma (), of the components `numbers` (batch, some)."""
        y, signal = torch.fft.fftn(x, dim=(-3, -2, -1), norm="ortho"), 1 - sigma
        guesses, likelihoods = [], []
        for column in numbers.T:
            power, mean = self.powers[self.classes[column]], self.means[column]
            total = signal**2 * power + sigma**2
            away = y - signal * mean
            guesses.append(mean + signal * power / total * away)
            energy = (away.real.square() + away.imag.square()) / total + total.log()
            likelihoods.append(-0.5 * energy.sum((1, 2, 3, 4), dtype=torch.float64))
        weights = torch.stack(likelihoods).softmax(0).float()
        mixed = sum(w[:, None, None, None, None] * guess for w, guess in zip(weights, guesses, strict=True))
        return torch.fft.ifftn(mixed, dim=(-3, -2, -1), norm="ortho").real


class FieldsDenoiser:
    """The model as the core sees it: x (batch, 4, frames, height, width) and sigma in (0, 1] to the denoised sample.

    Row i of a run asks for class i mod 4 (`for_rows`); with cfg other than 1 each call is a guided one.
    """

    sigma_min, sigma_max = SIGMA_MIN, SIGMA_MAX
    sigmas = torch.arange(1, 1001) / 1000  # what ComfyUI counts its steps on
    flow = True

    def __init__(self, cfg: float = 1.0, shape: Sequence[int] = SHAPE, fields: Fields | None = None) -> None:
        self.cfg = cfg
        self.shape = tuple(shape)
        self.fields = fields or Fields(shape)
        self.labels: tuple[int, ...] = ()

    def for_rows(self, rows: Sequence[int]) -> "FieldsDenoiser":
        """The same model, asked for the classes of samples number `rows`."""
        other = FieldsDenoiser(self.cfg, self.shape, self.fields)
        other.labels = tuple(row % CLASSES for row in rows)
        return other

    def __call__(self, x: Sample, sigma: Sigma) -> Answer:
        level, every = sigma.flatten()[0].to(x), torch.arange(CLASSES * PER_CLASS)
        if not self.labels:
            return self.fields.denoised(x, level, every.expand(len(x), -1))
        own = PER_CLASS * torch.tensor(self.labels)[:, None] + torch.arange(PER_CLASS)
        cond = self.fields.denoised(x, level, own)
        if self.cfg == 1:
            return cond
        uncond = self.fields.denoised(x, level, every.expand(len(x), -1))
        return uncond + self.cfg * (cond - uncond), None, cond - uncond
