"""What the first pictures teach, on every model of `beds`: the rows of `python -m amed_core first`, kept as they come.

A row that the file has already, of the same settings, is not measured again: a run may be stopped at any time.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
from amed_core.tools.first import USE_NAMES, first
from benchmarks.beds import MODELS


def options(text: str | None) -> argparse.ArgumentParser:
    """What a benchmark on such beds can be asked."""
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--cfg", nargs="+", type=float, default=[1.0, 3.0, 6.0])
    parser.add_argument("--calls", nargs="+", type=int, default=[5, 8])
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, required=True)
    return parser


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--uses", nargs="+", default=["noise"], choices=USE_NAMES)
    parser.add_argument("--pictures", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--draws", type=int, default=5)
    asked = parser.parse_args()
    rows = json.loads(asked.json.read_text()) if asked.json.exists() else []
    about = {"draws": asked.draws, "samples": asked.samples, "seed": asked.seed}
    for calls in asked.calls:
        for cfg in asked.cfg:
            for name in asked.models:
                for use in asked.uses:
                    here = {"model": name, "cfg": cfg, **about, "asked": calls}
                    if any(row["use"] == use and here.items() <= row.items() for row in rows):
                        continue
                    counts = ([calls], asked.pictures, asked.draws, asked.samples)
                    found = first(MODELS[name](cfg), *counts, uses=[use], batch=asked.batch, seed=asked.seed)
                    new = [{**here, **asdict(row)} for row in found]
                    rows += new
                    asked.json.write_text(json.dumps(rows, indent=1) + "\n")
                    for row in new:
                        print(
                            f"{name:9} cfg {cfg:g} {use:10} {row['calls']:2} calls, {row['pictures']} taught: "
                            f"{row['ratio']:.2f}, worst {row['worst']:.2f}, medians {row['median_ratio']:.2f}",
                            flush=True,
                        )


if __name__ == "__main__":
    main()
