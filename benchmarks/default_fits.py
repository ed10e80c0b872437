"""The default fit beside what the first pictures teach: on the same noises, over the error of the same stock pair.

A row that the file has already is not measured again: a run may be stopped at any time.
"""

import json
import math
import sys
import time
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))
from amed_core.fit.make import fit_predictor
from amed_core.tools.first import Bed
from benchmarks.beds import MODELS
from benchmarks.first_pictures import options


def main() -> None:
    asked = options(__doc__).parse_args()
    rows = json.loads(asked.json.read_text()) if asked.json.exists() else []
    for cfg in asked.cfg:
        for name in asked.models:
            bed = None
            for calls in asked.calls:
                here = {"model": name, "cfg": cfg, "calls": calls, "samples": asked.samples, "seed": asked.seed}
                if any(here.items() <= row.items() for row in rows):
                    continue
                bed = bed or Bed(MODELS[name](cfg), None, asked.samples, asked.batch)
                rows.append(here | measured(bed, calls, asked.seed))
                asked.json.write_text(json.dumps(rows, indent=1) + "\n")
                print(json.dumps(rows[-1]), flush=True)


@torch.no_grad()
def measured(bed: Bed, calls: int, seed: int) -> dict[str, object]:
    """A fit's errors on the bed's noises, and those of the best unlearned pair there."""
    stock = bed.stock(calls)
    best = min(stock, key=lambda name: float(stock[name].mean()))
    begin = time.perf_counter()
    fit = fit_predictor(bed.model, calls=calls, seed=seed)
    seconds, summary = time.perf_counter() - begin, fit.summary()
    errors = bed.squares(fit.predictor.method())
    error, least = math.sqrt(float(errors.mean())), math.sqrt(float(stock[best].mean()))
    median = min(math.sqrt(float(found.median())) for found in stock.values())
    return {
        "stock_name": best,
        "stock": least,
        "error": error,
        "ratio": error / least,
        "median_ratio": math.sqrt(float(errors.median())) / median,
        "fit_calls": summary.model_calls,
        "teacher": summary.teacher,
        "teacher_error": summary.details.get("teacher_error"),
        "seconds": round(seconds),
    }


if __name__ == "__main__":
    main()
