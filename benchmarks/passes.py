"""What a number of passes of the network gives, a guided call being two: the negative asked at every call, or at some.

    python benchmarks/passes.py --json benchmarks/passes.json     # goes on where it stopped

Errors are RMSEs to the converged sampler on noises that no fit saw. "stock" is the best unlearned pair of half as many
guided calls, chosen on the very noises that judge; "guided" is the fit of as many; "saving" the fit that asks fewer
negatives, whether or not it was kept; and "error" is what the fit for the passes hands over. A row that the file has
already is not measured again.
"""

import json
import math
import sys
import time
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1]))
from amed_core.fit.efforts import EFFORTS, Effort
from amed_core.fit.make import fit_predictor
from amed_core.fit.passes import UnderPasses
from amed_core.tools.first import Bed
from benchmarks.beds import MODELS
from benchmarks.first_pictures import options


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--passes", nargs="+", type=int, default=[10, 16])
    parser.add_argument("--effort", default="standard", choices=EFFORTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.set_defaults(cfg=[3.0, 6.0])
    asked = parser.parse_args()
    rows = json.loads(asked.json.read_text()) if asked.json.exists() else []
    for passes, cfg, name, seed in product(asked.passes, asked.cfg, asked.models, asked.seeds):
        here = {"model": name, "cfg": cfg, "passes": passes, "seed": seed}
        here |= {"samples": asked.samples, "effort": asked.effort}
        if any(here.items() <= row.items() for row in rows):
            continue
        bed = Bed(MODELS[name](cfg), None, asked.samples, asked.batch)
        rows.append(here | measured(bed, bed.stock(passes // 2), passes, asked.effort, cfg, seed))
        asked.json.write_text(json.dumps(rows, indent=1) + "\n")
        print(json.dumps(rows[-1]), flush=True)


@torch.no_grad()
def measured(
    bed: Bed, stock: dict[str, Tensor], passes: int, effort: Effort, cfg: float, seed: int
) -> dict[str, object]:
    """What a fit for so many passes hands over, and what it chose among, on the bed's noises.

    `stock` has the squared errors (samples,) of unlearned pairs there, by name.
    """
    begin = time.perf_counter()
    fit = fit_predictor(bed.model, effort=effort, guidance=cfg, seed=seed, passes=passes)
    seconds = time.perf_counter() - begin
    assert isinstance(fit, UnderPasses)
    assert fit.saving is not None
    best = min(stock, key=lambda name: float(stock[name].mean()))
    config, tried = fit.predictor.config, fit.saving.predictor.config
    guided, saving, error = (
        root_mean(bed.squares(one.method())) for one in (fit.plain.predictor, fit.saving.predictor, fit.predictor)
    )
    return {
        "stock_name": best,
        "stock": root_mean(stock[best]),
        "guided": guided,
        "saving": saving,
        "saving_calls": tried.calls,
        "saving_asks": list(tried.asking),
        "error": error,
        "calls": config.calls,
        "true_passes": config.passes,
        "fit_calls": fit.model_calls,
        "seconds": round(seconds),
    }


def root_mean(squares: Tensor) -> float:
    return math.sqrt(float(squares.mean()))


if __name__ == "__main__":
    main()
