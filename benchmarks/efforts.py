"""What each effort's fit errs by, over the error of the best unlearned pair, on noises that no fit saw.

    python benchmarks/efforts.py --json benchmarks/efforts.json     # goes on where it stopped
    python benchmarks/efforts.py --json benchmarks/efforts.json --summary

A row that the file has already is not measured again. Pairs are all one-call solvers on all usual grids. The best is
chosen on the very noises that judge.
"""

import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

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
    parser.add_argument("--summary", action="store_true", help="print what there is, and measure nothing")
    parser.set_defaults(calls=[3, 5, 8])
    asked = parser.parse_args()
    rows = json.loads(asked.json.read_text()) if asked.json.exists() else []
    cells = product(asked.efforts, asked.calls, asked.cfg, asked.models) if not asked.summary else ()
    for effort, calls, cfg, name in cells:
        bed = None
        for seed in asked.seeds:
            here = {"model": name, "cfg": cfg, "calls": calls, "effort": effort, "seed": seed, "samples": asked.samples}
            if any(here.items() <= row.items() for row in rows):
                continue
            bed = bed or Bed(MODELS[name](cfg), None, asked.samples, asked.batch)
            rows.append(here | measured(bed, calls, effort, cfg, seed))
            asked.json.write_text(json.dumps(rows, indent=1) + "\n")
            print(json.dumps(rows[-1]), flush=True)
    print(summary(rows))


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


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """For each effort and number of calls, over cells that all efforts have: medians over seeds, then over cells."""
    lines = [f"{'calls':>5} {'effort':9}{'cells':>6}{'of stock':>9}{'worst':>7}{'of thorough':>12}{'most calls':>11}"]
    for calls in sorted({row["calls"] for row in rows}):
        cells: dict[str, dict[tuple[str, float], list[dict[str, Any]]]] = {}
        for row in rows:
            if row["calls"] == calls:
                cells.setdefault(row["effort"], {}).setdefault((row["model"], row["cfg"]), []).append(row)
        shared = set.intersection(*(set(found) for found in cells.values()))
        for effort in [effort for effort in EFFORTS if effort in cells and shared]:
            own = [cells[effort][cell] for cell in sorted(shared)]
            ratios = [statistics.median(row["ratio"] for row in found) for found in own]
            best = (
                [statistics.median(row["ratio"] for row in cells["thorough"][cell]) for cell in sorted(shared)]
                if ("thorough" in cells)
                else [math.nan] * len(own)
            )
            most = max(row["fit_calls"] for found in own for row in found)
            worst = max(row["ratio"] for found in own for row in found)
            of_best = statistics.median(a / b for a, b in zip(ratios, best, strict=True))
            lines.append(
                f"{calls:5} {effort:9}{len(own):6}{statistics.median(ratios):9.2f}{worst:7.2f}{of_best:12.2f}{most:11,}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
