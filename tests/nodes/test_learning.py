"""KSampler alone: the first picture teaches, the second takes as many calls as steps says."""

from pathlib import Path
from typing import Any

import pytest
from families import Family, make
from toys import heard, k_sample

CFG, STEPS, TEACHER = 3.0, 4, 24


@pytest.fixture(scope="module")
def demo(pack: Any) -> Family:
    """The digits model, asked for two digits."""
    model, positive, negative, latent, _ = pack.nodes.AMEDDemoModel.execute("0 to 9", 2).args
    return Family(model, positive, negative, latent)


@pytest.fixture
def kept(user: Path) -> Path:
    """Where learned sets are."""
    return user.parent / "amed_learned"


def counted(family: Family) -> tuple[Any, list[Any]]:
    """The MODEL, and a list of all it is asked."""
    asked: list[Any] = []
    return heard(family.model, lambda parameters: asked.append(parameters["timestep"])), asked


@pytest.mark.parametrize("name", ["amed", "amed_multistep"])
def test_the_second_run_takes_as_many_calls_as_steps_says(pack: Any, demo: Family, kept: Path, name: str) -> None:
    del pack
    model, asked = counted(demo)
    assert k_sample(demo, model, STEPS, 1.0, name).isfinite().all()
    assert len(asked) > TEACHER
    assert len(list(kept.glob("*.safetensors"))) == 1
    asked.clear()
    assert k_sample(demo, model, STEPS, 1.0, name).isfinite().all()
    assert len(asked) == STEPS


@pytest.mark.parametrize("name", ["sd15", "flux", "wan21"])
def test_it_learns_toy_families(pack: Any, name: str) -> None:
    del pack
    family = make(name)
    model, asked = counted(family)
    at_once = 1 if family.latent["samples"].shape[0] > 1 else 2
    assert k_sample(family, model, STEPS, CFG).isfinite().all()
    asked.clear()
    assert k_sample(family, model, STEPS, CFG).isfinite().all()
    assert len(asked) == STEPS * at_once
