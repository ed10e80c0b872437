"""The rows of evidence.py: kept, found again and compared, without ComfyUI."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import evidence_rows as rows
from benchmarks.everyday_rows import Book
from benchmarks.evidence_rows import Row, Spread, Versus

ABOUT = {"seeds": 5}


def spread(error: float) -> Spread:
    return Spread(error, 0.9 * error, 1.1 * error, 0.8 * error, 0.7 * error, 1.5 * error, 3 * error)


def row(kind: str, name: str, error: float, calls: int = 5, draw: int | None = None, **changes: Any) -> Row:
    made = Row(
        3.0, calls, 2.0 * calls, kind, name, draw, 300, 1.0, spread(2 * error), spread(error),
        (2 * error, 1.4 * error, error, 0.7 * error), 0.9, 0.1, [1.0] * 12, 0.98, 1.01, 0.99, 1.02,
    )  # fmt: skip
    if kind not in (rows.STOCK, rows.LADDER, rows.CHECK):
        found = Versus("euler, simple", error / 0.1, error / 0.11, error / 0.09, 0.9, 1e-9)
        made = replace(made, latent_versus=found, decoded_versus=found)
    return replace(made, **changes)


EVERY = [
    row(rows.STOCK, "ipndm, beta", 0.12), row(rows.STOCK, "euler, simple", 0.1), row(rows.USED, "uni_pc, simple", 0.2),
    row(rows.OURS, rows.DEFAULT, 0.05, draw=0), row(rows.LEARNED, "learned from 1", 0.06, draw=0),
    row(rows.LEARNED, "learned from 1", 0.08, draw=1), row(rows.PAPER, "amed as published", 0.3, draw=0),
    row(rows.APART, "euler_cfg_pp, simple", 0.4), row(rows.CHECK, "400 calls", 0.001, 400),
    *(row(rows.LADDER, "euler, simple", 0.5 / calls, calls) for calls in (5, 10, 20)),
]  # fmt: skip


def test_rows_are_written_and_read_again(tmp_path: Path) -> None:
    file = tmp_path / "evidence.json"
    book = Book(file, ABOUT, rows.load)
    for one in EVERY:
        book.add(one)
    again = Book(file, ABOUT, rows.load)
    assert [one.text() for one in again.rows] == [one.text() for one in EVERY]
    assert rows.tables(again.rows) == rows.tables(EVERY)
    assert all(one.key in again for one in EVERY)
    assert row(rows.LEARNED, "learned from 1", 0.06, draw=2).key not in again
    assert row(rows.OURS, rows.DEFAULT, 0.05, calls=8, draw=0).key not in again
    assert set(json.loads(file.read_text())) == {"about", "rows"}


def test_the_best_stock_pair_is_the_best_of_its_own_cell() -> None:
    best = rows.best_stock(EVERY, 3.0, 5)
    assert best is not None
    assert best.name == "euler, simple"
    assert rows.best_stock(EVERY, 3.0, 8) is None
    nearer = replace(EVERY[0], latent=spread(0.01))
    assert rows.best_stock([nearer, *EVERY], 3.0, 5, rows.LATENT) == nearer
    assert rows.best_stock([nearer, *EVERY], 3.0, 5) == best
    assert rows.best_stock(EVERY, 1.0, 5) is None


def test_calls_for_the_same_error_follow_a_power_law_exactly() -> None:
    ladder = [(calls, 1 / calls**2) for calls in (3, 5, 8, 12)]
    assert rows.same_error(1 / 36, ladder) == "6.0"
    assert rows.same_error(1 / 25, ladder) == "5.0"
    assert rows.same_error(1 / 9, ladder) == "3"
    assert rows.same_error(0.2, ladder) == "below 3"
    assert rows.same_error(0.001, ladder) == "over 12"


def test_more_calls_never_count_as_worse() -> None:
    assert rows.same_error(0.05, [(3, 0.4), (5, 0.1), (8, 0.2), (12, 0.05)]) == "12.0"
    assert rows.same_error(0.15, [(3, 0.4), (5, 0.1), (8, 0.2), (12, 0.05)]) == rows.same_error(
        0.15, [(3, 0.4), (5, 0.1)]
    )


def test_draws_of_one_method_are_one_line() -> None:
    (line,) = [line for line in rows.errors(EVERY).splitlines() if "learned from 1" in line]
    assert "2 draws" in line
    assert "| 0.70 (" in line, "the mean of 0.6 and 0.8"
    assert rows.errors(EVERY).count("ipndm, beta") == 0, "only the best stock pair"
    assert "400 calls" not in rows.errors(EVERY) + rows.looks(EVERY)
    assert "400 calls" in rows.teachers(EVERY)


def test_goals_say_the_median_and_the_worst_cell_and_how_far_stock_has_to_go() -> None:
    other = [replace(one, cfg=6.0) for one in EVERY]
    worse = Versus("euler, simple", 0.9, 0.8, 1.0, 0.6, 0.01)
    other = [replace(one, decoded_versus=worse, sharp=0.9) if one.kind == rows.OURS else one for one in other]
    (line,) = [line for line in rows.goals([*EVERY, *other]).splitlines() if line.startswith("| default")]
    assert line == "| default | 2 | 0.70 | 0.90 | 0.900 | 1.010 | 10.0, 10.0 | 10.0, 10.0 |"


def test_a_line_of_a_cell_has_ratio_ratio_of_medians_and_seeds_won() -> None:
    (line,) = [line for line in rows.cells(EVERY).splitlines() if line.startswith("| 3 | 5 |")]
    assert line == "| 3 | 5 | 10 | euler, simple | 0.1000, 0.0700 | 0.50, 0.50, 90% | 0.70, 0.70, 90% |"


def test_every_table_stands_without_a_row_and_with_any_kind_missing() -> None:
    assert rows.tables([])
    for kind in rows.KINDS:
        assert rows.tables([one for one in EVERY if one.kind != kind])


def test_a_row_says_its_figures() -> None:
    said = EVERY[3].text()
    assert "0.50 of stock's" in said
    assert "10 passes" in said
    with pytest.raises(ValueError, match="not in tuple"):
        rows.KINDS.index("another")
