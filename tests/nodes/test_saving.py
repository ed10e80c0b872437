"""Names of predictor files: what travels to every system, what is refused, and that nothing is overwritten."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from families import Family
from toys import predictor, train


@pytest.mark.parametrize(
    ("written", "listed"),
    [
        ("sdxl_5", "sdxl_5_00001_.safetensors"),
        ("name.safetensors", "name_00001_.safetensors"),
        ('ä b/ü:*?"<>| x', "ä b/ü_______ x_00001_.safetensors"),
        ("con/aux.5", "_con/_aux.5_00001_.safetensors"),
        ("dots. /end.", "dots/end_00001_.safetensors"),
        ("a\\b", "a/b_00001_.safetensors"),
    ],
)
def test_a_name_travels(pack: Any, flux: Family, models: Path, written: str, listed: str) -> None:
    (name,) = pack.nodes.AMEDSavePredictor.execute(predictor(pack, flux), written).args
    assert name == listed
    assert (models / listed).is_file()


@pytest.mark.parametrize(
    ("written", "why"),
    [
        ("", "The name is empty"),
        ("folder/", "The name is empty"),
        ("../../evil", "leads out of models/amed_predictors"),
        ("a/../../b", "leads out of"),
        ("/tmp/x", "leads out of"),
        ("C:\\x", "leads out of"),
        ("unfinished/x", "is for what a stopped training leaves"),
        ("x" * 260, "has 260 characters"),
    ],
)
def test_a_name_is_refused_before_anything_runs(pack: Any, flux: Family, models: Path, written: str, why: str) -> None:
    nodes = pack.nodes
    assert why in nodes.AMEDSavePredictor.validate_inputs(written)
    if written:  # which saves nothing
        assert why in nodes.AMEDTrainPredictor.validate_inputs(save_as=[written])
        assert why in nodes.AMEDTrainPaperPredictor.validate_inputs(save_as=written)
    with pytest.raises(ValueError, match=why):
        nodes.AMEDSavePredictor.execute(predictor(pack, flux), written)
    assert not list(models.rglob("*.safetensors"))


def test_steps_are_checked_before_anything_runs(pack: Any) -> None:
    check = pack.nodes.AMEDTrainPredictor.validate_inputs
    assert check(steps=["3-10"]) is True
    assert "five" in check(steps="five")


def test_of_many_that_save_at_once_none_is_lost(pack: Any, flux: Family, models: Path) -> None:
    made = predictor(pack, flux)
    with ThreadPoolExecutor(8) as pool:
        names = list(pool.map(lambda _: pack.nodes.saving.saved(made, "same", "AMED Save Predictor"), range(40)))
    assert len(set(names)) == 40
    assert len(list(models.glob("same_*_.safetensors"))) == 40
    assert not list(models.glob(".*"))


def test_training_saves_by_itself_under_a_telling_name(pack: Any, flux: Family, models: Path) -> None:
    made, _, report, _ = train(pack, flux, steps=3, save_as="auto")
    (file,) = models.glob("*.safetensors")
    assert file.name == "Flux_3_cfg3_00001_.safetensors"
    assert f"Saved as {file.name}" in report
    loaded = pack.amed_core.files.load_predictors(file)
    assert loaded.main.config == made.config


def test_a_full_disk_costs_the_file_and_not_the_fit(pack: Any, flux: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pack.nodes.saving, "save_new", full)
    made, _, report, _ = train(pack, flux, steps=3, save_as="auto")
    assert made.config.calls == 3
    assert "NOT saved (No space left on device)" in report
