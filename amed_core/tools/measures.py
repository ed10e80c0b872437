"""How far samples are from where they should be."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from ..types import Sample

RESAMPLES = 2000
FRECHET_DIMENSIONS = 256  # larger samples are projected to so many


@dataclass(frozen=True)
class Error:
    """Distance to the converged teacher from the same noise, in the sample's own units."""

    rmse: float  # over all elements of all samples
    low: float  # 95 % bootstrap interval of the rmse over samples
    high: float
    median: float  # of the samples' own rmse
    p90: float


def error(samples: Sample, teacher: Sample, seed: int = 0) -> Error:
    """The RMSE of `samples` to `teacher`, both (n, *shape), with its 95 % interval (percentile bootstrap)."""
    squared = (samples.cpu().double() - teacher.cpu().double()).square().flatten(1).mean(1).numpy()
    drawn = np.random.default_rng(seed).integers(len(squared), size=(RESAMPLES, len(squared)))
    low, high = np.percentile(np.sqrt(squared[drawn].mean(1)), [2.5, 97.5])
    each = np.sqrt(squared)
    return Error(
        math.sqrt(squared.mean()), float(low), float(high), float(np.median(each)), float(np.percentile(each, 90))
    )


def frechet(samples: Sample, real: Sample) -> float:
    """Frechet distance between Gaussians fitted to two sets of samples (n, *shape), on their elements.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) (Dowson & Landau 1982). Above 256 elements both sets are projected onto
    the same fixed random directions. It is biased upward by roughly dimensions / n, so compare only values of the same
    n.
    """
    a, b = (s.flatten(1).cpu().double() for s in (samples, real))
    if a.shape[1] > FRECHET_DIMENSIONS:
        directions = torch.randn(a.shape[1], FRECHET_DIMENSIONS, generator=torch.Generator().manual_seed(0)).double()
        basis = torch.linalg.qr(directions).Q
        a, b = a @ basis, b @ basis
    difference = (a.mean(0) - b.mean(0)).square().sum()
    values, vectors = torch.linalg.eigh(a.T.cov())
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # C1^(1/2)
    # The eigenvalues of C1^(1/2) C2 C1^(1/2) are those of C1 C2.
    cross = torch.linalg.eigvalsh(root @ b.T.cov() @ root).clamp(min=0).sqrt().sum()
    return float(difference + a.T.cov().trace() + b.T.cov().trace() - 2 * cross)
