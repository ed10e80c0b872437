"""The demo does the whole job and says honestly who wins."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from amed_core.files import load_predictor
from amed_core.pictures import PicturesConfig, PicturesModel, load_pictures
from amed_core.tools.bench import Row
from amed_core.tools.demo import CALLS, CFG, PROMPTS, Judged, conclusion, demo, stock_pairs


@pytest.fixture(scope="module")
def tiny() -> PicturesModel:
    """The same networks with random weights, small enough for a fit in seconds."""
    generator = torch.Generator().manual_seed(0)
    names = tuple(load_pictures().config.names[:40])
    words = tuple(sorted({word for name in (*names, *PROMPTS) for word in name.split()}))
    model = PicturesModel(PicturesConfig(words, names, width=64, depth=1, modulation=16, vae=(8, 8, 8)))
    for weight in model.requires_grad_(False).eval().parameters():
        weight.normal_(std=0.2, generator=generator)
    return model


def test_the_demo_shows_twelve_prompts_through_teacher_stock_and_amed(
    tiny: PicturesModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo(tmp_path, samples=14, trajectories=4, model=tiny)
    with Image.open(tmp_path / "pictures.png") as sheet:
        assert sheet.width > 12 * 128
        assert sheet.height > 5 * 128
    rows = json.loads((tmp_path / "bench.json").read_text())
    assert {row["calls"] for row in rows} == {CALLS}
    assert rows[0]["method"] == "amed_multistep"
    config = load_predictor(tmp_path / "amed_multistep.safetensors").config
    assert (config.calls, config.guidance, config.model["family"]) == (CALLS, CFG, "AMEDPictures")
    said = capsys.readouterr().out
    assert "nearer to the teacher" in said
    assert "14 noises" in said


def test_every_shown_prompt_is_a_known_drawing() -> None:
    model = load_pictures()
    names = " ".join(model.config.names)
    assert all(prompt in names for prompt in PROMPTS)
    assert Judged(model, lambda count: None).for_rows(range(12)).prompts == PROMPTS


def test_stock_pairs_are_those_that_comfyui_has() -> None:
    names = [pair.name for pair in stock_pairs(load_pictures())]
    assert len(names) == len(set(names))
    assert all(name.endswith(" zero") and "analytic" not in name for name in names)
    assert any(name.startswith("heun") for name in names)
    assert any(name.startswith("euler discrete") for name in names)


@pytest.mark.parametrize(("ours", "who"), [(0.1, "AMED is nearer"), (0.3, "stock is nearer")])
def test_the_conclusion_says_who_wins(ours: float, who: str) -> None:
    def row(name: str, error: float) -> Row:
        return Row(name, CALLS, error, error, error, error, error, None, 0.0, None, None)

    text = conclusion(row("amed_multistep", ours), row("euler discrete zero", 0.2), 48)
    assert text.count(who) == 2
    assert f"ratio {ours / 0.2:.2f}" in text
