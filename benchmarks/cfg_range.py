"""What a predictor for a range of cfg errs by, over one that was fitted at the very scale it is used at.

    python benchmarks/cfg_range.py --json benchmarks/cfg_range.json     # goes on where it stopped
    python benchmarks/tables.py                                         # writes the table into docs/experiments.md

Both are of the training node's usual effort. As there, a range is fitted at POINTS scales, and between them its weights
are interpolated. Errors are RMSEs to the converged teacher on noises that no fit saw.
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))
from amed_core import Predictor, make_fit, usual_settings
from amed_core.fit.make import facts_of
from amed_core.fit.trajectories import gaussian
from amed_core.samplers import MULTISTEP_STUDENT, student_config
from amed_core.tools.first import Bed
from benchmarks.beds import MODELS
from benchmarks.first_pictures import options

POINTS = 3  # of a range, in the training node
RANGE = (2.0, 6.0)
USED = (2.0, 3.0, 4.0, 5.0, 6.0)


def fitted(name: str, scales: Sequence[float], calls: int, seed: int) -> Predictor:
    """A predictor for these scales."""
    models = [MODELS[name](cfg) for cfg in scales]
    several = tuple(scales) if len(scales) > 1 else ()
    config = student_config(MULTISTEP_STUDENT, calls, facts_of(models[0]), guidance=scales[0])
    config = replace(config, guidances=several)
    sources = [gaussian(model, tuple(model.shape), config.sigmas[0], seed) for model in models]
    fit = make_fit(config, usual_settings(config), sources, model_sigmas=getattr(models[0], "sigmas", None))
    for _ in fit.events():
        pass
    return fit.predictor


@torch.no_grad()
def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.set_defaults(calls=[5], cfg=list(USED))
    asked = parser.parse_args()
    rows = json.loads(asked.json.read_text()) if asked.json.exists() else []
    scales = torch.linspace(*RANGE, POINTS).tolist()
    for name, calls, seed in product(asked.models, asked.calls, asked.seeds):
        whole = None
        for cfg in asked.cfg:
            here = {"model": name, "calls": calls, "seed": seed, "cfg": cfg, "samples": asked.samples}
            if any(here.items() <= row.items() for row in rows):
                continue
            whole = whole or fitted(name, scales, calls, seed)
            bed, own = Bed(MODELS[name](cfg), None, asked.samples, asked.batch), fitted(name, [cfg], calls, seed)
            errors = [bed.squares(one.method(guidance=cfg)) for one in (whole, own)]
            of_range, of_scale = (math.sqrt(float(squares.mean())) for squares in errors)
            medians = [math.sqrt(float(squares.median())) for squares in errors]
            ratios = {"ratio": of_range / of_scale, "median_ratio": medians[0] / medians[1]}
            rows.append(here | {"range": of_range, "own": of_scale} | ratios)
            asked.json.write_text(json.dumps(rows, indent=1) + "\n")
            print(json.dumps(rows[-1]), flush=True)


if __name__ == "__main__":
    main()
