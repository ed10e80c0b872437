"""The bundled digits model as an ordinary ComfyUI model: no download, no GPU."""

from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models_base
import comfy.utils
import torch
from comfy_api.latest import io
from torch import Tensor
from torch.nn import functional

from ..amed_core import digits
from .bridge import at_bottleneck
from .values import CATEGORY, schema

ALL_DIGITS = "0 to 9"
PIXELS = 8  # an image is this much larger than its latent, as with ordinary VAEs


class DigitsLatent(comfy.latent_formats.LatentFormat):
    """One grey channel in [-1, 1]."""

    latent_channels = 1
    latent_rgb_factors = [[1.0, 1.0, 1.0]]  # noqa: RUF012 - ComfyUI's own way


class AMEDDigits(comfy.supported_models_base.BASE):
    """What ComfyUI's loaders would have detected. Its name is the model family in predictor files."""

    latent_format = DigitsLatent
    sampling_settings = {  # noqa: RUF012
        "sigma_min": digits.SIGMA_MIN,
        "sigma_max": digits.SIGMA_MAX,
        "sigma_data": digits.SIGMA_DATA,
    }
    memory_usage_factor = 0.1


class DigitsDiffusionModel(torch.nn.Module):
    """The network with the call that ComfyUI's BaseModel makes, and its patch at the bottleneck."""

    dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.network = digits.load_network()

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
        _, bottleneck = at_bottleneck(transformer_options)
        return self.network(x, timesteps, context, bottleneck)


class DigitsVAE:
    """Shows latents as 8 times larger grey images, and shrinks images to latents."""

    latent_channels, output_channels, latent_dim = 1, 3, 2
    downscale_ratio = upscale_ratio = PIXELS

    def decode(self, samples: Tensor, **options: Any) -> Tensor:
        """(batch, 1, h, w) to images (batch, 8 h, 8 w, 3) in [0, 1]."""
        del options
        large = functional.interpolate(samples.float(), scale_factor=PIXELS, mode="bicubic", align_corners=False)
        return ((large + 1) / 2).clamp(0, 1).expand(-1, 3, -1, -1).movedim(1, -1).cpu()

    def encode(self, pixels: Tensor) -> Tensor:
        """Images (batch, height, width, channels) in [0, 1] to (batch, 1, height / 8, width / 8)."""
        grey = pixels[..., :3].mean(-1)[:, None] * 2 - 1
        return functional.interpolate(grey, size=[s // PIXELS for s in grey.shape[2:]], mode="area")

    def decode_tiled(self, samples: Tensor, **tiling: Any) -> Tensor:
        """The same as `decode`: nothing here needs tiles."""
        del tiling
        return self.decode(samples)

    def encode_tiled(self, pixels: Tensor, **tiling: Any) -> Tensor:
        """The same as `encode`."""
        del tiling
        return self.encode(pixels)

    def spacial_compression_encode(self) -> int:
        return PIXELS

    def spacial_compression_decode(self) -> int:
        return PIXELS

    def temporal_compression_decode(self) -> None:
        return None


def load_digits_model() -> comfy.model_patcher.ModelPatcher:
    """The digits model behind ComfyUI's own BaseModel and ModelPatcher."""
    config = AMEDDigits({"disable_unet_model_creation": True})
    config.set_inference_dtype(torch.float32, None)
    model = comfy.model_base.BaseModel(config, model_type=comfy.model_base.ModelType.EDM)
    model.diffusion_model = DigitsDiffusionModel()
    return comfy.model_patcher.ModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


class AMEDDemoModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AMEDDemoModel",
            display_name="AMED Demo Model",
            category=CATEGORY,
            description="A very small diffusion model of handwritten digits that comes with this pack, for tests. To "
            'try things out, "AMED Demo Checkpoint" has prompts and pictures.',
            inputs=[
                io.Combo.Input(
                    "digit",
                    options=[ALL_DIGITS, *map(str, range(digits.CLASSES))],
                    default=ALL_DIGITS,
                    tooltip='What to draw. "0 to 9" asks for one digit after the other over the batch.',
                ),
                io.Int.Input(
                    "batch_size", default=10, min=1, max=4096, tooltip="How many images; 10 shows each digit once."
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The digits model, to be used as any other MODEL."),
                io.Conditioning.Output(display_name="positive", tooltip="Asks for the chosen digit."),
                io.Conditioning.Output(
                    display_name="negative", tooltip="Asks for any digit: the unconditional part of cfg."
                ),
                io.Latent.Output(display_name="latent", tooltip="An empty latent of 16x16, for images of 128x128."),
                io.Vae.Output(display_name="vae", tooltip="Turns the latents into images."),
            ],
        )

    @classmethod
    def execute(cls, digit: str, batch_size: int) -> io.NodeOutput:
        labels = list(range(digits.CLASSES)) if digit == ALL_DIGITS else [int(digit)]
        device = comfy.model_management.intermediate_device()
        return io.NodeOutput(
            load_digits_model(),
            [[digits.one_hot(labels), {}]],
            [[digits.one_hot([digits.NULL_CLASS]), {}]],
            {"samples": torch.zeros(batch_size, *digits.SHAPE, device=device)},
            DigitsVAE(),
        )
