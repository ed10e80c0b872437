"""One cell of the README's table of families: everything that people do with a model of theirs, once."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from families import SPECS, Family, joined, make
from toys import apply, flat, image, k_sample, streams, train

from amed_core.files import load_predictor, save_predictor

FEATURES = ("auto", "bottleneck", "latent", "none")
STEPS, CFG = 5, 3.0


def cell(pack: Any, name: str, features: str) -> str:
    """Train, save, load, apply, and sample from noise, from an image, and with a mask where ComfyUI takes one.

    "pass", if each picture is finite and drawn twice the same to the bit, and what is masked out stays as it was; or
    with which words the nodes refused. Raises whatever else happens.
    """
    family = make(name)
    try:
        made, *_ = train(pack, family, paper=True, features=features)
    except ValueError as error:
        return f"refused: {str(error).split('. ')[0]}"
    with tempfile.TemporaryDirectory() as folder:
        save_predictor(made.predictor, Path(folder) / "p.safetensors")
        applied = apply(pack, family, pack.nodes.values.NotedPredictor(load_predictor(Path(folder) / "p.safetensors")))
    given, (mask, kept) = image(family), half(family)
    ways: list[dict[str, Any]] = [{}, {"denoise": 0.5, "latent": given}, {"latent": given, "noise_mask": mask}]
    for changes in ways if SPECS[name].masked else ways[:2]:
        drawn, same = (k_sample(family, applied, STEPS, CFG, **changes) for _ in range(2))
        if not drawn.isfinite().all():
            return "fails: not finite"
        if not (drawn == same).all():
            return "fails: not repeatable"
    if SPECS[name].masked and not torch.allclose(drawn[kept], flat(given)[kept], rtol=1e-4, atol=1e-5):
        return "fails: what is masked out changes"
    return f"pass ({made.config.features})" if features == "auto" else "pass"


def half(family: Family) -> tuple[torch.Tensor, torch.Tensor]:
    """A mask for the left half of a latent, and which of its numbers have to stay as they are."""
    first, *others = streams(family.latent["samples"])
    mask = torch.zeros(1, 1, *first.shape[2:])
    mask[..., : mask.shape[-1] // 2] = 1
    changing = [mask.expand_as(first), *(torch.ones_like(other) for other in others)]
    return mask, flat(joined(changing)) == 0
