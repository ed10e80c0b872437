"""Which model families work with which features, found out by doing it in a real ComfyUI: the README's table.

    python benchmarks/model_matrix.py

Every family has ComfyUI's own classes at toy size, with random weights; the last is the bundled text-to-picture model
with its own. A cell is "pass" if a predictor was trained through the nodes, saved, loaded, applied, and sampled a
finite picture with KSampler in 5 calls, twice the same to the bit, both from noise and with denoise 0.5. Else it says
with which words the nodes refused.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path += [str(Path(__file__).parents[1] / "tests" / "nodes"), str(Path(__file__).parents[1])]
from comfyui import load_pack
from families import SPECS, Family, make
from toys import apply, k_sample, train

from amed_core.files import load_predictor, save_predictor

FEATURES = ("auto", "bottleneck", "latent", "none")


def cell(pack: Any, family: Family, features: str) -> str:
    """Train, save, load, apply, sample."""
    try:
        made, *_ = train(pack, family, features=features)
        with tempfile.TemporaryDirectory() as folder:
            save_predictor(made.network, Path(folder) / "p.safetensors")
            applied = apply(pack, family, pack.nodes.values.Predictor(load_predictor(Path(folder) / "p.safetensors")))
    except ValueError as error:
        return f"refused: {str(error).split('. ')[0]}"
    image = torch.randn(family.latent["samples"].shape, generator=torch.Generator().manual_seed(0))
    for changes in ({}, {"denoise": 0.5, "latent": image}):
        one, same = (k_sample(family, applied, 5, 3.0, **changes) for _ in range(2))
        if not one.isfinite().all():
            return "fails: not finite"
        if not (one == same).all():
            return "fails: not repeatable"
    return f"pass ({made.network.config.features})" if features == "auto" else "pass"


def main() -> None:
    pack = load_pack()
    print(f"| Family | Latent | Predicts | {' | '.join(FEATURES)} |")
    print("|---|---|---|" + "---|" * len(FEATURES))
    for name, spec in SPECS.items():
        family = make(name)
        kind = pack.nodes.pairing.prediction(family.model.get_model_object("model_sampling"))
        cells = [cell(pack, make(name), features) for features in FEATURES]
        shape = " x ".join(map(str, spec.shape))
        print(f"| {spec.kind} | {shape} | {kind} | {' | '.join(cells)} |", flush=True)
    from benchmarks.comfyui_models import checkpoint  # noqa: PLC0415 - needs ComfyUI

    cells = [cell(pack, checkpoint(pack), features) for features in FEATURES]
    print(f"| AMEDPictures | 8 x 16 x 16 | CONST | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
