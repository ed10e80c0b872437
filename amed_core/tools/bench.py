"""Every method at equal true model calls, on noise that no fit has seen."""

import fnmatch
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from ..config import PredictorConfig
from ..driver import sample
from ..fit.baselines import bench_methods
from ..fit.make import facts_of, fit_predictor
from ..fit.protocol import Fit
from ..fit.teacher import heun_calls, heun_samples
from ..fit.trajectories import chunks, conditioned
from ..predictor import Predictor
from ..samplers import MULTISTEP_STUDENT, TYPES, Kind, student_config
from ..types import Denoiser, Method, Model, Sample
from . import measures

TEACHER_NAME = "teacher"
PUBLISHED_SUFFIX, TABLE_SUFFIX = " published", " table"
EVALUATION_SEED = 0x5EED_0000_0000  # fits draw from seeds below it


@dataclass(frozen=True)
class BenchSettings:
    """How much work to do. All of it grows with `samples`."""

    calls: tuple[int, ...] = (3, 5, 7)
    samples: int = 1000  # evaluation noises
    trajectories: int = 0  # of every fit; 0 is twice the samples, at most the published 10,000
    teacher_calls: int = 200
    batch: int = 250  # samples per model call in evaluation
    seed: int = 0  # of the fits
    methods: tuple[str, ...] = ("*",)  # shell patterns of method names

    def __post_init__(self) -> None:
        if self.samples < 2 or self.batch < 1 or self.trajectories < 0 or self.teacher_calls < 2:
            raise ValueError(
                "A benchmark needs at least 2 samples, a batch of at least 1 and 2 teacher calls, but found "
                f"{self.samples}, {self.batch} and {self.teacher_calls}."
            )
        if not self.calls or min(self.calls) < 2:
            raise ValueError(f"Numbers of model calls start at 2, but found {list(self.calls)}.")
        if not 0 <= self.seed < EVALUATION_SEED:
            raise ValueError(f"seed must be in [0, {EVALUATION_SEED}), but found {self.seed}.")

    @property
    def fit_trajectories(self) -> int:
        """Trajectories of a network's fit: those given, or twice the samples, at most the published 10,000."""
        return self.trajectories or min(10_000, 2 * self.samples)


@dataclass(frozen=True)
class Row:
    """One line of the table: the JSON's keys."""

    method: str
    calls: int
    error: float | None
    error_low: float | None
    error_high: float | None
    error_median: float | None
    error_p90: float | None
    frechet: float | None
    seconds: float
    fit_calls: int | None = None
    fit_seconds: float | None = None

    @property
    def rank(self) -> float:
        """What rows are sorted by: the error, or infinity where some samples were not finite."""
        return math.inf if self.error is None else self.error


class Bench:
    """The evaluation noise, its converged teacher, and rows measured against them."""

    def __init__(self, model: Model, settings: BenchSettings, progress: "Listener") -> None:
        self.model = model
        self.settings = settings
        self.progress = progress
        generator = torch.Generator().manual_seed(EVALUATION_SEED + settings.seed)
        self.x = model.sigma_max * torch.randn(settings.samples, *model.shape, generator=generator)
        data = getattr(model, "data", None)
        self.real: Sample | None = None if data is None else data(settings.samples)
        calls, flow = settings.teacher_calls, getattr(model, "flow", False)
        slow = partial(heun_samples, sigma_min=model.sigma_min, sigma_max=model.sigma_max, calls=calls, flow=flow)
        begin = time.perf_counter()
        self.teacher = self.draw(TEACHER_NAME, slow, calls)
        self.teacher_seconds = time.perf_counter() - begin

    def draw(self, name: str, run: Callable[[Denoiser, Sample], Sample], calls: int) -> Sample:
        """All samples (samples, *shape) that `run` makes of the evaluation noise; `calls` are counted for each."""
        drawn = []
        for rows in chunks(self.settings.samples, self.settings.batch):
            drawn.append(run(conditioned(self.model, rows), self.x[rows.start : rows.stop]))
            self.progress(name, len(rows) * calls)
        return torch.cat(drawn)

    def teacher_row(self) -> Row:
        """The teacher's own row: no error, and the Frechet distance that others can at best reach."""
        return self._row(TEACHER_NAME, heun_calls(self.settings.teacher_calls), self.teacher, self.teacher_seconds)

    def row(self, method: Method, calls: int, fit_calls: int | None = None, fit_seconds: float | None = None) -> Row:
        """Sample with a method and measure. A row has no errors where samples are not finite."""
        begin = time.perf_counter()
        try:
            drawn = self.draw(method.name, lambda denoiser, x: sample(denoiser, x, method), calls)
        except FloatingPointError:  # a solver may blow up where it is not meant to be used; its row says so
            drawn = torch.full_like(self.teacher, math.nan)
        row = self._row(method.name, calls, drawn, time.perf_counter() - begin)
        return replace(row, fit_calls=fit_calls, fit_seconds=fit_seconds)

    def _row(self, name: str, calls: int, drawn: Sample, seconds: float) -> Row:
        finite = bool(drawn.isfinite().all())
        errors = astuple(measures.error(drawn, self.teacher)) if finite else (None,) * 5
        distance = measures.frechet(drawn, self.real) if finite and self.real is not None else None
        measured: tuple[Any, ...] = (*errors, distance, seconds)
        return Row(name, calls, *measured)


Listener = Callable[[str, int], None]  # hears what is going on, and how many sample calls were just made
Keep = Callable[[str, Fit], None]  # gets every finished fit


def bench(
    model: Model,
    settings: BenchSettings,
    progress: Listener = lambda name, calls: None,
    keep: Keep = lambda name, trainer: None,
) -> Iterator[Row]:
    """Measure every chosen method at every number of calls, one row after the other.

    Raises ValueError if no method fits the patterns.
    """
    planned = plans(model, settings)
    if not any(names for _, _, names in planned):
        listed = ", ".join([*students(), *planned[0][1]])
        raise ValueError(f"No method fits {' '.join(settings.methods)}. There are: {listed}.")
    run = Bench(model, settings, progress)
    yield run.teacher_row()
    for calls, methods, names in planned:
        for name in names:
            if name in methods:
                yield run.row(methods[name], calls)
                continue
            config = config_named(name, calls, model)
            begin = time.perf_counter()
            fit = fitted(model, config, settings, lambda fit, name=name: progress(f"fit {name}", 0))  # type: ignore[misc]
            seconds = time.perf_counter() - begin
            keep(name, fit)
            yield run.row(method_of(fit.predictor, name), calls, fit.model_calls, seconds)


def chosen(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The names that some shell pattern fits."""
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def plans(model: Model, settings: BenchSettings) -> list[tuple[int, dict[str, Method], list[str]]]:
    """Of every number of calls the unlearned methods by name, and the names of all methods that are chosen."""
    found = []
    for calls in settings.calls:
        methods = {method.name: method for method in bench_methods(model, calls)}
        found.append((calls, methods, chosen([*methods, *students()], settings.methods)))
    return found


def students() -> list[str]:
    """The learned methods: every sampler type as it measures best, as a table, and as published."""
    return [MULTISTEP_STUDENT, *(name + suffix for suffix in ("", TABLE_SUFFIX, PUBLISHED_SUFFIX) for name in TYPES)]


def config_named(name: str, calls: int, model: Model, **overrides: Any) -> PredictorConfig:
    """The settings of a learned method at a number of calls, by its name in the table.

    Raises ValueError for what `samplers.student_config` refuses.
    """
    published, table = name.endswith(PUBLISHED_SUFFIX), name.endswith(TABLE_SUFFIX)
    plain = name.removesuffix(PUBLISHED_SUFFIX).removesuffix(TABLE_SUFFIX)
    kind: Kind = "table" if table else "network"
    return student_config(plain, calls, facts_of(model), published=published, kind=kind, **overrides)


def fitted(
    model: Model, config: PredictorConfig, settings: BenchSettings, progress: Callable[[Fit], object] = lambda fit: None
) -> Fit:
    """The finished fit of a learned method, with the seed and, of a network, the trajectories of the settings."""
    trajectories = settings.fit_trajectories if config.kind == "network" else 0
    about = {"trajectories": trajectories, "seed": settings.seed}
    return fit_predictor(model, config, effort="thorough", **about, progress=progress)


def bench_with_bar(model: Model, settings: BenchSettings, keep: Keep = lambda name, trainer: None) -> list[Row]:
    """All rows, behind a progress bar that counts the evaluation's sample calls."""
    with tqdm(total=total_calls(model, settings), unit="call", unit_scale=True) as bar:

        def progress(name: str, calls: int) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update(calls)

        return list(bench(model, settings, progress, keep))


def method_of(predictor: Predictor, name: str, guidance: float | None = None) -> Method:
    """A predictor as a method, at a guidance scale if it knows several."""
    return replace(predictor.method(guidance=guidance), name=name)


def total_calls(model: Model, settings: BenchSettings) -> int:
    """Sample calls of the evaluation (not of the fits), for a progress bar."""
    counted = sum(len(names) * calls for calls, _, names in plans(model, settings))
    return settings.samples * (counted + settings.teacher_calls)


def best_of_each(rows: Sequence[Row]) -> list[Row]:
    """Of every solver without a predictor only its best schedule and ending at each number of calls; all else."""

    def group(row: Row) -> tuple[int, str]:
        """Rows that compete: of an unlearned solver all that have its number of calls."""
        words = row.method.split(" ")
        unlearned = row.fit_calls is None and row.method != TEACHER_NAME
        return row.calls, " ".join(words[: 2 if "noise" in words else 1]) if unlearned else row.method

    best: dict[tuple[int, str], Row] = {}
    for row in rows:
        other = best.get(group(row))
        if other is None or row.rank < other.rank:
            best[group(row)] = row
    return list(best.values())


def table(rows: Sequence[Row]) -> str:
    """The rows as text, best first within a number of calls; `*` marks the best method that learned nothing."""
    lines = [
        f"{'calls':>5}  {'method':34}{'error':>8}  {'95 %':17}{'median':>8}{'p90':>8}{'Frechet':>9}{'fit calls':>11}"
    ]
    for calls in dict.fromkeys(row.calls for row in rows):
        some = sorted((r for r in rows if r.calls == calls), key=lambda row: row.rank)
        best = next((r for r in some if r.fit_calls is None and r.method != TEACHER_NAME and r.error is not None), None)
        for r in some:
            numbers = (r.error, r.error_low, r.error_high, r.error_median, r.error_p90)
            shown = ["-" if v is None else f"{v:.4f}" for v in numbers]
            distance = "-" if r.frechet is None else f"{r.frechet:.3f}"
            fitted = "" if r.fit_calls is None else f"{r.fit_calls:,}"
            mark = " *" if r is best else ""
            lines.append(
                f"{r.calls:>5}  {r.method + mark:34}{shown[0]:>8}  {shown[1] + ' to ' + shown[2]:17}"
                f"{shown[3]:>8}{shown[4]:>8}{distance:>9}{fitted:>11}"
            )
    return "\n".join(lines)


def as_json(rows: Sequence[Any]) -> list[dict[str, Any]]:
    """Rows, which are dataclasses, as the JSON file has them."""
    return [asdict(row) for row in rows]
