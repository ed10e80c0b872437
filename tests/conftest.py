"""The repository root goes last on the path: first, our `nodes` folder would hide ComfyUI's nodes.py."""

import sys
from pathlib import Path

import pytest
import torch

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parent / "nodes")]
from comfyui import COMFYUI, WHY_NOT, summary

torch.set_num_threads(1)
# What is equal in float32 is not in the 10 bits that a GPU keeps of it by default in convolutions.
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The last lines of the run say how many node tests ran and where, or why they did not."""
    counts = [
        sum(
            "nodes/" in getattr(report, "nodeid", "").partition("::")[0]
            for report in terminalreporter.stats.get(outcome, [])
        )
        for outcome in ("passed", "failed", "skipped", "error")
    ]
    if any(counts):
        terminalreporter.write_line(f"node tests: none, {WHY_NOT}" if COMFYUI is None else summary(COMFYUI, *counts))
