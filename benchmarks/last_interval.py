"""How the last interval should end: at sigma_min as published, at 0, or at 0 with a plain call.

    python benchmarks/last_interval.py --trajectories 960 --samples 200

All at 5 model calls: on the digits model over its own range of sigma and over Stable Diffusion's, and on the
text-to-picture model, whose levels end at 1, at cfg 1 and 3. `sigma_min` and
`zero` take the analytic first step and three planned intervals; `plain` has two planned intervals, no analytic step,
and a plain call for the last interval. The error is the RMSE to the converged teacher at sigma = 0.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.append(str(Path(__file__).parents[1]))
from amed_core import TrainConfig, facts_of, polynomial, sample, student_config
from amed_core.driver import FixedMidpoint
from amed_core.schedules import fine
from amed_core.solvers import Dpm2
from amed_core.types import Method
from benchmarks.beds import MODELS, asked_for, fitted

RANGES = {  # a model, its cfg, and from where to where it is asked
    "EDM": ("digits", 1.0, 0.002, 80.0),
    "Stable Diffusion": ("digits", 1.0, 0.0292, 14.6146),
    "flow": ("pictures", 1.0, 0.001, 1.0),
    "flow, cfg 3": ("pictures", 3.0, 0.001, 1.0),
}
POINTS = 80  # of the teacher's grid, before 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trajectories", type=int, default=960, help="of every fit")
    parser.add_argument("--samples", type=int, default=200, help="evaluation noises")
    parser.add_argument("--ranges", nargs="+", default=list(RANGES), choices=RANGES)
    arguments = parser.parse_args()
    print(f"{'range':18}{'student':16}{'sigma_min':>10}{'zero':>10}{'plain':>10}")
    for name in tqdm(arguments.ranges):
        bed, cfg, low, high = RANGES[name]
        model = MODELS[bed](cfg)
        evaluated, shape = asked_for(model, arguments.samples), tuple(model.shape)
        noise = torch.randn(arguments.samples, *shape, generator=torch.Generator().manual_seed(10**9))
        x = noise * high
        levels = fine(POINTS, low, high, flow=True) if high == 1 else polynomial(POINTS, low, high)
        heun = FixedMidpoint(1.0, plain=frozenset({POINTS - 1}))
        teacher = sample(evaluated, x, Method((*levels.tolist(), 0.0), Dpm2(), heun))
        facts = replace(facts_of(model), sigma_min=low, sigma_max=high)
        for student in ("amed", "amed_ipndm", "amed_dpmpp_3m"):
            errors = []
            for end in ("sigma_min", "zero", "plain"):
                # Of flow models only the published recipe takes the analytic first step; their grid is the same.
                config = student_config(student, 5, facts, published=facts.flow, end=end)
                training = TrainConfig(trajectories=arguments.trajectories, batch_size=16)
                drawn = sample(evaluated, x, fitted(model, config, training).predictor.method())
                errors.append(float((drawn - teacher).square().mean().sqrt()))
            print(f"{name:18}{student:16}" + "".join(f"{error:10.4f}" for error in errors), flush=True)


if __name__ == "__main__":
    main()
