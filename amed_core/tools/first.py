"""What the first pictures teach: the learner's error on pictures it never saw, over that of the best stock pair."""

import contextlib
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..driver import NoMidpoint, sample
from ..fit.baselines import grids, solvers
from ..fit.huber import squares
from ..fit.learner import Learner
from ..fit.make import facts_of
from ..fit.teacher import heun_samples
from ..fit.trajectories import Metered, chunks, conditioned, noise
from ..samplers import MULTISTEP_STUDENT, student_config
from ..types import Denoiser, Method, Model, Sample

USES = (("noise", None, 0), ("image 0.75", 0.75, 0), ("image 0.5", 0.5, 1), ("image 0.3", 0.3, 2))
USE_NAMES = tuple(use[0] for use in USES)
TEACHER_CALLS = 100  # of the converged sampler that errors are measured against
TEST_ROWS, DRAW_ROWS, ROWS_EACH = 1000, 5000, 103  # numbers of trajectories: of the test, and of each draw
TEST_SEED, IMAGE_SEED = 0x5EED_0000, 0x1A6E_0000
FINALISTS = 20  # unlearned pairs that run on all test pictures, if these are more than a batch
FAR = 5.0  # medians: an error beyond them is an outlier


@dataclass(frozen=True)
class Row:
    """One line: the JSON's keys. Errors are RMSEs to the converged sampler."""

    use: str
    calls: int
    pictures: int
    error: float  # the median of the draws
    stock: float  # of the best unlearned solver and usual grid, chosen on the very pictures that judge
    stock_name: str
    ratio: float  # error / stock
    worst: float  # the largest ratio of the draws
    median_ratio: float  # the median picture's error over the least median of stock pairs
    outliers: float  # share of pictures with more than 5 medians of error
    held_out: float | None  # the ratio to the best plain candidate, as the learner itself estimates it
    sample_calls: int  # of the newest picture, all passes and the teacher together
    chosen: tuple[str, ...]  # candidate of every draw


class Bed:
    """A model, the level where pictures start (None: pure noise), and pictures that nobody learns from."""

    def __init__(self, model: Model, level: float | None, samples: int, batch: int = 100) -> None:
        self.model = model
        self.flow = bool(getattr(model, "flow", False))
        self.low, self.top = float(model.sigma_min), float(model.sigma_max)
        self.high = self.top if level is None else level
        self.parts: list[tuple[Denoiser, Sample, Sample]] = []  # by batch: the denoiser, noisy pictures, their ends
        for rows in chunks(samples, batch):
            asked = conditioned(model, range(TEST_ROWS + rows.start, TEST_ROWS + rows.stop))
            x = self.top * noise(rows, tuple(model.shape), TEST_SEED)
            if level is not None:
                x = self.noised(self.converged(asked, x, self.top), rows, TEST_SEED)
            self.parts.append((asked, x, self.converged(asked, x, self.high)))

    def converged(self, asked: Denoiser, x: Sample, high: float) -> Sample:
        """Where the converged sampler takes pictures from a level."""
        return heun_samples(asked, x, self.low, high, TEACHER_CALLS, flow=self.flow)

    def noised(self, images: Sample, rows: range, seed: int) -> Sample:
        """Images with noise at the level where pictures start."""
        fresh = noise(rows, tuple(self.model.shape), seed ^ IMAGE_SEED)
        return (1 - self.high) * images + self.high * fresh if self.flow else images + self.high * fresh

    def squares(self, method: Method, batches: slice = slice(None)) -> Tensor:
        """The mean squared error (samples,) of a method on the test pictures, or on these batches of them."""
        return torch.cat([squares(sample(asked, x, method), goal) for asked, x, goal in self.parts[batches]])

    def stock(self, calls: int) -> dict[str, Tensor]:
        """The errors (samples,) of unlearned solvers on usual grids, least first: FINALISTS run beyond one batch."""
        methods, found = {}, {}
        for grid_name, grid in grids(calls, self.low, self.high, getattr(self.model, "sigmas", None)):
            for solver_name, solver in solvers(self.flow).items():
                methods[name := f"{solver_name} {grid_name}"] = Method(grid, solver, NoMidpoint())
                with contextlib.suppress(FloatingPointError):
                    found[name] = self.squares(methods[name], slice(0, 1))
        best = sorted(found, key=lambda name: float(found[name].mean()))
        if len(self.parts) == 1:
            return {name: found[name] for name in best}
        return {name: self.squares(methods[name]) for name in best[:FINALISTS]}

    def start(self, rows: range) -> tuple[Sample, Denoiser]:
        """The noisy pictures of trajectories that are learned from, and their denoiser: a source."""
        asked = conditioned(self.model, rows)
        x = self.top * noise(rows, tuple(self.model.shape), 0)
        if self.high == self.top:
            return x, asked
        return self.noised(self.converged(asked, x, self.top), rows, 1), asked

    def learner(self, calls: int, teacher_calls: int) -> Learner:
        """A learner of this situation that knows nothing."""
        scale = float(getattr(self.model, "cfg", 1.0))
        config = student_config(MULTISTEP_STUDENT, calls, facts_of(self.model), guidance=scale)
        lower = torch.linspace(self.high, 0, calls + 1).tolist()
        config = replace(config, sigmas=(self.high, *lower[1:-1], 0.0))
        return Learner(config, model_sigmas=getattr(self.model, "sigmas", None), teacher_calls=teacher_calls)


def first(
    model: Model,
    calls: Sequence[int],
    pictures: Sequence[int],
    draws: int,
    samples: int,
    *,
    uses: Sequence[str] = USE_NAMES,
    teacher_calls: int = 24,
    batch: int = 100,
    seed: int = 0,
    progress: Callable[[str], object] = lambda text: None,
) -> Iterator[Row]:
    """Learn from so many pictures, `draws` times anew, and measure after each number of them.

    An image loses calls as fewer levels are left to cross: none from 0.75, one from 0.5, two from 0.3.
    """
    for use, level, less in USES:
        if use not in uses:
            continue
        bed = Bed(model, level, samples, batch)
        for count in calls:
            if count - less < 2:
                continue
            stock = bed.stock(count - less)
            best = min(stock, key=lambda name: float(stock[name].mean()))
            measured: dict[int, list[dict[str, Any]]] = {n: [] for n in pictures}
            for draw in range(draws):
                progress(f"{use}, {count - less} calls, draw {draw + 1}")
                learner = bed.learner(count - less, teacher_calls)
                for number in range(max(pictures)):
                    row, metered = DRAW_ROWS + 10**6 * seed + ROWS_EACH * draw + number, Metered(bed.start)
                    x, asked = metered(range(row, row + 1))
                    learner.learn(asked, x, learner.taught(asked, x))
                    if number + 1 in measured:
                        errors = bed.squares(learner.chosen.table.method())
                        facts = {"squares": errors, "calls": metered.calls, "name": learner.chosen.name}
                        measured[number + 1].append(facts | {"held_out": learner.held_out_ratio})
            for n, found in measured.items():
                yield _row(use, count - less, n, found, best, stock)


def _row(
    use: str, calls: int, pictures: int, found: Sequence[dict[str, Any]], best: str, stock: dict[str, Tensor]
) -> Row:
    error = [_rmse(one["squares"]) for one in found]
    stock_error = _rmse(stock[best])
    stock_median = min(math.sqrt(float(errors.median())) for errors in stock.values())
    medians = [math.sqrt(float(one["squares"].median())) for one in found]
    far = [
        float((one["squares"].sqrt() > FAR * median).double().mean())
        for one, median in zip(found, medians, strict=True)
    ]
    held_out = [one["held_out"] for one in found if one["held_out"] is not None]
    return Row(
        use,
        calls,
        pictures,
        statistics.median(error),
        stock_error,
        best,
        statistics.median(error) / stock_error,
        max(error) / stock_error,
        statistics.median(medians) / stock_median,
        statistics.mean(far),
        statistics.median(held_out) if held_out else None,
        max(one["calls"] for one in found),
        tuple(one["name"] for one in found),
    )


def _rmse(errors: Tensor) -> float:
    return math.sqrt(float(errors.mean()))


def table(rows: Sequence[Row]) -> str:
    """The rows to read."""
    names = f"{'use':12}{'calls':>6}{'pictures':>9}{'error':>9}{'stock':>9}{'ratio':>7}{'worst':>7}{'median':>8}"
    lines = [names + f"{'outliers':>10}{'held out':>10}{'calls each':>12}"]
    for r in rows:
        held_out = "-" if r.held_out is None else f"{r.held_out:.2f}"
        lines.append(
            f"{r.use:12}{r.calls:6}{r.pictures:9}{r.error:9.4f}{r.stock:9.4f}{r.ratio:7.2f}{r.worst:7.2f}"
            f"{r.median_ratio:8.2f}{r.outliers:10.0%}{held_out:>10}{r.sample_calls:12}"
        )
    return "\n".join(lines)
