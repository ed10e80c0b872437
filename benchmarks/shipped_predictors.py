"""The error of every shipped predictor, on noise that its training never drew.

    python benchmarks/shipped_predictors.py --samples 1000

Each on the model that it was made for, at its own cfg and from pure noise: the RMSE over all elements to the converged
teacher (200 model calls) with its 95 % bootstrap interval, and the median of the samples' own. For pictures also those
of the best unlearned solver and grid at the same number of calls, chosen on the same noise.
"""

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
from amed_core.files import load_predictors
from amed_core.fit.baselines import bench_methods
from amed_core.tools.bench import Bench, BenchSettings, Row, method_of
from benchmarks.beds import MODELS, judging

PREDICTORS = Path(__file__).parents[1] / "predictors"
FAMILIES = {"AMEDDigits": "digits", "AMEDPictures": "pictures"}


def printed(name: str, row: Row) -> None:
    print(
        f"{name}: {row.calls} calls, error {row.error:.4f} ({row.error_low:.4f} to {row.error_high:.4f}), "
        f"median {row.error_median:.4f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1000, help="evaluation noises")
    parser.add_argument("--models", nargs="+", default=list(FAMILIES.values()), choices=FAMILIES.values())
    parser.add_argument("--calls", nargs="+", type=int, help="of sets, only these")
    arguments = parser.parse_args()
    benches: dict[tuple[str, float], Bench] = {}
    for file in sorted(PREDICTORS.glob("*.safetensors")):
        for predictor in load_predictors(file).from_noise:
            config = predictor.config
            key = (FAMILIES[str(config.model["family"])], config.guidance)
            if key[0] not in arguments.models or (arguments.calls and config.calls not in arguments.calls):
                continue
            if key not in benches:
                model = judging(MODELS[key[0]](key[1]))
                benches[key] = Bench(model, BenchSettings(samples=arguments.samples), lambda name, calls: None)
            measured = benches[key]
            printed(file.stem, measured.row(method_of(predictor, file.stem), config.calls))
            if key[0] == "pictures":
                pairs = [pair for pair in bench_methods(measured.model, config.calls) if pair.name.endswith(" zero")]
                rows = [measured.row(pair, config.calls) for pair in pairs]
                best = min(rows, key=lambda row: row.error or float("inf"))
                printed(f"  best unlearned, {best.method}", best)


if __name__ == "__main__":
    main()
