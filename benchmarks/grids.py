"""What a searched grid gains for every student: the recommended grid against those found on the model itself.

    python benchmarks/grids.py --samples 500
    python benchmarks/grids.py --rules euler ipndm weights --cfg 1 3 --calls 5 --seeds 2 --samples 200

A table is fitted on each grid; "r = 0.5" is the student without a fit. A grid is searched for a rule, which says what
crosses an interval; without --rules for that of the student's sampler type. Errors are RMSEs to the converged teacher,
on noise that neither the search (16 trajectories, 24 model calls each) nor the fit (32 trajectories) saw; means over
seeds.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))
from amed_core.call_list import boundaries_of
from amed_core.config import PredictorConfig
from amed_core.fit.grid_search import RULES, SEARCH_CALLS, SEARCH_TRAJECTORIES, searched
from amed_core.fit.teacher import PathProducts, levels, path, products_of
from amed_core.fit.trajectories import gaussian
from amed_core.samplers import TYPES, sampler_name
from amed_core.schedules import SEARCHED
from amed_core.tools.bench import Bench, BenchSettings, config_named, fitted, method_of
from amed_core.types import Model
from benchmarks.beds import MODELS, judging


def passed(model: Model, config: PredictorConfig, seed: int) -> PathProducts:
    """What a grid is searched on, as a fit would search for it."""
    x, denoiser = gaussian(model, tuple(model.shape), config.sigmas[0], seed)(range(SEARCH_TRAJECTORIES))
    return products_of(path(denoiser, x, levels(config.sigma_min, config.sigmas[0], SEARCH_CALLS, config.flow)))


def on_grid(config: PredictorConfig, found: PathProducts, rule: str) -> PredictorConfig:
    """The student on the grid that is cheapest by a rule, which its sampler type need not have."""
    calls = 2 * config.intervals - config.plain_last
    every = searched(found, calls, rule, flow=config.flow)
    grid = tuple(every[n] for n in boundaries_of(calls, config.plain_last))
    return replace(config, sigmas=grid, schedule=SEARCHED, rho=1.0)


def errors(bench: Bench, model: Model, config: PredictorConfig, seed: int) -> tuple[float, float]:
    """Of the student without a fit, and of its table."""
    fit = fitted(model, config, BenchSettings(seed=seed))
    methods = (config.base_method(), method_of(fit.predictor, ""))
    unlearned, table = (bench.row(method, config.calls).error or 0.0 for method in methods)
    return unlearned, table


def mean(pairs: Sequence[tuple[float, float]]) -> tuple[float, ...]:
    return tuple(sum(column) / len(pairs) for column in zip(*pairs, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    students = [name for name in TYPES if name != "amed_dpmpp_2m"]
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--students", nargs="+", default=students, choices=TYPES)
    parser.add_argument("--calls", type=int, nargs="+", default=[5, 7])
    parser.add_argument("--cfg", type=float, nargs="+", default=[1.0])
    parser.add_argument("--rules", nargs="+", choices=RULES, help="to search for; the student's own if left out")
    parser.add_argument("--samples", type=int, default=500, help="evaluation noises")
    parser.add_argument("--seeds", type=int, default=1, help="searches and fits of each")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'model':10}{'cfg':>4}{'calls':>6}  {'student':16}{'grid':14}{'r = 0.5':>9}{'table':>9}")
    for name in arguments.models:
        for cfg in arguments.cfg:
            model = MODELS[name](cfg)
            bench = Bench(judging(model), BenchSettings(samples=arguments.samples), lambda text, calls: None)
            for calls in arguments.calls:
                for student in arguments.students:
                    own = config_named(f"{student} table", calls, model)
                    found: dict[str, list[tuple[float, float]]] = {}
                    for seed in range(arguments.seeds):
                        products = passed(model, own, seed)
                        rules = arguments.rules or [TYPES[sampler_name(own)].grid_rule]
                        configs = {"recommended": own} | {rule: on_grid(own, products, rule) for rule in rules}
                        for label, config in configs.items():
                            found.setdefault(label, []).append(errors(bench, model, config, seed))
                    for label, pairs in found.items():
                        numbers = "".join(f"{error:9.4f}" for error in mean(pairs))
                        print(f"{name:10}{cfg:>4g}{calls:>6}  {student:16}{label:14}{numbers}", flush=True)


if __name__ == "__main__":
    main()
