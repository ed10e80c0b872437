"""A ComfyUI model as the core's denoiser: called with sigma, answering with the denoised sample and its bottleneck.

The model is never modified: what is needed of it travels in a clone of the call's model_options.
"""

import threading
from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch
from torch import Tensor

from ..amed_core.types import Features, Sample, Sigma

OnCall = Callable[[Sample, Sigma, Sample], None]  # x, sigma (scalar or per sample), denoised


class Bottleneck:
    """Reads the U-Net's bottleneck during one model call, averaged over channels, for the positive rows.

    ComfyUI passes the activations that enter the first output block through `output_block_patch`;
    those are the bottleneck, after every ControlNet residual. Rows arrive in chunks, one per
    conditioning, in any order and over any number of calls; a chunk is known by its uuid, and only
    the first event of a uuid counts (later ones belong to perturbed-attention guidance and its like).
    """

    def __init__(self, positive: set[Any]) -> None:
        self.positive = positive
        self.lock = threading.Lock()  # several GPUs evaluate conditionings from several threads
        self.found: dict[Any, Tensor] = {}
        self.first: dict[Any, Tensor] = {}

    # A compiled model must not trace this: its guards on the dictionaries would recompile at every call.
    @torch.compiler.disable()
    def patch(self, h: Tensor, hsp: Tensor, transformer_options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The patch itself, which changes nothing."""
        if transformer_options.get("block") == ("output", 0):
            uuids = transformer_options.get("uuids") or [None]
            pooled = h.detach().float().mean(1)
            with self.lock:
                for uuid, rows in zip(uuids, pooled.chunk(len(uuids)), strict=False):
                    self.first.setdefault(uuid, rows)
                    if uuid in self.positive:
                        self.found.setdefault(uuid, rows)
        return h, hsp

    def take(self, x: Sample) -> Features | None:
        """The features (batch, height, width) of the finished call, or None if the model has no such bottleneck."""
        with self.lock:
            events = list(self.found.values()) or list(self.first.values())[:1]
            self.found, self.first = {}, {}
        if not events:
            return None
        # Areas crop and context windows cut: bring all to one shape before averaging over conditionings.
        shape, batch = events[0].shape[1:], x.shape[0]
        pooled = [e for e in events if e.shape[1:] == shape]
        rows = [e if e.shape[0] == batch else e.mean(0, keepdim=True).expand(batch, -1, -1) for e in pooled]
        return torch.stack([r.to(x.device) for r in rows]).mean(0)


class ComfyDenoiser:
    """`model(x, sigma, **extra_args)` of a ComfyUI sampler, in the core's terms.

    Guidance, masks, ControlNets and areas are already part of `model`; a guided call is one call.
    """

    def __init__(
        self, model: Any, guider: Any, extra_args: dict[str, Any], on_call: OnCall | None = None, features: bool = True
    ) -> None:
        self.model = model
        self.on_call = on_call
        self.bottleneck = Bottleneck({c["uuid"] for c in guider.conds.get("positive", []) if "uuid" in c})
        sampling = guider.inner_model.model_sampling
        self.sigma_min, self.sigma_max = float(sampling.sigma_min), float(sampling.sigma_max)
        options = comfy.model_patcher.create_model_options_clone(extra_args.get("model_options", {}))
        if features:
            transformer_options = options.setdefault("transformer_options", {})
            patches = dict(transformer_options.get("patches", {}))
            patches["output_block_patch"] = [*patches.get("output_block_patch", []), self.bottleneck.patch]
            transformer_options["patches"] = patches
        self.extra_args = {**extra_args, "model_options": options}

    def __call__(self, x: Sample, sigma: Sigma) -> tuple[Sample, Features | None]:
        # A learned time scale may leave the levels that the model knows.
        asked = sigma.to(x).reshape(-1).clamp(self.sigma_min, self.sigma_max).expand(x.shape[0])
        comfy.model_management.throw_exception_if_processing_interrupted()
        denoised = self.model(x, asked, **self.extra_args)
        features = self.bottleneck.take(x)
        if self.on_call is not None:
            self.on_call(x, sigma, denoised)
        return denoised, features


def fingerprint(model: Any) -> dict[str, str | int | float]:
    """What a predictor remembers of a loaded MODEL, to refuse another one."""
    base = model.model
    sampling = model.get_model_object("model_sampling")
    return {
        "family": type(base.model_config).__name__,
        "prediction": base.model_type.name,
        "latent_channels": int(base.latent_format.latent_channels),
        "sigma_min": float(sampling.sigma_min),
        "sigma_max": float(sampling.sigma_max),
    }


def refuse_other_model(made_for: dict[str, Any], model: Any) -> None:
    """Raise ValueError if a predictor made for one model meets another, naming the difference."""
    found = fingerprint(model)
    differing = [key for key in ("family", "prediction", "latent_channels") if made_for.get(key) != found[key]]
    if differing:
        raise ValueError(
            "This AMED predictor was made for another model: "
            + ", ".join(f"{key} {made_for.get(key)!r}, but the loaded model has {found[key]!r}" for key in differing)
            + '. Choose a predictor of this model in "AMED Load Predictor", or train one with "AMED Train Predictor".'
        )
