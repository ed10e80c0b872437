"""What the predictor's looking adds: the same student with the bottleneck, the latent, or nothing to look at.

    python benchmarks/features.py --trajectories 960 --samples 500

On the digits model, at equal true model calls; the error is the RMSE to the converged teacher, over three fits
with different seeds: the mean, and the lowest and highest.
"""

import argparse
import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.append(str(Path(__file__).parents[1]))
from amed_core import AMEDPredictor, TrainConfig, Trainer, measures, sample
from amed_core.digits import SHAPE, SIGMA_MAX, SIGMA_MIN, DigitsDenoiser
from amed_core.recipes import predictor_config
from amed_core.training import gaussian


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trajectories", type=int, default=960, help="of every fit")
    parser.add_argument("--samples", type=int, default=500, help="evaluation noises")
    parser.add_argument("--seeds", type=int, default=3, help="fits of each")
    arguments = parser.parse_args()
    model = DigitsDenoiser()
    asked = model.for_rows(range(arguments.samples))
    x = SIGMA_MAX * torch.randn(arguments.samples, *SHAPE, generator=torch.Generator().manual_seed(10**9))
    with torch.no_grad():
        teacher = measures.converged(asked, x, SIGMA_MIN, SIGMA_MAX, 200)
    print(f"{'student':12}{'features':14}{'error':>8}  lowest to highest")
    for name in tqdm(("amed", "amed_ipndm")):
        for features in ("bottleneck", "latent", "none"):
            errors = []
            for seed in range(arguments.seeds):
                config = predictor_config(name, 5, SIGMA_MIN, SIGMA_MAX, features=features)
                network = AMEDPredictor(config, torch.Generator().manual_seed(seed))
                training = TrainConfig(arguments.trajectories, batch_size=16, seed=seed)
                for _ in Trainer(network, gaussian(model, SHAPE, SIGMA_MAX), training).events():
                    pass
                grid = torch.tensor(config.sigmas, dtype=torch.float64)
                drawn = sample(asked, x, grid, config.build_solver(), network.planner(), first=config.first)
                errors.append(measures.error(drawn, teacher).rmse)
            mean = sum(errors) / len(errors)
            print(f"{name:12}{features:14}{mean:8.4f}  {min(errors):.4f} to {max(errors):.4f}", flush=True)


if __name__ == "__main__":
    main()
