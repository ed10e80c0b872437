"""The repository root goes last on the path: first, our `nodes` folder would hide ComfyUI's nodes.py."""

import sys
from pathlib import Path

import pytest
import torch

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parent / "nodes")]
from comfyui import COMFYUI, WHY_NOT

torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The last lines of the run say how many node tests ran, or why they did not."""
    reports = {
        outcome: [r for r in terminalreporter.stats.get(outcome, []) if "nodes/" in getattr(r, "nodeid", "")]
        for outcome in ("passed", "failed", "skipped", "error")
    }
    ran = len(reports["passed"]) + len(reports["failed"])
    where = WHY_NOT if COMFYUI is None else f"in the real ComfyUI at {COMFYUI}"
    terminalreporter.write_line(f"node tests: {ran} ran, {len(reports['skipped'])} skipped; {where}")
