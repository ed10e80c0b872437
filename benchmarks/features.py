"""What the predictor's looking adds: the same student with the bottleneck, the latent, or nothing to look at.

    python benchmarks/features.py --trajectories 960 --samples 500

On a model that shows its bottleneck, at equal true model calls; the error is the RMSE to the converged teacher, over
three fits with different seeds: the mean, and the lowest and highest. It trains the paper's network interval by
interval.
"""

import argparse
import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.append(str(Path(__file__).parents[1]))
from amed_core import Predictor, TrainConfig, sample
from amed_core.tools import measures
from amed_core.tools.bench import config_named
from amed_core.types import Model
from benchmarks.beds import MODELS, asked_for, fitted, taught

FEATURES = ("bottleneck", "latent", "none")


def networks(model: Model, name: str, seed: int, trajectories: int) -> dict[str, Predictor]:
    """The paper's networks, one for each thing to look at."""
    made = {}
    for features in FEATURES:
        config = config_named(name, 5, model, features=features)
        made[features] = fitted(model, config, TrainConfig(trajectories, batch_size=16), seed).predictor
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits", choices=("digits", "colours", "pictures"))
    parser.add_argument("--cfg", type=float, default=1.0)
    parser.add_argument("--trajectories", type=int, default=960, help="of every fit")
    parser.add_argument("--samples", type=int, default=500, help="evaluation noises")
    parser.add_argument("--seeds", type=int, default=3, help="fits of each")
    arguments = parser.parse_args()
    model = MODELS[arguments.model](arguments.cfg)
    asked = asked_for(model, arguments.samples)
    generator = torch.Generator().manual_seed(10**9)
    x = model.sigma_max * torch.randn(arguments.samples, *model.shape, generator=generator)
    with torch.no_grad():
        teacher = taught(model, x, 200)
    print(f"{'student':12}{'features':14}{'error':>8}  lowest to highest")
    for name in tqdm(("amed", "amed_ipndm")):
        errors: dict[str, list[float]] = {}
        for seed in range(arguments.seeds):
            for features, predictor in networks(model, name, seed, arguments.trajectories).items():
                drawn = sample(asked, x, predictor.method())
                errors.setdefault(features, []).append(measures.error(drawn, teacher).rmse)
        for features, found in errors.items():
            mean = sum(found) / len(found)
            print(f"{name:12}{features:14}{mean:8.4f}  {min(found):.4f} to {max(found):.4f}", flush=True)


if __name__ == "__main__":
    main()
