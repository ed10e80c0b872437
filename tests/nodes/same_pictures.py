"""Digests of what the bundled models draw in this ComfyUI, for tests/versions.py to compare between versions.

COMFYUI_PATH=... python tests/nodes/same_pictures.py
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[2])]
import torch
from comfyui import load_pack
from families import Family
from toys import apply, k_sample

SHIPPED = Path(__file__).parents[2] / "predictors"


def digest(*tensors: torch.Tensor) -> str:
    content = b"".join(tensor.float().contiguous().numpy().tobytes() for tensor in tensors)
    return hashlib.sha256(content).hexdigest()[:16]


def drawn(pack: Any, file: Path) -> str:
    """The demo graph with a shipped predictor: latent and picture."""
    made = pack.nodes.values.NotedPredictor(pack.amed_core.load_predictor(file))
    family, vae = pack_model(pack, made.config.model["family"])
    name, config = pack.amed_core.samplers.sampler_name(made.config), made.config
    latent = k_sample(family, apply(pack, family, made), config.calls, config.guidance, name)
    return digest(latent, vae.decode(latent))


def pack_model(pack: Any, family: str) -> tuple[Family, Any]:
    """The bundled model of a family, with prompts, an empty latent and its VAE."""
    if family == "AMEDDigits":
        *parts, vae = pack.nodes.AMEDDemoModel.execute("0 to 9", 10).args
        return Family(*parts), vae
    model, clip, vae = pack.nodes.AMEDDemoCheckpoint.execute().args
    strawberry, nothing = (clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("strawberry", ""))
    return Family(model, strawberry, nothing, {"samples": torch.zeros(2, 8, 16, 16)}), vae


if __name__ == "__main__":
    torch.set_num_threads(1)
    loaded = load_pack()
    print(json.dumps({file.name: drawn(loaded, file) for file in sorted(SHIPPED.glob("*.safetensors"))}))
