"""The rows of everyday.py: kept, found again, and set against stock, without ComfyUI."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import everyday_rows
from benchmarks.everyday_rows import BATCH, FIXED_SIZE, KINDS, LARGER, TEXT, Book, Row, Use

ABOUT = {"comfyui": "0", "seeds": 2}


def row(taught: int, error: float, use: Use = Use(TEXT, 5), **changes: Any) -> Row:  # noqa: B008 - frozen
    made = Row(
        "digits", "amed", use, taught, taught, use.steps, error, "euler, karras", 0.1, "euler, amed", 0.2, 0.001,
        [error, error], [0.1, 0.2], [[116, 5]], ["5 calls, learned from 1 picture."],
    )  # fmt: skip
    return replace(made, **changes)


def test_a_file_is_gone_on_with(tmp_path: Path) -> None:
    file = tmp_path / "everyday.json"
    Book(file, ABOUT).add(row(1, 0.05))
    book = Book(file, ABOUT)
    assert row(1, 0.9).key in book, "whatever its error was"
    assert row(2, 0.05).key not in book
    assert row(1, 0.05, Use(TEXT, 6)).key not in book
    book.add(row(2, 0.04))
    assert everyday_rows.load(file) == [row(1, 0.05), row(2, 0.04)]
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_of_other_seeds_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "everyday.json"
    Book(file, ABOUT).add(row(1, 0.05))
    before = file.read_bytes()
    with pytest.raises(SystemExit, match="was measured with"):
        Book(file, {**ABOUT, "seeds": 3})
    assert file.read_bytes() == before


def test_rows_are_kept_in_mind_without_a_file() -> None:
    book = Book(None, ABOUT)
    book.add(row(1, 0.05))
    assert row(1, 0.05).key in book


def test_a_row_is_compared_with_stock_as_a_whole_and_seed_by_seed() -> None:
    one = row(1, 0.05)
    assert one.ratio == pytest.approx(0.5)
    assert one.same_levels_ratio == pytest.approx(0.25)
    assert one.worst == pytest.approx(0.5)
    assert one.right_calls
    assert not replace(one, calls=116).right_calls
    assert "ratio 0.50" in one.text()


def test_a_line_sums_up_the_uses_of_a_kind() -> None:
    other = Use(TEXT, 8)
    some = [row(1, 0.05), row(2, 0.3), row(1, 0.2, other), row(2, 0.3, other), row(1, 0.05, Use(TEXT, 5, "karras"))]
    ours, others = everyday_rows.summary(some).splitlines()[2:]
    assert ours == "| digits | text-to-image | `amed` | 2 | 1.00, 3.00 | 2.00, 3.00 | 1, 2 | 0.50, 1.50 | 0, 2 |"
    assert others.startswith("| digits | text-to-image | others | 1 | 0.50, 0.50 |")
    assert everyday_rows.cells(some).count("| digits") == 3


def test_a_batch_that_taught_at_once_is_one_row_and_counts_for_fewer_pictures() -> None:
    some = [row(1, 0.05), row(4, 0.05), row(4, 0.3, Use(BATCH, 5, batch=4))]
    (line,) = [one for one in everyday_rows.summary(some).splitlines() if "| batch |" in one]
    assert line.startswith("| digits | batch | `amed` | 1 | 3.00, 3.00 |")


def test_no_use_is_there_twice_and_all_kinds_are() -> None:
    for model in ("digits", "colours"):
        every = list(everyday_rows.uses(model))
        assert len(every) == len(set(every))
        assert {use.kind for use in every} == set(KINDS)
        assert all(0 < use.cut < use.steps or not use.cut for use in every)
    assert not list(everyday_rows.uses(*FIXED_SIZE, (LARGER,)))
    assert math.isclose(everyday_rows.mean([0.5, 2.0]), 1.0)
