"""What each part of a multistep fit is good for: its error with all of them, without each, and with none.

    python benchmarks/ablation.py --samples 500 --seeds 2             # about an hour on 2 cores
    python benchmarks/ablation.py --parts benchmarks/parts.json       # only prints what was measured before parts went

"guidance" are the weights of what guidance adds, "first step" the one that asks no model, "bands" the weights of bands
of frequency, "end to end" all iterations after the closed form. Errors are RMSEs to the converged teacher, on noise
that no fit saw.

The file of parts has the errors of fits of the same seeds with and without a part, two of which no longer exist here:
"polish" solved for the last interval's bands again after every step, and the "middle round" tried the eight best
unlearned starts on a whole batch before two of them ran on all trajectories. It was measured at f6d11e5.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))
from amed_core.driver import sample
from amed_core.fit.baselines import baselines
from amed_core.fit.end_to_end import EndToEnd
from amed_core.fit.make import facts_of, usual_settings
from amed_core.fit.multistep_start import MultistepStart, Part
from amed_core.fit.parameters import MultistepParameters
from amed_core.fit.protocol import FitConfig
from amed_core.fit.runs import Runs
from amed_core.fit.trajectories import Metered, chunks, conditioned, gaussian, noise
from amed_core.fit.workers import ALONE
from amed_core.predictor import build
from amed_core.samplers import MULTISTEP_STUDENT, student_config
from amed_core.tools.bench import EVALUATION_SEED
from amed_core.tools.measures import error
from amed_core.types import Model
from benchmarks.beds import MODELS, judging, taught

PARTS: tuple[Part, ...] = ("first step", "bands")
GUIDANCE, END_TO_END = "guidance", "end to end"
ALL = (*PARTS, GUIDANCE, END_TO_END)
VARIANTS = ((), *((part,) for part in ALL), (*PARTS, GUIDANCE))
BATCH = 250
KEY = re.compile(r"(?P<model>\w+) cfg (?P<cfg>\S+) (?P<calls>\d+) calls seed (?P<seed>\d+) without (?P<part>.+)")
NOTHING = "nothing"  # is left out


class Judge:
    """A model at a guidance scale, with noise that no fit draws."""

    def __init__(self, name: str, cfg: float, samples: int) -> None:
        self.model: Model = MODELS[name](cfg)
        self.x = self.model.sigma_max * noise(range(samples), self.model.shape, EVALUATION_SEED)
        self.teacher = taught(self.model, self.x, 100, BATCH)

    def fitted(self, calls: int, seed: int, without: tuple[str, ...]) -> float:
        """The error of a fit that leaves some parts out."""
        model = self.model
        fit = fit_without(model, calls, seed, without)
        for _ in fit.events():
            pass
        method = fit.predictor.method()
        drawn = [
            sample(conditioned(judging(model), rows), self.x[rows.start : rows.stop], method)
            for rows in chunks(len(self.x), BATCH)
        ]
        return error(torch.cat(drawn), self.teacher).rmse


def fit_without(model: Model, calls: int, seed: int, without: tuple[str, ...]) -> EndToEnd:
    """The default fit, put together without some of its parts."""
    config = student_config(MULTISTEP_STUDENT, calls, facts_of(model))
    config = replace(config, guided=config.guided and GUIDANCE not in without)
    settings = usual_settings(config, effort="thorough")
    assert isinstance(settings, FitConfig)
    if END_TO_END in without:
        settings = replace(settings, iterations=1)
    source = Metered(gaussian(model, tuple(model.shape), config.sigmas[0], seed))
    runs = Runs.of(config, settings, source, ALONE)
    listed = baselines(
        calls, config.sigma_min, config.sigmas[0], flow=config.flow, model_sigmas=getattr(model, "sigmas", None)
    )
    start = MultistepStart(runs, listed, without=[part for part in PARTS if part in without])
    return EndToEnd(build(config), MultistepParameters, start, runs)


def parts_table(errors: Mapping[str, float]) -> str:
    """Of every part and cell the ratio of the errors without and with it, over seeds, in Markdown."""
    ratios: dict[str, dict[tuple[str, float, int], list[float]]] = {}
    for key, without in errors.items():
        found = KEY.fullmatch(key)
        if found is None:
            raise SystemExit(f"{key!r} names no fit.")
        if found["part"] != NOTHING:
            cell = (found["model"], float(found["cfg"]), int(found["calls"]))
            whole = errors[key.removesuffix(found["part"]) + NOTHING]
            ratios.setdefault(found["part"], {}).setdefault(cell, []).append(without / whole)
    lines = [
        "| Part | Model | cfg | Calls | Seeds | Median ratio, without to with | Least | Largest |",
        "|---" * 8 + "|",
    ]
    for part, cells in ratios.items():
        for (name, cfg, calls), some in cells.items():
            shown = " | ".join(f"{value:.3f}" for value in (statistics.median(some), min(some), max(some)))
            lines.append(f"| {part} | {name} | {cfg:g} | {calls} | {len(some)} | {shown} |")
        overall = statistics.median(statistics.median(some) for some in cells.values())
        lines.append(f"| {part} | median of all cells |  |  |  | {overall:.3f} |  |  |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--cfg", type=float, nargs="+", default=[1.0, 3.0])
    parser.add_argument("--calls", type=int, nargs="+", default=[3, 5])
    parser.add_argument("--samples", type=int, default=500, help="evaluation noises")
    parser.add_argument("--seeds", type=int, default=2, help="fits of each, whose mean error is printed")
    parser.add_argument("--parts", type=Path, help="only print the table of this JSON file")
    arguments = parser.parse_args()
    if arguments.parts:
        print(parts_table(json.loads(arguments.parts.read_text(encoding="utf-8"))))
        return
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
