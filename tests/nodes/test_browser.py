"""What a person sees, in the real browser interface: needs Chromium on the PATH and the package playwright."""

import importlib.util
import itertools
import json
import shutil
from collections.abc import Iterator
from typing import Any

import graphs
import pytest
from comfyui import COMFYUI, version_of
from graphs import Graph, node
from safetensors import safe_open
from safetensors.torch import save_file

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or importlib.util.find_spec("playwright") is None,
    reason="needs chromium and pip install playwright",
)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
READY = "() => window.app?.graph && Object.keys(LiteGraph.registered_node_types).length > 100"
SCRIPT = "<img src=x onerror=\"window.ran='{}'\">"


@pytest.fixture(scope="module")
def page(server: Any) -> Iterator[Any]:
    """ComfyUI's own page, ready to be given a graph."""
    from playwright.sync_api import sync_playwright  # noqa: PLC0415

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        opened = browser.new_page(viewport={"width": 1600, "height": 1000})
        opened.goto(f"http://127.0.0.1:{server.port}/")
        opened.wait_for_function(READY, timeout=120_000)
        yield opened
        browser.close()


def run(page: Any, server: Any, graph: Graph) -> str:
    """Queue a graph in the page as a press of Run does; the texts that are then on it."""
    before = len(server.get("/history"))
    page.evaluate("graph => app.loadApiJson(graph, 'test')", graph)
    page.evaluate("() => app.graph.arrange()")
    page.evaluate("() => app.queuePrompt(0, 1)")
    for _ in range(600):
        if len(server.get("/history")) > before:
            break
        page.wait_for_timeout(100)
    (latest,) = list(server.get("/history?max_items=1").values())
    assert latest["status"]["status_str"] == "success", json.dumps(latest["status"])
    page.wait_for_timeout(1000)  # for the texts, which travel by themselves, and for scripts, if any
    shown: str = page.evaluate(
        "() => document.body.innerText + [...document.querySelectorAll('textarea')].map(t => t.value)"
    )
    return shown


@pytest.mark.trust("scripts")
def test_a_predictor_file_runs_no_script(page: Any, server: Any) -> None:
    """Neither what it says of its model, nor a name that it is saved under."""
    own = server.base / "models" / "amed_predictors"
    own.mkdir(parents=True, exist_ok=True)
    shipped = next(iter((graphs.PREDICTORS).glob("digits_amed_5*")))
    with safe_open(shipped, framework="pt") as file:
        metadata, weights = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header = json.loads(metadata["header"])
    header["configs"][0]["model"] |= {"family": "AMEDDigits" + SCRIPT.format("file"), "loras": SCRIPT.format("loras")}
    save_file(weights, own / "odd.safetensors", metadata | {"header": json.dumps(header)})
    server.get("/object_info/AMEDLoadPredictor")  # lists the folder anew
    load = node("AMEDLoadPredictor", predictor_name="odd.safetensors")
    graph = {
        "load": load,
        "file": node("AMEDSavePredictor", predictor=["load", 0], filename_prefix=SCRIPT.format("name")),
    }
    shown = run(page, server, graph)
    assert "AMEDDigitsimg srcx" in shown, "the text is there"
    assert "Saved as _img src=x" in shown, "and so is a name, without what Windows forbids"
    assert page.evaluate("() => window.ran ?? null") is None


def test_what_went_wrong_is_said_at_once(page: Any, server: Any) -> None:
    """In a toast: newer ComfyUI shows only that the node failed."""
    shipped = next(iter(graphs.PREDICTORS.glob("digits_amed_5*"))).name
    graph = graphs.demo() | {
        "load": node("AMEDLoadPredictor", predictor_name=shipped),
        "apply": graphs.apply(["load", 0]),
        "sample": graphs.k_sampler(["apply", 0], "amed_ipndm", "amed", 5),
        **graphs.save_image(["sample", 0], "never"),
    }
    page.evaluate("graph => app.loadApiJson(graph, 'test')", graph)
    page.evaluate("() => app.queuePrompt(0, 1)")
    page.wait_for_selector("text=The applied predictor was made for the sampler", timeout=60_000)


def test_advanced_inputs_are_folded_in_the_old_canvas_too(page: Any) -> None:
    graph = {"train": node("AMEDTrainPredictor")}
    page.evaluate("graph => app.loadApiJson(graph, 'test')", graph)
    widgets = "app.graph._nodes.find(node => node.comfyClass === 'AMEDTrainPredictor').widgets"
    folded = set(page.evaluate(f"() => {widgets}.filter(one => one.advanced).map(one => one.name)"))
    shown = set(page.evaluate(f"() => {widgets}.filter(one => !one.advanced).map(one => one.name)"))
    assert {"batch_size", "held_out", "teacher_calls", "teacher_steps"} <= folded
    assert {"steps", "cfg", "effort", "budget"} <= shown


def test_what_a_file_is_for_is_shown_before_anything_runs(page: Any) -> None:
    shipped = next(iter(graphs.PREDICTORS.glob("digits_amed_5*"))).name
    graph = {"load": node("AMEDLoadPredictor", predictor_name=shipped)}
    page.evaluate("graph => app.loadApiJson(graph, 'test')", graph)
    loader = "app.graph._nodes.find(node => node.comfyClass === 'AMEDLoadPredictor')"
    about = f"{loader}.widgets.find(one => one.name === 'made for')?.value ?? ''"
    page.wait_for_function(f"() => ({about}).includes('5 steps, cfg 1')", timeout=10_000)
    assert "made for" not in str(page.evaluate(f"() => JSON.stringify({loader}.serialize().widgets_values)"))
    assert "5 steps" not in str(page.evaluate(f"() => JSON.stringify({loader}.serialize().widgets_values)"))


TEMPLATES = sorted((graphs.PREDICTORS.parent / "example_workflows").glob("*.json"))
BOXES = """() => app.graph._nodes.map(node => {
    const seen = document.querySelector(`[data-node-id="${node.id}"]`);
    const height = Math.max(node.size[1] + 30, seen?.offsetHeight ?? 0);
    return [node.pos[0], node.pos[1] - 30, Math.max(node.size[0], seen?.offsetWidth ?? 0), height];
})"""


@pytest.mark.parametrize("canvas", ["classic", "nodes 2.0"])
def test_templates_open_legibly_in_both_canvases(page: Any, canvas: str) -> None:
    """Every node is known and none lies on another, and nothing of this pack complains."""
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
    wanted = canvas != "classic"
    if wanted and version_of(COMFYUI) == "0.3.64":
        pytest.skip("its Nodes 2.0 is a first draft, whose widgets grow with their values")
    page.evaluate("on => app.ui.settings.setSettingValueAsync('Comfy.VueNodes.Enabled', on)", wanted)
    page.reload()
    page.wait_for_function(READY, timeout=120_000)
    page.wait_for_timeout(4000)  # the last workflow is opened again
    if bool(page.evaluate("() => LiteGraph.vueNodesMode ?? false")) != wanted:
        pytest.skip(f"this browser interface has no {canvas}")
    for file in TEMPLATES:
        saved = json.loads(file.read_text(encoding="utf-8"))
        known = page.evaluate("names => names.every(name => LiteGraph.registered_node_types[name])", _kinds(saved))
        if not known:
            continue  # test_templates.py says which are not there
        page.evaluate("graph => app.loadGraphData(graph, true, true, 'test')", saved)
        page.wait_for_timeout(1500)
        boxes = page.evaluate(BOXES)
        assert len(boxes) == len(saved["nodes"])
        for (x, y, width, height), (left, top, wide, tall) in itertools.combinations(boxes, 2):
            apart = x + width <= left or left + wide <= x or y + height <= top or top + tall <= y
            assert apart, f"{file.stem}: {(x, y, width, height)} and {(left, top, wide, tall)}"
        assert page.evaluate("() => app.graph.links.size ?? app.graph.links.length") >= len(saved["links"])
    assert not [error for error in errors if "AMED" in error]


def saved_template(number: int) -> Graph:
    (file,) = (file for file in TEMPLATES if file.name.startswith(f"{number} "))
    opened: Graph = json.loads(file.read_text(encoding="utf-8"))
    return opened


def press_run(page: Any) -> None:
    page.evaluate("() => app.queuePrompt(0, 1)")


def wait_idle(page: Any, server: Any, seconds: int = 240) -> dict[str, Any]:
    """Wait until nothing runs; the newest entry of the history."""
    for _ in range(5 * seconds):
        queue = server.get("/queue")
        if not queue["queue_running"] and not queue["queue_pending"]:
            break
        page.wait_for_timeout(200)
    (latest,) = list(server.get("/history?max_items=1").values())
    found: dict[str, Any] = latest
    return found


def test_a_newcomers_path(page: Any, server: Any) -> None:
    """Template, Run, pictures; another loader in its place, Run, and Run again: no value is copied."""
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.evaluate("graph => app.loadGraphData(graph, true, true, 'test')", saved_template(1))
    page.wait_for_timeout(1000)
    press_run(page)
    first = wait_idle(page, server)
    assert first["status"]["status_str"] == "success"
    assert [len(one["images"]) for one in first["outputs"].values() if "images" in one] == [4, 4], "ours and stock"
    own = saved_template(2)
    for one in own["nodes"]:
        if one["type"] == "CheckpointLoaderSimple":  # the one action: another loader in its place
            one["type"], one["widgets_values"] = "AMEDDemoCheckpoint", []
            one["inputs"] = []
        if one["type"] == "EmptyLatentImage":
            one["widgets_values"][:2] = [128, 128]
    page.evaluate("graph => app.loadGraphData(graph, true, true, 'test')", own)
    page.wait_for_timeout(1000)
    learned = server.base / "user" / "amed_learned"
    for _ in range(2):
        press_run(page)
        page.wait_for_timeout(500)
        assert wait_idle(page, server)["status"]["status_str"] == "success"
        assert list(learned.glob("*.safetensors")), "the first picture taught"
    assert not [error for error in errors if "AMED" in error]


def test_training_is_cancelled_and_goes_on(page: Any, server: Any) -> None:
    states = server.base / "user" / "amed_training"
    others = set(states.glob("*.safetensors"))
    graph = graphs.demo() | {"train": graphs.train(seed=11, effort="standard", save_as="cancelled")}
    page.evaluate("graph => app.loadApiJson(graph, 'test')", graph)
    press_run(page)
    page.wait_for_timeout(3000)
    page.evaluate("() => fetch('/interrupt', {method: 'POST'})")
    assert wait_idle(page, server)["status"]["status_str"] == "error", "as ComfyUI calls what was interrupted"
    assert len(set(states.glob("*.safetensors")) - others) == 1
    press_run(page)
    page.wait_for_timeout(500)
    assert wait_idle(page, server)["status"]["status_str"] == "success"
    assert set(states.glob("*.safetensors")) == others
    assert (server.base / "models" / "amed_predictors" / "cancelled_00001_.safetensors").is_file()


def _kinds(saved: dict[str, Any]) -> list[str]:
    return [one["type"] for one in saved["nodes"]]
