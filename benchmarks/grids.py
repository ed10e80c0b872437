"""What a searched grid gains for every student: the recommended grid against the one found on the model itself.

    python benchmarks/grids.py --samples 500

A table is fitted on each grid; "r = 0.5" is the student without a fit. Errors are RMSEs to the converged teacher, on
noise that neither the search (16 trajectories, 24 model calls each) nor the fit (32 trajectories) saw.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))
from amed_core import FixedMidpoint
from amed_core.config import PredictorConfig
from amed_core.driver import Method
from amed_core.fit.end_to_end import EndToEnd
from amed_core.fit.grid_search import TRAJECTORIES, search
from amed_core.fit.make import student_config
from amed_core.fit.protocol import FitConfig
from amed_core.fit.trajectories import gaussian
from amed_core.midpoints import TablePredictor
from amed_core.samplers import DEFAULT
from amed_core.tools.bench import Bench, Settings, method_of
from benchmarks.beds import MODELS, judging


def unlearned(config: PredictorConfig) -> Method:
    plain = frozenset(range(config.planned, config.intervals))
    planner = FixedMidpoint(0.5, config.sigma_min, plain)
    return Method("", config.sigmas, config.build_solver(), planner, config.first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--students", nargs="+", default=[n for n in DEFAULT if n != "amed_dpmpp_2m"], choices=DEFAULT)
    parser.add_argument("--calls", type=int, nargs="+", default=[5, 7])
    parser.add_argument("--cfg", type=float, default=1.0)
    parser.add_argument("--samples", type=int, default=500, help="evaluation noises")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'model':10}{'calls':>5}  {'student':16}{'r = 0.5':>9}{'searched':>9}  {'table':>9}{'searched':>9}")
    for name in arguments.models:
        model = MODELS[name](arguments.cfg)
        measured = Bench(judging(model), Settings(samples=arguments.samples), lambda text, calls: None)
        source = gaussian(model, tuple(model.shape), model.sigma_max, 0)
        for calls in arguments.calls:
            for student in arguments.students:
                errors: list[float] = []
                own = student_config(f"{student} table", calls, model)
                x, denoiser = source(range(TRAJECTORIES))
                configs = (own, search(denoiser, x, own))
                errors += [measured.row(unlearned(config), calls).error or 0.0 for config in configs]
                for config in configs:
                    fit = EndToEnd(TablePredictor(config), source, FitConfig())
                    for _ in fit.events():
                        pass
                    errors.append(measured.row(method_of(fit.predictor, student), calls).error or 0.0)
                numbers = [f"{error:9.4f}" for error in errors]
                print(f"{name:10}{calls:>5}  {student:16}{''.join(numbers[:2])}  {''.join(numbers[2:])}", flush=True)


if __name__ == "__main__":
    main()
