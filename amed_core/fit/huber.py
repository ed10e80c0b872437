"""A loss for samples of which a few end far from the teacher whatever the solver: they count, but only linearly."""

import math

import torch
from torch import Tensor

FAR = 3.0  # times the geometric mean of all distances: beyond it they count linearly


def far(distances: Tensor) -> Tensor:
    """From which distance on samples count linearly (groups,), in a set of distances (groups, rows)."""
    return FAR * distances.clamp(min=torch.finfo(torch.float64).tiny).log().mean(1).exp()


def huber(distances: Tensor, limit: Tensor) -> Tensor:
    """Huber's loss (groups,) of distances (groups, rows): their mean square, but beyond the limit they count linearly.

    Huber 1964, "Robust estimation of a location parameter", twice its equation.
    """
    limit = limit[:, None]
    return torch.where(distances <= limit, distances**2, limit * (2 * distances - limit)).mean(1)


def compared(distances: Tensor, others: Tensor) -> float:
    """Huber's loss of distances (groups, rows) over that of others, the mean of all groups; below 1 they are better."""
    limit = torch.minimum(far(distances), far(others))
    return float((huber(distances, limit) / huber(others, limit)).nan_to_num(nan=math.inf).mean())
