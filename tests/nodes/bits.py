"""What a stock sampling gives to the bit, with this pack and in processes that never saw it."""

import hashlib
from typing import Any

import torch

CFG, SEED = 3.0, 3


def drawn(family: Any, sampler: str, scheduler: str, steps: int = 3, **more: Any) -> torch.Tensor:
    """What KSampler draws, without anything of this pack."""
    import comfy.sample  # noqa: PLC0415 - only where ComfyUI is on the path

    latent = family.latent["samples"]
    noise = comfy.sample.prepare_noise(latent, SEED)
    prompts = (family.positive, family.negative)
    with torch.inference_mode():
        sample: torch.Tensor = comfy.sample.sample(
            family.model, noise, steps, CFG, sampler, scheduler, *prompts, latent, seed=SEED, disable_pbar=True, **more
        )
    return sample


def digest(sample: torch.Tensor) -> str:
    """All bits of a sample, in short."""
    return hashlib.sha256(sample.contiguous().view(torch.uint8).cpu().numpy().tobytes()).hexdigest()
