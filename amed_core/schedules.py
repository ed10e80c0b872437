"""Noise-level grids: pure functions of their settings, largest sigma first, in float64.

Each takes (points, sigma_min, sigma_max, rho) and returns `points` levels from sigma_max to
sigma_min, both included. `SCHEDULES` is the table from name to function.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

Schedule = Callable[[int, float, float, float], Tensor]

EPSILON_S = 1e-3  # the smallest time of the VP process that `time_uniform` discretises (Song et al. 2021)


def polynomial(points: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """Equal steps (points,) in sigma^(1/rho) (EDM, eq. 5); rho 7 is ComfyUI's `karras`."""
    _check(points, sigma_min, sigma_max, rho)
    sigmas: Tensor = _ramp(points, sigma_max ** (1 / rho), sigma_min ** (1 / rho)) ** rho
    return sigmas


def logsnr(points: int, sigma_min: float, sigma_max: float, rho: float = 1.0) -> Tensor:
    """Equal steps (points,) in -ln(sigma) (DPM-Solver); ComfyUI's `exponential`.

    There is no rho: it is ignored.
    """
    _check(points, sigma_min, sigma_max, rho)
    return _ramp(points, math.log(sigma_max), math.log(sigma_min)).exp()


def time_uniform(points: int, sigma_min: float, sigma_max: float, rho: float = 1.0) -> Tensor:
    """Equal steps (points,) in t^(1/rho) of the VP process, sigma(t)^2 + 1 = exp(beta_d t^2 / 2 + beta_min t).

    beta_d and beta_min are those for which sigma(1) = sigma_max and sigma(1e-3) = sigma_min (EDM,
    appendix C.1); with rho 1 it is the uniform schedule of DDPM.
    """
    _check(points, sigma_min, sigma_max, rho)
    log_max, log_min = math.log(sigma_max**2 + 1), math.log(sigma_min**2 + 1)
    beta_d = 2 * (log_min / EPSILON_S - log_max) / (EPSILON_S - 1)
    beta_min = log_max - beta_d / 2
    t = _ramp(points, 1.0, EPSILON_S ** (1 / rho)) ** rho
    return torch.expm1(beta_d * t**2 / 2 + beta_min * t).sqrt()


def discrete(points: int, sigma_min: float, sigma_max: float, rho: float = 1.0, table: Tensor | None = None) -> Tensor:
    """Equal steps (points,) in t^(1/rho), where t is the timestep of a discrete model, interpolated in ln(sigma).

    `table` (timesteps,) holds the model's levels, smallest first (ComfyUI's `model_sampling.sigmas`);
    without it, Stable Diffusion's. The published code raises only t_min to 1/rho, so that with rho
    other than 1 its grid starts far above sigma_max; here both ends are raised.
    Raises ValueError if the table does not cover sigma_min and sigma_max.
    """
    _check(points, sigma_min, sigma_max, rho)
    log_table = (stable_diffusion_sigmas() if table is None else table.double().cpu()).log()
    t_max, t_min = (float(_timestep(log_table, math.log(sigma))) for sigma in (sigma_max, sigma_min))
    t = _ramp(points, t_max ** (1 / rho), t_min ** (1 / rho)) ** rho
    low = t.floor().clamp(max=len(log_table) - 2).long()
    return torch.lerp(log_table[low], log_table[low + 1], t - low).exp()


def arctan(points: int, sigma_min: float, sigma_max: float, rho: float = 1.0) -> Tensor:
    """Equal steps (points,) in arctan(sigma), best for Gaussian data (Sabour et al. 2024); ComfyUI's `kl_optimal`.

    There is no rho: it is ignored.
    """
    _check(points, sigma_min, sigma_max, rho)
    return _ramp(points, math.atan(sigma_max), math.atan(sigma_min)).tan()


def fine(points: int, sigma_min: float, sigma_max: float, flow: bool) -> Tensor:
    """The grid (points,) that slow samplers take: EDM's, or half a cosine wave for flow models.

    EDM's is dense at small levels alone. A flow model's curve bends at both ends: there, with 24 calls of iPNDM, it
    errs by 15 to 30 times as much as the cosine.
    """
    if not flow:
        return polynomial(points, sigma_min, sigma_max)
    _check(points, sigma_min, sigma_max, 1.0)
    return sigma_min + (sigma_max - sigma_min) * (1 + _ramp(points, 0.0, math.pi).cos()) / 2


def stable_diffusion_sigmas() -> Tensor:
    """Stable Diffusion's noise levels (1000,), smallest first: scaled-linear betas from 0.00085 to 0.012."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas_cumprod = (1 - betas).cumprod(0)
    return ((1 - alphas_cumprod) / alphas_cumprod).sqrt()


SCHEDULES: dict[str, Schedule] = {
    "polynomial": polynomial,
    "logsnr": logsnr,
    "time_uniform": time_uniform,
    "discrete": discrete,
}
SEARCHED = "searched"  # a grid that `fit/grid_search.py` found on the model: no function of the settings
USUAL_RHO = {"polynomial": 7.0, "logsnr": 1.0, "time_uniform": 1.0, "discrete": 1.0}


def schedule(name: str) -> Schedule:
    """Look a schedule up by name. Raises ValueError that lists the valid names."""
    if name not in SCHEDULES:
        raise ValueError(f"There is no schedule {name!r}. Choose one of: {', '.join(SCHEDULES)}.")
    return SCHEDULES[name]


def on_levels(made: Schedule, table: Tensor | None) -> Schedule:
    """A schedule for a discrete model with the levels `table` (timesteps,), rising: only `discrete` looks at them."""
    return partial(discrete, table=table) if made is discrete else made


def _ramp(points: int, first: float, last: float) -> Tensor:
    return first + torch.arange(points, dtype=torch.float64) / (points - 1) * (last - first)


def _timestep(log_table: Tensor, log_sigma: float) -> Tensor:
    """The fractional timestep of a noise level; the inverse of interpolating `log_table`."""
    tolerance = 1e-3  # relative: model files round sigma_min and sigma_max
    if not log_table[0] - tolerance <= log_sigma <= log_table[-1] + tolerance:
        raise ValueError(
            f"The discrete schedule covers sigma {log_table[0].exp():.4g} to {log_table[-1].exp():.4g}, "
            f"but {math.exp(log_sigma):.4g} was asked for. Choose another schedule for this model."
        )
    low = (torch.searchsorted(log_table, log_sigma, right=True) - 1).clamp(0, len(log_table) - 2)
    return (low + (log_sigma - log_table[low]) / (log_table[low + 1] - log_table[low])).clamp(0, len(log_table) - 1)


def _check(points: int, sigma_min: float, sigma_max: float, rho: float) -> None:
    if points < 2:
        raise ValueError(f"A grid needs at least 2 points (1 interval), but {points} were asked for.")
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"A grid needs 0 < sigma_min < sigma_max, but found {sigma_min} and {sigma_max}.")
    if not 0 < rho < math.inf:
        raise ValueError(f"rho must be positive, but found {rho}.")
