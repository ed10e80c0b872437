"""The benchmark of everyday use, on one small use of each way to sample."""

import os
import subprocess
import sys

import pytest
from comfyui import COMFYUI, PACK

from benchmarks import everyday_rows


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[everyday_rows.Row]:
    """Of the mixture, whose calls take no time; in a process of its own, as it loads this pack."""
    file = tmp_path_factory.mktemp("everyday") / "rows.json"
    command = [sys.executable, str(PACK / "benchmarks" / "everyday.py"), "--models", "mixture", "--steps", "5"]
    command += ["--uses", everyday_rows.MASKED, everyday_rows.SPLIT, everyday_rows.ADVANCED, "--taught", "1", "2"]
    command += ["--seeds", "2", "--pupils", "2", "--truth-calls", "40", "--json", str(file)]
    environment = {**os.environ, "COMFYUI_PATH": str(COMFYUI), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "FAILED" not in ran.stdout
    return everyday_rows.load(file)


def test_every_use_has_a_row_for_every_number_of_pictures(rows: list[everyday_rows.Row]) -> None:
    kinds = (everyday_rows.MASKED, everyday_rows.SPLIT, everyday_rows.ADVANCED)
    asked = [use for use in everyday_rows.uses("mixture", kinds) if use.steps == 5]
    assert [(row.use, row.taught) for row in rows] == [(use, count) for use in asked for count in (1, 2)]


def test_so_many_pictures_taught_and_then_every_step_was_one_call(rows: list[everyday_rows.Row]) -> None:
    for row in rows:
        assert row.pictures == row.taught
        assert row.right_calls
        for runs in row.runs:
            slow = [calls for calls in runs if calls > row.use.steps]
            assert len(slow) == row.taught, "none that was slow did not teach"
        assert row.said
        assert len(row.errors) == len(row.stock_errors) == 4, "two pupils, two seeds"


def test_two_nodes_that_do_the_same_do_the_same(rows: list[everyday_rows.Row]) -> None:
    """SplitSigmas and KSamplerAdvanced, with our sampler and with those of stock."""
    errors = {
        kind: [(row.errors, row.stock_errors) for row in rows if row.use.kind == kind]
        for kind in (everyday_rows.SPLIT, everyday_rows.ADVANCED)
    }
    assert errors[everyday_rows.SPLIT] == errors[everyday_rows.ADVANCED]
