"""What a fit costs against AMED's published recipe: model calls, seconds, and with --memory the memory it takes.

    python benchmarks/training.py --trajectories 10000 --samples 500 --seeds 3
    python benchmarks/training.py --memory                    # with AMED_GPU=1 that of a GPU

"recipe" is the paper's network with its settings: 10,000 trajectories in batches of 32, Adam at 5e-3 interval by
interval, autograd through the model. "table" is fitted end to end with its defaults on the same grid and ending, "own
grid" on the recommended ones. Each number is the mean over fits with different seeds, with the lowest and highest. The
error is the RMSE to the converged teacher on noise that no fit saw. "until" says what a table had cost when it was
first as good as the recipe's last predictor, its teacher and all measuring of its own included, and "of it" which part
of the recipe's cost that is.

--memory compares the peak of a fit with that of sampling the same batch on the same model, with random weights: a few
batches of a network, or an iteration of a table. Each has a process of its own, in which all of them were done once at
toy size, so that "loaded" has the libraries of all.
"""

import argparse
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.append(str(Path(__file__).parents[1]))
from amed_core import FitConfig, ModelFacts, Predictor, TrainConfig, build, make_fit, sample, student_config
from amed_core.config import PredictorConfig
from amed_core.digits import SHAPE, SIGMA_MAX, SIGMA_MIN, DigitsDenoiser, DigitsUNet
from amed_core.fit.call_derivative import GRADIENTS
from amed_core.fit.make import facts_of, usual_settings
from amed_core.fit.per_interval import PerInterval
from amed_core.fit.trajectories import gaussian, noise
from amed_core.samplers import TYPES
from amed_core.tools import measures
from amed_core.types import Denoiser, Model, Sample
from benchmarks.beds import MODELS, asked_for, fitted, taught

UNSEEN = 10**9  # the seed of the evaluation noise; fits count theirs from 0
GPU = bool(os.environ.get("AMED_GPU")) and torch.cuda.is_available()
WORKS = ("sampling", *(f"network, {gradient}" for gradient in GRADIENTS), "table")
COLUMNS = (("student", 14), ("fit", 17), ("error", 26), ("calls", 27), ("seconds", 21))
UNTIL = (("until: iteration", 18), ("calls", 24), ("of it", 25), ("seconds", 20), ("of it", 25))


@dataclass(frozen=True)
class Point:
    """Where a fit stood."""

    iteration: int  # end to end
    error: float
    calls: int  # single-sample model calls so far
    seconds: float


@dataclass(frozen=True)
class Judge:
    """Noise that no fit saw, and where the converged teacher takes it."""

    denoiser: Denoiser
    x: Sample
    teacher: Sample

    def error(self, predictor: Predictor) -> float:
        return measures.error(sample(self.denoiser, self.x, predictor.method()), self.teacher).rmse


def judge(model: Model, samples: int) -> Judge:
    x = model.sigma_max * noise(range(samples), model.shape, UNSEEN)
    return Judge(asked_for(model, samples), x, taught(model, x, 200))


def recipe(model: Model, config: PredictorConfig, trajectories: int, seed: int, judged: Judge) -> Point:
    """The published fit."""
    begin = time.perf_counter()
    fit = fitted(model, config, TrainConfig(trajectories), seed)
    seconds = time.perf_counter() - begin
    return Point(0, judged.error(fit.predictor), fit.model_calls, seconds)


def table(model: Model, config: PredictorConfig, seed: int, judged: Judge) -> Iterator[Point]:
    """The table's fit, after the base solver and after every iteration; measuring it for this is not timed."""
    begin = time.perf_counter()
    source = gaussian(model, tuple(model.shape), config.sigmas[0], seed)
    fit = make_fit(config, usual_settings(config), source)
    events, seconds = fit.events(), 0.0
    while (event := next(events, None)) is not None:
        seconds += time.perf_counter() - begin
        yield Point(max(event.iteration - 1, 0), judged.error(fit.predictor), event.model_calls, seconds)
        begin = time.perf_counter()


def spread(values: Sequence[float], form: str) -> str:
    """Mean, lowest and highest, as the format says."""
    mean, low, high = (format(value, form) for value in (sum(values) / len(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def printed(cells: Sequence[str], widths: Sequence[int]) -> None:
    print("".join(f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip(), flush=True)


def costs(points: Sequence[Point]) -> list[str]:
    forms = (("error", ".4f"), ("calls", ",.0f"), ("seconds", ".1f"))
    return [spread([getattr(point, name) for point in points], form) for name, form in forms]


def until(runs: Sequence[Sequence[Point]], recipes: Sequence[Point]) -> list[str]:
    """When every run was first as good as the recipe with the same seed, and what it had cost then."""
    found = []
    for points, published in zip(runs, recipes, strict=True):
        point = next((point for point in points if point.error <= published.error), None)
        if point is not None:
            parts = (point.calls / published.calls, point.seconds / published.seconds)
            found.append((point.iteration, point.calls, parts[0], point.seconds, parts[1]))
    if not found:
        return ["never", "", "", "", ""]
    columns = zip(*found, strict=True)
    cells = [spread(values, form) for values, form in zip(columns, (".1f", ",.0f", ".1%", ".1f", ".1%"), strict=True)]
    if len(found) < len(runs):
        cells[0] += f", {len(found)} of {len(runs)}"
    return cells


def fits(model: Model, students: Sequence[str], calls: int, trajectories: int, samples: int, seeds: int) -> None:
    judged = judge(model, samples)
    heads, widths = zip(*COLUMNS, *UNTIL, strict=True)
    printed(heads, widths)
    for student in students:
        facts = facts_of(model)
        published = student_config(student, calls, facts, published=True)
        on_its_grid = student_config(student, calls, facts, published=True, kind="table")
        recommended = student_config(student, calls, facts, kind="table")
        recipes, same, own = [], [], []
        for seed in tqdm(range(seeds), desc=student):
            recipes.append(recipe(model, published, trajectories, seed, judged))
            same.append(list(table(model, on_its_grid, seed, judged)))
            own.append(list(table(model, recommended, seed, judged)))
        printed([student, "recipe", *costs(recipes), *[""] * len(UNTIL)], widths)
        for name, runs in (("table", same), ("table, own grid", own)):
            printed([student, name, *costs([points[-1] for points in runs]), *until(runs, recipes)], widths)


def done(kind: str, student: str, calls: int, network: DigitsUNet, side: int, batch: int) -> str:
    """Sample, or fit to a few batches, on this network at this size; says with which gradient it was in the end."""
    device = "cuda" if GPU else "cpu"
    facts = ModelFacts(SIGMA_MIN, SIGMA_MAX, bottleneck=True)
    config = student_config(student, calls, facts, kind="table" if kind == "table" else "network")
    source = gaussian(DigitsDenoiser(network=network), (1, side, side), config.sigmas[0], device=device)
    if kind == "sampling":
        x, asked = source(range(batch))
        sample(asked, x, build(config).to(device).method())
        return kind
    settings: FitConfig | TrainConfig
    if kind == "table":
        settings = FitConfig(2 * batch, held_out=batch, batch_size=batch, teacher_calls=4, iterations=2)
    else:
        gradient = next(gradient for gradient in GRADIENTS if gradient in kind)
        settings = TrainConfig(trajectories=3 * batch, batch_size=batch, gradient=gradient)
    fit = make_fit(config, settings, source, device=device)
    for _ in fit.events():
        pass
    return f"network, {fit.gradient}" if isinstance(fit, PerInterval) else kind


def most() -> float:
    """The most memory there ever was, in MiB: of the process, or of the GPU."""
    if GPU:
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def random_network(channels: int) -> DigitsUNet:
    """The digits model's network with other widths and random weights."""
    network = DigitsUNet(channels, 3 * channels // 2)
    generator = torch.Generator().manual_seed(0)
    for weight in network.requires_grad_(False).parameters():
        weight.normal_(std=0.02, generator=generator)
    return network.to("cuda" if GPU else "cpu")


def peak(kind: str, student: str, calls: int, channels: int, side: int, batch: int) -> tuple[str, float, float]:
    """What was done, the memory before it, and the most during it, in MiB."""
    torch.set_num_threads(1)
    network = random_network(channels)
    for any_kind in WORKS:
        done(any_kind, student, calls, network, SHAPE[1], 2)
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    loaded = most()
    return done(kind, student, calls, network, side, batch), loaded, most()


def memory(students: Sequence[str], calls: int, channels: int, side: int, batch: int) -> None:
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)  # so that what PyTorch frees leaves the process
    widths = (14, 28, 12, 12, 12, 12, 12)
    printed(("student", "work", "loaded MiB", "peak MiB", "above MiB", "of sampling", "above it"), widths)
    for student in students:
        sampling: tuple[float, float] | None = None
        for kind in tqdm(WORKS, desc=student):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                name, loaded, highest = pool.submit(peak, kind, student, calls, channels, side, batch).result()
            above = highest - loaded
            sampling = sampling or (highest, above)
            ratios = (highest / sampling[0], above / sampling[1])
            cells = [f"{value:.0f}" for value in (loaded, highest, above)] + [f"{ratio:.3f}" for ratio in ratios]
            printed((student, name, *cells), widths)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--students", nargs="+", default=["amed", "amed_ipndm", "amed_dpmpp_2m"], choices=TYPES)
    parser.add_argument("--model", default="digits", choices=MODELS)
    parser.add_argument("--cfg", type=float, default=1.0)
    parser.add_argument("--calls", type=int, default=5)
    parser.add_argument("--trajectories", type=int, default=10_000, help="of the recipe")
    parser.add_argument("--samples", type=int, default=500, help="evaluation noises")
    parser.add_argument("--seeds", type=int, default=3, help="fits of each")
    parser.add_argument("--memory", action="store_true", help="measure memory instead")
    parser.add_argument("--channels", type=int, default=160, help="of the network whose memory is measured")
    parser.add_argument("--side", type=int, default=32, help="of its samples")
    parser.add_argument("--batch", type=int, default=16, help="of them")
    arguments = parser.parse_args()
    if arguments.memory:
        memory(arguments.students, arguments.calls, arguments.channels, arguments.side, arguments.batch)
    else:
        model = MODELS[arguments.model](arguments.cfg)
        fits(model, arguments.students, arguments.calls, arguments.trajectories, arguments.samples, arguments.seeds)


if __name__ == "__main__":
    main()
