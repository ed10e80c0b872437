"""What each part of a multistep fit is good for: its error with all of them, without each, and with none.

    python benchmarks/ablation.py --samples 500 --seeds 2   # about an hour on 2 cores
    python benchmarks/ablation.py --cfg 3 7 --calls 5 --seeds 10 --paired paired.json   # only what is in question

"polish" solves the last interval's bands again after every step, "middle round" tries the eight best unlearned starts
on a whole batch before two of them run on all trajectories. With --paired every fit is compared with that of the same
seed that has all parts; the file is written after each, and what it holds is not done again.

"guidance" are the weights of what guidance adds, "first step" the one that asks no model, "bands" the weights of bands
of frequency, "end to end" all iterations after the closed form. Errors are RMSEs to the converged teacher, on noise
that no fit saw.
"""

import argparse
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))
from amed_core.beginnings import Part
from amed_core.bench import EVALUATION_SEED, Model, method_of, starts_for, student_config
from amed_core.measures import chunks, conditioned, error
from amed_core.multistep import MultistepTable
from amed_core.multistep_fit import MultistepFit
from amed_core.recipes import multistep_fit
from amed_core.sources import gaussian, noise
from benchmarks.beds import MODELS, judging, taught

PARTS: tuple[Part, ...] = ("first step", "bands")
GUIDANCE, END_TO_END = "guidance", "end to end"
ALL = (*PARTS, GUIDANCE, END_TO_END)
VARIANTS = ((), *((part,) for part in ALL), (*PARTS, GUIDANCE))
QUESTIONED = (("guidance",), ("polish",), ("middle round",))
BATCH = 250


class Judge:
    """A model at a guidance scale, with noise that no fit draws."""

    def __init__(self, name: str, cfg: float, samples: int) -> None:
        self.model: Model = MODELS[name](cfg)
        self.quick = name == "pictures"  # half the trajectories and calls: a fit of the default takes minutes
        self.x = self.model.sigma_max * noise(range(samples), self.model.shape, EVALUATION_SEED)
        self.teacher = taught(self.model, self.x, 100, BATCH)

    def fitted(self, calls: int, seed: int, without: tuple[str, ...]) -> float:
        """The error of a fit that leaves some parts out."""
        model = self.model
        config = student_config("amed_multistep", calls, model)
        config = replace(config, guided=config.guided and GUIDANCE not in without)
        fitting = replace(multistep_fit(calls), seed=seed)
        if self.quick:
            fitting = replace(fitting, trajectories=32, held_out=16, budget=8000)
        if END_TO_END in without:
            fitting = replace(fitting, iterations=1)
        parts = [part for part in (*PARTS, "polish", "middle round") if part in without]
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


def paired(arguments: argparse.Namespace) -> None:
    """The error of every fit without a part over that with all of them, seed by seed."""
    done = json.loads(arguments.paired.read_text()) if arguments.paired.exists() else {}
    judges: dict[tuple[str, float], Judge] = {}
    for seed in range(arguments.seeds):
        for name in arguments.models:
            for cfg in arguments.cfg:
                for calls in arguments.calls:
                    for without in ((), *QUESTIONED):
                        key = f"{name} cfg {cfg:g} {calls} calls seed {seed} without {'nothing' if not without else without[0]}"
                        if key in done:
                            continue
                        if (name, cfg) not in judges:
                            judges[name, cfg] = Judge(name, cfg, arguments.samples)
                        done[key] = judges[name, cfg].fitted(calls, seed, without)
                        arguments.paired.write_text(json.dumps(done, indent=1))
    summarise(done)


def summarise(done: dict[str, float]) -> None:
    """Median, least and largest ratio of every part, cell by cell."""
    for part in ("guidance", "polish", "middle round"):
        cells: dict[str, list[float]] = {}
        for key, error_without in done.items():
            cell, _, rest = key.partition(" seed ")
            if rest.endswith(f"without {part}"):
                cells.setdefault(cell, []).append(error_without / done[key.replace(f"without {part}", "without nothing")])
        for cell, ratios in cells.items():
            print(
                f"| {part} | {cell} | {len(ratios)} | {statistics.median(ratios):.3f} | {min(ratios):.3f} | {max(ratios):.3f} |"
            )
        if cells:
            overall = statistics.median([statistics.median(ratios) for ratios in cells.values()])
            print(f"| {part} | median of cells | | {overall:.3f} | | |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--cfg", type=float, nargs="+", default=[1.0, 3.0])
    parser.add_argument("--calls", type=int, nargs="+", default=[3, 5])
    parser.add_argument("--samples", type=int, default=500, help="evaluation noises")
    parser.add_argument("--paired", type=Path, help="compare seed by seed only the parts in question; keep them here")
    parser.add_argument("--seeds", type=int, default=2, help="fits of each, whose mean error is printed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.paired:
        paired(arguments)
        return
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
