"""Packed latents: newer ComfyUI puts streams of several shapes, such as video with audio, into one flat sample."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

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
