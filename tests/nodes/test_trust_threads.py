"""Two threads that sample at once, with a model each, draw what each draws alone."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from families import Family, make
from toys import apply, flat, predictor

STUDENTS = ("amed", "amed_euler", "amed_dpm_2", "amed_ipndm", "amed_dpmpp_2m", "amed_dpmpp_3m")
FAMILIES = ("flux", "sd15", "sd3", "wan21")
CFG = 3.0


def prepared(pack: Any, name: str, student: str) -> tuple[Family, Any, torch.Tensor]:
    """A family, its model with a predictor, and noise, of which ComfyUI's own comes from one generator of all."""
    family = make(name)
    model = apply(pack, family, predictor(pack, family, student, guidance=CFG))
    return family, model, torch.randn(family.latent["samples"].shape, generator=torch.Generator().manual_seed(4))


def drawn(run: tuple[Family, Any, torch.Tensor], student: str, begin: Any = None) -> torch.Tensor:
    """What KSampler draws, after the other thread has come as far."""
    import comfy.sample  # noqa: PLC0415

    family, model, noise = run
    if begin is not None:
        begin.wait()
    prompts = (family.positive, family.negative)
    with torch.inference_mode():
        return flat(
            comfy.sample.sample(
                model, noise, 5, CFG, student, "amed", *prompts, family.latent["samples"], seed=4, disable_pbar=True
            )
        )


@pytest.mark.trust("threads")
def test_two_threads_draw_what_each_draws_alone(pack: Any, trials: Any) -> None:
    uses = [(name, student) for name in FAMILIES for student in STUDENTS]
    runs = [(use, uses[(place + step) % len(uses)]) for step in range(1, 6) for place, use in enumerate(uses)]
    with ThreadPoolExecutor(2) as pool:
        for pair in runs[:: len(runs) // trials.many(6, 115)]:
            made = [prepared(pack, *use) for use in pair]
            alone = [drawn(run, student) for run, (_, student) in zip(made, pair, strict=True)]
            begin = threading.Barrier(2)
            waiting = [pool.submit(drawn, run, student, begin) for run, (_, student) in zip(made, pair, strict=True)]
            for use, one, other in zip(pair, waiting, alone, strict=True):
                trials.held(f"{use} of {pair}", bool((one.result() == other).all()), "other bits than alone")
