"""A predictor on noise levels that it was not made for: image to image, and other schedulers.

    python benchmarks/off_grid.py --trajectories 640 --samples 200

At the true model calls in the second column, on the digits model. "base" is the student's base solver with plain calls
on the same levels; "rule" is what sampling does: single-step students plan pairs that are no longer than they learned
and the rest is plain, multistep students are their base solver. "all" plans every pair, "network" does so by asking
the network for intervals it was never trained on. The error is the RMSE to the converged teacher from the same start:
noise, or with denoise below 1 real digits with noise on them.
"""

import argparse
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.append(str(Path(__file__).parents[1]))
from amed_core import AMEDPredictor, NoMidpoint, TrainConfig, Trainer, logsnr, measures, polynomial, sample
from amed_core.calls import call_sigmas, read
from amed_core.digits import SHAPE, SIGMA_MAX, SIGMA_MIN, DigitsDenoiser
from amed_core.predictor import PredictorPlanner, embedding
from amed_core.recipes import predictor_config
from amed_core.sources import gaussian


def pairs(levels: tuple[float, ...]) -> tuple[tuple[float, ...], frozenset[int]]:
    """Every pair planned, from the end and before a plain last call, as in the students' own lists."""
    last = len(levels) - 1
    points = sorted({0, last, *range(last - 1, -1, -2)})
    plain = frozenset(n for n, (a, b) in enumerate(pairwise(points)) if b - a == 1)
    return tuple(levels[p] for p in points), plain


def by_network(network: AMEDPredictor, grid: tuple[float, ...], plain: frozenset[int]) -> PredictorPlanner:
    """The network asked for the run's own levels, without regard to what it knows."""
    levels = [embedding(interval).float() for interval in pairwise(grid)]
    return replace(
        network.planner(grid, plain),
        own=lambda interval, features: network(features, levels[interval]),
        made_of=tuple(((1.0, interval),) for interval in range(len(grid) - 1)),
    )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trajectories", type=int, default=640, help="of every fit")
    parser.add_argument("--samples", type=int, default=200, help="evaluation noises")
    parser.add_argument("--students", nargs="+", default=["amed", "amed_dpm_2", "amed_ipndm", "amed_dpmpp_2m"])
    arguments = parser.parse_args()
    model = DigitsDenoiser()
    asked = model.for_rows(range(arguments.samples))
    noise = torch.randn(arguments.samples, *SHAPE, generator=torch.Generator().manual_seed(10**9))
    data = model.data(arguments.samples)
    print(f"{'student':15}{'calls':>6}  {'levels':14}{'planned':>8}{'base':>9}{'rule':>9}{'all':>9}{'network':>9}")
    for name in tqdm(arguments.students):
        config = predictor_config(name, 5, SIGMA_MIN, SIGMA_MAX)
        network = AMEDPredictor(config)
        training = TrainConfig(arguments.trajectories, batch_size=16, gradient="finite difference")
        with torch.enable_grad():
            for _ in Trainer(network, gaussian(model, SHAPE, SIGMA_MAX), training).events():
                pass
        solver = config.build_solver()
        lists = {"its own": call_sigmas(config, 5)}
        for calls in (5, 8):
            lists[f"Karras {calls}"] = (*polynomial(calls, SIGMA_MIN, SIGMA_MAX).tolist(), 0.0)
        lists["exponential 8"] = (*logsnr(8, SIGMA_MIN, SIGMA_MAX).tolist(), 0.0)
        for denoise in (0.8, 0.6, 0.4, 0.2):
            lists[f"denoise {denoise}"] = call_sigmas(config, int(5 / denoise))[-6:]
        for label, levels in lists.items():
            start = levels[0]
            x = noise * start if start > SIGMA_MAX * 0.99 else data + noise * start
            teacher = measures.converged(asked, x, SIGMA_MIN, start, 200)
            run = read(levels, config)
            every = pairs(levels)
            ways = [
                (levels, NoMidpoint()),
                (run.sigmas, network.planner(run.sigmas, run.plain)),
                (every[0], network.planner(*every)),
                (every[0], by_network(network, *every)),
            ]
            errors = []
            for grid, planner in ways:
                drawn = sample(asked, x, torch.tensor(grid, dtype=torch.float64), solver, planner)
                errors.append(float((drawn - teacher).square().mean().sqrt()))
            columns = "".join(f"{e:9.4f}" for e in errors)
            print(f"{name:15}{len(levels) - 1:6}  {label:14}{run.planned:8}{columns}", flush=True)


if __name__ == "__main__":
    main()
