"""The whole job on the bundled model: fit, compare at equal calls, look."""

import os
import time
from itertools import pairwise
from pathlib import Path

import torch

from .bench import (
    EVALUATION_SEED,
    Fit,
    Row,
    Settings,
    as_json,
    baselines,
    bench_with_bar,
    best_of_each,
    method_of,
    table,
)
from .digits import CLASSES, SHAPE, DigitsDenoiser
from .driver import FixedMidpoint, NoMidpoint, sample, trajectory
from .files import load_predictor, provenance, save_predictor, write_json
from .measures import converged
from .plots import Learned, save_comparison, save_learned
from .schedules import logsnr
from .solvers import Dpm2
from .table import AnyPredictor
from .types import Planner

CALLS = 5
STUDENTS = {"amed": "AMED-Solver", "amed_ipndm": "AMED-Plugin on iPNDM"}
BASES = {"amed": "DPM-Solver-2, r = 0.5", "amed_ipndm": "iPNDM, r = 0.5"}
PICTURED = ("heun", "dpm_2", "euler", "dpmpp", "ipndm")  # base solvers in the picture, each at its best


def demo(output: Path, samples: int, trajectories: int) -> None:
    """Train both students at 5 calls, print the table, write pictures, table and predictors to `output`."""
    begin = time.monotonic()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    model = DigitsDenoiser()
    settings = Settings(
        calls=(CALLS,),
        samples=samples,
        trajectories=trajectories,
        teacher_calls=100,
        methods=("euler*", "heun*", "dpm_2*", "ipndm*", "dpmpp*", *STUDENTS),
    )
    print(f"Training {' and '.join(STUDENTS.values())}, then comparing at {CALLS} model calls:")
    rows = bench_with_bar(model, settings, keep=lambda name, trainer: _save(output, name, trainer))
    print(table(best_of_each(rows)))
    write_json(output / "bench.json", as_json(rows))
    predictors = {name: load_predictor(output / f"{name}.safetensors") for name in STUDENTS}
    _picture(model, rows, predictors, settings, output / "samples.png")
    save_learned([_learned(model, name, predictor) for name, predictor in predictors.items()], output / "fit.png")
    print(f"{output}/: samples.png, fit.png, bench.json and both predictors, in {time.monotonic() - begin:.0f} s")


def _save(output: Path, name: str, trainer: Fit) -> None:
    save_predictor(trainer.predictor, output / f"{name}.safetensors", provenance(trainer.summary()))


def _picture(
    model: DigitsDenoiser, rows: list[Row], predictors: dict[str, AnyPredictor], settings: Settings, path: Path
) -> None:
    """The ten digits, from the same noise, through the teacher, the base solvers and the students."""
    generator = torch.Generator().manual_seed(EVALUATION_SEED - 1)
    x = model.sigma_max * torch.randn(CLASSES, *SHAPE, generator=generator)
    asked = model.for_rows(range(CLASSES))
    labelled = [("teacher, 100 calls", converged(asked, x, model.sigma_min, model.sigma_max, settings.teacher_calls))]
    methods = {method.name: method for method in baselines(model, CALLS)}
    bases = [row for row in best_of_each(rows) if row.method in methods and row.error is not None]
    for solver in PICTURED:
        row = min((r for r in bases if r.method.startswith(solver)), key=lambda r: r.error or 0.0)
        labelled.append((f"{row.method}\nerror {row.error:.3f}", methods[row.method].run(asked, x)))
    for name, title in STUDENTS.items():
        row = next(r for r in rows if r.method == name)
        labelled.append((f"{title}\nerror {row.error:.3f}", method_of(predictors[name], name).run(asked, x)))
    save_comparison(labelled, path)


@torch.no_grad()
def _learned(model: DigitsDenoiser, name: str, predictor: AnyPredictor, samples: int = 50) -> Learned:
    """What the predictor does interval by interval, on noise it has not seen."""
    config = predictor.config
    x = config.sigmas[0] * torch.randn(samples, *SHAPE, generator=torch.Generator().manual_seed(EVALUATION_SEED))
    asked = model.for_rows(range(samples))
    truth, here = [], x
    for start, end in pairwise(config.sigmas):
        fine = logsnr(11, max(end, config.sigma_min), start)
        here = sample(asked, here, fine, Dpm2(), FixedMidpoint(1.0))
        if end == 0:
            here = sample(asked, here, torch.tensor([float(fine[-1]), 0.0]), Dpm2(), NoMidpoint())
        truth.append(here)
    plain = frozenset(range(config.planned, config.intervals))
    base: Planner = FixedMidpoint(0.5, config.sigma_min, plain)
    errors: dict[str, list[float]] = {}
    plans = []
    for label, planner in (("base", base), ("student", predictor.planner())):
        grid = torch.tensor(config.sigmas, dtype=torch.float64)
        steps = trajectory(asked, x, grid, config.build_solver(), planner, first=config.first)
        for step in steps:
            distance = float((step.x - truth[step.index]).square().mean().sqrt())
            errors.setdefault(label, []).append(distance)
            if label == "student" and step.plan is not None:
                plan = {k: getattr(step.plan, k) for k in ("r", "scale_dir", "scale_time")}
                plans.append({k: torch.as_tensor(v).expand(samples, *[1] * (x.ndim - 1)) for k, v in plan.items()})
    return Learned(STUDENTS[name], BASES[name], config.sigmas[1:], errors["student"], errors["base"], plans)
