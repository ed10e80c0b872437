"""A predictor on noise levels that it was not made for: image to image, and other schedulers.

    python benchmarks/off_grid.py --trajectories 640 --samples 200

At the true model calls in the second column. "base" is the student's base solver with plain calls
on the same levels; "rule" is what sampling does: single-step students plan pairs that are no longer than they learned
and the rest is plain, multistep students are their base solver. "all" plans every pair, "network" does so by asking
the network for intervals it was never trained on. The error is the RMSE to the converged teacher from the same start:
noise, or with denoise below 1 real digits, or pictures that the model drew, with noise on them.
"""

import argparse
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.append(str(Path(__file__).parents[1]))
from amed_core import AMEDPredictor, Method, TrainConfig, logsnr, polynomial, sample
from amed_core.call_list import call_sigmas, run_of
from amed_core.features import LOOKS
from amed_core.fit.teacher import heun_samples
from amed_core.midpoints import PredictorPlanner
from amed_core.network import embedding
from amed_core.tools.bench import config_named
from amed_core.types import Run
from benchmarks.beds import MODELS, asked_for, fitted, taught


def pairs(levels: tuple[float, ...]) -> Run:
    """Every pair planned, from the end and before a plain last call, as in the students' own lists."""
    last = len(levels) - 1
    points = sorted({0, last, *range(last - 1, -1, -2)})
    plain = frozenset(n for n, (a, b) in enumerate(pairwise(points)) if b - a == 1)
    return Run(tuple(levels[p] for p in points), plain, analytic_first_step=False, own_grid=False)


def by_network(network: AMEDPredictor, run: Run) -> Method:
    """The network asked for the run's own levels, without regard to what it knows."""
    levels = [embedding(interval).float() for interval in pairwise(run.sigmas)]
    planner = PredictorPlanner(
        lambda interval, features: network(features, levels[interval]),
        run.plain,
        LOOKS[network.config.features],
        tuple(((1.0, interval),) for interval in range(len(run.sigmas) - 1)),
    )
    return replace(network.method(run), planner=planner)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trajectories", type=int, default=640, help="of every fit")
    parser.add_argument("--samples", type=int, default=200, help="evaluation noises")
    parser.add_argument("--students", nargs="+", default=["amed", "amed_dpm_2", "amed_ipndm", "amed_dpmpp_2m"])
    parser.add_argument("--model", default="digits", choices=("digits", "pictures"))
    parser.add_argument("--cfg", type=float, default=1.0)
    arguments = parser.parse_args()
    model = MODELS[arguments.model](arguments.cfg)
    low, high, flow = float(model.sigma_min), float(model.sigma_max), getattr(model, "flow", False)
    shape, asked = tuple(model.shape), asked_for(model, arguments.samples)
    noise, other = (
        torch.randn(arguments.samples, *shape, generator=torch.Generator().manual_seed(10**9 + n)) for n in range(2)
    )
    data = model.data(arguments.samples) if hasattr(model, "data") else taught(model, high * other, 100)
    print(f"{'student':15}{'calls':>6}  {'levels':14}{'planned':>8}{'base':>9}{'rule':>9}{'all':>9}{'network':>9}")
    for name in tqdm(arguments.students):
        config = config_named(name, 5, model)
        training = TrainConfig(arguments.trajectories, batch_size=16, gradient="finite difference")
        with torch.enable_grad():
            network = fitted(model, config, training).predictor
        assert isinstance(network, AMEDPredictor)
        lists = {"its own": call_sigmas(config, 5)}
        for calls in (5, 8):
            lists[f"Karras {calls}"] = (*polynomial(calls, low, high).tolist(), 0.0)
        lists["exponential 8"] = (*logsnr(8, low, high).tolist(), 0.0)
        for denoise in (0.8, 0.6, 0.4, 0.2):
            lists[f"denoise {denoise}"] = call_sigmas(config, int(5 / denoise))[-6:]
        for label, levels in lists.items():
            start = levels[0]
            kept = 1 - start if flow else 1.0
            x = noise * start if start > high * 0.99 else kept * data + noise * start
            teacher = heun_samples(asked, x, low, start, 200, flow=flow)
            run = run_of(levels, config)
            every = pairs(levels)
            ways = (config.plain_method(levels), network.method(run), network.method(every), by_network(network, every))
            drawn = [sample(asked, x, way) for way in ways]
            errors = [float((one - teacher).square().mean().sqrt()) for one in drawn]
            columns = "".join(f"{e:9.4f}" for e in errors)
            print(f"{name:15}{len(levels) - 1:6}  {label:14}{run.planned:8}{columns}", flush=True)


if __name__ == "__main__":
    main()
