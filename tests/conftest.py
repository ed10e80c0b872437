"""The repository root goes last on the path: first, our `nodes` folder would hide ComfyUI's nodes.py."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parent), str(Path(__file__).parent / "nodes")]
from comfyui import COMFYUI, WHY_NOT, summary
from trials import PROMISES, Trials

torch.set_num_threads(1)
# What is equal in float32 is not in the 10 bits that a GPU keeps of it by default in convolutions.
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def pytest_addoption(parser: pytest.Parser) -> None:
    """Which promises of `tests/trust.py` are tried, if not all."""
    parser.addoption("--promise", action="append", default=[], choices=PROMISES)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests of other promises."""
    chosen = config.getoption("--promise")
    if chosen:
        items[:] = [item for item in items if promise_of(item) in chosen]


def promise_of(item: pytest.Item) -> str | None:
    """The promise that a test keeps, if any."""
    marker = item.get_closest_marker("trust")
    if marker is None:
        return None
    (promise,) = marker.args
    assert promise in PROMISES
    return str(promise)


@pytest.fixture(autouse=True)
def promise(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> None:
    """Note for the table of `tests/trust.py` which promise a test keeps."""
    if (kept := promise_of(request.node)) is not None:
        record_property("promise", kept)


@pytest.fixture
def trials(record_property: Callable[[str, object], None]) -> Iterator[Trials]:
    """Counts what a test tries. It fails at its end if anything broke."""
    counted = Trials()
    yield counted
    record_property("tried", counted.tried)
    record_property("broken", json.dumps(counted.broken))
    assert counted.tried
    assert not counted.broken, "\n".join(counted.broken[:20])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The last lines of the run say how many node tests ran and where, or why they did not."""
    counts = [
        sum(
            re.search("(nodes|browser)/", getattr(report, "nodeid", "").partition("::")[0]) is not None
            for report in terminalreporter.stats.get(outcome, [])
        )
        for outcome in ("passed", "failed", "skipped", "error")
    ]
    if any(counts):
        terminalreporter.write_line(f"node tests: none, {WHY_NOT}" if COMFYUI is None else summary(COMFYUI, *counts))
