"""The documents' tables are what their JSON files say."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import tables

BENCHMARKS, MAIN, EXPERIMENTS, TRUST = tables.DOCUMENTS


@pytest.mark.parametrize("file", tables.DOCUMENTS, ids=["benchmarks", "main", "experiments", "trust"])
def test_marked_tables_are_those_of_their_files(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert tables.written(text) == text


def test_every_table_stands_in_a_document_and_every_marker_is_closed() -> None:
    texts = [file.read_text(encoding="utf-8") for file in (BENCHMARKS, EXPERIMENTS, TRUST)]
    names = [found[1] for text in texts for found in tables.MARKED.finditer(text)]
    assert len(set(names)) == len(names)
    main = {found[1] for found in tables.MARKED.finditer(MAIN.read_text(encoding="utf-8"))}
    assert {*names, *main} == set(tables.TABLES)
    for file in tables.DOCUMENTS:
        text = file.read_text(encoding="utf-8")
        assert text.count("<!-- table: ") == text.count("<!-- end -->") == len(tables.MARKED.findall(text)) > 0


def test_a_changed_figure_is_found_and_put_right() -> None:
    text = BENCHMARKS.read_text(encoding="utf-8")
    begin = text.index("| digits | 1 |")
    changed = text[:begin] + text[begin:].replace("0.", "1.", 1)
    assert changed != text
    assert tables.written(changed) == text


def test_the_benchmarks_document_is_short() -> None:
    assert len(BENCHMARKS.read_text(encoding="utf-8").splitlines()) <= 120


def test_tables_are_written_without_torch_and_comfyui() -> None:
    heavy = "import sys; from benchmarks import tables; print('torch' in sys.modules or 'comfy' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", heavy], cwd=MAIN.parent, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"
