"""What ComfyUI's own model families are built from at toy size."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Extra = Callable[[int, torch.Generator], dict[str, Any]]  # of a prompt of so many tokens


def unet(**changes: Any) -> dict[str, Any]:
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


def _flux(**changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = {
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
        "guidance_embed": False,
        "txt_ids_dims": [],
    }
    return config | changes


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


_FLUX2 = {
    "image_model": "flux2",
    "in_channels": 128,
    "out_channels": 128,
    "patch_size": 1,
    "vec_in_dim": None,
    "axes_dim": [8, 8, 8, 8],
    "qkv_bias": False,
    "ops_bias": False,
    "guidance_embed": True,
    "global_modulation": True,
    "mlp_silu_act": True,
    "default_ref_method": "index",
    "txt_ids_dims": [3],
}
_RADIANCE = {
    "image_model": "chroma_radiance",
    "in_channels": 3,
    "out_channels": 3,
    "patch_size": 16,
    "vec_in_dim": None,
    "in_dim": 64,
    "out_dim": 64,
    "hidden_dim": 32,
    "n_layers": 1,
    "nerf_hidden_size": 16,
    "nerf_mlp_ratio": 2,
    "nerf_depth": 1,
    "nerf_max_freqs": 4,
    "nerf_tile_size": 0,
    "nerf_final_head_type": "conv",
    "nerf_embedder_dtype": torch.float32,
    "use_x0": False,
    "use_sequential_txt_ids": False,
}
_HUNYUAN = {
    "image_model": "hunyuan_video",
    "vec_in_dim": None,
    "theta": 256,
    "byt5": False,
    "meanflow": False,
    "meanflow_sum": False,
    "use_cond_type_embedding": False,
    "vision_in_dim": None,
}
_HUNYUAN_IMAGE = {
    "in_channels": 64,
    "out_channels": 64,
    "patch_size": [1, 1],
    "axes_dim": [16, 16],
    "guidance_embed": True,
}
_HUNYUAN_VIDEO_15 = {
    "in_channels": 65,
    "out_channels": 32,
    "patch_size": [1, 1, 1],
    "meanflow_sum": True,
    "use_cond_type_embedding": True,
    "vision_in_dim": 32,
}
_Z_IMAGE = {
    "dim": 256,
    "n_kv_heads": 2,
    "axes_dims": [32, 48, 48],
    "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
}
_COSMOS = {
    "image_model": "cosmos",
    "max_img_h": 240,
    "max_img_w": 240,
    "max_frames": 128,
    "in_channels": 16,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "model_channels": 64,
    "num_blocks": 1,
    "num_heads": 2,
    "crossattn_emb_channels": 32,
    "pos_emb_cls": "rope3d",
    "use_adaln_lora": True,
    "adaln_lora_dim": 16,
}
_COSMOS_1 = {
    "block_config": "FA-CA-MLP",
    "block_x_format": "THWBD",
    "extra_per_block_abs_pos_emb": True,
    "extra_per_block_abs_pos_emb_type": "learnable",
    "pos_emb_interpolation": "crop",
    "affline_emb_norm": True,
}
_LTXV = {
    "image_model": "ltxv",
    "in_channels": 128,
    "cross_attention_dim": 64,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "caption_channels": 32,
    "num_layers": 1,
}
_LTXAV = {
    "image_model": "ltxav",
    "audio_in_channels": 128,
    "audio_cross_attention_dim": 64,
    "audio_attention_head_dim": 32,
    "audio_num_attention_heads": 2,
    "connector_num_attention_heads": 2,
    "connector_attention_head_dim": 16,
    "connector_num_layers": 1,
}
_COGVIDEO = {
    "image_model": "cogvideox",
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "time_embed_dim": 32,
    "text_embed_dim": 32,
    "num_layers": 1,
    "use_rotary_positional_embeddings": True,
}
_ERNIE = {
    "image_model": "ernie",
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_layers": 1,
    "ffn_hidden_size": 128,
    "text_in_dim": 32,
    "rope_axes_dim": (8, 12, 12),
}
_HIDREAM_O1 = {
    "image_model": "hidream_o1",
    "text_config_overrides": {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "rope_dims": [8, 4, 4],
    },
    "vision_config_overrides": {
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 32,
        "depth": 1,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": (),
    },
}
_MINIMAX = {
    "image_model": "minimax_h3",
    "hidden_size": 64,
    "num_layers": 1,
    "token_refiner_num_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "ffn_hidden_size": 64,
    "text_dim": 32,
    "timestep_input_dim": 32,
    "time_embed_hidden_size": 32,
    "time_embed_dim": 32,
    "rope_inv_freq_len": 4,
}
_SPLAT = {
    "image_model": "triposplat",
    "q_token_length": 32,
    "model_channels": 64,
    "cond_channels": 32,
    "num_blocks": 1,
    "num_refiner_blocks": 1,
    "num_head_channels": 32,
}
_HUNYUAN_3D = {
    "image_model": "hunyuan3d2",
    "context_in_dim": 32,
    "hidden_size": 64,
    "num_heads": 2,
    "depth": 1,
    "depth_single_blocks": 1,
}
_ACE = {
    "audio_model": "ace",
    "num_layers": 1,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "text_embedding_dim": 32,
    "lyric_encoder_vocab_size": 32,
    "lyric_hidden_size": 32,
    "ssl_latent_dims": [32, 32],
}
_TIME_TOKEN = 151673  # HiDream-O1's, last in a prompt, in whose place it puts the noise level


def _nothing(tokens: int, generator: torch.Generator) -> dict[str, Any]:
    del tokens, generator
    return {}


def _mask(tokens: int, generator: torch.Generator) -> dict[str, Any]:
    del generator
    return {"attention_mask": torch.ones(1, tokens, dtype=torch.long)}


def _words(tokens: int, generator: torch.Generator) -> dict[str, Any]:
    words = torch.randint(1000, (1, tokens - 1), generator=generator)
    return {"text_input_ids": torch.cat([words, torch.tensor([[_TIME_TOKEN]])], dim=1)}


def _t5_words(tokens: int, generator: torch.Generator) -> dict[str, Any]:
    return {"t5xxl_ids": torch.randint(1000, (tokens,), generator=generator), "t5xxl_weights": torch.ones(tokens)}


def _lyrics(tokens: int, generator: torch.Generator) -> dict[str, Any]:
    return {"conditioning_lyrics": torch.randint(32, (1, tokens), generator=generator)}


@dataclass(frozen=True)
class Spec:
    """What to build: a class of comfy.supported_models, its network's settings, and what it is asked with."""

    kind: str
    config: dict[str, Any]
    shape: tuple[int, ...]  # of one latent
    more: tuple[tuple[int, ...], ...] = ()  # of its other streams, where several are packed into one latent
    context: int = 32  # width of a prompt's tokens
    pooled: int = 0
    extra: Extra = _nothing  # what else belongs to a prompt
    flow: bool = True
    batch: int = 2
    masked: bool = True  # whether ComfyUI's own samplers take a mask there


SPECS = {
    "sd15": Spec("SD15", unet(), (4, 16, 16), flow=False),
    "sd2_v": Spec("SD20", unet(**_WIDE), (4, 16, 16), flow=False),
    "sdxl": Spec(
        "SDXL",
        unet(**_WIDE, num_classes="sequential", adm_in_channels=2816),
        (4, 16, 16),
        pooled=1280,
        flow=False,
    ),
    "flux": Spec("Flux", _flux(guidance_embed=True), (16, 16, 16), pooled=16),
    "flux_schnell": Spec("FluxSchnell", _flux(), (16, 16, 16), pooled=16),
    "flux2": Spec("Flux2", _flux(**_FLUX2), (128, 8, 8)),
    "ernie_image": Spec("ErnieImage", _ERNIE, (128, 8, 8)),
    "chroma_radiance": Spec("ChromaRadiance", _flux(**_RADIANCE), (3, 32, 32), pooled=16),
    "sd3": Spec("SD3", _SD3, (16, 16, 16), pooled=2048),
    "lumina2": Spec("Lumina2", _LUMINA, (16, 16, 16), extra=_mask),
    "z_image": Spec("ZImage", _LUMINA | _Z_IMAGE, (16, 16, 16), extra=_mask),
    "qwen_image": Spec("QwenImage", _QWEN, (16, 1, 16, 16)),
    "anima": Spec("Anima", _COSMOS | {"image_model": "anima"}, (16, 1, 16, 16), extra=_t5_words),
    "hidream_o1": Spec("HiDreamO1", _HIDREAM_O1, (3, 64, 64), extra=_words),
    "hunyuan_image21": Spec("HunyuanImage21", _flux(**_HUNYUAN | _HUNYUAN_IMAGE), (64, 8, 8)),
    "wan21": Spec("WAN21_T2V", _WAN, (16, 3, 16, 16)),
    "wan22_5b": Spec("WAN22_T2V", _WAN | {"in_dim": 48, "out_dim": 48}, (48, 2, 8, 8)),
    "hunyuan_video15": Spec(
        "HunyuanVideo15", _flux(**_HUNYUAN | _HUNYUAN_VIDEO_15), (32, 2, 8, 8), pooled=16, masked=False
    ),
    "cosmos": Spec("CosmosT2V", _COSMOS | _COSMOS_1, (16, 2, 8, 8), flow=False),
    "cosmos_predict2": Spec(
        "CosmosT2IPredict2", _COSMOS | {"image_model": "cosmos_predict2"}, (16, 1, 16, 16), flow=False
    ),
    "cogvideox": Spec("CogVideoX_T2V", _COGVIDEO, (16, 2, 8, 8), flow=False),
    "ltxv": Spec("LTXV", _LTXV, (128, 2, 4, 4), extra=_mask),
    "ltxav": Spec("LTXAV", _LTXV | _LTXAV, (128, 2, 4, 4), more=((8, 5, 16),), context=64, extra=_mask),
    "minimax_h3": Spec("MiniMaxH3", _MINIMAX, (24, 2, 8, 8), more=((32, 2, 5),), batch=1),
    "stable_audio": Spec("StableAudio", _AUDIO, (64, 96), context=768, flow=False),
    "ace_step": Spec("ACEStep", _ACE, (8, 16, 16), extra=_lyrics),
    "hunyuan3d": Spec("Hunyuan3Dv2", _HUNYUAN_3D, (64, 32)),
    "triposplat": Spec("TripoSplat", _SPLAT, (32, 16), more=((1, 5),)),
}
UNETS = ("sd15", "sd2_v", "sdxl")
DISCRETE = (*UNETS, "cogvideox")  # ComfyUI rounds their levels to timesteps
# In newer ComfyUI they run kernels that have no derivative, or cut their noise level off from it.
FUSED = ("ernie_image", "chroma_radiance", "anima", "hidream_o1", "cosmos_predict2", "minimax_h3")
