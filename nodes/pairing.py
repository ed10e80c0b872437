"""Whether a predictor and a loaded MODEL belong together: refused, warned of, or right."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import comfy.model_sampling
import comfy.samplers
from torch import Tensor

from ..amed_core.config import PredictorConfig, plain_text
from ..amed_core.samplers import ModelFacts
from . import timesteps

FROM_IMAGES = ("IMG_TO_IMG", "IMG_TO_IMG_FLOW")  # predictions of models that are given a picture in place of noise
ANOTHER_MODEL = ("family", "prediction", "latent_channels")  # nothing good can come of a difference in these
LOOKED_INTO = 4  # patched weights; two LoRAs differ in all of them
# Keys of wrappers, and of options, that change how a model is computed and not what it answers.
KERNELS = ("torch.compile", "optimized_attention_override")
OF_LOW = "_low_noise"  # ends the names of facts of the second of two models
LOOKED_AT = 8  # values of a weight of a checkpoint,
LOOKED_AT_WEIGHTS = 256  # of so many weights: all of a small model, and some of every block of a large one
LONGEST = 160  # characters of a list of names
TRAIN_ONE = 'or train a predictor as things are now with "AMED Train Predictor"'
ADVICE = {  # what to do where something differs: what stands on the node first, in few words
    "sigma_min": "Undo the model sampling node",
    "sigma_max": "Undo the model sampling node",
    "shift": "Set the shift back in the model sampling node",
    "noise_scale": "Set the noise scale back",
    "audio_shift": "Set the audio shift back",
    "loras": "Use the same LoRAs and strengths",
    "cfg_functions": "Use the same guidance nodes",
    "patches": "Use the same nodes that patch the model",
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
        "patches": patches(model),
        "noise_scale": float(getattr(sampling, "noise_scale", 1.0)),
    }
    for name in ("shift", "audio_shift"):
        if (value := getattr(sampling, name, None)) is not None:
            found[name] = float(value)
    return found


def model_facts(model: Any, guider: Any = None, *, bottleneck: bool = False, guided: bool = False) -> ModelFacts:
    """What the recipes of predictors must know of a loaded MODEL, and of the guider that asks it."""
    sampling = model.get_model_object("model_sampling")
    return ModelFacts(
        float(sampling.sigma_min),
        float(sampling.sigma_max),
        getattr(sampling, "sigmas", None),
        flow=isinstance(sampling, comfy.model_sampling.CONST),
        bottleneck=bottleneck,
        guided=guided,
        fingerprint=fingerprint(model)
        | {"checkpoint": checkpoint(model)}
        | ({} if guider is None else of_guider(guider)),
    )


def prediction(sampling: Any) -> str:
    """What the network predicts, by the class that turns its answer into the denoised sample.

    It is EPS, V_PREDICTION, EDM, CONST for flow, or another. A model sampling node may have exchanged it.
    """
    return next(c.__name__ for c in type(sampling).__mro__ if "calculate_denoised" in vars(c))


def loras(model: Any) -> str:
    """A short digest of the weight patches on a MODEL: which weights, how strong, and a few of their values.

    LoRAs in bypass mode are no patches, but adapters that are injected while the model runs.
    """
    adapters = bypassed(model)
    if not model.patches and not adapters:
        return "none"
    digest = hashlib.sha256()
    for n, key in enumerate(sorted(model.patches, key=str)):
        for strength, patch, strength_model, *_ in model.patches[key]:
            digest.update(f"{key} {strength} {strength_model}".encode())
            if n < LOOKED_INTO:
                digest.update("".join(_leaves(patch)).encode())
    for n, (key, adapter, strength) in enumerate(adapters):
        digest.update(f"bypass {key} {strength}".encode())
        if n < LOOKED_INTO:
            digest.update("".join(_leaves(adapter)).encode())
    return f"{len(model.patches) + len(adapters)} weights, {digest.hexdigest()[:8]}"


def checkpoint(model: Any) -> str:
    """A digest of a MODEL's own weights: a few values of many, as they are without the patches on them.

    Fine-tunes of one family differ in it, and what is loaded, where to, and how it is patched does not matter.
    It takes some 10 ms, so that nothing need remember it.
    """
    return of_weights(model.model.diffusion_model.state_dict(), lambda key: model.backup.get(f"diffusion_model.{key}"))


def of_weights(weights: Mapping[str, Tensor], kept: Callable[[str], Any] = lambda key: None) -> str:
    """A digest of weights by their names. `kept` has the weight itself, while patches are in its place."""
    digest = hashlib.sha256()
    for number, (key, weight) in enumerate(weights.items()):
        if number % math.ceil(len(weights) / LOOKED_AT_WEIGHTS):
            digest.update(f"{key} {tuple(weight.shape)}".encode())
            continue
        unpatched = kept(key)
        try:
            values = (weight if unpatched is None else unpatched.weight).detach().flatten()
            shown = values[:: max(1, len(values) // LOOKED_AT)][:LOOKED_AT].float().tolist()
        except (NotImplementedError, RuntimeError, TypeError):  # a packed kind of another pack's
            shown = []
        digest.update(f"{key} {tuple(weight.shape)} {shown}".encode())
    return digest.hexdigest()[:16]


def bypassed(model: Any) -> list[tuple[str, Any, float]]:
    """The LoRA adapters that bypass a MODEL's weights: key, adapter and strength, as ComfyUI's injections hold them."""
    found = []
    for injections in model.injections.values():
        for injection in injections:
            for cell in getattr(injection.inject, "__closure__", None) or ():  # the manager of all adapters is in there
                adapters = getattr(cell.cell_contents, "adapters", {})
                found += [(key, adapter, strength) for key, (adapter, strength) in sorted(adapters.items())]
    return found


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
    found = [model_options.get("sampler_cfg_function"), model_options.get("sampler_calc_cond_batch_function")]
    found += model_options.get("sampler_pre_cfg_function", []) + model_options.get("sampler_post_cfg_function", [])
    return listed(name_of(f) for f in found if f is not None)


def patches(model: Any) -> str:
    """What else changes a MODEL's answers, by name: patches in its blocks, wrappers, injections, exchanged parts.

    Guidance and weights have entries of their own, and kernels (attention, compilation) change no answer.
    """
    options = model.model_options
    transformer = options.get("transformer_options", {})
    found = [f"{place} {name_of(f)}" for place, functions in transformer.get("patches", {}).items() for f in functions]
    found += [
        f"{place} {name_of(f)}" for place, by in transformer.get("patches_replace", {}).items() for f in by.values()
    ]
    for wrappers in (model.wrappers, transformer.get("wrappers", {})):
        for kind, by_key in wrappers.items():
            found += [f"{kind} {name_of(f)}" for key, fs in by_key.items() if key not in KERNELS for f in fs]
    if (function := options.get("model_function_wrapper")) is not None:
        found.append(f"model_function {name_of(function)}")
    found += [f"injection {key}" for key in model.injections if key != "bypass_lora"]
    for name, part in model.object_patches.items():
        # The model sampling has entries of its own, and a compiled model answers as it did.
        if name not in ("model_sampling", "latent_format") and not hasattr(part, "_orig_mod"):
            found.append(f"part {name}")
    return listed(found)


def name_of(function: Any) -> str:
    """A function, or an object that is called like one, as a predictor file names it."""
    wrapped = getattr(function, "func", function)  # functools.partial
    return str(getattr(wrapped, "__qualname__", type(wrapped).__name__)).replace("<locals>.", "")


def listed(names: Iterable[str]) -> str:
    """Names, each once, as one text of plain characters; of many, the first and a digest of all."""
    every = plain_text(", ".join(dict.fromkeys(names)), longest=None) or "none"
    if len(every) <= LONGEST:
        return every
    return f"{every[:LONGEST]}... {hashlib.sha256(every.encode()).hexdigest()[:8]}"


def on_several_gpus(model: Any) -> bool:
    """Whether ComfyUI asks copies of a MODEL on other GPUs, too."""
    return bool(model.get_additional_models_with_key("multigpu"))


def refuse_unfit(model: Any) -> None:
    """Raise ValueError for a MODEL that no sampler of ours suits, however it is trained."""
    family = type(model.model.model_config).__name__
    kinds = [c.__name__ for c in type(model.get_model_object("model_sampling")).__mro__ if c.__name__ in FROM_IMAGES]
    if kinds:
        raise ValueError(
            f"{family} is of the kind {kinds[0]}: it starts from a picture and not from noise, so there is no "
            "trajectory to learn. Use it with the sampler and steps that its makers name, without AMED nodes."
        )
    if getattr(model.model.diffusion_model, "time_r_in", None) is not None:
        raise ValueError(
            f"{family} is a MeanFlow model: it is told where a step ends and answers the mean slope up to there, so it "
            "is distilled for few steps already. Use it with euler, without AMED nodes."
        )


def refuse_other_model(config: PredictorConfig, found: Mapping[str, Any]) -> None:
    """Raise ValueError if a predictor meets a model with another `fingerprint` than it was made for."""
    made_for = dict(config.model)
    differing = [key for key in ANOTHER_MODEL if made_for.get(key) != found[key]]
    if differing:
        key, *_ = differing  # one reason is enough
        raise ValueError(
            f"This AMED predictor was made for another model: {key} {made_for.get(key)!r}, but the loaded model has "
            f'{found[key]!r}. Choose a predictor of this model in "AMED Load Predictor", or train one with "AMED Train '
            'Predictor".'
        )


def fits(config: PredictorConfig, facts: Mapping[str, Any], guider: Any) -> bool:
    """Whether a predictor may be taken for a run unasked: made for this very checkpoint, and as things are now.

    `facts` are the MODEL's fingerprint and its checkpoint.
    """
    same = all(config.model.get(key) == facts[key] for key in (*ANOTHER_MODEL, "checkpoint"))
    kind = of_guider(guider).get("guider", "")
    alike = config.model.get("guider", "") == kind and not config.switch
    return same and alike and not differences(config, facts, guider)


def differences(config: PredictorConfig, found: Mapping[str, Any], guider: Any, *, low: bool = False) -> list[str]:
    """What is not as it was when the predictor was made, and what to do: one sentence each.

    `low` says that the run is the second model's alone, of two.
    """
    made_for = dict(config.model)
    if low:
        made_for |= {name.removesuffix(OF_LOW): value for name, value in made_for.items() if name.endswith(OF_LOW)}
    sentences = [
        f"{advice}. The {key} was {_shown(made_for[key])} when the predictor was made and is {_shown(found[key])} now; "
        f"{TRAIN_ONE}."
        for key, advice in ADVICE.items()
        if key in made_for and key in found and not _same(made_for[key], found[key])
    ]
    found_scale, cfg = scale(guider), guidance(guider)
    if config.guidances:
        least, most = config.guidances[0], config.guidances[-1]
        made, right = f"cfg {least:g} to {most:g}", found_scale is not None and least <= found_scale <= most
    else:
        made = str(made_for.get("guidance", f"cfg {config.guidance:g}"))
        right = cfg == made
    if not right:
        sentences.append(
            f"Set {made}. The guidance was {made} when the predictor was made and is {cfg} now; {TRAIN_ONE}."
        )
    return sentences


def models_beside(guider: Any) -> list[Any]:
    """The MODELs that a guider asks besides its first: one for low noise, or one for the negative answer."""
    found = (getattr(guider, name, None) for name in ("low", "uncond_model_patcher"))
    return [model for model in found if model is not None]


def of_guider(guider: Any) -> dict[str, str | int | float]:
    """What a predictor remembers of the guider that it was made for, if that is another than CFGGuider."""
    if type(guider) is comfy.samplers.CFGGuider:
        return {}
    found: dict[str, str | int | float] = {"guider": type(guider).__name__, "guidance": guidance(guider)}
    if (low := getattr(guider, "low", None)) is not None:
        found |= {f"{name}{OF_LOW}": value for name, value in fingerprint(low).items() if name in ADVICE}
    return found


def scale(guider: Any) -> float | None:
    """The one guidance scale of a guider; None if its kind has others."""
    return scale_in(guidance(guider))


def scale_in(text: str) -> float | None:
    """The one scale that `guidance` has named; None if it named others."""
    return float(text.removeprefix("cfg ")) if text.startswith("cfg ") and "," not in text else None


def scale_of_plan(config: PredictorConfig, scale: float | None) -> float:
    """The guidance scale whose plan a predictor of one scale, or of a range, follows at this one."""
    if not config.guidances or scale is None:
        return config.guidance
    return min(max(scale, config.guidances[0]), config.guidances[-1])


def guidance(guider: Any) -> str:
    """How strongly a guider guides; guiders with more than two prompts name all their strengths."""
    found = vars(guider).items()
    strengths = {k: v for k, v in found if (k.startswith("cfg") or k.endswith("_cfg")) and isinstance(v, (int, float))}
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
