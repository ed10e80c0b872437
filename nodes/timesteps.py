"""Discrete models at any noise level: ComfyUI rounds sigma to one of their 1,000 timesteps, we interpolate.

A U-Net takes fractional timesteps as well as whole ones. Rounded, the model is a staircase in sigma:
midpoints that a predictor places are moved, and what it learns from small differences is noise.
"""

import copy
from typing import Any

import comfy.model_sampling
import torch
from torch import Tensor

INTERPOLATED = "interpolated"


def rounds(model_sampling: Any) -> bool:
    """Whether this MODEL's sampling rounds sigma to whole timesteps."""
    return type(model_sampling).timestep is comfy.model_sampling.ModelSamplingDiscrete.timestep


def interpolated(model_sampling: Any) -> Any:
    """A copy of a discrete model's sampling whose timesteps are interpolated in ln(sigma); any other as it is."""
    if not rounds(model_sampling):
        return model_sampling
    smooth = copy.copy(model_sampling)
    smooth.__class__ = type("InterpolatedTimesteps", (type(model_sampling),), {"timestep": timestep})
    return smooth


def timestep(model_sampling: Any, sigma: Tensor) -> Tensor:
    """The inverse of ComfyUI's own `model_sampling.sigma(timestep)`: fractional between two table entries.

    The table goes to the levels' device. The other way round, every model call would wait for the GPU.
    """
    table = model_sampling.log_sigmas.to(sigma.device, non_blocking=True)
    log_sigma = sigma.to(table.dtype).log().flatten()
    above = torch.searchsorted(table, log_sigma).clamp(1, len(table) - 1)
    low, high = table[above - 1], table[above]
    fraction = ((log_sigma - low) / (high - low)).clamp(0, 1)
    return (above - 1 + fraction).reshape(sigma.shape)


def describe(model_sampling: Any) -> str:
    """What a predictor's file remembers of it."""
    if rounds(model_sampling):
        return "rounded"
    return INTERPOLATED if type(model_sampling).timestep is timestep else "continuous"


def with_interpolated_timesteps(model: Any) -> Any:
    """A clone of a MODEL that is asked at interpolated timesteps; the MODEL itself if it has none to round."""
    sampling = model.get_model_object("model_sampling")
    if not rounds(sampling):
        return model
    clone = model.clone()
    clone.add_object_patch("model_sampling", interpolated(sampling))
    return clone
