"""What the README promises about the repository itself."""

import fnmatch
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import amed_core
from scripts import draw_icon

ROOT = Path(__file__).parents[2]
NEEDED = ["__init__.py", "pyproject.toml", "LICENSE", "README.md", "amed_core", "nodes", "predictors"]
SERVED = ["example_workflows", "web", "locales", "subgraphs"]  # what ComfyUI looks for, be it there or not


def test_ci_runs_the_readmes_test_command_and_nothing_else() -> None:
    commands = re.findall(r"^python3 -m venv .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(commands) == 2
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    ran = [line for line in script if line and not line.startswith(("#", "set ", "cd "))]
    assert ran == [commands[1]]


def test_the_workflow_of_the_tests_runs_no_other_command() -> None:
    assert re.findall(r"run: (.*)", (ROOT / ".github" / "workflows" / "tests.yml").read_text()) == ["bash .ci/run"]


def test_versions_agree() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", amed_core.__version__)
    assert re.findall(r'^version = "(.*?)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE) == [
        amed_core.__version__
    ]


def test_the_changelog_begins_with_what_is_unreleased_and_knows_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## \[(.*?)\]", text, re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert headings[1:2] == [amed_core.__version__] or f"what {amed_core.__version__} will hold" in text


@pytest.mark.parametrize("name", [*NEEDED, *SERVED])
def test_the_registrys_archive_lacks_nothing_that_is_needed(name: str) -> None:
    lines = (ROOT / ".comfyignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"/[\w.-]+(/|\*)?", pattern) for pattern in patterns), "of the root alone, and no others"
    assert not any(fnmatch.fnmatch(name, pattern.strip("/")) for pattern in patterns)


@pytest.mark.parametrize("name", ["icon", "banner"])
def test_icon_and_banner_are_what_the_script_draws_and_the_registry_takes(name: str) -> None:
    with Image.open(ROOT / "assets" / f"{name}.png") as image:
        kept, drawn = image.convert("RGBA"), getattr(draw_icon, name)().convert("RGBA")
    assert kept.size == drawn.size
    width, height = kept.size
    assert (width == height <= 400) if name == "icon" else (width * 9 == height * 21)
    difference = np.abs(np.asarray(kept, dtype=float) - np.asarray(drawn, dtype=float)).mean()
    assert difference < 1, "of 255; other versions of Pillow may round otherwise"


def test_everything_the_readme_shows_exists() -> None:
    for text in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "predictors").glob("*.md")]:
        for target in re.findall(r"\]\(((?!http)[^)#]+)\)", text.read_text()):
            assert (text.parent / target).exists(), f"{text.name} shows {target}"


@pytest.mark.trust("supply")
def test_all_weights_have_a_licence_and_name_whose_data_they_learned_from() -> None:
    _, _, licences = (ROOT / "README.md").read_text().partition("\n## Licences\n")
    rows = [line for line in licences.splitlines() if line.startswith("| `")]
    assert all(re.search(r"Apache-2\.0|SIL Open Font License", row.split(" | ")[-1]) for row in rows)
    for file in [*(ROOT / "amed_core").rglob("*.safetensors"), *(ROOT / "predictors").rglob("*.safetensors")]:
        name = file.relative_to(ROOT).as_posix()
        assert any(f"`{name}`" in row or f"`{name.split('/')[0]}/`" in row for row in rows), name
    digits, pictures = (next(row for row in rows if f"{name}.safetensors" in row) for name in ("digits", "pictures"))
    assert "C. Kaynak" in digits
    assert "CC BY 4.0" in digits
    assert "Noto Color Emoji" in pictures
    assert "SIL OPEN FONT LICENSE" in (ROOT / "amed_core" / "pictures.LICENSE").read_text()


@pytest.mark.trust("supply")
def test_the_pack_needs_nothing_at_run_time() -> None:
    assert "dependencies = []" in (ROOT / "pyproject.toml").read_text()
    assert not (ROOT / "requirements.txt").exists()


def test_the_figures_beside_the_demos_picture_are_those_that_it_printed() -> None:
    ours, *unlearned = json.loads((ROOT / "docs" / "demo.json").read_text())
    best = min(unlearned, key=lambda row: row["error"])
    (caption,) = re.findall(r"\]\(docs/demo.png\)\n\n(.*)\n", (ROOT / "README.md").read_text())
    for row in (ours, best):
        assert f"{row['error']:.3f}" in caption
        assert f"{row['error_median']:.3f}" in caption
