"""Multistep fits from few trajectories, at strong guidance, with few and with many calls: is any worse than no fit?

    python benchmarks/robustness.py --samples 300

Every cell is the RMSE of the fitted table over that of the best unlearned solver and grid, both on noise that no fit
saw. The unlearned ones are all that the fit may begin with, those on searched grids among them, and the best is
chosen on that very noise, which no user could do. In brackets: the fit kept its start, as it gained nothing on what it
holds out. Models: a closed-form mixture at Stable Diffusion's noise levels (whether a model predicts eps or v is all
the same to a sampler), digits (EDM) and coloured shapes (flow).
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))
from amed_core.bench import EVALUATION_SEED, Model, method_of, starts_for, student_config
from amed_core.digits import DigitsDenoiser
from amed_core.measures import conditioned, converged, error
from amed_core.multistep import MultistepTable
from amed_core.multistep_fit import MultistepFit
from amed_core.recipes import MULTISTEP_FIT
from amed_core.sources import gaussian
from benchmarks.colours import ColoursDenoiser
from benchmarks.mixture import MixtureDenoiser

MODELS = {"mixture": MixtureDenoiser, "digits": DigitsDenoiser, "colours": ColoursDenoiser}
TRAJECTORIES, SCALES, CALLS = (4, 8, 16, 64), (1.0, 3.0, 5.0, 8.0), tuple(range(3, 11))
USUAL = (64, 1.0, 5)


@dataclass(frozen=True)
class Cell:
    """A fit against the best that needs none."""

    model: str
    trajectories: int
    cfg: float
    calls: int
    error: float
    unlearned: float
    best: str  # unlearned
    kept: bool  # the start was kept

    @property
    def ratio(self) -> float:
        return self.error / self.unlearned

    @property
    def shown(self) -> str:
        return f"({self.ratio:.2f})" if self.kept else f"{self.ratio:.2f}"


class Judge:
    """A model at a guidance scale, with noise that no fit draws."""

    def __init__(self, name: str, cfg: float, samples: int) -> None:
        self.name, self.cfg = name, cfg
        self.model: Model = MODELS[name](cfg)
        self.asked = conditioned(self.model, range(samples))
        generator = torch.Generator().manual_seed(EVALUATION_SEED)
        self.x = self.model.sigma_max * torch.randn(samples, *self.model.shape, generator=generator)
        low, high, flow = self.model.sigma_min, self.model.sigma_max, getattr(self.model, "flow", False)
        self.teacher = converged(self.asked, self.x, low, high, 100, flow=flow)
        self.known: dict[tuple[int, str], float] = {}  # errors of starts on the usual grids

    def error(self, table: MultistepTable) -> float:
        return error(method_of(table, "").run(self.asked, self.x), self.teacher).rmse

    def cell(self, trajectories: int, calls: int) -> Cell:
        config = student_config("amed_multistep", calls, self.model)
        begin = starts_for(self.model, config)
        few = replace(MULTISTEP_FIT, trajectories=trajectories, batch_size=min(16, trajectories))
        source = gaussian(self.model, tuple(self.model.shape), self.model.sigma_max, 0)
        fit = MultistepFit(MultistepTable(config), source, few, begin)
        for _ in fit.events():
            pass
        usual = {start.name for start in begin}
        unlearned = {
            start.name: self.known.get((calls, start.name)) or self.error(fit.written(start)) for start in fit.tried
        }
        self.known |= {(calls, name): error for name, error in unlearned.items() if name in usual}
        best = min(unlearned, key=lambda name: unlearned[name])
        found = (self.error(fit.predictor), unlearned[best], best, fit.summary()["gain"] == 0)
        return Cell(self.name, trajectories, self.cfg, calls, *found)


def cells(names: list[str], samples: int, every: list[str]) -> Iterator[Cell]:
    """All combinations for the models in `every`, and for the others those with two of three settings as usual."""
    for name, cfg in itertools.product(names, SCALES):
        judge = Judge(name, cfg, samples)
        for trajectories, calls in itertools.product(TRAJECTORIES, CALLS):
            usual = sum((trajectories == USUAL[0], cfg == USUAL[1], calls == USUAL[2]))
            if name in every or usual >= 2:
                yield judge.cell(trajectories, calls)


def table(found: list[Cell], name: str) -> str:
    """Markdown: a row per guidance scale and number of trajectories, a column per number of calls."""
    lines = [f"| {name}, cfg | Trajectories | " + " | ".join(f"{calls} calls" for calls in CALLS) + " |"]
    lines.append("|---" * (len(CALLS) + 2) + "|")
    for cfg, trajectories in itertools.product(SCALES, TRAJECTORIES):
        row = {c.calls: c for c in found if (c.model, c.cfg, c.trajectories) == (name, cfg, trajectories)}
        if row:
            shown = [row[calls].shown if calls in row else "" for calls in CALLS]
            lines.append(f"| {cfg:g} | {trajectories} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--every", nargs="*", default=["mixture"], help="models to measure all combinations on")
    parser.add_argument("--samples", type=int, default=300, help="evaluation noises")
    parser.add_argument("--json", type=Path, help="file for the cells")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for cell in cells(arguments.models, arguments.samples, arguments.every):
        found.append(cell)
        print(f"{cell} ratio {cell.ratio:.3f}", file=sys.stderr, flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps([asdict(c) for c in found], indent=1))
    for name in arguments.models:
        print(table(found, name) + "\n")
    worse = [c for c in found if c.ratio > 1]
    print(f"{len(worse)} of {len(found)} cells are worse than the best unlearned solver and grid.")
    for cell in worse:
        print(f"{cell.ratio:.3f} {cell}")


if __name__ == "__main__":
    main()
