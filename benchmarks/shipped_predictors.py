"""The error of every shipped predictor, on noise that its training never drew.

    python benchmarks/shipped_predictors.py --samples 1000

The RMSE over all elements to the converged teacher (200 model calls) with its 95 % bootstrap interval.
"""

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
from amed_core import load_predictor
from amed_core.bench import Bench, Settings, method_of
from amed_core.digits import DigitsDenoiser

PREDICTORS = Path(__file__).parents[1] / "predictors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1000, help="evaluation noises")
    settings = Settings(samples=parser.parse_args().samples)
    measured = Bench(DigitsDenoiser(), settings, lambda name, calls: None)
    for file in sorted(PREDICTORS.glob("*.safetensors")):
        predictor = load_predictor(file)
        row = measured.row(method_of(predictor, file.stem), predictor.config.calls)
        print(f"{row.method}: {row.calls} calls, error {row.error:.4f} ({row.error_low:.4f} to {row.error_high:.4f})")


if __name__ == "__main__":
    main()
