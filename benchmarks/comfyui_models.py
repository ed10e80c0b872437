"""The benchmarks' models as ComfyUI models: digits (EDM), colours and pictures (flow), mixture (discrete eps).

Call `comfyui.load_pack()` before.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models_base
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1]))
from amed_core.digits import CLASSES, NULL_CLASS, one_hot
from benchmarks import colours, mixture

DRAWINGS = 48  # of pictures, that samples ask for in turn
TRAINING = (8, 16)  # prompts of a fit: so many batches of so many
UNSEEN = 1000  # drawings from this number on are not among them


@dataclass(frozen=True)
class Subject:
    """A model with what it is asked for; the prompts' rows take turns over a batch."""

    model: Any  # ModelPatcher
    positive: list[Any]
    negative: list[Any]
    latent: Tensor  # of one sample, with its batch
    classes: int
    data: Callable[[int], Tensor] | None = None
    training: tuple[list[Any], ...] = ()  # prompts of a fit, where they are others than `positive`

    @property
    def fitted(self) -> list[list[Any]]:
        """The prompts that a fit is given."""
        return list(self.training) or [self.positive]


class ColoursLatent(comfy.latent_formats.LatentFormat):
    latent_channels = 3


class MixtureLatent(comfy.latent_formats.LatentFormat):
    latent_channels = mixture.SHAPE[0]
    latent_dimensions = 3


class AMEDColours(comfy.supported_models_base.BASE):
    latent_format = ColoursLatent
    sampling_settings = {"shift": 1.0}  # noqa: RUF012
    memory_usage_factor = 0.1


class AMEDMixture(comfy.supported_models_base.BASE):
    latent_format = MixtureLatent
    memory_usage_factor = 0.1


class ColoursModel(torch.nn.Module):
    """The network as ComfyUI calls it: timesteps are 1000 sigma."""

    dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.network = colours.load_network()

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, **extra: Any) -> Tensor:
        options = dict(extra.get("transformer_options") or {}, block=("output", 0))

        def bottleneck(h: Tensor) -> Tensor:
            for patch in options.get("patches", {}).get("output_block_patch", []):
                h, _ = patch(h, h, options)
            return h

        sigma = timesteps.reshape(-1, 1, 1, 1) / 1000
        velocity: Tensor = self.network(*colours.scaled(x, sigma), context, bottleneck)
        return velocity


class MixtureModel(torch.nn.Module):
    """The closed form as ComfyUI calls a discrete eps model: x at unit scale, and the number of a timestep."""

    dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.mixture = mixture.Mixture()
        self.register_buffer("log_sigmas", mixture.timesteps().log())

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, **extra: Any) -> Tensor:
        del extra
        below = timesteps.double().floor().long().clamp(0, len(self.log_sigmas) - 2)
        low, high = self.log_sigmas[below], self.log_sigmas[below + 1]
        sigma = torch.lerp(low, high, timesteps.double() - below).exp().reshape(-1, 1, 1, 1, 1)
        noisy = x.double() * (1 + sigma.square()).sqrt()
        denoised = self.mixture.denoised(noisy, sigma, context[:, 0].argmax(1))
        return ((noisy - denoised) / sigma).to(x)


def patcher(config: Any, kind: Any, network: torch.nn.Module) -> Any:
    """The network behind ComfyUI's own BaseModel and ModelPatcher."""
    settings = config({"disable_unet_model_creation": True})
    settings.set_inference_dtype(torch.float32, None)
    model = comfy.model_base.BaseModel(settings, model_type=kind)
    model.diffusion_model = network
    mm = comfy.model_management
    return comfy.model_patcher.ModelPatcher(model, mm.get_torch_device(), mm.unet_offload_device())


def subject(pack: Any, name: str) -> Subject:
    """The model of this name: digits, colours, mixture or pictures. Raises ValueError for another name."""
    if name == "digits":
        model, positive, negative, latent, _ = pack.nodes.AMEDDemoModel.execute("0 to 9", 1).args
        data = pack.amed_core.digits.DigitsDenoiser().data
        return Subject(model, positive, negative, latent["samples"], CLASSES, data)
    if name == "colours":
        model = patcher(AMEDColours, comfy.model_base.ModelType.FLOW, ColoursModel())
        null, count = NULL_CLASS, len(colours.SHAPES)
        return Subject(
            model,
            [[one_hot(range(count)), {}]],
            [[one_hot([null]), {}]],
            torch.zeros(1, *colours.SHAPE),
            count,
            colours.ColoursDenoiser().data,
        )
    if name == "mixture":
        model = patcher(AMEDMixture, comfy.model_base.ModelType.EPS, MixtureModel())
        classes = torch.eye(mixture.CLASSES + 1)[:, None]
        return Subject(
            model,
            [[classes[: mixture.CLASSES], {}]],
            [[classes[mixture.NULL_CLASS :], {}]],
            torch.zeros(1, *mixture.SHAPE),
            mixture.CLASSES,
            mixture.MixtureDenoiser().data,
        )
    if name == "pictures":
        model, clip, _ = pack.nodes.AMEDDemoCheckpoint.execute().args
        about = pack.amed_core.pictures.PicturesDenoiser()
        batches, size = TRAINING
        return Subject(
            model,
            prompts(about, clip, UNSEEN, DRAWINGS),
            [[clip.encode_from_tokens(clip.tokenize("")), {}]],
            torch.zeros(1, *about.shape),
            DRAWINGS,
            training=tuple(prompts(about, clip, size * n, size) for n in range(batches)),
        )
    raise ValueError(f'There is no model "{name}": choose digits, colours, mixture or pictures.')


def prompts(about: Any, clip: Any, first: int, count: int) -> list[Any]:
    """A CONDITIONING that asks for so many drawings of a PicturesDenoiser from a number on, a row each."""
    asked = about.for_rows(range(first, first + count)).prompts
    encoded = [clip.encode_from_tokens(clip.tokenize(prompt)) for prompt in asked]
    return [[torch.cat(encoded), {}]]


def checkpoint(pack: Any, batch: int = 1, side: int = 16) -> Any:
    """The bundled text-to-picture model with two prompts and an empty latent, as the node tests have a family."""
    model, clip, _ = pack.nodes.AMEDDemoCheckpoint.execute().args
    positive, negative = ([[clip.encode_from_tokens(clip.tokenize(prompt)), {}]] for prompt in ("strawberry", ""))
    latent = {"samples": torch.zeros(batch, model.model.latent_format.latent_channels, side, side)}
    return SimpleNamespace(model=model, positive=positive, negative=negative, latent=latent)
