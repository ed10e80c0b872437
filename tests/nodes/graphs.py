"""Graphs in ComfyUI's API format, built from stock nodes and ours."""

from pathlib import Path
from typing import Any

PREDICTORS = Path(__file__).parents[2] / "predictors"
Graph = dict[str, dict[str, Any]]


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def demo(digit: str = "0 to 9", batch: int = 10) -> Graph:
    return {"demo": node("AMEDDemoModel", digit=digit, batch_size=batch)}


MODEL, POSITIVE, NEGATIVE, LATENT, VAE = (["demo", i] for i in range(5))


def k_sampler(model: Any, sampler: str, scheduler: str, steps: int, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"seed": 7, "cfg": 1.0, "denoise": 1.0, "latent_image": LATENT}
    settings |= {"positive": POSITIVE, "negative": NEGATIVE} | changes
    return node("KSampler", model=model, sampler_name=sampler, scheduler=scheduler, steps=steps, **settings)


def train(**settings: Any) -> dict[str, Any]:
    """What makes the default predictor for 5 calls."""
    return _train("AMEDTrainPredictor", **{"effort": "thorough", "budget": 0.0, "starts": "noise", **settings})


def train_paper(sampler: str = "amed", **changes: Any) -> dict[str, Any]:
    """What makes one of the paper's predictors for 5 calls."""
    settings: dict[str, Any] = {"trajectories": 320, "predictor_type": "network", "preset": "recommended"} | changes
    return _train("AMEDTrainPaperPredictor", sampler_name=sampler, **settings)


def _train(kind: str, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"seed": 0, "cfg": 1.0, "steps": 5, "trajectories": 0, "save_as": ""} | changes
    return node(kind, model=MODEL, positive=POSITIVE, negative=NEGATIVE, latent_image=LATENT, **settings)


def apply(predictor: Any) -> dict[str, Any]:
    return node("AMEDApplyPredictor", model=MODEL, predictor=predictor)


def save_image(samples: Any, prefix: str) -> Graph:
    return {
        "decode": node("VAEDecode", samples=samples, vae=VAE),
        "image": node("SaveImage", images=["decode", 0], filename_prefix=prefix),
    }


def save_latent(samples: Any, prefix: str) -> dict[str, Any]:
    return node("SaveLatent", samples=samples, filename_prefix=prefix)
