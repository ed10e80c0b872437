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
from amed_core import facts_of, sample, student_config, usual_settings
from amed_core.config import PredictorConfig
from amed_core.fit.baselines import Baseline, baseline, baselines, solvers
from amed_core.fit.grid_search import RULES, searched
from amed_core.fit.protocol import FitConfig
from amed_core.fit.teacher import levels, path, products_of
from amed_core.fit.trajectories import gaussian
from amed_core.multistep import MultistepTable, multistep_config
from amed_core.samplers import MULTISTEP_STUDENT
from amed_core.tools.bench import EVALUATION_SEED
from amed_core.types import Method, Model
from benchmarks.beds import MODELS, asked_for, fitted, taught

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
        self.known: dict[int, dict[str, Tensor]] = {}  # squared errors on the usual grids, by the number of calls

    def squares(self, method: Method) -> Tensor:
        """The squared error (samples,) of every sample; infinite where it is not finite."""
        try:
            apart = sample(self.asked, self.x, method) - self.teacher
        except FloatingPointError:  # a solver may blow up where it is not meant to be used
            return torch.full((len(self.x),), torch.inf, dtype=torch.float64)
        return apart.double().square().flatten(1).mean(1)

    def usual(self, config: PredictorConfig) -> dict[str, Tensor]:
        """Those of every unlearned solver on the usual grids."""
        if config.calls not in self.known:
            table = getattr(self.model, "sigmas", None)
            listed = baselines(config.calls, config.sigma_min, config.sigmas[0], flow=config.flow, model_sigmas=table)
            self.known[config.calls] = {one.name: self.squares(method_of(config, one)) for one in listed}
        return self.known[config.calls]

    def searched(self, config: PredictorConfig, settings: FitConfig) -> dict[str, Tensor]:
        """And on the grids that the fit searches on its own trajectories."""
        source = gaussian(self.model, tuple(self.model.shape), config.sigmas[0])
        x, asked = source(range(settings.trajectories))
        fine = levels(config.sigma_min, config.sigmas[0], settings.teacher_calls, config.flow)
        passed, found = products_of(path(asked, x, fine)), {}
        for rule in RULES:
            grid = searched(passed, config.calls, rule, flow=config.flow)
            for name, solver in solvers(config.flow).items():
                one = baseline(f"{name} searched for {rule}", solver, grid)
                found[one.name] = self.squares(method_of(config, one))
        return found

    def cell(self, trajectories: int, calls: int) -> Cell:
        config = student_config(MULTISTEP_STUDENT, calls, facts_of(self.model))
        settings = usual_settings(config, trajectories, effort="thorough")
        assert isinstance(settings, FitConfig)
        few = replace(settings, batch_size=min(settings.batch_size, trajectories))
        fit = fitted(self.model, config, few)
        unlearned = self.usual(config) | self.searched(config, few)
        best = min(unlearned, key=lambda name: float(unlearned[name].mean()))
        ours, theirs = self.squares(fit.predictor.method()), unlearned[best]
        apart = ours - theirs
        z = float(apart.mean() / (apart.std() / len(apart) ** 0.5).clamp(min=1e-30))
        found_errors = (float(ours.mean().sqrt()), float(theirs.mean().sqrt()))
        return Cell(self.name, trajectories, self.cfg, calls, *found_errors, best, fit.summary().gain == 0, z)


def method_of(config: PredictorConfig, one: Baseline) -> Method:
    """An unlearned solver as the table that a fit begins with."""
    table = MultistepTable(multistep_config(replace(config, guided=False), one.levels))
    table.weights.copy_(torch.tensor(one.weights))
    return table.method()


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
