"""What a network looks at before it plans an interval."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from .types import Evaluation, Features, Sample

POOLED = 8  # what the predictor looks at is pooled to 8x8 at any resolution
MAPS = {"bottleneck": 1, "latent": 2, "none": 1}  # of 8x8, per kind of features
Look = Callable[[Evaluation], Tensor]  # what the predictor sees of an interval's start: (batch or 1, [maps,] 8, 8)


def look_at_bottleneck(start: Evaluation) -> Tensor:
    """The U-Net's bottleneck (batch, 8, 8), as in the paper; zeros where no model was asked, as in its code.

    Raises ValueError if the model gave none.
    """
    if start.analytic:
        return start.x.new_zeros(len(start.x), POOLED, POOLED)
    if start.features is None:
        raise ValueError(
            "This predictor reads the model's bottleneck, but the model gave none. Train a predictor on this "
            'model, with features set to "latent".'
        )
    return pool(start.features)


def look_at_latent(start: Evaluation) -> Tensor:
    """The sample, at unit scale, and its denoised version (batch, 2, 8, 8): every model has both."""
    x = start.x / (1 + start.sigma**2).sqrt()
    return torch.stack([pooled_latent(x), pooled_latent(start.denoised)], dim=1)


def look_at_none(start: Evaluation) -> Tensor:
    """Nothing (1, 8, 8): the plan depends on the interval alone, and is the same for all samples."""
    return start.x.new_zeros(1, POOLED, POOLED)


LOOKS: dict[str, Look] = {"bottleneck": look_at_bottleneck, "latent": look_at_latent, "none": look_at_none}


def pool(features: Tensor) -> Features:
    """Average a bottleneck to (batch, 8, 8): from (batch, height, width), or raw (batch, channels, [frames,] h, w).

    Raises ValueError for other shapes.
    """
    if features.ndim >= 4:
        features = features.mean(1)
    if features.ndim == 4:  # video: frames are averaged, too
        features = features.mean(1)
    if features.ndim != 3:
        raise ValueError(
            "Bottleneck features must be (batch, height, width) or (batch, channels, height, width), "
            f"but the model gave {tuple(features.shape)}."
        )
    return functional.adaptive_avg_pool2d(features, POOLED)


def pooled_latent(x: Sample) -> Features:
    """Average a latent of any rank to (batch, 8, 8): images, video (over its frames) and audio (in 64 pieces)."""
    if x.ndim >= 4:
        return pool(x)
    pieces: Tensor = functional.adaptive_avg_pool1d(x.reshape(len(x), -1, x.shape[-1]).mean(1, True), POOLED**2)
    return pieces.reshape(len(x), POOLED, POOLED)
