"""ComfyUI's page in Chromium, and what people do there."""

import importlib.util
import json
import shutil
from typing import Any

import graphs
from graphs import Graph

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
WHY_NO_BROWSER = "needs chromium and pip install playwright"
HAS_BROWSER = CHROMIUM is not None and importlib.util.find_spec("playwright") is not None
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
READY = "() => window.app?.graph && Object.keys(LiteGraph.registered_node_types).length > 100"
TEMPLATES = sorted((graphs.PREDICTORS.parent / "example_workflows").glob("*.json"))


def opened(browser: Any, server: Any) -> Any:
    """A page of its own, as if in a browser of its own, ready to be given a graph. `page.of_ours` lists our errors."""
    page = browser.new_context(viewport={"width": 1600, "height": 1000}).new_page()
    page.of_ours = []

    def hear(text: str, place: str) -> None:
        if "ComfyUI-AMED" in text + place:
            page.of_ours.append(f"{text} {place}")

    page.on("pageerror", lambda error: hear(str(error), str(error.stack)))
    page.on("console", lambda said: hear(said.text, said.location["url"]) if said.type == "error" else None)
    page.goto(f"http://127.0.0.1:{server.port}/")
    page.wait_for_function(READY, timeout=120_000)
    return page


def put(page: Any, graph: Graph) -> None:
    """A graph of nodes alone, as the browser makes one of it."""
    page.evaluate("graph => app.loadApiJson(graph, 'test')", graph)


def put_workflow(page: Any, workflow: dict[str, Any]) -> None:
    """A saved workflow."""
    page.evaluate("graph => app.loadGraphData(graph, true, true, 'test')", workflow)
    page.wait_for_timeout(1000)


def saved_template(number: int) -> dict[str, Any]:
    (file,) = (file for file in TEMPLATES if file.name.startswith(f"{number} "))
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def press_run(page: Any) -> None:
    page.evaluate("() => app.queuePrompt(0, 1)")


def wait_idle(page: Any, server: Any, seconds: int = 240) -> dict[str, Any]:
    """Wait until nothing runs; the newest entry of the history."""
    page.wait_for_timeout(500)
    for _ in range(5 * seconds):
        queue = server.get("/queue")
        if not queue["queue_running"] and not queue["queue_pending"]:
            break
        page.wait_for_timeout(200)
    (latest,) = list(server.get("/history?max_items=1").values())
    found: dict[str, Any] = latest
    return found


def texts(page: Any) -> str:
    """All that is to be read on a page now, once texts have travelled."""
    page.wait_for_timeout(1000)
    shown: str = page.evaluate(
        "() => document.body.innerText + [...document.querySelectorAll('textarea')].map(t => t.value)"
    )
    return shown


def run(page: Any, server: Any, graph: Graph) -> str:
    """Queue a graph that must succeed, as a press of Run does; the texts that are then on the page."""
    put(page, graph)
    page.evaluate("() => app.graph.arrange()")
    press_run(page)
    latest = wait_idle(page, server)
    assert latest["status"]["status_str"] == "success", json.dumps(latest["status"])
    return texts(page)
