"""What each part of a multistep fit is good for: its error with all of them, without each, and with none.

    python benchmarks/ablation.py --samples 500 --seeds 2   # about an hour on 2 cores

"guidance" are the weights of what guidance adds, "first step" the one that asks no model, "bands" the weights of bands
of frequency, "end to end" all iterations after the closed form. Errors are RMSEs to the converged teacher, on noise
that no fit saw.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))
from amed_core.fit.make import multistep_fit, starts_for, student_config
from amed_core.fit.multistep_fit import MultistepFit
from amed_core.fit.multistep_start import Part
from amed_core.fit.trajectories import chunks, conditioned, gaussian, noise
from amed_core.multistep import MultistepTable
from amed_core.tools.bench import EVALUATION_SEED, method_of
from amed_core.tools.measures import error
from amed_core.types import Model
from benchmarks.beds import MODELS, judging, taught

PARTS: tuple[Part, ...] = ("first step", "bands")
GUIDANCE, END_TO_END = "guidance", "end to end"
ALL = (*PARTS, GUIDANCE, END_TO_END)
VARIANTS = ((), *((part,) for part in ALL), (*PARTS, GUIDANCE))
BATCH = 250


class Judge:
    """A model at a guidance scale, with noise that no fit draws."""

    def __init__(self, name: str, cfg: float, samples: int) -> None:
        self.model: Model = MODELS[name](cfg)
        self.x = self.model.sigma_max * noise(range(samples), self.model.shape, EVALUATION_SEED)
        self.teacher = taught(self.model, self.x, 100, BATCH)

    def fitted(self, calls: int, seed: int, without: tuple[str, ...]) -> float:
        """The error of a fit that leaves some parts out."""
        model = self.model
        config = student_config("amed_multistep", calls, model)
        config = replace(config, guided=config.guided and GUIDANCE not in without)
        fitting = replace(multistep_fit(calls), seed=seed)
        if END_TO_END in without:
            fitting = replace(fitting, iterations=1)
        parts = [part for part in PARTS if part in without]
        source = gaussian(model, tuple(model.shape), model.sigma_max, seed)
        fit = MultistepFit(MultistepTable(config), source, fitting, starts_for(model, config), without=parts)
        for _ in fit.events():
            pass
        method = method_of(fit.predictor, "")
        drawn = [
            method.run(conditioned(judging(model), rows), self.x[rows.start : rows.stop])
            for rows in chunks(len(self.x), BATCH)
        ]
        return error(torch.cat(drawn), self.teacher).rmse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--cfg", type=float, nargs="+", default=[1.0, 3.0])
    parser.add_argument("--calls", type=int, nargs="+", default=[3, 5])
    parser.add_argument("--samples", type=int, default=500, help="evaluation noises")
    parser.add_argument("--seeds", type=int, default=2, help="fits of each, whose mean error is printed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = ["all parts", *(f"no {part}" for part in ALL), "none but end to end"]
    print("| Model | cfg | Calls | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 3) + "|", flush=True)
    for name in arguments.models:
        for cfg in arguments.cfg:
            judge = Judge(name, cfg, arguments.samples)
            for calls in arguments.calls:
                cells = []
                for without in VARIANTS:
                    if cfg == 1 and without == (GUIDANCE,):
                        cells.append("")
                        continue
                    errors = [judge.fitted(calls, seed, without) for seed in range(arguments.seeds)]
                    cells.append(f"{sum(errors) / len(errors):.4f}")
                print(f"| {name} | {cfg:g} | {calls} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
