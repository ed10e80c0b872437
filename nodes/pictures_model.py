"""The bundled text-to-picture model as Load Checkpoint gives a model: MODEL, CLIP and VAE, with no download."""

from types import SimpleNamespace
from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models_base
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.sd1_clip import escape_important, token_weights, unescape_important
from comfy_api.latest import io
from torch import Tensor

from ..amed_core import pictures
from .bridge import at_bottleneck
from .values import CATEGORY, schema

Tokens = list[tuple[int, float]]  # of one prompt: word numbers, 0 for none, and their weights


class PicturesLatent(comfy.latent_formats.LatentFormat):
    """Eight channels of about unit variance; how they look is in the weights file."""

    latent_channels = pictures.CHANNELS


class AMEDPictures(comfy.supported_models_base.BASE):
    """What ComfyUI's loaders would have detected. Its name is the model family in predictor files."""

    latent_format = PicturesLatent
    sampling_settings = {"shift": 1.0}  # noqa: RUF012 - ComfyUI's own way
    memory_usage_factor = 0.1


class PicturesDiffusionModel(pictures.PicturesTransformer):
    """The transformer with the call that ComfyUI's BaseModel makes, and its patches: the middle, and attention."""

    dtype = torch.float32

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        **extra: Any,
    ) -> Tensor:
        del control, extra
        options, middle = at_bottleneck(transformer_options)

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            kept = {"skip_reshape": True, "skip_output_reshape": True}
            return optimized_attention(q, k, v, q.shape[1], **kept, transformer_options=options)

        return super().forward(x, timesteps / 1000, context, middle, attention)  # a flow's timesteps are 1000 sigma


class PicturesTokenizer:
    """Prompts to word numbers with ComfyUI's weights, as in "a (penguin:1.2)"; unknown words are passed over."""

    def __init__(self, words: pictures.Words) -> None:
        self.words = words

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **options: Any) -> dict[str, list[Any]]:
        del options
        tokens: Tokens = []
        for part, weight in token_weights(escape_important(text), 1.0):
            numbers = self.words.numbers(unescape_important(part))
            tokens += [(number, weight) for number in numbers if number]
        tokens = (tokens + [(0, 1.0)] * pictures.WORDS)[: pictures.WORDS]
        if return_word_ids:
            return {"words": [[(*token, place) for place, token in enumerate(tokens, start=1)]]}
        return {"words": [tokens]}

    def untokenize(self, tokens: Tokens) -> list[Any]:
        """Each token with the word that it stands for."""
        names = {number: word for word, number in self.words.known.items()}
        return [(token, names.get(token[0], "")) for token in tokens]

    def state_dict(self) -> dict[str, Any]:
        return {}


class PicturesTextEncoder(torch.nn.Module):
    """The embeddings of words with the calls that ComfyUI's CLIP makes."""

    dtypes = frozenset({torch.float32})
    disable_offload = True  # a megabyte or two: not worth loading in parts

    def __init__(self, words: pictures.Words) -> None:
        super().__init__()
        self.words = words

    def set_clip_options(self, options: dict[str, Any]) -> None:
        """There is one layer, and nothing to choose: "CLIP Set Last Layer" changes nothing."""

    def reset_clip_options(self) -> None:
        """See above."""

    def encode_token_weights(self, tokens: dict[str, list[Any]]) -> tuple[Tensor, Tensor]:
        """The words' vectors (1, 8, width), each times its weight, and their sum (1, width)."""
        (first, *_) = tokens["words"]
        device = self.words.vectors.weight.device
        numbers = torch.tensor([[token[0] for token in first]], device=device)
        weights = torch.tensor([[token[1] for token in first]], device=device)
        vectors = self.words(numbers) * weights[..., None]
        kept = vectors.to(comfy.model_management.intermediate_device(), torch.float32)
        return kept, kept.sum(1)

    def load_sd(self, weights: dict[str, Tensor]) -> Any:
        return self.load_state_dict(weights, strict=False)


class PicturesVAE:
    """Pictures to latents and back, as nodes use a VAE of ComfyUI's."""

    latent_channels, output_channels, latent_dim = pictures.CHANNELS, 3, 2
    downscale_ratio = upscale_ratio = pictures.PIXELS

    def __init__(self, network: pictures.PicturesVae) -> None:
        management = comfy.model_management
        self.first_stage_model = network
        self.output_device = management.intermediate_device()
        self.patcher = comfy.model_patcher.ModelPatcher(
            network, load_device=management.vae_device(), offload_device=management.vae_offload_device()
        )

    def _loaded(self) -> tuple[pictures.PicturesVae, torch.device]:
        comfy.model_management.load_models_gpu([self.patcher])
        return self.first_stage_model, self.patcher.load_device

    def decode(self, samples: Tensor, **options: Any) -> Tensor:
        """(batch, 8, h, w) to images (batch, 8 h, 8 w, 3) in [0, 1]."""
        del options
        network, device = self._loaded()
        drawn = [network.decode(one.to(device, torch.float32)) for one in samples.split(1)]
        return ((torch.cat(drawn) + 1) / 2).clamp(0, 1).movedim(1, -1).to(self.output_device)

    def encode(self, pixels: Tensor) -> Tensor:
        """Images (batch, height, width, channels) in [0, 1] to (batch, 8, height / 8, width / 8), cut to fit."""
        network, device = self._loaded()
        for side in (1, 2):
            rest = pixels.shape[side] % pictures.PIXELS
            pixels = pixels.narrow(side, rest // 2, pixels.shape[side] - rest)
        images = pixels[..., :3].movedim(-1, 1) * 2 - 1
        latents = [network.encode(one.to(device, torch.float32)) for one in images.split(1)]
        return torch.cat(latents).to(self.output_device)

    def decode_tiled(self, samples: Tensor, **tiling: Any) -> Tensor:
        """The same as `decode`: nothing here needs tiles."""
        del tiling
        return self.decode(samples)

    def encode_tiled(self, pixels: Tensor, **tiling: Any) -> Tensor:
        """The same as `encode`."""
        del tiling
        return self.encode(pixels)

    def spacial_compression_encode(self) -> int:
        return pictures.PIXELS

    def spacial_compression_decode(self) -> int:
        return pictures.PIXELS

    def temporal_compression_decode(self) -> None:
        return None

    def throw_exception_if_invalid(self) -> None:
        """It is always whole."""

    def is_dynamic(self) -> bool:
        return False

    def get_sd(self) -> dict[str, Tensor]:
        return self.first_stage_model.state_dict()


def load_pictures_model() -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, PicturesVAE]:
    """The bundled model's three parts behind ComfyUI's own BaseModel, ModelPatcher and CLIP."""
    parts = pictures.load_pictures()
    config = AMEDPictures({"disable_unet_model_creation": True})
    config.set_inference_dtype(torch.float32, None)
    *factors, bias = parts.vae.preview.tolist()
    config.latent_format.latent_rgb_factors, config.latent_format.latent_rgb_factors_bias = factors, bias
    model = comfy.model_base.BaseModel(config, model_type=comfy.model_base.ModelType.FLOW)
    network = PicturesDiffusionModel(parts.config)
    network.load_state_dict(parts.transformer.state_dict())
    model.diffusion_model = network.requires_grad_(False).eval()
    management = comfy.model_management
    patcher = comfy.model_patcher.ModelPatcher(
        model, load_device=management.get_torch_device(), offload_device=management.unet_offload_device()
    )
    encoder = PicturesTextEncoder(parts.words)
    target = SimpleNamespace(params={}, clip=lambda **_: encoder, tokenizer=lambda **_: PicturesTokenizer(parts.words))
    clip = comfy.sd.CLIP(target, parameters=sum(weight.numel() for weight in encoder.parameters()))
    return patcher, clip, PicturesVAE(parts.vae)


class AMEDDemoCheckpoint(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AMEDDemoCheckpoint",
            display_name="AMED Demo Checkpoint",
            category=CATEGORY,
            description="A small text-to-picture model that comes with this pack and knows 1,357 drawings by their "
            'names: "strawberry", "penguin", "rocket". Its outputs are those of Load Checkpoint, which takes its place '
            "for a model of your own. It draws 128x128 pixels best.",
            inputs=[],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="Denoises latents; a flow model."),
                io.Clip.Output(display_name="CLIP", tooltip="Reads prompts. Words that it does not know do no harm."),
                io.Vae.Output(display_name="VAE", tooltip="Turns latents into images of 8 times their size, and back."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(*load_pictures_model())
