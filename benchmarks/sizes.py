"""What a predictor loses at another size than it was fitted at: larger pictures, other aspects, more frames.

    python benchmarks/sizes.py --json benchmarks/sizes.json     # goes on where it stopped
    python benchmarks/tables.py                                 # writes the table into docs/experiments.md

Each model is fitted at its usual size and at every other one, in 5 calls, with the effort "standard". At every size
both fits are compared with the best unlearned solver and usual grid there, which other noises choose, and with one
another: "loss" is the error of the fit from the usual size over that of the fit made there. Errors are RMSEs to Heun's
method in 100 calls on held-out noises. Models: pictures and colours, which take any size, and video (`fields.py`).
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1]))
from amed_core.driver import NoMidpoint, sample
from amed_core.fit.baselines import grids, solvers
from amed_core.fit.huber import squares
from amed_core.fit.make import fit_predictor
from amed_core.fit.targets import rmse
from amed_core.fit.teacher import heun_samples
from amed_core.fit.trajectories import chunks, conditioned, noise
from amed_core.pictures import PicturesDenoiser
from amed_core.types import Denoiser, Method, Model, Sample
from benchmarks import fields
from benchmarks.beds import judging
from benchmarks.colours import ColoursDenoiser

CALLS = 5
TRUTH = 100  # calls of the converged sampler
SCREENED, FINALISTS = 4, 8  # noises on which all unlearned methods run, and how many then run on all that choose
JUDGED_FROM, CHOSEN_FROM = 10_000, 20_000  # numbers of noises
PICTURES = {  # (height, width)
    "1": (16, 16),
    "1.5": (24, 24),
    "2": (32, 32),
    "3": (48, 48),
    "2:1": (12, 24),
    "1:2": (24, 12),
    "16:9": (12, 20),
}
VIDEOS = {  # (frames, height, width)
    "1": fields.SHAPE[1:],
    "1.5": (6, 24, 36),
    "2": (6, 32, 48),
    "3": (6, 48, 72),
    "2:1": (6, 14, 28),
    "1:2": (6, 28, 14),
    "16:9": (6, 15, 26),
    "1.5 x frames": (9, 16, 24),
    "2 x frames": (12, 16, 24),
    "3 x frames": (18, 16, 24),
    "2, 2 x frames": (12, 32, 48),
}
SHOWN = ("stock", "error", "own", "ratio", "loss", "ratio_median", "loss_median")
MODELS = {"video": VIDEOS, "colours": PICTURES, "pictures": PICTURES}


def model_of(name: str, cfg: float, size: Sequence[int]) -> Model:
    """A model at a size: (height, width), of video (frames, height, width)."""
    if name == "video":
        return fields.FieldsDenoiser(cfg, (fields.CHANNELS, *size))
    model = {"pictures": PicturesDenoiser, "colours": ColoursDenoiser}[name](cfg)
    return at_size(model, size)


def at_size(model: Model, size: Sequence[int]) -> Model:
    """The same model, asked for samples of another size."""
    made = copy.copy(model)
    made.shape = (model.shape[0], *size)  # type: ignore[misc]
    return made


class Held:
    """Noises of a model, from number `begin` on, and where the converged sampler takes them."""

    def __init__(self, model: Model, begin: int, count: int, batch: int) -> None:
        low, self.high = float(model.sigma_min), float(model.sigma_max)
        self.parts: list[tuple[Denoiser, Sample, Sample]] = []
        for some in chunks(count, batch):
            rows = range(begin + some.start, begin + some.stop)
            x, asked = self.high * noise(rows, tuple(model.shape), 0x51E5), conditioned(judging(model), rows)
            self.parts.append((asked, x, heun_samples(asked, x, low, self.high, TRUTH, flow=True)))

    def distances(self, method: Method, most: int | None = None) -> Tensor:
        """The RMSE (samples,) of every sample of a method, or of the first so many."""
        found, left = [], most or sum(len(x) for _, x, _ in self.parts)
        for asked, x, end in self.parts:
            count = min(left, len(x))
            if count:
                few = asked if count == len(x) else conditioned_for_first(asked, count)
                found.append(squares(sample(few, x[:count], method), end[:count]).sqrt())
            left -= count
        return torch.cat(found)


def conditioned_for_first(asked: Denoiser, count: int) -> Denoiser:
    """A denoiser of a batch's rows for the first of them."""
    made = copy.copy(asked)
    for name in ("labels", "prompts"):
        if hasattr(made, name):
            setattr(made, name, getattr(made, name)[:count])
    return made


def best_unlearned(model: Model, batch: int, count: int) -> tuple[str, Method]:
    """The unlearned solver and usual grid that do best on other noises: all run on a few, the best on all."""
    chosen = Held(model, CHOSEN_FROM, count, batch)
    listed = grids(CALLS, float(model.sigma_min), float(model.sigma_max), getattr(model, "sigmas", None))
    methods = {
        f"{name} {spacing}": Method(grid, solver, NoMidpoint())
        for spacing, grid in listed
        for name, solver in solvers(flow=True).items()
    }
    few = {name: rmse(chosen.distances(method, SCREENED)) for name, method in methods.items()}
    last = sorted(few, key=few.__getitem__)[:FINALISTS]
    best = min(last, key=lambda name: rmse(chosen.distances(methods[name])))
    return best, methods[best]


def errors(name: str, distances: Tensor) -> dict[str, float]:
    """Their RMSE and their median, by name."""
    return {name: rmse(distances), f"{name}_median": float(distances.median())}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--cfg", nargs="+", type=float, default=[1.0, 3.0])
    parser.add_argument("--sizes", nargs="+", help="only these, by name")
    parser.add_argument("--samples", type=int, default=48, help="held-out noises, and a third of it that choose")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the fits")
    parser.add_argument("--json", type=Path, required=True)
    asked = parser.parse_args()
    rows = json.loads(asked.json.read_text()) if asked.json.exists() else []
    for name in asked.models:
        for cfg in asked.cfg:
            usual = {}  # fits at the usual size, by seed
            for label, size in MODELS[name].items():
                about = {"model": name, "cfg": cfg, "size": label, "shape": list(size), "samples": asked.samples}
                here = [about | {"seed": seed} for seed in asked.seeds]
                missing = [one for one in here if not any(one.items() <= row.items() for row in rows)]
                if not missing or (asked.sizes and label not in asked.sizes):
                    continue
                begin, model = time.perf_counter(), model_of(name, cfg, size)
                stock_name, stock = best_unlearned(model, asked.batch, -(-asked.samples // 3))
                held = Held(model, JUDGED_FROM, asked.samples, asked.batch)
                unlearned = held.distances(stock)
                for one in missing:
                    seed = one["seed"]
                    if seed not in usual:
                        at_first = model_of(name, cfg, MODELS[name]["1"])
                        usual[seed] = fit_predictor(at_first, calls=CALLS, guidance=cfg, seed=seed).predictor
                    own = (
                        usual[seed]
                        if label == "1"
                        else fit_predictor(model, calls=CALLS, guidance=cfg, seed=seed).predictor
                    )
                    error, ours = (held.distances(made.method()) for made in (usual[seed], own))
                    found = {"stock_name": stock_name, **errors("stock", unlearned)}
                    found |= errors("error", error) | errors("own", ours)
                    for kind in ("", "_median"):
                        found["ratio" + kind] = found["error" + kind] / found["stock" + kind]
                        found["loss" + kind] = found["error" + kind] / found["own" + kind]
                    rows.append(one | found | {"seconds": round(time.perf_counter() - begin)})
                    asked.json.write_text(json.dumps(rows, indent=1) + "\n")
                    shown = ", ".join(f"{key} {found[key]:.4g}" for key in SHOWN)
                    print(f"{name} cfg {cfg:g} {label} seed {seed}: {shown}, {rows[-1]['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
