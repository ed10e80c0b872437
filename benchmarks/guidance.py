"""How far a table carries to another guidance scale than its own, and what one fitted at several scales gives.

    python benchmarks/guidance.py --samples 500

Rows are the scales that a table was fitted at, columns those it then samples with; every cell is
the RMSE to the converged teacher of the column's scale, on noise that no fit saw. "1 to 8" is one table that was fitted
at all of the scales and goes linearly from one to the next; "none" is the base solver, its midpoints at r = 0.5.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

sys.path.append(str(Path(__file__).parents[1]))
from amed_core import Predictor, build, make_fit, sample, usual_settings
from amed_core.config import PredictorConfig
from amed_core.fit.trajectories import gaussian, noise
from amed_core.samplers import TYPES
from amed_core.tools import measures
from amed_core.tools.bench import config_named
from amed_core.types import Denoiser, Sample
from benchmarks.beds import MODELS, asked_for, taught

FITTED = (1.0, 2.0, 4.0, 8.0)
USED = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
UNSEEN = 10**9  # the seed of the evaluation noise; fits count theirs from 0


@dataclass(frozen=True)
class Judge:
    """Noise that no fit saw, and where the converged teacher takes it at one guidance scale."""

    cfg: float
    denoiser: Denoiser
    x: Sample
    teacher: Sample

    def error(self, table: Predictor) -> float:
        drawn = sample(self.denoiser, self.x, table.method(guidance=self.cfg))
        return measures.error(drawn, self.teacher).rmse


def judge(name: str, cfg: float, samples: int) -> Judge:
    model = MODELS[name](cfg)
    x = model.sigma_max * noise(range(samples), model.shape, UNSEEN)
    return Judge(cfg, asked_for(model, samples), x, taught(model, x, 200))


def fitted(name: str, config: PredictorConfig, scales: Sequence[float], seed: int) -> Predictor:
    """One table, fitted at these scales."""
    config = replace(config, guidance=scales[0], guidances=tuple(scales) if len(scales) > 1 else ())
    models = [MODELS[name](cfg) for cfg in scales]
    sources = [gaussian(model, tuple(model.shape), config.sigmas[0], seed) for model in models]
    fit = make_fit(
        config, usual_settings(config, effort="thorough"), sources, model_sigmas=getattr(models[0], "sigmas", None)
    )
    for _ in fit.events():
        pass
    return fit.predictor


def printed(student: str, name: str, table: Predictor, judges: Sequence[Judge]) -> None:
    print(f"{student:14}{name:12}" + "".join(f"{judged.error(table):8.4f}" for judged in judges), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits", choices=MODELS)
    parser.add_argument("--students", nargs="+", default=["amed", "amed_ipndm"], choices=TYPES)
    parser.add_argument("--calls", type=int, default=5)
    parser.add_argument("--samples", type=int, default=500, help="evaluation noises")
    parser.add_argument("--seed", type=int, default=0, help="of the noise that is fitted")
    arguments = parser.parse_args()
    name = arguments.model
    judges = [judge(name, cfg, arguments.samples) for cfg in tqdm(USED, desc="teacher")]
    print(f"{'student':14}{'fitted at':12}" + "".join(f"{cfg:8g}" for cfg in USED))
    for student in arguments.students:
        config = config_named(f"{student} table", arguments.calls, MODELS[name](1.0))
        printed(student, "none", build(config), judges)
        for cfg in tqdm(FITTED, desc=student):
            printed(student, f"{cfg:g}", fitted(name, config, [cfg], arguments.seed), judges)
        printed(student, f"{FITTED[0]:g} to {FITTED[-1]:g}", fitted(name, config, FITTED, arguments.seed), judges)


if __name__ == "__main__":
    main()
