"""The help pages that ComfyUI's (i) button shows: one for every node, readable in a panel of 300 pixels."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "web" / "docs"
FEWEST_WORDS = 120
LARGEST_PICTURE, LARGEST_FOLDER = 60 * 1024, 1536 * 1024  # bytes
PICTURE = re.compile(r"!\[[^\]]*\]\(([^)\s]+)\)")


def nodes() -> list[str]:
    """The classes of NODES, whose names are the nodes' ids; read, since without ComfyUI none can be imported."""
    tree = ast.parse((ROOT / "nodes" / "__init__.py").read_text(encoding="utf-8"))
    (listed,) = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "NODES"
    ]
    assert isinstance(listed, ast.Tuple)
    return [ast.unparse(one) for one in listed.elts]


def page(node: str) -> str:
    return (DOCS / node / "en.md").read_text(encoding="utf-8")


each = pytest.mark.parametrize("node", nodes())


def test_every_page_is_of_a_node() -> None:
    assert sorted(folder.name for folder in DOCS.iterdir()) == sorted(nodes())


@each
def test_a_page_says_something_and_has_no_table(node: str) -> None:
    text = page(node)
    assert len(text.split()) >= FEWEST_WORDS
    assert not [line for line in text.splitlines() if line.lstrip().startswith("|")], "the panel is too narrow"


@each
def test_a_page_shows_small_pictures_that_exist(node: str) -> None:
    """The browser takes their addresses from web/docs on, wherever the page itself lies."""
    shown = PICTURE.findall(page(node))
    assert shown
    for name in shown:
        assert (DOCS / name).stat().st_size <= LARGEST_PICTURE, name


@each
def test_a_page_names_only_nodes_of_ours_that_exist(node: str) -> None:
    named = re.findall(r"\*\*(AMED [\w ]+)\*\*", page(node))
    assert {name.replace(" ", "") for name in named} <= set(nodes())


def test_no_picture_is_left_over_and_all_are_a_small_download() -> None:
    shown = {DOCS / name for node in nodes() for name in PICTURE.findall(page(node))}
    files = {file for file in DOCS.rglob("*") if file.is_file()}
    assert {file for file in files if file.suffix != ".md"} == shown
    assert sum(file.stat().st_size for file in files) <= LARGEST_FOLDER
