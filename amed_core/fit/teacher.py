"""The teacher's way, level by level: what grids are searched on, and what closed-form weights are fitted to."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from ..config import PredictorConfig, switch_of
from ..driver import FixedMidpoint, NoMidpoint, sample, trajectory
from ..samplers import TYPES, sampler_name
from ..schedules import fine, schedule
from ..solvers import CautiousIpndm, Dpm2, DpmSolverPP, Ipndm, restarted
from ..types import Denoiser, Method, Planner, Sample, Solver, Step

# The teacher: in 24 calls it is nearer to convergence than Heun's method in 40, and safe where guidance is strong.
SLOW = CautiousIpndm(3)
ROUNDING = 1e-6  # relative, of levels that were kept in float32
REFINED, MOST_CALLS = 2, 100  # of a teacher that is too poor for its student
QUADRATURE = 4  # slopes that a polynomial takes to show a teacher's error
MOST_LEVELS = 128  # that grids are searched on
PIECE = 1 << 15  # elements of all samples: sums over a path take them one piece after the other


@dataclass(frozen=True)
class TeacherPath:
    """Where a batch was at every level (levels, batch, ...), and its slopes there; the last level, 0, has none.

    With `last`, the last samples in full precision, all others are in half of it. Those at level sigma are then divided
    by sqrt(1 + sigma^2), so that none overflows.
    """

    levels: tuple[float, ...]
    x: Tensor
    slopes: Tensor
    last: Sample | None = None

    def to(self, device: torch.device | str) -> "TeacherPath":
        """The same path on another device."""
        last = None if self.last is None else self.last.to(device)
        return TeacherPath(self.levels, self.x.to(device), self.slopes.to(device), last)

    @property
    def bytes(self) -> int:
        """What it takes of memory."""
        return sum(part.numel() * part.element_size() for part in (self.x, self.slopes))

    @property
    def end(self) -> Sample:
        """The teacher's samples."""
        return self.x[-1] if self.last is None else self.last

    def at(self, sigma: float) -> tuple[Sample, Sample]:
        """The sample and its slope at any level between two that were passed, by cubic Hermite interpolation."""
        if sigma == self.levels[-1]:
            return self.end, self.slopes[-1].to(self.end)
        above = max(n for n, level in enumerate(self.levels[:-2]) if level >= sigma or n == 0)
        high, low = self.levels[above : above + 2]
        x, slopes = self.x[above : above + 2], self.slopes[above : above + 2]
        if self.last is None:
            return _between(sigma, high, low, x, slopes)
        x_0, x_1 = (_unit(level) * sample.to(self.last) for level, sample in zip((high, low), x, strict=True))
        return _between(sigma, high, low, (x_0, x_1), slopes.to(self.last))

    def first(self, count: int) -> "TeacherPath":
        """That of the first samples of the batch."""
        last = None if self.last is None else self.last[:count]
        return TeacherPath(self.levels, self.x[:, :count], self.slopes[:, :count], last)

    def halved(self) -> "TeacherPath":
        """The same path in half precision."""
        units = torch.tensor([_unit(level) for level in self.levels]).to(self.x)
        x = self.x / units.reshape(-1, *[1] * (self.x.ndim - 1))
        return TeacherPath(self.levels, x.half(), self.slopes.half(), self.end.clone())

    def below(self, sigma: float) -> "TeacherPath":
        """The part from a level on, where samples and slopes are interpolated."""
        lower = [n for n, level in enumerate(self.levels) if level < (1 - ROUNDING) * sigma]
        begin, slope = self.at(sigma)
        kept = begin / (1.0 if self.last is None else _unit(sigma))
        x = torch.cat([kept[None].to(self.x), self.x[lower]])
        slopes = torch.cat([slope[None].to(self.slopes), self.slopes[lower[:-1]]])
        return TeacherPath((sigma, *(self.levels[n] for n in lower)), x, slopes, self.last)

    def channels(self) -> Iterator["TeacherPath"]:
        """The same path, one channel (levels, batch, 1, ...) at a time."""
        for n in range(self.x.shape[2]):
            last = None if self.last is None else self.last[:, n : n + 1]
            yield TeacherPath(self.levels, self.x[:, :, n : n + 1], self.slopes[:, :, n : n + 1], last)

    def pieces(self) -> Iterator["TeacherPath"]:
        """The same path, a few elements (levels, batch, part) at a time."""
        x, slopes, end = self.x.flatten(2), self.slopes.flatten(2), self.end.flatten(1)
        size = max(PIECE // len(end), 1)
        for begin in range(0, end.shape[1], size):
            part = slice(begin, begin + size)
            last = None if self.last is None else end[:, part]
            yield TeacherPath(self.levels, x[..., part], slopes[..., part], last)


def path_bytes(x: Sample, calls: int, *, half: bool) -> int:
    """What a path of x (batch, ...) in so many calls takes of memory: samples and slopes at every level."""
    return (2 * calls + 1) * x.numel() * (2 if half else x.element_size())


def _unit(sigma: float) -> float:
    """What a path in half precision has its samples at a level in units of."""
    return math.sqrt(1 + sigma**2)


def _between(
    sigma: float, high: float, low: float, x: Tensor | Sequence[Sample], slopes: Tensor | Sequence[Sample]
) -> tuple[Sample, Sample]:
    """The sample and its slope between two levels (cubic Hermite interpolation)."""
    h, t = low - high, (sigma - high) / (low - high)
    (x_0, x_1), (d_0, d_1) = x, slopes
    there = (1 + 2 * t) * (1 - t) ** 2 * x_0 + t**2 * (3 - 2 * t) * x_1 + h * t * (1 - t) * ((1 - t) * d_0 - t * d_1)
    slope = 6 * t * (1 - t) / h * (x_1 - x_0) + (1 - t) * (1 - 3 * t) * d_0 + t * (3 * t - 2) * d_1
    return there, slope


def levels(sigma_min: float, sigma_max: float, calls: int, flow: bool) -> tuple[float, ...]:
    """The levels of a teacher of so many calls: `schedules.fine`, and 0."""
    return (*fine(calls, sigma_min, sigma_max, flow).tolist(), 0.0)


def teacher(grid: Sequence[float], switch_sigma: float = 0.0) -> Method:
    """The teacher on a grid; below `switch_sigma` a second model answers, and there it begins anew."""
    return Method(tuple(grid), restarted(SLOW, switch_of(grid, switch_sigma)), NoMidpoint())


@torch.no_grad()
def path(denoiser: Denoiser, x: Sample, grid: Sequence[float], switch_sigma: float = 0.0) -> TeacherPath:
    """The teacher's path on a grid, from the noisy sample `x` at its first level."""
    return path_of(denoiser, x, teacher(grid, switch_sigma))


@torch.no_grad()
def path_of(denoiser: Denoiser, x: Sample, method: Method, *, half: bool = False) -> TeacherPath:
    """Run a method with one call per interval, and keep all that it passes, on the CPU, on demand in half precision.

    The device holds no more than it does in sampling.
    """
    grid, kept = method.sigmas, torch.float16 if half else x.dtype
    samples, slopes = (torch.empty(n, *x.shape, dtype=kept) for n in (len(grid), len(grid) - 1))
    units = [_unit(sigma) if half else 1.0 for sigma in grid]
    samples[0].copy_(x / units[0])
    for step in trajectory(denoiser, x, method):
        x = step.x
        samples[step.index + 1].copy_(x / units[step.index + 1])
        slopes[step.index].copy_(step.start.slope)
        del step
    return TeacherPath(grid, samples, slopes, x.cpu() if half else None)


@torch.no_grad()
def passed_at(
    denoiser: Denoiser, x: Sample, grid: Sequence[float], wanted: Sequence[float], switch_sigma: float = 0.0
) -> list[Sample]:
    """Where the teacher passes these levels, the largest first; of its way no more is held than its solver needs.

    The wanted levels end with the grid's last, 0, or lie above the one before it.
    """
    found: list[Sample] = []
    before: Step | None = None
    for step in trajectory(denoiser, x, teacher(grid, switch_sigma)):
        while (
            before is not None and len(found) < len(wanted) and wanted[len(found)] >= (1 - ROUNDING) * grid[step.index]
        ):
            ends, slopes = (before.start.x, step.start.x), (before.start.slope, step.start.slope)
            found.append(_between(wanted[len(found)], grid[before.index], grid[step.index], ends, slopes)[0])
        before = step
    if before is not None and len(found) < len(wanted):
        found.append(before.x)
    return found


def left_of_errors(levels: Sequence[float], variance: float, flow: bool) -> Tensor:
    """What is left at the end, squared, of an error at every level (levels,), if the data were Gaussian.

    At sigma, v / (s^2 v + sigma^2), with the data's variance v and the signal's scale s.
    """
    sigma = torch.tensor(levels, dtype=torch.float64)
    signal = 1 - sigma if flow else torch.ones_like(sigma)
    return variance / (signal**2 * variance + sigma**2)


def own_errors(passed: TeacherPath, flow: bool) -> Tensor:
    """What a path itself shows of how far it ends from the ODE's solution, squared, per value (batch,), in float64.

    In every interval the slopes that were passed, integrated by polynomials of order QUADRATURE - 1, say where the step
    should have led. What it missed is added up as it would arrive at the end if the data were Gaussian. Measured on
    four models, its root is 0.11 to 1.56 of the true error: least where nearby samples part on their way.
    """
    levels, count = passed.levels, len(passed.slopes)
    left = left_of_errors(levels, float(passed.end.double().square().mean()), flow).sqrt().tolist()
    order = min(QUADRATURE, count)
    sums = torch.zeros(passed.end.shape[0], dtype=torch.float64)
    for piece in passed.pieces():
        points = [piece.at(level) for level in levels[:count]]
        missed = torch.zeros_like(points[0][0], dtype=torch.float64)
        for k in range(count - 1):
            begin = max(0, min(k + 1 - order // 2, count - order))
            weights = _integral(levels[begin : begin + order], levels[k], levels[k + 1])
            moved = sum(w * points[begin + j][1].double() for j, w in enumerate(weights))
            missed += left[k + 1] * (moved - (points[k + 1][0] - points[k][0]).double())
        sums += missed.square().sum(1)
    return sums / passed.end[0].numel()


def refined_calls(calls: int, own: float, students: float) -> int:
    """The calls that a teacher of so many should take, by its own and its student's squared errors.

    One that errs by half as much as its student, or more, takes REFINED times the calls, if these are no more than
    MOST_CALLS.
    """
    more = REFINED * calls
    return more if own > students / 4 and more <= MOST_CALLS else calls


def _integral(nodes: Sequence[float], begin: float, end: float) -> list[float]:
    """The weights of values at nodes in the integral of their polynomial from `begin` to `end`."""
    middle, scale = sum(nodes) / len(nodes), max(nodes) - min(nodes)
    at = (torch.tensor([*nodes, begin, end], dtype=torch.float64) - middle) / scale
    powers = torch.arange(len(nodes), dtype=torch.float64)[:, None]
    integrals = scale * (at[-1] ** (powers + 1) - at[-2] ** (powers + 1)) / (powers + 1)
    solved: list[float] = torch.linalg.solve(at[:-2] ** powers, integrals)[:, 0].tolist()
    return solved


@dataclass(frozen=True)
class PathProducts:
    """All inner products of what paths pass, summed over them: what any linear rule errs by follows from these.

    `products` (2 n, 2 n) are those of n samples and n slopes in this order, in float64.
    """

    levels: tuple[float, ...]
    products: Tensor
    elements: int  # of all samples that were summed

    @property
    def variance(self) -> float:
        """Of the samples at the end, about 0."""
        n = len(self.levels)
        return float(self.products[n - 1, n - 1] / self.elements)


def below(products: PathProducts, level: float) -> PathProducts:
    """The part from one of its levels on."""
    n, begin = len(products.levels), products.levels.index(level)
    kept = [*range(begin, n), *range(n + begin, 2 * n)]
    return PathProducts(products.levels[begin:], products.products[kept][:, kept], products.elements)


def sum_of(several: Sequence[PathProducts]) -> PathProducts:
    """Of paths along the same levels."""
    products = torch.stack([one.products for one in several]).sum(0)
    return PathProducts(several[0].levels, products, sum(one.elements for one in several))


def products_of(passed: TeacherPath, finer: int = 2) -> PathProducts:
    """The inner products of a path, at `finer` times as many levels, but no more than MOST_LEVELS.

    What is searched on them takes memory by the third power of their number.
    """
    every = -(-len(passed.levels) // MOST_LEVELS)
    finer = finer if finer * len(passed.levels) <= MOST_LEVELS else 1
    wanted: list[float] = []
    for high, low in pairwise(passed.levels[:-1:every]):
        wanted += [high * (low / high) ** (part / finer) for part in range(finer)]
    wanted += passed.levels[-2:]
    products = torch.zeros(2 * len(wanted), 2 * len(wanted), dtype=torch.float64)
    for piece in passed.pieces():
        points = [piece.at(sigma) for sigma in wanted]
        vectors = torch.stack([x for x, _ in points] + [slope for _, slope in points]).flatten(1).cpu().double()
        products += vectors @ vectors.T
    return PathProducts(tuple(wanted), products, passed.end.numel())


def heun_calls(calls: int) -> int:
    """The true number of model calls of `heun_samples` with `calls`."""
    return 2 * max(calls // 2, 1) + 1


@torch.no_grad()
def heun_samples(
    denoiser: Denoiser,
    x: Sample,
    sigma_min: float,
    sigma_max: float,
    calls: int = 200,
    *,
    flow: bool = False,
) -> Sample:
    """The samples that errors are measured against: Heun's method in `calls` model calls, the last one plain, to 0.

    `x` is the noisy sample at sigma_max; the grid is `schedules.fine`. No step remembers the one before, so that it
    does not matter where a second model takes over.
    """
    intervals = max(calls // 2, 1)
    grid = (*fine(intervals + 1, sigma_min, sigma_max, flow).tolist(), 0.0)
    return sample(denoiser, x, Method(grid, Dpm2(), FixedMidpoint(1.0, plain=frozenset({intervals}))))


class Teacher(Protocol):
    """A slow way from noisy samples to finished ones, which a student is to reproduce in fewer calls.

    One that subclasses it writes `path`, and of the others what is not as here.
    """

    @property
    def name(self) -> str:
        """For people, with its number of calls."""

    @property
    def calls(self) -> int:
        """What it is set to, in model calls."""

    @property
    def model_calls(self) -> int:
        """True model calls of each sample."""
        return self.calls

    def path(self, denoiser: Denoiser, x: Sample, *, half: bool = False) -> TeacherPath:
        """Its path from noisy samples x (batch, ...), on the CPU, on demand in half precision."""

    def samples(self, denoiser: Denoiser, x: Sample) -> Sample:
        """Where it leads x (batch, ...)."""
        return self.path(denoiser, x).end.to(x)

    def passed_at(self, denoiser: Denoiser, x: Sample, wanted: Sequence[float]) -> list[Sample]:
        """Where it passes these levels, the largest first."""
        passed = self.path(denoiser, x)
        return [passed.at(sigma)[0].to(x) for sigma in wanted]

    def in_calls(self, calls: int) -> "Teacher":
        """The same in another number of calls; itself where it is to be reproduced as it is."""
        del calls
        return self

    def below(self, sigma: float, levels: int) -> "Teacher":
        """The same from a level on: one whose paths are known as parts of this one's.

        One that can be made more exact is another where these would have fewer than so many levels.
        """
        del sigma, levels
        return AsKnown(self)


@dataclass(frozen=True)
class Converged(Teacher):
    """Nearly the ODE's own solution: `SLOW` on `levels`, from sigma_max to 0."""

    sigma_min: float
    sigma_max: float
    calls: int = 24
    flow: bool = False
    switch_sigma: float = 0.0

    @classmethod
    def of(cls, config: PredictorConfig, calls: int) -> "Converged":
        """The teacher of a student with these settings."""
        return cls(config.sigma_min, config.sigmas[0], calls, config.flow, config.switch_sigma)

    @property
    def name(self) -> str:
        """For people."""
        return f"iPNDM of cautious order, {self.calls} calls"

    @property
    def grid(self) -> tuple[float, ...]:
        """Its levels."""
        return levels(self.sigma_min, self.sigma_max, self.calls, self.flow)

    def path(self, denoiser: Denoiser, x: Sample, *, half: bool = False) -> TeacherPath:
        """Its path from noisy samples x (batch, ...)."""
        return path_of(denoiser, x, teacher(self.grid, self.switch_sigma), half=half)

    @torch.no_grad()
    def samples(self, denoiser: Denoiser, x: Sample) -> Sample:
        """Where it leads x (batch, ...), with the memory of sampling."""
        for step in trajectory(denoiser, x, teacher(self.grid, self.switch_sigma)):
            x = step.x
        return x

    def passed_at(self, denoiser: Denoiser, x: Sample, wanted: Sequence[float]) -> list[Sample]:
        """Where it passes these levels, the largest first, with the memory of sampling."""
        return passed_at(denoiser, x, self.grid, wanted, self.switch_sigma)

    def in_calls(self, calls: int) -> "Converged":
        """The same in another number of calls."""
        return replace(self, calls=calls)

    def below(self, sigma: float, levels: int) -> Teacher:
        """The same from a level on, in at least so many levels."""
        if sum(level < sigma for level in self.grid) >= levels:
            return AsKnown(self)
        return replace(self, sigma_max=sigma, sigma_min=min(self.sigma_min, sigma / 2), calls=levels)


@dataclass(frozen=True)
class AsKnown(Teacher):
    """A teacher whose paths are known already; it makes no others."""

    of: Teacher

    @property
    def name(self) -> str:
        """For people."""
        return self.of.name

    @property
    def calls(self) -> int:
        """What it is set to, in model calls."""
        return self.of.calls

    @property
    def model_calls(self) -> int:
        """None: they were made before."""
        return 0

    def path(self, denoiser: Denoiser, x: Sample, *, half: bool = False) -> TeacherPath:
        """There is none to make."""
        raise ValueError("The paths of this teacher were made before: no other can be.")


@dataclass(frozen=True)
class Heun(Converged):
    """Heun's method, whose steps remember nothing: `heun_samples`."""

    @property
    def name(self) -> str:
        """For people."""
        return f"Heun, {self.model_calls} calls"

    @property
    def model_calls(self) -> int:
        """True model calls of each sample."""
        return heun_calls(self.calls)

    def samples(self, denoiser: Denoiser, x: Sample) -> Sample:
        """Where it leads x (batch, ...)."""
        return heun_samples(denoiser, x, self.sigma_min, self.sigma_max, self.calls, flow=self.flow)


# The paper's teachers, which cross the student's intervals in smaller steps. Multistep ones are the student's own
# solver, with its order and its prediction type.
TEACHERS: Mapping[str, Callable[[PredictorConfig], tuple[Solver, Planner]]] = {
    "heun": lambda student: (Dpm2(), FixedMidpoint(1.0, sigma_floor=student.sigma_min)),
    "dpm_2": lambda student: (Dpm2(), FixedMidpoint(0.5, sigma_floor=student.sigma_min)),
    "ipndm": lambda student: (Ipndm(student.max_order), NoMidpoint()),
    "dpmpp": lambda student: (
        DpmSolverPP(student.max_order, student.prediction, student.lower_order_final, student.thresholding),
        NoMidpoint(),
    ),
    "euler": lambda student: (Ipndm(1), NoMidpoint()),
}


def papers_teacher(config: PredictorConfig, name: str = "", points: int = 0) -> tuple[Method, int]:
    """A teacher of the student `config`, and how many points it adds inside every interval.

    Those that the student's sampler type has, unless they are given.
    """
    kind = TYPES[sampler_name(config)]
    points = points or kind.teacher_points
    solver, planner = TEACHERS[name or kind.teacher](config)
    return Method(tuple(refine(config, points).tolist()), solver, planner), points


def refine(config: PredictorConfig, points: int) -> Tensor:
    """The teacher's grid: `points` more inside every planned interval, all of whose ends it contains.

    The schedule gives them where it gave the student's whole grid; otherwise they are spaced evenly
    in ln(sigma), from the smallest level if the interval ends at 0.
    """
    sigmas = torch.tensor(config.sigmas, dtype=torch.float64)
    low = config.sigma_min if sigmas[-1] == 0 else float(sigmas[-1])
    ends = sigmas.clamp(min=low).log()
    inner = torch.arange(points + 1, dtype=torch.float64) / (points + 1)
    fine = torch.cat([(ends[:-1, None] + inner * ends.diff()[:, None]).flatten(), ends[-1:]]).exp()
    with contextlib.suppress(ValueError):  # of a discrete schedule whose timesteps only the model knows
        scheduled = schedule(config.schedule)(len(fine), low, float(sigmas[0]), config.rho)
        if torch.allclose(scheduled[:: points + 1][:-1], sigmas[:-1], rtol=1e-9):
            fine = scheduled
    fine[:: points + 1] = sigmas
    return fine[: config.planned * (points + 1) + 1]
