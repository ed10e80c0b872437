"""What a person sees, in the real browser interface."""

import itertools
import json
from typing import Any

import graphs
import pytest
from comfyui import COMFYUI, version_of
from graphs import node
from pages import READY, TEMPLATES, press_run, put, put_workflow, run, wait_idle
from safetensors import safe_open
from safetensors.torch import save_file

SCRIPT = "<img src=x onerror=\"window.ran='{}'\">"


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
    put(page, graph)
    press_run(page)
    page.wait_for_selector("text=The applied predictor was made for the sampler", timeout=60_000)


@pytest.mark.parametrize("tells", [True, False])
def test_a_setting_says_whether_it_is_said_at_once(page: Any, server: Any, tells: bool) -> None:
    """Of wrong steps, on a node that is not ours: those of a predictor of the paper are others."""
    shipped = next(iter(graphs.PREDICTORS.glob("digits_amed_5*"))).name
    graph = graphs.demo() | {
        "load": node("AMEDLoadPredictor", predictor_name=shipped),
        "apply": graphs.apply(["load", 0]),
        "sample": graphs.k_sampler(["apply", 0], "amed", "amed", 8),
        **graphs.save_image(["sample", 0], "never"),
    }
    page.evaluate("on => app.extensionManager.setting.set('AMED.Errors.Tell', on)", tells)
    try:
        put(page, graph)
        press_run(page)
        assert wait_idle(page, server)["status"]["status_str"] == "error"
        page.wait_for_timeout(2000)
        assert (page.get_by_text("Set steps to 5").count() > 0) == tells
    finally:
        page.evaluate("() => app.extensionManager.setting.set('AMED.Errors.Tell', true)")
        page.evaluate("() => app.extensionManager.toast.removeAll?.()")


def test_advanced_inputs_are_folded_in_the_old_canvas_too(page: Any) -> None:
    graph = {"train": node("AMEDTrainPredictor")}
    put(page, graph)
    widgets = "app.graph._nodes.find(node => node.comfyClass === 'AMEDTrainPredictor').widgets"
    folded = set(page.evaluate(f"() => {widgets}.filter(one => one.advanced).map(one => one.name)"))
    shown = set(page.evaluate(f"() => {widgets}.filter(one => !one.advanced).map(one => one.name)"))
    assert {"batch_size", "held_out", "teacher_calls", "teacher_steps"} <= folded
    assert {"steps", "cfg", "effort", "budget"} <= shown


def test_folded_inputs_leave_no_gap_and_a_setting_unfolds_them(page: Any) -> None:
    """In the old canvas; what is drawn lies below one another without room between."""
    put(page, {"train": node("AMEDTrainPredictor")})
    train = "app.graph._nodes.find(node => node.comfyClass === 'AMEDTrainPredictor')"
    places = f"() => {train}.widgets.filter(one => !one.advanced).map(one => [one.y, one.y + one.computedHeight])"
    fold = "on => app.extensionManager.setting.set('AMED.Inputs.Fold', on)"
    page.wait_for_timeout(1000)
    folded = page.evaluate(places)
    assert len(folded) >= 10
    assert all(abs(below[0] - above[1]) < 1 for above, below in itertools.pairwise(folded))
    try:
        page.evaluate(fold, False)
        page.wait_for_timeout(1000)
        assert len(page.evaluate(places)) >= len(folded) + 8
    finally:
        page.evaluate(fold, True)
    page.wait_for_timeout(500)
    assert len(page.evaluate(places)) == len(folded)


def test_what_a_file_is_for_is_shown_before_anything_runs(page: Any) -> None:
    shipped = next(iter(graphs.PREDICTORS.glob("digits_amed_5*"))).name
    graph = {"load": node("AMEDLoadPredictor", predictor_name=shipped)}
    put(page, graph)
    loader = "app.graph._nodes.find(node => node.comfyClass === 'AMEDLoadPredictor')"
    about = f"{loader}.widgets.find(one => one.name === 'made for')?.value ?? ''"
    page.wait_for_function(f"() => ({about}).includes('5 steps, cfg 1')", timeout=10_000)
    assert "made for" not in str(page.evaluate(f"() => JSON.stringify({loader}.serialize().widgets_values)"))
    assert "5 steps" not in str(page.evaluate(f"() => JSON.stringify({loader}.serialize().widgets_values)"))


BOXES = """() => app.graph._nodes.map(node => {
    const seen = document.querySelector(`[data-node-id="${node.id}"]`);
    const height = Math.max(node.size[1] + 30, seen?.offsetHeight ?? 0);
    return [node.pos[0], node.pos[1] - 30, Math.max(node.size[0], seen?.offsetWidth ?? 0), height];
})"""


@pytest.mark.parametrize("canvas", ["classic", "nodes 2.0"])
def test_templates_open_legibly_in_both_canvases(page: Any, canvas: str) -> None:
    """Every node is known and none lies on another."""
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
        put_workflow(page, saved)
        boxes = page.evaluate(BOXES)
        assert len(boxes) == len(saved["nodes"])
        for (x, y, width, height), (left, top, wide, tall) in itertools.combinations(boxes, 2):
            apart = x + width <= left or left + wide <= x or y + height <= top or top + tall <= y
            assert apart, f"{file.stem}: {(x, y, width, height)} and {(left, top, wide, tall)}"
        assert page.evaluate("() => app.graph.links.size ?? app.graph.links.length") >= len(saved["links"])


def _kinds(saved: dict[str, Any]) -> list[str]:
    return [one["type"] for one in saved["nodes"]]
