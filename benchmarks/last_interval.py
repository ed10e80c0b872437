"""How the last interval should end: at sigma_min as published, at 0, or at 0 with a plain call.

    python benchmarks/last_interval.py --trajectories 960 --samples 200

All at 5 model calls: on the digits model over its own range of sigma and over Stable Diffusion's, and on the
text-to-picture model, whose levels end at 1, at cfg 1 and 3. `sigma_min` and
`zero` take the analytic first step and three planned intervals; `plain` has two planned intervals, no analytic step,
and a plain call for the last interval. The error is the RMSE to the converged teacher at sigma = 0.
"""

import argparse
import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.append(str(Path(__file__).parents[1]))
from amed_core import AMEDPredictor, Dpm2, FixedMidpoint, Ipndm, NoMidpoint, TrainConfig, Trainer, polynomial, sample
from amed_core.fit.trajectories import gaussian
from amed_core.samplers import predictor_config
from amed_core.schedules import fine
from benchmarks.beds import MODELS, asked_for

RANGES = {  # a model, its cfg, and from where to where it is asked
    "EDM": ("digits", 1.0, 0.002, 80.0),
    "Stable Diffusion": ("digits", 1.0, 0.0292, 14.6146),
    "flow": ("pictures", 1.0, 0.001, 1.0),
    "flow, cfg 3": ("pictures", 3.0, 0.001, 1.0),
}
TO_ZERO = (Ipndm(1), NoMidpoint())


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
        levels = fine(80, low, high, flow=True) if high == 1 else polynomial(80, low, high)
        teacher = sample(evaluated, x, levels, Dpm2(), FixedMidpoint(1.0))
        teacher = sample(evaluated, teacher, torch.tensor([low, 0.0]), *TO_ZERO)
        for student in ("amed", "amed_ipndm", "amed_dpmpp_3m"):
            errors = []
            for end in ("sigma_min", "zero", "plain"):
                config = predictor_config(student, 5, low, high, end=end)
                predictor = AMEDPredictor(config)
                training = TrainConfig(trajectories=arguments.trajectories, batch_size=16)
                for _ in Trainer(predictor, gaussian(model, shape, config.sigmas[0]), training).events():
                    pass
                grid = torch.tensor(config.sigmas, dtype=torch.float64)
                drawn = sample(evaluated, x, grid, config.build_solver(), predictor.planner(), first=config.first)
                errors.append(float((drawn - teacher).square().mean().sqrt()))
            print(f"{name:18}{student:16}" + "".join(f"{error:10.4f}" for error in errors), flush=True)


if __name__ == "__main__":
    main()
