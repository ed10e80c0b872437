"""ComfyUI's own model families at toy size: the real classes, seeded random weights, no files."""

import importlib
import re
from dataclasses import dataclass
from typing import Any

import torch
from comfyui import COMFYUI
from specs import DISCRETE, FUSED, SPECS, UNETS, unet

__all__ = ["DISCRETE", "FUSED", "SPECS", "UNETS", "Family", "control_net", "here", "joined", "make", "prompt"]


def here() -> list[str]:
    """The families that the found ComfyUI has."""
    if COMFYUI is None:
        return []
    text = (COMFYUI / "comfy" / "supported_models.py").read_text(encoding="utf-8")
    classes = re.findall(r"^class (\w+)", text, re.MULTILINE)
    return [name for name, spec in SPECS.items() if spec.kind in classes]


@dataclass(frozen=True)
class Family:
    """A loaded toy model, with two prompts and an empty latent."""

    model: Any
    positive: Any
    negative: Any
    latent: dict[str, Any]


def make(
    name: str,
    seed: int = 0,
    batch: int = 0,
    shape: tuple[int, ...] = (),
    dtype: torch.dtype = torch.float32,
    cast: torch.dtype | None = None,
    **changes: Any,
) -> Family:
    """A family of its own, with `changes` to its network: nothing is shared between two calls.

    Weights of `dtype` are cast to another one at each call, if that is given.
    """
    import comfy.model_base  # noqa: PLC0415 - only where ComfyUI is on the path
    import comfy.model_management as mm  # noqa: PLC0415
    import comfy.model_patcher  # noqa: PLC0415
    import comfy.supported_models  # noqa: PLC0415

    spec = SPECS[name]
    config = getattr(comfy.supported_models, spec.kind)(_known(spec.config | changes))
    config.set_inference_dtype(dtype, cast)
    if name == "sd2_v":
        config.model_type = lambda state_dict, prefix="": comfy.model_base.ModelType.V_PREDICTION
    model = config.get_model(_other_weights(name), "", device=torch.device("cpu"))
    _make_smaller(name, model.diffusion_model)
    _fill(model.diffusion_model, seed)
    model.diffusion_model.eval()
    patcher = comfy.model_patcher.ModelPatcher(model, mm.get_torch_device(), mm.unet_offload_device())
    streams = [torch.zeros(batch or spec.batch, *stream) for stream in (shape or spec.shape, *spec.more)]
    return Family(patcher, prompt(name, 1), prompt(name, 2), {"samples": joined(streams)})


def joined(streams: list[torch.Tensor]) -> Any:
    """A latent of several streams, as ComfyUI has them."""
    if len(streams) == 1:
        return streams[0]
    from comfy.nested_tensor import NestedTensor  # noqa: PLC0415 - of newer ComfyUI

    return NestedTensor(streams)


PARAMETERS = {  # of networks whose class takes no others, and newer versions more
    "flux": "flux.model.FluxParams",
    "flux2": "flux.model.FluxParams",
    "chroma_radiance": "chroma_radiance.model.ChromaRadianceParams",
    "hunyuan_video": "hunyuan_video.model.HunyuanVideoParams",
}


def _known(config: dict[str, Any]) -> dict[str, Any]:
    """A network's settings without those that its class does not have, where ComfyUI does not set them either."""
    if config.get("image_model") not in PARAMETERS:
        return config
    module, _, name = PARAMETERS[config["image_model"]].rpartition(".")
    fields = getattr(importlib.import_module(f"comfy.ldm.{module}"), name).__dataclass_fields__
    return {key: value for key, value in config.items() if key in ("image_model", *fields)}


def prompt(name: str, seed: int, tokens: int = 8) -> Any:
    """A CONDITIONING of random tokens."""
    spec = SPECS[name]
    generator = torch.Generator().manual_seed(seed)
    extra: dict[str, Any] = {}
    if spec.pooled:
        extra["pooled_output"] = torch.randn(1, spec.pooled, generator=generator)
    return [[torch.randn(1, tokens, spec.context, generator=generator), extra | spec.extra(tokens, generator)]]


def _other_weights(name: str) -> dict[str, Any]:
    if name != "stable_audio":
        return {}
    from comfy.ldm.audio.embedders import NumberConditioner  # noqa: PLC0415

    weights = NumberConditioner(768, min_val=0, max_val=512).state_dict()
    generator = torch.Generator().manual_seed(0)
    random = {key: torch.randn(value.shape, generator=generator) * 0.1 for key, value in weights.items()}
    places = ("seconds_start", "seconds_total")
    return {f"conditioner.conditioners.{place}.{key}": value for place in places for key, value in random.items()}


def _make_smaller(name: str, network: Any) -> None:
    """Replace parts whose size no setting reaches."""
    from comfy.ops import disable_weight_init as operations  # noqa: PLC0415

    if name == "anima":
        network.llm_adapter = type(network.llm_adapter)(32, 32, 32, num_layers=1, num_heads=2, operations=operations)
    if name == "ace_step":
        small = {"output_size": 32, "attention_heads": 2, "linear_units": 32, "num_blocks": 1}
        network.lyric_encoder = type(network.lyric_encoder)(32, **small, static_chunk_size=0, operations=operations)


@torch.no_grad()
def _fill(network: torch.nn.Module, seed: int) -> None:
    """ComfyUI leaves new weights uninitialised."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in network.named_parameters():
        if weight.ndim >= 2:
            weight.copy_(torch.randn(weight.shape, generator=generator) * weight[0].numel() ** -0.5)
        elif name.endswith(("weight", "scale", "gamma")):
            weight.fill_(1.0)
        else:
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.02)
    for name, buffer in network.named_buffers():
        if name.endswith("pos_embed"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.02)
        elif name.endswith("inv_freq"):
            buffer.copy_(10000.0 ** -(torch.arange(len(buffer)) / len(buffer)))


def control_net(seed: int = 5) -> Any:
    """A ControlNet for the toy SD1.5, in ComfyUI's own classes."""
    import comfy.cldm.cldm  # noqa: PLC0415
    import comfy.controlnet  # noqa: PLC0415
    import comfy.model_management  # noqa: PLC0415
    import comfy.ops  # noqa: PLC0415

    config = unet(num_heads=8)
    for unused in ("out_channels", "transformer_depth_output"):
        config.pop(unused)
    network = comfy.cldm.cldm.ControlNet(**config, hint_channels=3, operations=comfy.ops.disable_weight_init)
    _fill(network, seed)
    return comfy.controlnet.ControlNet(network.eval(), load_device=comfy.model_management.get_torch_device())
