"""Ten of ComfyUI's own model families at toy size: the real classes, seeded random weights, no files."""

import re
from dataclasses import dataclass
from typing import Any

import torch
from comfyui import COMFYUI


def _unet(**changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "num_res_blocks": [1, 1],
        "channel_mult": [1, 2],
        "transformer_depth": [1, 1],
        "transformer_depth_output": [1, 1, 1, 1],
        "transformer_depth_middle": 1,
        "use_linear_in_transformer": False,
        "context_dim": 32,
        "use_spatial_transformer": True,
        "legacy": False,
        "use_checkpoint": False,
        "adm_in_channels": None,
        "use_temporal_attention": False,
        "use_temporal_resblock": False,
    }
    return config | changes


def _flux(guidance_embed: bool) -> dict[str, Any]:
    return {
        "image_model": "flux",
        "in_channels": 16,
        "out_channels": 16,
        "patch_size": 2,
        "vec_in_dim": 16,
        "context_in_dim": 32,
        "hidden_size": 64,
        "mlp_ratio": 2.0,
        "num_heads": 2,
        "depth": 1,
        "depth_single_blocks": 1,
        "axes_dim": [8, 12, 12],
        "theta": 10000,
        "qkv_bias": True,
        "guidance_embed": guidance_embed,
        "txt_ids_dims": [],
    }


_SD3 = {
    "in_channels": 16,
    "patch_size": 2,
    "out_channels": 16,
    "depth": 1,
    "input_size": None,
    "adm_in_channels": 2048,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 32, "out_features": 64}},
    "num_patches": 36864,
    "pos_embed_max_size": 192,
    "pos_embed_scaling_factor": None,
}
_LUMINA = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 96,
    "cap_feat_dim": 32,
    "n_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 1,
    "qk_norm": True,
    "axes_dims": [16, 16, 16],
    "axes_lens": [300, 512, 512],
    "multiple_of": 32,
}
_WAN = {
    "image_model": "wan2.1",
    "model_type": "t2v",
    "dim": 128,
    "out_dim": 16,
    "in_dim": 16,
    "num_heads": 1,
    "ffn_dim": 256,
    "num_layers": 1,
    "patch_size": (1, 2, 2),
    "freq_dim": 256,
    "window_size": (-1, -1),
    "qk_norm": True,
    "cross_attn_norm": True,
    "eps": 1e-6,
    "text_dim": 32,
}
_QWEN = {
    "image_model": "qwen_image",
    "in_channels": 64,
    "num_layers": 1,
    "attention_head_dim": 64,
    "num_attention_heads": 1,
    "joint_attention_dim": 32,
    "axes_dims_rope": (8, 28, 28),
}
_AUDIO = {
    "audio_model": "dit1.0",
    "io_channels": 64,
    "embed_dim": 64,
    "depth": 1,
    "num_heads": 1,
    "project_cond_tokens": True,
}
_WIDE = {"use_linear_in_transformer": True, "model_channels": 64}


@dataclass(frozen=True)
class Spec:
    """What to build: a class of comfy.supported_models, its network's settings, and what it is asked with."""

    kind: str
    config: dict[str, Any]
    shape: tuple[int, ...]  # of one latent
    context: int = 32  # width of a prompt's tokens
    pooled: int = 0
    flow: bool = True


SPECS = {
    "sd15": Spec("SD15", _unet(), (4, 16, 16), flow=False),
    "sd2_v": Spec("SD20", _unet(**_WIDE), (4, 16, 16), flow=False),
    "sdxl": Spec(
        "SDXL",
        _unet(**_WIDE, num_classes="sequential", adm_in_channels=2816),
        (4, 16, 16),
        pooled=1280,
        flow=False,
    ),
    "flux": Spec("Flux", _flux(guidance_embed=True), (16, 16, 16), pooled=16),
    "flux_schnell": Spec("FluxSchnell", _flux(guidance_embed=False), (16, 16, 16), pooled=16),
    "sd3": Spec("SD3", _SD3, (16, 16, 16), pooled=2048),
    "lumina2": Spec("Lumina2", _LUMINA, (16, 16, 16)),
    "wan21": Spec("WAN21_T2V", _WAN, (16, 3, 16, 16)),
    "qwen_image": Spec("QwenImage", _QWEN, (16, 1, 16, 16)),
    "stable_audio": Spec("StableAudio", _AUDIO, (64, 96), context=768, flow=False),
}
UNETS = ("sd15", "sd2_v", "sdxl")


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
    batch: int = 2,
    shape: tuple[int, ...] = (),
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Family:
    """A family of its own, with `changes` to its network: nothing is shared between two calls."""
    import comfy.model_base  # noqa: PLC0415 - only where ComfyUI is on the path
    import comfy.model_management as mm  # noqa: PLC0415
    import comfy.model_patcher  # noqa: PLC0415
    import comfy.supported_models  # noqa: PLC0415

    spec = SPECS[name]
    config = getattr(comfy.supported_models, spec.kind)(_known(spec.config | changes))
    config.set_inference_dtype(dtype, None)
    if name == "sd2_v":
        config.model_type = lambda state_dict, prefix="": comfy.model_base.ModelType.V_PREDICTION
    model = config.get_model(_other_weights(name), "", device=torch.device("cpu"))
    _fill(model.diffusion_model, seed)
    model.diffusion_model.eval()
    patcher = comfy.model_patcher.ModelPatcher(model, mm.get_torch_device(), mm.unet_offload_device())
    latent = {"samples": torch.zeros(batch, *(shape or spec.shape))}
    return Family(patcher, prompt(name, 1), prompt(name, 2), latent)


def _known(config: dict[str, Any]) -> dict[str, Any]:
    """A network's settings without those that its class does not have yet; there ComfyUI does not set them either."""
    if not config.get("image_model", "").startswith("flux"):
        return config
    from comfy.ldm.flux.model import FluxParams  # noqa: PLC0415

    newer = {"txt_ids_dims"} - FluxParams.__dataclass_fields__.keys()
    return {key: value for key, value in config.items() if key not in newer}


def prompt(name: str, seed: int, tokens: int = 8) -> Any:
    """A CONDITIONING of random tokens."""
    spec = SPECS[name]
    generator = torch.Generator().manual_seed(seed)
    extra: dict[str, Any] = {}
    if spec.pooled:
        extra["pooled_output"] = torch.randn(1, spec.pooled, generator=generator)
    if name == "lumina2":
        extra["attention_mask"] = torch.ones(1, tokens, dtype=torch.long)
    return [[torch.randn(1, tokens, spec.context, generator=generator), extra]]


def _other_weights(name: str) -> dict[str, Any]:
    if name != "stable_audio":
        return {}
    from comfy.ldm.audio.embedders import NumberConditioner  # noqa: PLC0415

    weights = NumberConditioner(768, min_val=0, max_val=512).state_dict()
    generator = torch.Generator().manual_seed(0)
    random = {key: torch.randn(value.shape, generator=generator) * 0.1 for key, value in weights.items()}
    places = ("seconds_start", "seconds_total")
    return {f"conditioner.conditioners.{place}.{key}": value for place in places for key, value in random.items()}


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
        if "pos_embed" in name:
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.02)
        elif name.endswith("inv_freq"):
            buffer.copy_(10000.0 ** -(torch.arange(len(buffer)) / len(buffer)))


def control_net(seed: int = 5) -> Any:
    """A ControlNet for the toy SD1.5, in ComfyUI's own classes."""
    import comfy.cldm.cldm  # noqa: PLC0415
    import comfy.controlnet  # noqa: PLC0415
    import comfy.ops  # noqa: PLC0415

    config = _unet(num_heads=8)
    for unused in ("out_channels", "transformer_depth_output"):
        config.pop(unused)
    network = comfy.cldm.cldm.ControlNet(**config, hint_channels=3, operations=comfy.ops.disable_weight_init)
    _fill(network, seed)
    device = torch.device("cpu")
    return comfy.controlnet.ControlNet(network.eval(), load_device=device)
