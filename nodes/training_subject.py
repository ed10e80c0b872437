"""What is trained on: a MODEL that is asked at every call, prompts, and latents of the size that will be sampled."""

import hashlib
import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.sample
import comfy.samplers
import torch
from torch import Tensor

from ..amed_core.config import PredictorConfig
from ..amed_core.fit.grid_search import search
from ..amed_core.fit.trajectories import Metered
from .bridge import ComfyDenoiser
from .fitting import noisy
from .pairing import of_weights
from .streams import Balance, packed_shapes
from .timesteps import with_interpolated_timesteps

CACHES = ("easycache", "lazycache")  # wrappers that answer for the model
# What a ControlNet's answers depend on, beside its weights.
OF_CONTROL = ("strength", "timestep_percent_range", "cond_hint_original", "extra_concat_orig", "previous_controlnet")


@dataclass(frozen=True)
class Subject:
    """What is trained on: a MODEL and how it is asked."""

    model: Any  # asked at every call, and between its timesteps
    guider: Any  # with all prompts
    latent: Any  # of the size that will be sampled
    prompts: tuple[str, ...]  # names under which the guider has the positive prompts
    digest: str  # of what the prompts say
    rows: int  # of the longest conditioning: it may have one for each picture of a batch


def sized_for(model: Any, latent: Mapping[str, Any]) -> Any:
    """The latent as the samplers of this ComfyUI will see it.

    It has the MODEL's channels. Where an empty latent says for which ratio it was made, it has the MODEL's own size.
    """
    ratios = ("downscale_ratio_spacial", "downscale_ratio_temporal")  # newer ComfyUI; so it spells them
    said = {name: latent[name] for name in ratios if latent.get(name) is not None}
    return comfy.sample.fix_empty_latent_channels(model, latent["samples"], **said)


def shapes_of(latent: Any) -> list[list[int]]:
    """The shapes of a latent with its batch; newer ComfyUI has nested ones, of several shapes."""
    return [list(part.shape) for part in (latent.unbind() if latent.is_nested else [latent])]


def empty(like: Any, batch: int) -> Any:
    """Zeros (batch, ...) of the shape of a latent; newer ComfyUI has nested ones, of several shapes."""
    if like.is_nested:
        return type(like)([torch.zeros(batch, *part.shape[1:]) for part in like.unbind()])
    return torch.zeros(batch, *like.shape[1:])


def prepared(model: Any) -> Any:
    """A MODEL as it is trained on: asked at every call, and between its timesteps."""
    return without_caches(with_interpolated_timesteps(model))


def without_caches(model: Any) -> Any:
    """A clone of a MODEL that is asked at every call; itself if no cache answers for it.

    EasyCache and LazyCache expect one run from high noise to low, and training makes many.
    """
    keys = [key for key in CACHES if any(key in kinds for kinds in model.wrappers.values())]
    if not keys:
        return model
    clone = model.clone()
    clone.model_options["transformer_options"].pop("easycache", None)
    for kind, key in itertools.product(list(clone.wrappers), keys):
        clone.remove_wrappers_with_key(kind, key)
    logging.info(f"AMED: training asks the model itself, without {' and '.join(keys)}.")
    return clone


def inside(subject: Subject, batch: int, seed: int, sigmas: Sequence[float], work: Any) -> Any:
    """The result of `work(model_wrap, like, extra_args)`, run where ComfyUI runs a sampler, on so many zeros."""
    found, latent = [], empty(subject.latent, batch)

    class Work(comfy.samplers.Sampler):
        def sample(
            self, model_wrap: Any, sigmas: Tensor, extra_args: Any, callback: Any, noise: Tensor, *_: Any
        ) -> Tensor:
            found.append(work(model_wrap, noise, extra_args))
            return noise

    subject.guider.sample(latent, latent, Work(), torch.tensor(sigmas), disable_pbar=True, seed=seed)
    return found[0]


def has_bottleneck(subject: Subject, seed: int) -> bool:
    """Whether the model shows its bottleneck, found out by one model call."""
    sampling = subject.model.get_model_object("model_sampling")
    ends = [float(sampling.sigma_max), float(sampling.sigma_min)]

    def work(model_wrap: Any, like: Tensor, extra_args: Any) -> bool:
        denoiser = ComfyDenoiser(model_wrap, extra_args, ends, bottleneck=True)
        return denoiser(like, torch.tensor(ends[0]).to(like))[1] is not None

    return bool(inside(subject, 1, seed, ends, work))


def on_searched_grid(subject: Subject, seed: int, config: PredictorConfig, count: int) -> PredictorConfig:
    """The settings on the grid that is found by a slow run of so many noises."""

    def work(model_wrap: Any, like: Tensor, extra_args: Any) -> PredictorConfig:
        balance = Balance.of(packed_shapes(model_wrap), like)
        denoiser = balance.denoiser(ComfyDenoiser(model_wrap, extra_args, config.sigmas, bottleneck=False))

        def draw(rows: range) -> tuple[Tensor, Any]:
            return balance.scaled(noisy(model_wrap, rows, like, config.sigmas[0], seed)), denoiser

        x, metered = Metered(draw)(range(count))  # which knows what to do if memory is short
        return search(metered, x, config)

    found: PredictorConfig = inside(subject, count, seed, config.sigmas, work)
    return found


def digest(value: Any) -> str:
    """A name for anything that conditionings are made of."""
    content = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, Tensor):
            content.update(repr((tuple(part.shape), str(part.dtype))).encode())
            content.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(part, Mapping):
            for key in sorted(part, key=str):
                content.update(str(key).encode())
                add(part[key])
        elif isinstance(part, (list, tuple)):
            content.update(f"{len(part)} ".encode())
            for one in part:
                add(one)
        elif isinstance(part, (str, int, float, bool, type(None))):
            content.update(repr(part).encode())
        else:  # of a ControlNet what it shows and its weights; of a hook, or what else there is, its kind must do
            content.update(type(part).__qualname__.encode())
            add([getattr(part, name, None) for name in OF_CONTROL])
            if (weights := getattr(part, "control_model", None)) is not None:
                add(of_weights(weights.state_dict()))

    add(value)
    return content.hexdigest()
