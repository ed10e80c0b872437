"""What each effort's fit errs by, over the error of the best unlearned pair, on noises that no fit saw.

    python benchmarks/efforts.py --json benchmarks/efforts.json     # goes on where it stopped
    python benchmarks/tables.py                                     # writes the table into docs/experiments.md

A row that the file has already is not measured again. Pairs are all one-call solvers on all usual grids. The best is
chosen on the very noises that judge.
"""

import json
import math
import sys
import time
from itertools import product
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))
from amed_core.fit.efforts import EFFORTS, Effort
from amed_core.fit.make import fit_predictor
from amed_core.tools.first import Bed
from benchmarks.beds import MODELS
from benchmarks.first_pictures import options


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--efforts", nargs="+", default=list(EFFORTS), choices=EFFORTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.set_defaults(calls=[3, 5, 8])
    asked = parser.parse_args()
    rows = json.loads(asked.json.read_text()) if asked.json.exists() else []
    for calls, cfg, name in product(asked.calls, asked.cfg, asked.models):
        bed = None
        for effort, seed in product(asked.efforts, asked.seeds):
            here = {"model": name, "cfg": cfg, "calls": calls, "effort": effort, "seed": seed, "samples": asked.samples}
            if any(here.items() <= row.items() for row in rows):
                continue
            bed = bed or Bed(MODELS[name](cfg), None, asked.samples, asked.batch)
            rows.append(here | measured(bed, calls, effort, cfg, seed))
            asked.json.write_text(json.dumps(rows, indent=1) + "\n")
            print(json.dumps(rows[-1]), flush=True)


@torch.no_grad()
def measured(bed: Bed, calls: int, effort: Effort, cfg: float, seed: int) -> dict[str, object]:
    """A fit's errors on the bed's noises, and those of the best unlearned pair there."""
    stock = bed.stock(calls)
    best = min(stock, key=lambda name: float(stock[name].mean()))
    begin = time.perf_counter()
    fit = fit_predictor(bed.model, calls=calls, effort=effort, guidance=cfg, seed=seed)
    seconds, found = time.perf_counter() - begin, fit.summary()
    errors = bed.squares(fit.predictor.method())
    error, least = math.sqrt(float(errors.mean())), math.sqrt(float(stock[best].mean()))
    median = min(math.sqrt(float(squared.median())) for squared in stock.values())
    return {
        "stock_name": best,
        "stock": least,
        "error": error,
        "ratio": error / least,
        "median_ratio": math.sqrt(float(errors.median())) / median,
        "fit_calls": found.model_calls,
        "seconds": round(seconds),
    }


if __name__ == "__main__":
    main()
