"""What the predictor's looking adds: the same student with the bottleneck, the latent, or nothing to look at.

    python benchmarks/features.py --trajectories 960 --samples 500
    python benchmarks/features.py --end-to-end --trajectories 256 --samples 500

On a model that shows its bottleneck, at equal true model calls; the error is the RMSE to the converged teacher, over
three fits with different seeds: the mean, and the lowest and highest. The first command trains the paper's network
interval by interval. The second fits a table to the end of the trajectory, and networks that correct this table sample
by sample.
"""

import argparse
import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.append(str(Path(__file__).parents[1]))
from amed_core import AMEDPredictor, TrainConfig, Trainer
from amed_core.fit.end_to_end import EndToEnd
from amed_core.fit.make import student_config
from amed_core.fit.protocol import FitConfig
from amed_core.fit.trajectories import gaussian
from amed_core.midpoints import TablePredictor, centred_config
from amed_core.network import centred_on
from amed_core.predictor import AnyPredictor
from amed_core.tools import measures
from amed_core.tools.bench import method_of
from amed_core.types import Model
from benchmarks.beds import MODELS, asked_for, taught

FEATURES = ("bottleneck", "latent", "none")


def per_interval(model: Model, name: str, seed: int, trajectories: int) -> dict[str, AnyPredictor]:
    """The paper's networks."""
    made: dict[str, AnyPredictor] = {}
    for features in FEATURES:
        config = student_config(name, 5, model, features=features)
        network = AMEDPredictor(config, torch.Generator().manual_seed(seed))
        training = TrainConfig(trajectories, batch_size=16, seed=seed)
        for _ in Trainer(network, gaussian(model, tuple(model.shape), model.sigma_max, seed), training).events():
            pass
        made[features] = network
    return made


def end_to_end(model: Model, name: str, seed: int, trajectories: int) -> dict[str, AnyPredictor]:
    """A table, and networks that correct it; all choose their best iteration on 128 noises."""
    source = gaussian(model, tuple(model.shape), model.sigma_max, seed)
    settings = FitConfig(trajectories, held_out=128, batch_size=32, seed=seed)
    table = TablePredictor(student_config(f"{name} table", 5, model))
    for _ in EndToEnd(table, source, settings).events():
        pass
    made: dict[str, AnyPredictor] = {"table": table}
    for features in FEATURES:
        config = centred_config(table.config, features)
        network = centred_on(table, config, torch.Generator().manual_seed(seed))
        for _ in EndToEnd(network, source, settings).events():
            pass
        made[features] = network
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits", choices=("digits", "colours", "pictures"))
    parser.add_argument("--cfg", type=float, default=1.0)
    parser.add_argument("--trajectories", type=int, default=960, help="of every fit")
    parser.add_argument("--samples", type=int, default=500, help="evaluation noises")
    parser.add_argument("--seeds", type=int, default=3, help="fits of each")
    parser.add_argument("--end-to-end", action="store_true", help="tables, and networks that correct them")
    arguments = parser.parse_args()
    model = MODELS[arguments.model](arguments.cfg)
    asked = asked_for(model, arguments.samples)
    generator = torch.Generator().manual_seed(10**9)
    x = model.sigma_max * torch.randn(arguments.samples, *model.shape, generator=generator)
    with torch.no_grad():
        teacher = taught(model, x, 200)
    print(f"{'student':12}{'features':14}{'error':>8}  lowest to highest")
    fit = end_to_end if arguments.end_to_end else per_interval
    for name in tqdm(("amed", "amed_ipndm")):
        errors: dict[str, list[float]] = {}
        for seed in range(arguments.seeds):
            for features, predictor in fit(model, name, seed, arguments.trajectories).items():
                drawn = method_of(predictor, name).run(asked, x)
                errors.setdefault(features, []).append(measures.error(drawn, teacher).rmse)
        for features, found in errors.items():
            mean = sum(found) / len(found)
            print(f"{name:12}{features:14}{mean:8.4f}  {min(found):.4f} to {max(found):.4f}", flush=True)


if __name__ == "__main__":
    main()
