"""The whole job on the bundled model: fit, compare at equal calls, look."""

import os
import time
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
from .files import load_predictor, provenance, save_predictor, write_json
from .measures import converged
from .plots import save_comparison, save_learned
from .report import Learned, learned
from .table import AnyPredictor

CALLS = 5
STUDENTS = {"amed": "AMED-Solver", "amed_multistep": "learned multistep"}
BASES = {"amed": "DPM-Solver-2, r = 0.5", "amed_multistep": "iPNDM"}
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


def _learned(model: DigitsDenoiser, name: str, predictor: AnyPredictor, samples: int = 50) -> Learned:
    """What the predictor does interval by interval, on noise it has not seen."""
    generator = torch.Generator().manual_seed(EVALUATION_SEED)
    x = predictor.config.sigmas[0] * torch.randn(samples, *SHAPE, generator=generator)
    return learned(STUDENTS[name], BASES[name], predictor, model.for_rows(range(samples)), x, teacher_calls=60)
