"""A loss for samples of which a few end far from the teacher whatever the solver: they count, but only linearly."""

import math

import torch
from torch import Tensor

LINEAR_BEYOND = 3.0  # times the geometric mean of all distances: beyond it they count linearly


def squares(samples: Tensor, targets: Tensor) -> Tensor:
    """The mean squared error (rows,) of samples (rows, ...), in float64 on the CPU; infinite where it is NaN."""
    apart = (samples - targets).cpu().double()
    return apart.square().flatten(1).mean(1).nan_to_num(nan=torch.inf)


def linear_from(distances: Tensor) -> Tensor:
    """The distance () from which on samples count linearly, in a set of distances (rows,)."""
    return LINEAR_BEYOND * distances.clamp(min=torch.finfo(torch.float64).tiny).log().mean().exp()


def huber(distances: Tensor, limit: Tensor) -> Tensor:
    """Huber's loss () of distances (rows,): their mean square, but beyond the limit they count linearly.

    Huber 1964, "Robust estimation of a location parameter", twice its equation.
    """
    return torch.where(distances <= limit, distances**2, limit * (2 * distances - limit)).mean()


def compared(distances: Tensor, others: Tensor) -> float:
    """Huber's loss of distances (rows,) over that of others, both by the nearer limit; below 1 they are better."""
    limit = torch.minimum(linear_from(distances), linear_from(others))
    return float((huber(distances, limit) / huber(others, limit)).nan_to_num(nan=math.inf))
