"""A third model to measure on: Gaussians in a 5-D latent, denoised in closed form, asked as Stable Diffusion is.

Its data are four classes of short videos (channels 4, frames 3, height 4, width 4). Each class has several Gaussians;
their covariances are diagonal in the cosine basis, with spectra that fall as a power of the frequency, as in natural
images. The noise levels are those of Stable Diffusion's 1,000 timesteps.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1]))
from amed_core.spectrum import cosines
from amed_core.types import Answer, Sample, Sigma

SHAPE = (4, 3, 4, 4)
CLASSES, PER_CLASS = 4, 6
NULL_CLASS = CLASSES
FAMILY = "AMEDMixture"


def timesteps() -> Tensor:
    """The sigmas (1000,) of Stable Diffusion's timesteps: "scaled linear" betas from 0.00085 to 0.012."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = (1 - betas).cumprod(0)
    return ((1 - kept) / kept).sqrt()


def transformed(x: Tensor) -> Tensor:
    """The cosine coefficients (batch, elements) of samples (batch, *SHAPE)."""
    c, t, h, w = (cosines(size, x) for size in SHAPE)
    return torch.einsum("bcthw,Cc,Tt,Hh,Ww->bCTHW", x, c, t, h, w).flatten(1)


def restored(coefficients: Tensor) -> Sample:
    """Samples (batch, *SHAPE) from their cosine coefficients (batch, elements)."""
    c, t, h, w = (cosines(size, coefficients) for size in SHAPE)
    return torch.einsum("bCTHW,Cc,Tt,Hh,Ww->bcthw", coefficients.unflatten(1, SHAPE), c, t, h, w)


class Mixture:
    """The Gaussians, in cosine coefficients: means and variances (components, elements), and each one's class."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        frequencies = torch.cartesian_prod(*(torch.arange(size, dtype=torch.float64) for size in SHAPE[1:]))
        spectrum = (1 + frequencies.square().sum(1)).pow(-2).repeat(SHAPE[0])
        spectrum /= spectrum.mean()
        count = CLASSES * PER_CLASS

        def drawn(*shape: int) -> Tensor:
            return torch.randn(*shape, spectrum.numel(), generator=generator, dtype=torch.float64)

        self.classes = torch.arange(count) // PER_CLASS
        self.means = (0.6 * drawn(CLASSES)[self.classes] + 0.5 * drawn(count)) * spectrum.sqrt()
        self.variances = 0.4 * spectrum * (0.3 * drawn(count)).exp() + 0.02**2

    def denoised(self, x: Sample, sigma: Sigma, classes: Tensor) -> Sample:
        """E[x0 | x] at sigma (1 or batch, 1, ...) for each row's class (batch,); NULL_CLASS stands for all."""
        y, noise = transformed(x), sigma.reshape(-1, 1, 1) ** 2
        means, variances = self.means.to(y), self.variances.to(y)
        away = y[:, None] - means
        total = variances + noise  # (batch, components, elements)
        likelihood = -0.5 * (away.square() / total + total.log()).sum(2)
        other = (self.classes != classes[:, None]) & (classes[:, None] != NULL_CLASS)
        weights = likelihood.masked_fill(other, -torch.inf).softmax(1)
        guesses = means + variances / total * away
        return restored((weights[:, :, None] * guesses).sum(1))

    def data(self, n: int) -> Sample:
        """n samples, the classes in turn."""
        generator = torch.Generator().manual_seed(2**40)
        component = torch.arange(n) % CLASSES * PER_CLASS + torch.randint(PER_CLASS, (n,), generator=generator)
        noise = torch.randn(n, self.means.shape[1], generator=generator, dtype=torch.float64)
        return restored(self.means[component] + self.variances[component].sqrt() * noise).float()


class MixtureDenoiser:
    """The model as the core sees it: x (batch, 4, 3, 4, 4) and sigma to the denoised sample.

    Row i of a run asks for class i mod 4 (`for_rows`); with cfg other than 1 each call is a guided one.
    """

    shape = SHAPE
    sigmas = timesteps()
    sigma_min, sigma_max = float(sigmas[0]), float(sigmas[-1])
    fingerprint = {  # noqa: RUF012
        "family": FAMILY,
        "prediction": "EPS",
        "latent_channels": SHAPE[0],
        "sigma_min": sigma_min,
        "sigma_max": sigma_max,
    }

    def __init__(self, cfg: float = 1.0, labels: Sequence[int] | None = None, mixture: Mixture | None = None) -> None:
        self.cfg = cfg
        self.labels = labels
        self.mixture = mixture or Mixture()

    def for_rows(self, rows: Sequence[int]) -> "MixtureDenoiser":
        """The same model, asked for the classes of samples number `rows`."""
        return MixtureDenoiser(self.cfg, [row % CLASSES for row in rows], self.mixture)

    def __call__(self, x: Sample, sigma: Sigma) -> Answer:
        everything = torch.full((len(x),), NULL_CLASS)
        classes = everything if self.labels is None else torch.tensor(self.labels)
        cond = self.mixture.denoised(x, sigma, classes)
        if self.cfg == 1 or self.labels is None:
            return cond
        uncond = self.mixture.denoised(x, sigma, everything)
        return uncond + self.cfg * (cond - uncond), None, cond - uncond

    def conditional(self, x: Sample, sigma: Sigma) -> Answer:
        """The answer without guidance."""
        return MixtureDenoiser(1.0, self.labels, self.mixture)(x, sigma)

    def data(self, n: int) -> Sample:
        """n samples of the data, for the Frechet distance."""
        return self.mixture.data(n)
