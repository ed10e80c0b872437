"""Whether a predictor and a loaded MODEL belong together: refused, warned of, or right."""

import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from ..amed_core import PredictorConfig
from . import timesteps

ANOTHER_MODEL = ("family", "prediction", "latent_channels")  # nothing good can come of a difference in these
LOOKED_INTO = 4  # patched weights; two LoRAs differ in all of them
TRAIN_ONE = 'or train a predictor as things are now with "AMED Train Predictor"'
ADVICE = {  # where to change back what differs
    "sigma_min": f"remove or undo the model sampling node, {TRAIN_ONE}",
    "sigma_max": f"remove or undo the model sampling node, {TRAIN_ONE}",
    "shift": f"set the shift back in the model sampling node, {TRAIN_ONE}",
    "loras": f"use the same LoRAs and strengths, {TRAIN_ONE}",
    "cfg_functions": f"use the same guidance nodes, {TRAIN_ONE}",
}


def fingerprint(model: Any) -> dict[str, str | int | float]:
    """What a predictor remembers of a loaded MODEL."""
    base = model.model
    sampling = model.get_model_object("model_sampling")
    found: dict[str, str | int | float] = {
        "family": type(base.model_config).__name__,
        "prediction": prediction(sampling),
        "latent_channels": int(base.latent_format.latent_channels),
        "sigma_min": float(sampling.sigma_min),
        "sigma_max": float(sampling.sigma_max),
        "timesteps": timesteps.describe(sampling),
        "loras": loras(model),
        "cfg_functions": cfg_functions(model.model_options),
    }
    if (shift := getattr(sampling, "shift", None)) is not None:
        found["shift"] = float(shift)
    return found


def prediction(sampling: Any) -> str:
    """What the network predicts: the class that turns its answer into the denoised sample (EPS, V_PREDICTION,
    EDM, CONST for flow, ...), which a model sampling node may have exchanged.
    """
    return next(c.__name__ for c in type(sampling).__mro__ if "calculate_denoised" in vars(c))


def loras(model: Any) -> str:
    """A short digest of the weight patches on a MODEL: which weights, how strong, and a few of their values."""
    if not model.patches:
        return "none"
    digest = hashlib.sha256()
    for n, key in enumerate(sorted(model.patches, key=str)):
        for strength, patch, strength_model, *_ in model.patches[key]:
            digest.update(f"{key} {strength} {strength_model}".encode())
            if n < LOOKED_INTO:
                digest.update("".join(_leaves(patch)).encode())
    return f"{len(model.patches)} weights, {digest.hexdigest()[:8]}"


def _leaves(patch: Any) -> Iterator[str]:
    if isinstance(patch, Tensor):
        yield f"{tuple(patch.shape)} {[f'{v:.3e}' for v in patch.flatten()[:8].float().tolist()]}"
    elif isinstance(patch, (list, tuple)):
        for part in patch:
            yield from _leaves(part)
    elif hasattr(patch, "weights"):  # a LoRA of any kind
        yield from _leaves(patch.weights)


def cfg_functions(model_options: Mapping[str, Any]) -> str:
    """The functions that change guidance (RescaleCFG and its like), by name."""
    found = [model_options.get("sampler_cfg_function")]
    found += model_options.get("sampler_pre_cfg_function", []) + model_options.get("sampler_post_cfg_function", [])
    names = [getattr(f, "__qualname__", type(f).__name__) for f in found if f is not None]
    return ", ".join(names) or "none"


def refuse_other_model(config: PredictorConfig, found: Mapping[str, Any]) -> None:
    """Raise ValueError if a predictor meets a model with another `fingerprint` than it was made for."""
    made_for = dict(config.model)
    differing = [key for key in ANOTHER_MODEL if made_for.get(key) != found[key]]
    if differing:
        raise ValueError(
            "This AMED predictor was made for another model: "
            + ", ".join(f"{key} {made_for.get(key)!r}, but the loaded model has {found[key]!r}" for key in differing)
            + '. Choose a predictor of this model in "AMED Load Predictor", or train one with "AMED Train Predictor".'
        )


def differences(config: PredictorConfig, found: Mapping[str, Any], guider: Any) -> list[str]:
    """What is not as it was when the predictor was made, and what to do: one sentence each."""
    made_for = dict(config.model)
    sentences = [
        f"{key} was {_shown(made_for[key])} when the predictor was made and is {_shown(found[key])} now: {advice}."
        for key, advice in ADVICE.items()
        if key in made_for and key in found and not _same(made_for[key], found[key])
    ]
    found_scale, cfg = scale(guider), guidance(guider)
    if config.guidances:
        low, high = config.guidances[0], config.guidances[-1]
        made, right = f"cfg {low:g} to {high:g}", found_scale is not None and low <= found_scale <= high
    else:
        made = f"cfg {config.guidance:g}"
        right = cfg == made
    if not right:
        sentences.append(f"guidance was {made} when the predictor was made and is {cfg} now: set it back, {TRAIN_ONE}.")
    return sentences


def scale(guider: Any) -> float | None:
    """The one guidance scale of a guider; None if its kind has others."""
    text = guidance(guider)
    return float(text.removeprefix("cfg ")) if text.startswith("cfg ") and "," not in text else None


def guidance(guider: Any) -> str:
    """How strongly a guider guides; guiders with more than two prompts name all their strengths."""
    strengths = {k: v for k, v in vars(guider).items() if k.startswith("cfg") and isinstance(v, (int, float))}
    if len(strengths) > 1:  # a kind with its own strengths does not use the plain one
        strengths.pop("cfg", None)
    if (negative := getattr(guider, "neg_scale", None)) is not None:
        strengths["neg_scale"] = negative
    return ", ".join(f"{name} {value:g}" for name, value in strengths.items()) or "cfg 1"


def _same(made: Any, found: Any) -> bool:
    if isinstance(made, (int, float)) and isinstance(found, (int, float)):
        return math.isclose(made, found, rel_tol=1e-3)
    return bool(made == found)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else repr(value)
