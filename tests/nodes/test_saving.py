"""Names of predictor files: what travels to every system, what is refused, and that nothing is overwritten."""

import itertools
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from families import Family
from toys import predictor, train
from trials import Trials

PARTS = (
    *("a", "ä", "a b", " a", "a.", "a .", "a.b", "~", "$", "%", "%year%", "%USERPROFILE%", "learned", "auto", "-"),
    *("", " ", ".", "..", "...", ". .", ".git", " .x", "_1_", "&", "a?", "a*", '"', "<b>", "a|b", "C:", "a:b"),
    *("a\x00b", "\x00", "\n", "\t", "\x1b[0m", "\ud800", "\udcff", "\u202e"),
    *("con", "CON.txt", "nul", "aux .x", "com1", "LPT\u00b9", "CONIN$"),
    *("x" * 120, "x" * 121, "x" * 205, "x" * 5000, "\u540d" * 66, "\u540d" * 67, "\U0001f600" * 51, "e\u0301" * 60),
    *("unfinished", "UNFINISHED", "x.safetensors", ".safetensors", "a_00001_", "a_99999_", "9" * 100),
)


@pytest.mark.trust("saving")
@pytest.mark.parametrize(
    ("written", "listed"),
    [
        ("sdxl_5", "sdxl_5_00001_.safetensors"),
        ("name.safetensors", "name_00001_.safetensors"),
        ('ä b/ü:*?"<>| x', "ä b/ü_______ x_00001_.safetensors"),
        ("con/aux.5", "_con/_aux.5_00001_.safetensors"),
        ("dots. /end.", "dots/end_00001_.safetensors"),
        ("a\\b", "a/b_00001_.safetensors"),
        ("NUL .txt/lpt\u00b9", "_NUL .txt/_lpt\u00b9_00001_.safetensors"),
        ("a\x00b\ud800\u202e\n", "a_b___00001_.safetensors"),
        ("x" * 120, f"{'x' * 120}_00001_.safetensors"),
    ],
)
def test_a_name_travels(pack: Any, flux: Family, models: Path, written: str, listed: str) -> None:
    (name,) = pack.nodes.AMEDSavePredictor.execute(predictor(pack, flux), written).args
    assert name == listed
    assert (models / listed).is_file()


@pytest.mark.trust("saving")
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
        (" Unfinished. /x", "is for what a stopped training leaves"),
        ("x" * 260, "has 260 characters"),
        ("\u540d" * 100, "has 100 characters of many bytes"),
        ("/".join(["folder"] * 50).lstrip("/"), "has 349 characters with its folders"),
        (".git/x", "begins with a dot"),
        ("a/ .hidden", "begins with a dot"),
        ("../amed_predictors/y", "leads out of"),
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


@pytest.mark.trust("saving")
def test_every_name_is_refused_in_words_or_travels_and_is_listed(
    pack: Any, flux: Family, models: Path, trials: Trials
) -> None:
    """And nothing is written anywhere else."""
    nodes, made = pack.nodes, predictor(pack, flux)
    names = [*PARTS, *(f"{a}{slash}{b}" for a, b in itertools.product(PARTS, PARTS) for slash in "/\\")]
    step = len(names) // trials.many(300, len(names))
    models.mkdir()
    for name in names[::step]:
        before = nodes.AMEDSavePredictor.validate_inputs(name)
        try:
            (listed,) = nodes.AMEDSavePredictor.execute(made, name).args
        except ValueError as error:
            trials.held(repr(name), 0 < len(str(error)) <= 300 and str(error) == before, str(error))
            continue
        (written,) = (path for path in models.parent.rglob("*") if path.is_file())
        nodes.predictor_files.folder_paths.filename_list_cache.clear()
        well = before is True and written == models / listed and travels(listed)
        trials.held(repr(name), well and nodes.AMEDLoadPredictor.validate_inputs(listed) is True, listed)
        written.unlink()


ODD = re.compile(r'[<>:"|?*\\\x00-\x1f]|[. ]$')
DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt[\d\u00b9]|conin\$)( *\.|$)", re.IGNORECASE)


def travels(name: str) -> bool:
    """Whether Windows takes a name, and every other system."""
    parts = name.split("/")
    odd = (part for part in parts if not part or ODD.search(part) or DEVICE.match(part) or len(part.encode()) > 255)
    return name.isprintable() and not any(odd)


def test_a_list_of_prompts_that_is_not_there_is_refused_before_anything_runs(
    pack: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import folder_paths  # noqa: PLC0415

    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path))
    for node in (pack.nodes.AMEDTrainPredictor, pack.nodes.AMEDTrainPaperPredictor):
        check = node.validate_inputs
        assert "There is no file list.txt" in check(prompts="list.txt")
        assert "There is no file list.txt" in check(prompts=["list.txt"]), "as a node that takes lists may be given it"
        assert check(prompts="a cat\na dog") is True
    (tmp_path / "list.txt").write_text("a cat\na dog\n", encoding="utf-8")
    assert pack.nodes.AMEDTrainPredictor.validate_inputs(prompts="list.txt") is True
    (tmp_path / "list.txt").write_text("\n", encoding="utf-8")
    assert "holds no prompt" in pack.nodes.AMEDTrainPredictor.validate_inputs(prompts="list.txt")


@pytest.mark.trust("saving")
def test_of_many_that_save_at_once_none_is_lost(pack: Any, flux: Family, models: Path) -> None:
    made = predictor(pack, flux)
    with ThreadPoolExecutor(8) as pool:
        names = list(pool.map(lambda _: pack.nodes.saving.saved(made, "same", "AMED Save Predictor"), range(40)))
    assert len(set(names)) == 40
    assert len(list(models.glob("same_*_.safetensors"))) == 40
    assert not list(models.glob(".*"))


@pytest.mark.trust("saving")
def test_training_saves_by_itself_under_a_telling_name(pack: Any, flux: Family, models: Path) -> None:
    made, _, report, _ = train(pack, flux, steps=3, save_as="auto")
    (file,) = models.glob("*.safetensors")
    assert file.name == "Flux_3_cfg3_00001_.safetensors"
    assert f"Saved as {file.name}" in report
    loaded = pack.amed_core.files.load_predictors(file)
    assert loaded.main.config == made.config


def in_its_place(models: Path, patch: pytest.MonkeyPatch, files: Any) -> None:
    del patch, files
    models.write_text("a file")


def in_a_subfolders_place(models: Path, patch: pytest.MonkeyPatch, files: Any) -> None:
    del patch, files
    models.mkdir()
    (models / "sub").write_text("a file")


def read_only(models: Path, patch: pytest.MonkeyPatch, files: Any) -> None:
    """The superuser may write anywhere, so that the system is made to say it."""
    del models, files

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system", "sub")

    patch.setattr(os, "mkdir", refuse)


def full(models: Path, patch: pytest.MonkeyPatch, files: Any) -> None:
    """Full as soon as something was written."""
    del models

    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    patch.setattr(files.os, "fsync", refuse)


UNWRITABLE = {
    "a file in its place": (in_its_place, "models is a file where a folder belongs: move it away"),
    "a file in a subfolder's place": (in_a_subfolders_place, "sub is a file where a folder belongs: move it away"),
    "read-only": (read_only, "(Read-only file system). Let ComfyUI write in "),
    "full": (full, "(No space left on device). Free space in "),
}


@pytest.mark.trust("saving")
@pytest.mark.parametrize(("fault", "why"), UNWRITABLE.values(), ids=UNWRITABLE)
def test_a_folder_that_cannot_be_written_is_told_in_words_and_costs_nothing(
    pack: Any, flux: Family, models: Path, fault: Any, why: str
) -> None:
    made, node = predictor(pack, flux), pack.nodes.AMEDSavePredictor
    with pytest.MonkeyPatch.context() as patch:
        fault(models, patch, pack.amed_core.files)
        with pytest.raises(ValueError, match="The predictor is not saved") as caught:
            node.execute(made, "sub/name")
    text = str(caught.value)
    assert why in text
    assert str(caught.value.__cause__.strerror) in text, "the system's reason"
    assert text.endswith('then run "AMED Save Predictor" again.')
    assert len(text) <= 300
    assert not [path for path in models.rglob("*") if path.is_file() and path.name != "sub"]
    for path in (models, models / "sub"):
        if path.is_file():
            path.unlink()
    assert node.execute(made, "sub/name").args == ("sub/name_00001_.safetensors",)


@pytest.mark.trust("saving")
@pytest.mark.parametrize(("fault", "why"), UNWRITABLE.values(), ids=UNWRITABLE)
def test_training_hands_over_what_cannot_be_written_and_says_why(
    pack: Any, flux: Family, user: Path, models: Path, monkeypatch: pytest.MonkeyPatch, fault: Any, why: str
) -> None:
    real = pack.nodes.training.saved

    def saved(*given: Any) -> str:
        with pytest.MonkeyPatch.context() as patch:
            fault(models, patch, pack.amed_core.files)
            return str(real(*given))

    monkeypatch.setattr(pack.nodes.training, "saved", saved)
    made, _, report, _ = train(pack, flux, steps=3, save_as="sub/name")
    assert made.config.calls == 3
    (line,) = (line for line in report.splitlines() if line.startswith("NOT saved"))
    assert why.removeprefix("(").replace("). ", "): ") in line
    assert 'connect "AMED Save Predictor" and run again' in line
    assert len(line) <= 300
    assert len(list(user.glob("*.safetensors"))) == 1, "its state stays"


@pytest.mark.trust("saving")
def test_a_full_disk_costs_the_file_and_not_the_fit(pack: Any, flux: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pack.nodes.saving, "save_new", full)
    made, _, report, _ = train(pack, flux, steps=3, save_as="auto")
    assert made.config.calls == 3
    assert "NOT saved (No space left on device)" in report
