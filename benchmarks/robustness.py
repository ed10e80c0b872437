"""Multistep fits from few trajectories, at strong guidance, with few and with many calls: is any worse than no fit?

    python benchmarks/robustness.py --samples 300 --json cells.json   # hours; goes on where it stopped

Every cell is the RMSE of the fitted table over that of the best unlearned solver and grid, both on noise that no fit
saw. The unlearned ones are all that the fit may begin with, those on searched grids among them, and the best is
chosen on that very noise, which no user could do. In brackets: the fit kept its start, as it gained nothing on what it
holds out. Where a cell is worse, a paired test says whether these samples show it: a single one at a fork of the ODE
can outweigh all others.

Models: a closed-form mixture at Stable Diffusion's noise levels (whether a model predicts eps or v is all the same to a
sampler), digits (EDM), coloured shapes (flow) and the bundled text-to-picture model (flow).
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1]))
from amed_core.fit.make import multistep_fit, starts_for, student_config
from amed_core.fit.multistep_fit import MultistepFit
from amed_core.fit.trajectories import gaussian
from amed_core.multistep import MultistepTable
from amed_core.tools.bench import EVALUATION_SEED, method_of
from amed_core.types import Model
from benchmarks.beds import MODELS, asked_for, taught

TRAJECTORIES, SCALES, CALLS = (4, 8, 16, 64), (1.0, 3.0, 5.0, 8.0), tuple(range(3, 11))
USUAL = (64, 1.0, 5)
SURE = 1.96  # standard errors, of a difference at 95 %


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
    z: float  # how much worse its squared errors are, in standard errors of that difference

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
        self.asked = asked_for(self.model, samples)
        generator = torch.Generator().manual_seed(EVALUATION_SEED)
        self.x = self.model.sigma_max * torch.randn(samples, *self.model.shape, generator=generator)
        self.teacher = taught(self.model, self.x, 100, samples)
        self.known: dict[tuple[int, str], Tensor] = {}  # squared errors of starts on the usual grids

    def squares(self, table: MultistepTable) -> Tensor:
        """The squared error (samples,) of every sample."""
        apart = method_of(table, "").run(self.asked, self.x) - self.teacher
        return apart.double().square().flatten(1).mean(1).nan_to_num(torch.inf)

    def cell(self, trajectories: int, calls: int) -> Cell:
        config = student_config("amed_multistep", calls, self.model)
        begin = starts_for(self.model, config)
        few = replace(multistep_fit(calls), trajectories=trajectories, batch_size=min(16, trajectories))
        source = gaussian(self.model, tuple(self.model.shape), self.model.sigma_max, 0)
        fit = MultistepFit(MultistepTable(config), source, few, begin)
        for _ in fit.events():
            pass
        usual = {start.name for start in begin}
        unlearned: dict[str, Tensor] = {}
        for start in fit.beginning.tried:
            found = self.known.get((calls, start.name))
            unlearned[start.name] = self.squares(fit.beginning.written(start)) if found is None else found
        self.known |= {(calls, name): squares for name, squares in unlearned.items() if name in usual}
        best = min(unlearned, key=lambda name: float(unlearned[name].mean()))
        ours, theirs = self.squares(fit.predictor), unlearned[best]
        apart = ours - theirs
        z = float(apart.mean() / (apart.std() / len(apart) ** 0.5).clamp(min=1e-30))
        found_errors = (float(ours.mean().sqrt()), float(theirs.mean().sqrt()))
        return Cell(self.name, trajectories, self.cfg, calls, *found_errors, best, fit.summary()["gain"] == 0, z)


def cells(asked: argparse.Namespace, done: list[Cell]) -> Iterator[Cell]:
    """All combinations for the models in `every`, and for the others those with two of three settings as usual."""
    known = {(c.model, c.cfg, c.trajectories, c.calls) for c in done}
    for name, cfg in itertools.product(asked.models, SCALES):
        judge = None
        for trajectories, calls in itertools.product(TRAJECTORIES, asked.calls):
            usual = sum((trajectories == USUAL[0], cfg == USUAL[1], calls == USUAL[2]))
            if (name in asked.every or usual >= 2) and (name, cfg, trajectories, calls) not in known:
                judge = judge or Judge(name, cfg, asked.samples)
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
    parser.add_argument("--calls", type=int, nargs="+", default=list(CALLS))
    parser.add_argument("--json", type=Path, help="file for the cells, which is also where to go on")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    file = arguments.json
    found = [Cell(**cell) for cell in json.loads(file.read_text())] if file and file.exists() else []
    for cell in cells(arguments, found):
        found.append(cell)
        print(f"{cell} ratio {cell.ratio:.3f}", file=sys.stderr, flush=True)
        if file:
            file.write_text(json.dumps([asdict(c) for c in found], indent=1))
    for name in arguments.models:
        print(table(found, name) + "\n")
    worse = [c for c in found if c.ratio > 1]
    sure = [c for c in worse if c.z > SURE]
    print(
        f"{len(worse)} of {len(found)} cells are worse than the best unlearned solver and grid, {len(sure)} of them by "
        f"more than {SURE} standard errors."
    )
    for cell in worse:
        print(f"{cell.ratio:.3f} {cell}")


if __name__ == "__main__":
    main()
