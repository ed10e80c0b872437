"""A ComfyUI model as the core's denoiser, and what a predictor may look at in it.

The model is never modified: what is needed of it travels in a clone of the call's model_options.
"""

import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor

from ..amed_core.config import PredictorConfig
from ..amed_core.features import LOOKS, Look, look_at_latent, pool
from ..amed_core.types import Answer, Evaluation, Features, Sample, Sigma
from .streams import Shapes, packed_shapes, streams

COMFYUI = Path(comfy.samplers.__file__).parents[1]
KNOWN = (COMFYUI / "comfy", COMFYUI / "comfy_extras", Path(__file__).parent)
COUNTER = "amed_passes"  # the key of the wrapper that counts them
# Entries of a MODEL's options that may need the negative, or ask it always.
NEEDY = (
    "disable_cfg1_optimization",
    *("sampler_cfg_function", "sampler_calc_cond_batch_function"),
    *("sampler_pre_cfg_function", "sampler_post_cfg_function"),
)
OnCall = Callable[[Sample, Sigma, Sample], None]  # x, sigma (scalar or per sample), denoised


def at_bottleneck(transformer_options: dict[str, Any] | None) -> tuple[dict[str, Any], Callable[[Tensor], Tensor]]:
    """For networks of our own: the options of a call, and what is done to the activations at their bottleneck.

    As ComfyUI's U-Nets do, it hands them to every `output_block_patch`, at ("output", 0).
    """
    options = dict(transformer_options or {}, block=("output", 0))

    def patched(h: Tensor) -> Tensor:
        for patch in options.get("patches", {}).get("output_block_patch", []):
            h, _ = patch(h, h, options)
        return h

    return options, patched


class Bottleneck:
    """Reads the U-Net's bottleneck during one model call, averaged over channels, for the positive rows.

    ComfyUI passes the activations that enter the first output block through `output_block_patch`. Those are the
    bottleneck, after every ControlNet residual. Rows arrive in chunks, one per conditioning, in any order and over any
    number of calls. A chunk is known by its uuid, and only the first event of a uuid counts. Later ones belong to
    perturbed-attention guidance and its like.
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
            pooled = pool(h.detach().float())
            with self.lock:
                for name, rows in zip(uuids, pooled.chunk(len(uuids)), strict=False):
                    self.first.setdefault(name, rows)
                    if name in self.positive:
                        self.found.setdefault(name, rows)
        return h, hsp

    def take(self, x: Sample) -> Features | None:
        """The features (batch, 8, 8) of the finished call, or None if the model has no such bottleneck."""
        with self.lock:
            events = list(self.found.values()) or list(self.first.values())[:1]
            self.found, self.first = {}, {}
        if not events:
            return None
        batch = x.shape[0]
        # Context windows over a batch cut it in pieces that overlap: all samples then share their mean.
        rows = [e if e.shape[0] == batch else e.mean(0, keepdim=True).expand(batch, -1, -1) for e in events]
        return torch.stack([r.to(x.device) for r in rows]).mean(0)


class AddedByGuidance:
    """Reads what guidance adds to the conditional answer during one model call, which it can also take away again.

    It is shown as a difference of the conditional and the unconditional answer, the one that would add as much at the
    scale `made_for`. With plain guidance of that scale it is their own. Where a node changes, bends or drops the
    guidance of a call, a predictor's use of it changes in proportion.
    """

    def __init__(self, made_for: float) -> None:
        self.made_for = made_for
        self.found: Tensor | None = None
        self.dropped = False  # then a call answers as if it had not been guided: its conditional sample

    def patch(self, arguments: dict[str, Any]) -> Tensor:
        """As ComfyUI calls it after guidance."""
        denoised: Tensor = arguments["denoised"]
        if self.dropped:
            conditional: Tensor = arguments["cond_denoised"]
            return conditional
        self.found = (denoised - arguments["cond_denoised"]) / (self.made_for - 1)
        return denoised

    def take(self, denoised: Sample) -> Sample:
        """What was found in the finished call, whose answer is `denoised`; 0 where nothing was guided."""
        found, self.found = self.found, None
        return torch.zeros_like(denoised) if found is None else found


def foreign_code(guider: Any) -> str | None:
    """The file of another pack whose code answers for this guider; None if it is ComfyUI's own, or ours.

    Such code may loop over the model inside a call, and answer something else than the denoised sample. It may be in a
    guider of its own, or put into ComfyUI's. A plan made for an ODE is lost on that.
    """
    code = getattr(type(guider).predict_noise, "__code__", None)
    written_in = Path(getattr(code, "co_filename", "an unknown file"))  # modules of nodes are named by their path
    return None if any(written_in.is_relative_to(folder) for folder in KNOWN) else str(written_in)


def shows_guidance(guider: Any) -> bool:
    """Whether this run's model calls show what guidance adds to them, which may be nothing.

    Guiders with more than two prompts, and those of other packs, add up their answers unseen.
    """
    kind = type(guider)
    plain = kind.predict_noise is comfy.samplers.CFGGuider.predict_noise
    return plain or kind.__name__ in ("Guider_DualModel", "TwoModelsGuider")


def leaves_out_negative(guider: Any, model_options: Mapping[str, Any]) -> bool:
    """Whether, asked at cfg 1, this run's model does not ask the negative and answers its conditional sample.

    A function that changes guidance (RescaleCFG and its like) may need the negative, and says nothing of a call that
    has none.
    """
    if not shows_guidance(guider):
        return False
    of_low = getattr(getattr(guider, "low", None), "model_options", {})  # the second of two models
    return not any(options.get(name) for options in (model_options, of_low) for name in NEEDY)


class Passes:
    """Counts passes of the network, in samples: what ComfyUI hands it in one piece may be of several conditionings."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # several GPUs evaluate conditionings from several threads
        self.samples = 0

    # A compiled model must not trace this.
    @torch.compiler.disable()
    def wrap(self, apply_model: Callable[..., Tensor], x: Tensor, *inputs: Any, **more: Any) -> Tensor:
        """As ComfyUI wraps a pass; it changes nothing."""
        with self.lock:
            self.samples += len(x)
        return apply_model(x, *inputs, **more)


class ComfyDenoiser:
    """`model(x, sigma, **extra_args)` of a ComfyUI sampler, in the core's terms.

    Guidance, masks, ControlNets and areas are already part of `model`; a guided call is one call. With `guidance`, the
    scale that a predictor was made for, it also shows what guidance adds (see `AddedByGuidance`), for which
    `shows_guidance` must be true. Then `conditional` answers without it, and asks no negative where the guider can
    leave it out; elsewhere it is asked and its part taken away, which is the same to rounding. `passes` counts them.
    `levels` are those of the run. With `per_call` they have one entry per call: there the level that is really asked
    takes the place of a nominal one. Otherwise it is put among them.
    """

    def __init__(
        self,
        model: Any,
        extra_args: dict[str, Any],
        levels: Sequence[float],
        *,
        bottleneck: bool,
        guidance: float | None = None,
        per_call: bool = False,
        on_call: OnCall | None = None,
    ) -> None:
        guider = guider_of(model)
        self.model = model
        self.guider = guider
        self.on_call = on_call
        self.per_call = per_call
        self.calls = 0
        sampling = guider.inner_model.model_sampling
        # A learned time scale may leave the levels that the model knows; the run's own are the user's choice.
        self.lowest = min(float(sampling.sigma_min), *(level for level in levels if level > 0))
        self.highest = max(float(sampling.sigma_max), *levels)
        options = comfy.model_patcher.create_model_options_clone(extra_args.get("model_options", {}))
        self.leaves_out = leaves_out_negative(guider, options)
        self.options = options.setdefault("transformer_options", {})
        self.network = Passes()
        add_wrapper_with_key(WrappersMP.APPLY_MODEL, COUNTER, self.network.wrap, self.options)
        self.sample_sigmas: Tensor | None = self.options.get("sample_sigmas")
        self.bottleneck = None
        if bottleneck:
            self.bottleneck = Bottleneck(positive_uuids(guider.conds))
            patches = dict(self.options.get("patches", {}))
            patches["output_block_patch"] = [*patches.get("output_block_patch", []), self.bottleneck.patch]
            self.options["patches"] = patches
        self.added = None if guidance is None else AddedByGuidance(guidance)
        if self.added is not None:
            post = options.get("sampler_post_cfg_function", [])
            options["sampler_post_cfg_function"] = [*post, self.added.patch]
        self.extra_args = {**extra_args, "model_options": options}

    @property
    def passes(self) -> int:
        """Passes of the network so far, in samples."""
        return self.network.samples

    def conditional(self, x: Sample, sigma: Sigma) -> Answer:
        """The answer without guidance. Raises ValueError if the run does not show what guidance adds."""
        if self.added is None:
            raise ValueError("A run that does not show what guidance adds cannot leave it out.")
        cfg = self.guider.cfg
        try:
            if self.leaves_out:
                self.guider.cfg = 1.0
            else:
                self.added.dropped = True
            denoised, features, _ = self(x, sigma)
        finally:
            self.guider.cfg, self.added.dropped = cfg, False
        return denoised, features, None

    def __call__(self, x: Sample, sigma: Sigma) -> tuple[Sample, Features | None, Sample | None]:
        denoised = self._ask(x, sigma)
        features = None if self.bottleneck is None else self.bottleneck.take(x)
        guidance = None if self.added is None else self.added.take(denoised)
        if self.on_call is not None:
            self.on_call(x, sigma, denoised)
        return denoised, features, guidance

    def _ask(self, x: Sample, sigma: Sigma) -> Sample:
        asked = sigma.to(x).reshape(-1).clamp(self.lowest, self.highest)
        asked = asked.expand(x.shape[0]).contiguous()  # a compiled model would compile again for other strides
        comfy.model_management.throw_exception_if_processing_interrupted()
        if self.sample_sigmas is not None:
            self.options["sample_sigmas"] = self._sample_sigmas(asked.detach())
        denoised: Sample = self.model(x, asked, **self.extra_args)
        self.calls += 1
        return denoised

    def _sample_sigmas(self, asked: Tensor) -> Tensor:
        """The run's levels as ComfyUI hands them down: context windows and others look the asked one up there."""
        assert self.sample_sigmas is not None
        known, level = self.sample_sigmas, asked[:1].to(self.sample_sigmas)
        if self.per_call:
            return torch.cat([known[: self.calls], level, known[self.calls + 1 :]])
        return torch.cat([known, level]).sort(descending=True).values


def positive_uuids(conds: dict[str, list[dict[str, Any]]]) -> set[Any]:
    """How the rows of positive prompts are known in this run.

    For a positive prompt with an area ComfyUI adds the negative prompt in the same area, as a copy that
    keeps the positive's uuid. Such copies get their own here; they live as long as the run.
    """
    positive = {c["uuid"] for c in conds.get("positive", []) if "uuid" in c}
    for kind, others in conds.items():
        for c in others:
            if kind != "positive" and c.get("uuid") in positive:
                c["uuid"] = uuid.uuid4()
    return positive


def guider_of(model: Any) -> Any:
    """The guider of what ComfyUI calls `model`: a sampler function gets it wrapped, a Sampler as it is."""
    return model if hasattr(model, "conds") else model.inner_model


def look(config: PredictorConfig, model: Any) -> Look:
    """How a predictor looks at this model: its kind of features, where packed latents and videos need care."""
    guider = guider_of(model)
    see = LOOKS[config.features]
    if config.features == "latent" and (shapes := packed_shapes(guider)):
        see = _look_at_packed(shapes)
    if frames_are_batch(guider):
        one_by_one = see
        return lambda start: one_by_one(start).mean(0, keepdim=True)
    return see


def _look_at_packed(shapes: Shapes) -> Look:
    def see(start: Evaluation) -> Tensor:
        pairs = zip(streams(start.x, shapes), streams(start.denoised, shapes), strict=True)
        return torch.stack([look_at_latent(replace(start, x=x, denoised=d)) for x, d in pairs]).mean(0)

    return see


def frames_are_batch(guider: Any) -> bool:
    """Whether the batch is one video: its frames must be at the same noise level, so they share their plan."""
    handler = guider.model_options.get("context_handler")
    if handler is not None and getattr(handler, "dim", None) == 0:
        return True
    return any("num_video_frames" in c.get("model_conds", {}) for c in guider.conds.get("positive", []))
