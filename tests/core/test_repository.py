"""What the README promises about the repository itself."""

import json
import re
from pathlib import Path

import amed_core

ROOT = Path(__file__).parents[2]


def test_ci_runs_the_readmes_test_command_and_nothing_else() -> None:
    commands = re.findall(r"^python3 -m venv .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(commands) == 2
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    ran = [line for line in script if line and not line.startswith(("#", "set ", "cd "))]
    assert ran == [commands[1]]


def test_versions_agree() -> None:
    assert f'version = "{amed_core.__version__}"' in (ROOT / "pyproject.toml").read_text()


def test_everything_the_readme_shows_exists() -> None:
    for text in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "predictors").glob("*.md")]:
        for target in re.findall(r"\]\(((?!http)[^)#]+)\)", text.read_text()):
            assert (text.parent / target).exists(), f"{text.name} shows {target}"


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
