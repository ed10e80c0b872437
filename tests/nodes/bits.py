"""What a stock sampling gives to the bit, with this pack and in processes that never saw it."""

import hashlib
import json
import sys
from pathlib import Path
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


def answer(family: Any, sampler: str, scheduler: str) -> str:
    """The bits of what is drawn, or what ComfyUI says instead: not every sampler can draw with every model."""
    try:
        return digest(drawn(family, sampler, scheduler))
    except Exception as error:
        return repr(error)


def main(comfyui: str, file: str, *combinations: str) -> None:
    """Write what each `family sampler scheduler` gives in a ComfyUI that knows nothing of this pack."""
    sys.path.insert(0, comfyui)
    import comfy.cli_args  # noqa: PLC0415

    comfy.cli_args.args.cpu = True
    torch.set_num_threads(1)
    sys.path.append(str(Path(__file__).parent))
    from families import make  # noqa: PLC0415

    families = {name: make(name) for name in {one.split()[0] for one in combinations}}
    answers = {one: answer(families[one.split()[0]], *one.split()[1:]) for one in combinations}
    assert not [name for name in sys.modules if name.startswith("amed")]
    Path(file).write_text(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
