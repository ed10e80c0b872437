"""The example of the API, `docs/api/draw.py`, against a real server, and its graph in the real interface."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

API = Path(__file__).parents[2] / "docs" / "api"
GRAPH = json.loads((API / "graph.json").read_text(encoding="utf-8"))
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
READY = "() => window.app?.graph && Object.keys(LiteGraph.registered_node_types).length > 100"


def drawn(server: Any, output: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """What the example does when it is run as a user runs it: isolated, so that it finds the standard library alone."""
    command = [sys.executable, "-I", "-S", str(API / "draw.py"), *arguments, "--output", str(output)]
    command += ["--server", f"http://127.0.0.1:{server.port}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_it_saves_the_picture_of_its_prompt_and_seed(server: Any, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("first.png", "penguin.png", "other.png")]
    for file, (prompt, seed) in zip(files, [("strawberry", 7), ("penguin", 7), ("strawberry", 8)], strict=True):
        done = drawn(server, file, prompt, "--seed", str(seed))
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == str(file)
        with Image.open(file) as picture:
            assert picture.size == (128, 128)
    assert len({file.read_bytes() for file in files}) == len(files)
    (latest,) = server.get("/history?max_items=1").values()
    queued = latest["prompt"][2]
    assert [queued[node]["inputs"].get("text") for node in "23"] == ["strawberry", ""]
    assert queued["5"]["inputs"] == GRAPH["5"]["inputs"] | {"seed": 8}
    red, _, blue = Image.open(files[0]).resize((1, 1)).getpixel((0, 0))
    assert red > blue, "a strawberry is red"


def test_what_the_server_refuses_is_said(server: Any, tmp_path: Path) -> None:
    done = drawn(server, tmp_path / "none.png", "--seed", "-1")
    assert done.returncode
    assert "seed" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "none.png").exists()


@pytest.mark.skipif(
    CHROMIUM is None or importlib.util.find_spec("playwright") is None,
    reason="needs chromium and pip install playwright",
)
def test_its_graph_is_what_the_interface_exports(server: Any) -> None:
    from playwright.sync_api import sync_playwright  # noqa: PLC0415

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{server.port}/")
        page.wait_for_function(READY, timeout=120_000)
        page.evaluate("graph => app.loadApiJson(graph, 'example')", GRAPH)
        exported = page.evaluate("async () => JSON.stringify((await app.graphToPrompt()).output, null, 2)")
        browser.close()
    assert exported == json.dumps(GRAPH, indent=2)
