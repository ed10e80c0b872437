"""What stock samplers give is the same to the bit with this pack as without it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bits import answer
from comfyui import COMFYUI
from families import make
from toys import apply, k_sample, predictor

from amed_core.samplers import NAMES

FAMILIES = {"flux": (14, 1000), "sd15": (3, 60)}  # combinations of each in the suite, and at most


def combinations(name: str, most: int) -> list[str]:
    """So many of a family with stock samplers and schedulers."""
    import comfy.samplers  # noqa: PLC0415

    ours = {*NAMES, "amed"}
    samplers, schedulers = (
        [name for name in names if name not in ours]
        for names in (comfy.samplers.KSampler.SAMPLERS, comfy.samplers.KSampler.SCHEDULERS)
    )
    every = [f"{name} {sampler} {scheduler}" for sampler in samplers for scheduler in schedulers]
    return every[:: max(len(every) // most, 1)]


@pytest.mark.trust("parity")
def test_stock_output_is_the_same_with_the_pack(pack: Any, tmp_path: Path, trials: Any) -> None:
    """Also after ours have sampled with the same model."""
    chosen = [one for name, (few, most) in FAMILIES.items() for one in combinations(name, trials.many(few, most))]
    command = [sys.executable, str(Path(__file__).parent / "bits.py"), str(COMFYUI), str(tmp_path / "bits.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    without = subprocess.Popen([*command, *chosen], env=environment, cwd=COMFYUI)
    families = {name: make(name) for name in FAMILIES}
    for family in families.values():
        k_sample(family, apply(pack, family, predictor(pack, family, guidance=3.0)), 5, 3.0)
    found = {one: answer(families[one.split()[0]], *one.split()[1:]) for one in chosen}
    assert without.wait(1800) == 0
    expected = json.loads((tmp_path / "bits.json").read_text())
    for one in chosen:
        trials.held(one, found[one] == expected[one], f"{found[one][:80]}, not {expected[one][:80]}")
    assert sum(len(bits) == 64 for bits in expected.values()) > 0.9 * len(chosen), "nearly all can draw"
