"""Learned multistep methods: the grid, the weights of all slopes so far, and what the model is told, as plain numbers.

Every deterministic solver that calls the model n times takes, whatever its name, linear combinations of the
starting noise and of the slopes that the model has answered so far. So a table of such weights holds
all of them, and a fit that starts from the best of them can only come nearer to the teacher.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from .config import PredictorConfig, at_guidance
from .driver import First, NoMidpoint, trajectory
from .features import Look
from .solvers import Multistep, restarted
from .spectrum import BANDS, carried
from .types import Evaluation, Planner, Sample, Sigma, Solver

TOLERANCE = 5e-3  # relative; grids arrive rounded to float32, or to half precision


@dataclass(frozen=True)
class Told(Planner):
    """No midpoints; at the start of interval k the model is told `scales[k]` times the noise level.

    With `gains` (channels, BANDS) a first step without a call leads to the level `first_sigma`. From interval `switch`
    on, if it is not 0, a second model answers, and neither is told a level of the other's side of `switch_sigma`.
    """

    scales: tuple[float, ...]
    lowest: float  # the model knows no levels outside
    highest: float
    first_sigma: float = 0.0
    gains: Tensor | None = None
    switch: int = 0
    switch_sigma: float = 0.0

    def updates(self, interval: int) -> Literal[1, 2]:
        return 1

    def __call__(self, start: Evaluation, sigma_next: Sigma, interval: int) -> None:
        del start, sigma_next, interval

    def told(self, interval: int, sigma: Sigma) -> Sigma:
        scale, lowest, highest = self.scales[interval], self.lowest, self.highest
        if self.switch and interval < self.switch:
            lowest = max(lowest, self.switch_sigma)
        elif self.switch:
            highest = min(highest, self.switch_sigma * (1 - TOLERANCE))
        return sigma if scale == 1 else (scale * sigma).clamp(lowest, highest)

    def carried(self, interval: int, x: Sample, sigma: Sigma) -> tuple[Sample, Sigma]:
        if interval or self.gains is None:
            return x, sigma
        return carried(x, self.gains), torch.full_like(sigma, self.first_sigma)


class MultistepTable(nn.Module):
    """Lower triangular `weights` ([guidances,] intervals, intervals); `first`, `scale_time` ([guidances,] intervals).

    Row k of the weights and entry k of `first` are of interval k (see `solvers.Multistep`); before any fit they are
    iPNDM's. A guided one has `guided`, as the weights, a spectral one `spectral` ([guidances,] intervals, vectors,
    BANDS), what weights differ by in each band, the vectors being slopes, the first denoised sample and guidance
    slopes; and one with a first step `gains` ([guidances,] channels, BANDS).
    All hold for the grid they were fitted on, from its beginning, or from where a second model takes over, whose steps
    have no weights of what the first one answered. On other grids it is plain iPNDM.
    """

    guided: nn.Parameter
    spectral: nn.Parameter
    gains: nn.Parameter

    def __init__(self, config: PredictorConfig) -> None:
        super().__init__()
        self.config = config
        asked_at = (config.first_sigma or config.sigmas[0], *config.sigmas[1:])
        weights = torch.tensor(coefficients(restarted(config.build_solver(), config.switch), asked_at)[1])
        several = (len(config.guidances),) if config.guidances else ()
        self.weights = nn.Parameter(weights.expand(*several, -1, -1).clone(), requires_grad=False)
        self.first = nn.Parameter(torch.zeros(*several, config.intervals), requires_grad=False)
        self.scale_time = nn.Parameter(torch.ones(*several, config.intervals), requires_grad=False)
        if config.guided:
            self.guided = nn.Parameter(torch.zeros_like(self.weights), requires_grad=False)
        if config.spectral:
            vectors = config.intervals * (1 + config.guided) + 1
            self.spectral = nn.Parameter(torch.zeros(*several, config.intervals, vectors, BANDS), requires_grad=False)
        if config.first_sigma:
            plain = torch.full((*several, config.channels, BANDS), config.first_sigma / config.sigmas[0])
            self.gains = nn.Parameter(plain, requires_grad=False)

    @property
    def learned(self) -> dict[str, Tensor]:
        """All its numbers, by name."""
        return dict(self.named_parameters())

    def begins_at(self, sigmas: Sequence[float]) -> int | None:
        """The interval of this table that a grid begins with: 0, or where a second model takes over; else None."""
        for begin in dict.fromkeys((0, self.config.switch)):
            own = self.config.sigmas[begin : begin + len(sigmas)]
            if len(own) == len(sigmas) and all(
                math.isclose(a, b, rel_tol=TOLERANCE) for a, b in zip(sigmas, own, strict=True)
            ):
                return begin
        return None

    def solver(self, sigmas: Sequence[float] = (), guidance: float | None = None) -> Solver:
        """The learned update rule, on a piece of this table's own grid that it may begin with; on others, iPNDM."""
        begin = self.begins_at(sigmas)
        if begin is None:
            return self.config.build_solver()
        first = at_guidance(self.config, self.first, guidance).tolist()
        guided = self._rows(self.guided, guidance)[begin:] if self.config.guided else ()
        weights, spectral = self._rows(self.weights, guidance)[begin:], self._spectral(guidance)[begin:]
        return Multistep(weights, tuple(first[begin:]), guided, spectral, 0 if begin else self.config.switch)

    def _spectral(self, guidance: float | None) -> tuple[Tensor, ...]:
        """Of every interval, what the weights of the vectors that it knows differ by in each band."""
        if not self.config.spectral:
            return ()
        values = at_guidance(self.config, self.spectral, guidance).detach()
        return tuple(values[k, self.vectors(k)] for k in range(self.config.intervals))

    def known(self, k: int) -> range:
        """The intervals whose slopes interval k adds up."""
        return known_to(k, self.config.switch)

    def row(self, k: int) -> Tensor:
        """The weights of interval k (vectors,) of one guidance scale, in the order of `solvers.multistep_vectors`."""
        guided = [self.guided[k, self.known(k)]] if self.config.guided else []
        return torch.cat([self.weights[k, self.known(k)], self.first[k : k + 1], *guided]).detach().double()

    def vectors(self, k: int) -> list[int]:
        """Which of the vectors of `spectral` interval k knows, in the order of `solvers.multistep_vectors`."""
        n, known = self.config.intervals, self.known(k)
        return [*known, n, *((n + 1 + j for j in known) if self.config.guided else ())]

    def _rows(self, triangle: Tensor, guidance: float | None) -> tuple[tuple[float, ...], ...]:
        rows = at_guidance(self.config, triangle, guidance).tolist()
        return tuple(tuple(row[j] for j in self.known(k)) for k, row in enumerate(rows))

    def planner(
        self,
        sigmas: Sequence[float] = (),
        plain: frozenset[int] | None = None,
        look: Look | None = None,
        guidance: float | None = None,
    ) -> Planner:
        """What the model is told along this table's own grid; on others, the levels themselves."""
        del plain, look
        begin = self.begins_at(sigmas)
        if begin is None:
            return NoMidpoint()
        scales = tuple(at_guidance(self.config, self.scale_time, guidance).tolist())[begin:]
        highest = max(self.config.sigma_max, self.config.sigmas[0])
        gains = at_guidance(self.config, self.gains, guidance).detach() if self.config.first_sigma else None
        told = Told(scales, self.config.sigma_min, highest, self.config.first_sigma, gains)
        if not self.config.switch:
            return told
        # A run of the second model alone has no first one.
        return replace(told, switch=self.config.switch - begin or -1, switch_sigma=self.config.switch_sigma)

    def alone(self) -> "list[MultistepTable]":
        """One table for each guidance scale: copies, whose numbers may be changed."""
        several, scales = bool(self.config.guidances), self.config.guidances or (self.config.guidance,)
        tables = [MultistepTable(replace(self.config, guidance=scale, guidances=())) for scale in scales]
        for number, table in enumerate(tables):
            for name, values in self.learned.items():
                table.learned[name].copy_(values[number] if several else values)
        return tables


def known_to(k: int, switch: int) -> range:
    """The intervals whose slopes interval k adds up: all up to it, of the second model from where it takes over."""
    return range(switch if k >= switch else 0, k + 1)


def together(config: PredictorConfig, tables: "Sequence[MultistepTable]") -> MultistepTable:
    """One table of several guidance scales; the inverse of `alone`."""
    made = MultistepTable(config)
    for name, values in made.learned.items():
        joined = torch.stack([table.learned[name] for table in tables])
        values.copy_(joined if config.guidances else joined[0])
    return made


def multistep_config(
    config: PredictorConfig,
    sigmas: Sequence[float],
    *,
    first_sigma: float = 0.0,
    channels: int = 0,
    spectral: bool = False,
) -> PredictorConfig:
    """The settings of a multistep table on a grid that ends at 0, for the model of other settings."""
    return replace(
        config,
        kind="multistep",
        solver="ipndm",
        sigmas=tuple(sigmas),
        features="none",
        analytic_first_step=False,
        plain_last=False,
        centred=False,
        scale_dir=0.0,
        scale_time=0.0,
        first_sigma=first_sigma,
        channels=channels,
        spectral=spectral,
    )


def coefficients(
    solver: Solver, sigmas: Sequence[float], planner: Planner | None = None, first: First | None = None
) -> tuple[tuple[float, ...], list[list[float]]]:
    """A linear solver on a grid, written out: the levels at which it calls the model and the last one, and its weights.

    The solver itself runs, on coordinates: its sample is 1 times the starting noise, and the model answers
    call k with the k-th unit vector as slope. Raises ValueError for a solver that is not linear,
    and for one that calls the model twice at a level, as Heun's method does.
    """
    planner = planner or NoMidpoint()
    calls = sum(planner.updates(interval) for interval in range(len(sigmas) - 1)) - (first is not None)
    visited: list[tuple[float, Tensor]] = []

    def answer(x: Sample, sigma: Sigma) -> Sample:
        slope = torch.zeros_like(x)
        slope[0, len(visited) + 1] = 1.0
        visited.append((float(sigma), x))
        return x - sigma * slope

    x = torch.zeros(1, calls + 1, dtype=torch.float64)
    x[0, 0] = 1.0
    grid = torch.tensor(sigmas, dtype=torch.float64)
    for step in trajectory(answer, x, grid, solver, planner, first=first):
        x = step.x
    visited.append((float(sigmas[-1]), x))
    rows = []
    for (sigma, here), (sigma_next, there) in pairwise(visited):
        if sigma_next == sigma:
            raise ValueError(
                f"{solver} calls the model twice at the noise level {sigma:.4g}: that is no multistep method."
            )
        change = (there - here)[0] / (sigma_next - sigma)
        if abs(float(change[0])) > 1e-6 / abs(sigma_next - sigma):
            raise ValueError(f"{solver} does not keep the starting noise as it is: it is no linear multistep method.")
        rows.append(change[1:].tolist())
    return tuple(sigma for sigma, _ in visited), rows
