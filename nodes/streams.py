"""Packed latents: newer ComfyUI puts streams of several shapes, such as video with audio, into one flat sample.

A fit minimises mean squares over elements, and a video has many times those of its sound. So it runs on samples in
which every stream is scaled to count alike. That changes no sampler: all that we fit are linear in samples and act on
each element alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..amed_core.driver import in_full
from ..amed_core.features import Look
from ..amed_core.types import Answer, Denoiser, Evaluation, Sample, Sigma

Shapes = Sequence[Sequence[int]]  # of every stream, with the batch


def packed_shapes(guider: Any) -> Shapes:
    """The shapes of the streams in a guider's samples; empty where a sample is one latent."""
    shapes = getattr(guider.inner_model, "latent_shapes", None) or ()
    return tuple(tuple(shape) for shape in shapes) if len(shapes) > 1 else ()


def streams(packed: Tensor, shapes: Shapes) -> list[Tensor]:
    """Latents of their own shapes from (batch, 1, elements); the sample itself where nothing is packed.

    `shapes` may be those of the first streams alone.
    """
    if not shapes:
        return [packed]
    found, begin = [], 0
    for shape in shapes:
        size = math.prod(shape[1:])
        found.append(packed[..., begin : begin + size].reshape(len(packed), *shape[1:]))
        begin += size
    return found


@dataclass(frozen=True)
class Balance:
    """Scales the streams of packed samples to count alike; of other samples it changes nothing.

    `factors` (1, 1, elements) are sqrt(elements / (streams * a stream's own elements)): their squares have the mean 1.
    They are None for samples of one stream.
    """

    shapes: Shapes
    factors: Tensor | None

    @classmethod
    def of(cls, shapes: Shapes, like: Tensor) -> "Balance":
        """For samples like these."""
        if not shapes:
            return cls(shapes, None)
        sizes = [math.prod(shape[1:]) for shape in shapes]
        each = [torch.full((1, 1, size), math.sqrt(sum(sizes) / (len(sizes) * size))) for size in sizes]
        return cls(shapes, torch.cat(each, -1).to(like))

    def scaled(self, x: Sample) -> Sample:
        """As a fit sees it."""
        return x if self.factors is None else x * self.factors

    def unscaled(self, x: Sample) -> Sample:
        """The inverse."""
        return x if self.factors is None else x / self.factors

    def denoiser(self, inner: Denoiser) -> Denoiser:
        """A model as a fit sees it."""
        return inner if self.factors is None else Balanced(self, inner)

    def look(self, see: Look) -> Look:
        """What is looked at are the samples as they are."""

        def unscaled(start: Evaluation) -> Tensor:
            return see(replace(start, x=self.unscaled(start.x), denoised=self.unscaled(start.denoised)))

        return see if self.factors is None else unscaled

    def parts(self, x: Sample) -> dict[str, Tensor]:
        """The streams of a scaled sample as they are, by their shapes; nothing if there is but one."""
        return {
            f"{number}: {' x '.join(map(str, shape[1:]))}": stream
            for number, (shape, stream) in enumerate(
                zip(self.shapes, streams(self.unscaled(x), self.shapes), strict=False), start=1
            )
        }


@dataclass(frozen=True)
class Balanced:
    """A model that is asked, and answers, in scaled samples."""

    balance: Balance
    inner: Any

    def __call__(self, x: Sample, sigma: Sigma) -> Answer:
        return self._scaled(self.inner(self.balance.unscaled(x), sigma))

    def conditional(self, x: Sample, sigma: Sigma) -> Answer:
        """The answer without guidance."""
        return self._scaled(self.inner.conditional(self.balance.unscaled(x), sigma))

    def _scaled(self, answer: Answer) -> Answer:
        denoised, features, guidance = in_full(answer)
        scaled = self.balance.scaled
        return scaled(denoised), features, None if guidance is None else scaled(guidance)
