"""Learned multistep methods: the grid, the weights of all slopes so far, and what the model is told, as plain numbers.

Every deterministic solver that calls the model n times takes, whatever its name, linear combinations of the
starting noise and of the slopes that the model has answered so far. So a table of such weights holds
all of them, and a fit that starts from the best of them can only come nearer to the teacher.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from .config import TOLERANCE, PredictorConfig, at_guidance
from .driver import NoMidpoint, trajectory
from .features import Look
from .solvers import Multistep, restarted
from .spectrum import BANDS, carried
from .types import Method, Run, Sample, Sigma


@dataclass(frozen=True)
class ToldLevels(NoMidpoint):
    """No midpoints; at the start of interval k the model is told `scales[k]` times the noise level.

    Of a guided model, the calls of all intervals ask the negative, or those of `negatives` alone.
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
    negatives: tuple[int, ...] | None = None

    def asks_negative(self, interval: int) -> bool:
        """Whether the call of an interval asks the negative."""
        return self.negatives is None or interval in self.negatives

    def told(self, interval: int, sigma: Sigma) -> Sigma:
        """`scales[interval]` times sigma, within the levels of the model that answers there."""
        scale, lowest, highest = self.scales[interval], self.lowest, self.highest
        if self.switch and interval < self.switch:
            lowest = max(lowest, self.switch_sigma)
        elif self.switch:
            highest = min(highest, self.switch_sigma * (1 - TOLERANCE))
        return sigma if scale == 1 else (scale * sigma).clamp(lowest, highest)

    def carried(self, interval: int, x: Sample, sigma: Sigma) -> tuple[Sample, Sigma]:
        """In the first interval, with gains: the sample (batch, channels, ...) where they lead, at `first_sigma`."""
        if interval or self.gains is None:
            return x, sigma
        return carried(x, self.gains), torch.full_like(sigma, self.first_sigma)


class MultistepTable(nn.Module):
    """Lower triangular `weights` ([guidances,] intervals, intervals); `first`, `scale_time` ([guidances,] intervals).

    Row k of the weights and entry k of `first` are of interval k (see `solvers.Multistep`); before any fit they are
    iPNDM's. A guided one has `guided`, as the weights, a spectral one `spectral` ([guidances,] intervals, vectors,
    BANDS), what weights differ by in each band, the vectors being slopes, the first denoised sample and guidance
    slopes; and one with a first step `gains` ([guidances,] channels, BANDS). Calls that ask no negative have no
    guidance slope, and its weights stay 0; before any fit the newest one that was asked stands for it.
    All hold for the grid they were fitted on, from its beginning, or from where a second model takes over, whose steps
    have no weights of what the first one answered. On other grids it is plain iPNDM.
    """

    guided: nn.Parameter
    spectral: nn.Parameter
    gains: nn.Parameter

    def __init__(self, config: PredictorConfig) -> None:
        super().__init__()
        self.config = config
        several = (len(config.guidances),) if config.guidances else ()

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*several, *shape), requires_grad=False)

        n = config.intervals
        self.weights, self.first, self.scale_time = empty(n, n), empty(n), empty(n)
        if config.guided:
            self.guided = empty(n, n)
        if config.spectral:
            self.spectral = empty(n, n * (1 + config.guided) + 1, BANDS)
        if config.first_sigma:
            self.gains = empty(config.channels, BANDS)
        if not self.weights.is_meta:  # those have names and shapes, and no numbers
            self.reset()

    def reset(self) -> None:
        """Set all numbers to those before any fit. Raises ValueError for a solver that is no linear multistep one."""
        config = self.config
        plain = Method(self.asked, restarted(config.build_solver(), config.switch), NoMidpoint())
        self.weights.copy_(torch.tensor(coefficients(plain)[1]))
        self.first.fill_(0.0)
        self.scale_time.fill_(1.0)
        if config.guided:
            self.guided.copy_(lacking_guidance(config, self.weights))
        if config.spectral:
            self.spectral.fill_(0.0)
        if config.first_sigma:
            self.gains.fill_(config.first_sigma / config.sigmas[0])

    @property
    def learned(self) -> dict[str, Tensor]:
        """All its numbers by name, in the shapes above."""
        return dict(self.named_parameters())

    @property
    def asked(self) -> tuple[float, ...]:
        """The levels of its model calls, and its end."""
        return asked_at(self.config.sigmas, self.config.first_sigma)

    def method(self, run: Run | None = None, *, guidance: float | None = None, look: Look | None = None) -> Method:
        """How it samples a run that begins where this table or its second model does, or its own grid.

        On other levels it is plain iPNDM. `guidance` is the cfg scale, if it was fitted at several.
        """
        del look
        sigmas = self.config.sigmas if run is None else run.sigmas
        config = self.config
        if (begin := config.begins_at(sigmas)) is None:
            return config.plain_method(sigmas)
        # A list in half precision says which levels are meant, but not how long its steps are.
        sigmas = config.sigmas[begin : begin + len(sigmas)]
        first = at_guidance(config, self.first, guidance).tolist()
        guided = self._rows(self.guided, guidance, self.asking)[begin:] if config.guided else ()
        weights, spectral = self._rows(self.weights, guidance, self.known)[begin:], self._spectral(guidance)[begin:]
        negatives = tuple(j - begin for j in config.negatives if j >= begin) if config.negatives else None
        solver = Multistep(weights, tuple(first[begin:]), guided, negatives, spectral, 0 if begin else config.switch)
        scales = tuple(at_guidance(config, self.scale_time, guidance).tolist())[begin:]
        highest = max(config.sigma_max, config.sigmas[0])
        gains = at_guidance(config, self.gains, guidance).detach() if config.first_sigma else None
        told = ToldLevels(scales, config.sigma_min, highest, config.first_sigma, gains, negatives=negatives)
        if config.switch:  # a run of the second model alone has no first one
            told = replace(told, switch=config.switch - begin or -1, switch_sigma=config.switch_sigma)
        return Method(tuple(sigmas), solver, told)

    def _spectral(self, guidance: float | None) -> tuple[Tensor, ...]:
        """Of every interval, what the weights of the vectors that it knows differ by in each band."""
        if not self.config.spectral:
            return ()
        values = at_guidance(self.config, self.spectral, guidance).detach()
        return tuple(values[k, self.vectors(k)] for k in range(self.config.intervals))

    def known(self, k: int) -> range:
        """The intervals whose slopes interval k adds up."""
        return known_to(k, self.config.switch)

    def asking(self, k: int) -> list[int]:
        """The intervals whose guidance slopes interval k adds up."""
        return [j for j in self.known(k) if j in self.config.asking] if self.config.guided else []

    def row(self, k: int) -> Tensor:
        """The weights of interval k (vectors,) of one guidance scale, in the order of `solvers.multistep_vectors`."""
        guided = [self.guided[k, self.asking(k)]] if self.config.guided else []
        return torch.cat([self.weights[k, self.known(k)], self.first[k : k + 1], *guided]).detach().double()

    def row_by_band(self, k: int) -> Tensor:
        """The same for each band (vectors, BANDS), or for all together (vectors, 1)."""
        apart = self.spectral[k, self.vectors(k)].detach().double() if self.config.spectral else 0.0
        return self.row(k)[:, None] + apart

    def set_row(self, k: int, row: Tensor, apart: Tensor | None = None) -> None:
        """Set the weights (vectors,) of interval k, and of a spectral table what bands differ by (vectors, BANDS)."""
        known = self.known(k)
        weights, first, guided = row.to(self.weights).tensor_split([len(known), len(known) + 1])
        self.weights[k, known], self.first[k] = weights, first[0]
        if self.config.guided:
            self.guided[k, self.asking(k)] = guided
        if apart is not None:
            self.spectral[k, self.vectors(k)] = apart.to(self.spectral)

    def vectors(self, k: int) -> list[int]:
        """Which of the vectors of `spectral` interval k knows, in the order of `solvers.multistep_vectors`."""
        n, known = self.config.intervals, self.known(k)
        return [*known, n, *(n + 1 + j for j in self.asking(k))]

    def _rows(
        self, triangle: Tensor, guidance: float | None, of: Callable[[int], Iterable[int]]
    ) -> tuple[tuple[float, ...], ...]:
        """Row k of a triangle at the places that `of(k)` lists."""
        rows = at_guidance(self.config, triangle, guidance).tolist()
        return tuple(tuple(row[j] for j in of(k)) for k, row in enumerate(rows))

    def text(self) -> str:
        """What it learned, to read."""
        config, lines = self.config, []
        if config.first_sigma:
            lines.append(f"before its first model call a step without one leads from {config.sigmas[0]:.4g} on")
        lines.append(
            "the noise level that the model is told, weights of all slopes so far, the oldest first, of the first"
        )
        lines.append(
            "denoised sample, and, if it is guided, of what guidance adds to the slopes; bands differ from these:"
        )
        for table in self.alone():
            lines.append(f"  cfg {table.config.guidance:g}")
            for k, (start, end) in enumerate(pairwise(config.sigmas)):
                begin, known = config.first_sigma if config.first_sigma and k == 0 else start, len(table.known(k))
                parts = table.row(k).tensor_split([known, known + 1])
                weights = "; ".join(" ".join(f"{w:8.4f}" for w in part.tolist()) for part in parts if len(part))
                told = float(table.scale_time[k]) * begin
                lines.append(f"  {begin:.4g} to {end:.4g}: told {told:.4g}, weights {weights}")
        return "\n".join(lines)

    def alone(self) -> "list[MultistepTable]":
        """One table for each guidance scale, without the first axis: copies, whose numbers may be changed."""
        several, scales = bool(self.config.guidances), self.config.guidances or (self.config.guidance,)
        tables = [MultistepTable(replace(self.config, guidance=scale, guidances=())) for scale in scales]
        for number, table in enumerate(tables):
            for name, values in self.learned.items():
                table.learned[name].copy_(values[number] if several else values)
        return tables


def moved(table: MultistepTable, start: float) -> MultistepTable:
    """The same weights for runs that start at another level, above a grid's last but one, which ends at 0.

    Levels stay in proportion in ln(sigma), down to that one.
    """
    grid = table.config.sigmas
    parts = [math.log(sigma / grid[-2]) / math.log(grid[0] / grid[-2]) for sigma in grid[:-1]]
    levels = [start, *(grid[-2] * (start / grid[-2]) ** part for part in parts[1:]), grid[-1]]
    with torch.device("meta"):  # it takes its numbers from the other
        made = MultistepTable(replace(table.config, sigmas=tuple(levels)))
    made.load_state_dict(table.state_dict(), assign=True)
    return made.requires_grad_(False)


def asked_at(sigmas: Sequence[float], first_sigma: float) -> tuple[float, ...]:
    """The levels of a grid's model calls, and its end; a first step without a call leads to `first_sigma`, if not 0."""
    return (first_sigma or sigmas[0], *sigmas[1:])


def known_to(k: int, switch: int) -> range:
    """The intervals whose slopes interval k adds up: all up to it, of the second model from where it takes over."""
    return range(switch if k >= switch else 0, k + 1)


def lacking_guidance(config: PredictorConfig, weights: Tensor) -> Tensor:
    """Weights of guidance slopes in place of what calls without the negative lack: ([guidances,] intervals, intervals).

    Such a call answers a conditional slope. At the scale s a guided one would be s - 1 guidance slopes more, and that
    of the newest call that asked stands for it. What was not asked yet is left out. `weights` are those of the slopes,
    in the same shape.
    """
    made = torch.zeros_like(weights)
    scale = torch.tensor(config.guidances or config.guidance).to(weights)
    for k in range(config.intervals):
        known = known_to(k, config.switch)
        for j in set(known) - set(config.asking):
            if before := [i for i in config.asking if known.start <= i < j]:
                made[..., k, before[-1]] += (scale - 1) * weights[..., k, j]
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
        scale_dir=0.0,
        scale_time=0.0,
        first_sigma=first_sigma,
        channels=channels,
        spectral=spectral,
    )


def coefficients(method: Method) -> tuple[tuple[float, ...], list[list[float]]]:
    """A linear method, written out: the levels at which it calls the model and the last one, and its weights.

    The method itself runs, on coordinates: its sample is 1 times the starting noise, and the model answers
    call k with the k-th unit vector as slope. Raises ValueError for a solver that is not linear,
    and for one that calls the model twice at a level, as Heun's method does.
    """
    visited: list[tuple[float, Tensor]] = []

    def answer(x: Sample, sigma: Sigma) -> Sample:
        slope = torch.zeros_like(x)
        slope[0, len(visited) + 1] = 1.0
        visited.append((float(sigma), x))
        return x - sigma * slope

    x = torch.zeros(1, method.calls + 1, dtype=torch.float64)
    x[0, 0] = 1.0
    for step in trajectory(answer, x, method):
        x = step.x
    visited.append((method.sigmas[-1], x))
    rows = []
    for (sigma, here), (sigma_next, there) in pairwise(visited):
        if sigma_next == sigma:
            raise ValueError(
                f"{method.solver} calls the model twice at the noise level {sigma:.4g}: that is no multistep method."
            )
        change = (there - here)[0] / (sigma_next - sigma)
        if abs(float(change[0])) > 1e-6 / abs(sigma_next - sigma):
            raise ValueError(
                f"{method.solver} does not keep the starting noise as it is: it is no linear multistep method."
            )
        rows.append(change[1:].tolist())
    return tuple(sigma for sigma, _ in visited), rows
