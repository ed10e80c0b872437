"""The example workflows: right in this ComfyUI, legible, and those of bundled models run."""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from comfyui import COMFYUI, PACK, version_of
from graphs import Graph, node
from PIL import Image

sys.path.append(str(PACK))
from scripts.make_templates import BLUEPRINT, TEMPLATES, written
from scripts.workflow_json import ENTRY, EXIT, HEADING, NOTE, ROOM, TITLE, Kind

WORKFLOWS = PACK / "example_workflows"
FILES = sorted(WORKFLOWS.glob("*.json"), key=lambda file: int(file.stem.split()[0]))
FILE_NAMES = ("ckpt_name", "unet_name", "clip_name", "clip_name1", "clip_name2", "vae_name", "image")
PYTHON = {"STRING": str, "BOOLEAN": bool, "INT": int, "FLOAT": (int, float)}
AFTER_A_RUN = ("fixed", "increment", "decrement", "randomize")
GROWS = 34  # pixels that a node is taller in Nodes 2.0 at most
LEGIBLE = 0.6  # zoom below which the old canvas draws no texts
LETS_PASS = 16  # pixels of a node's edge that a wire may touch where it turns
Box = tuple[float, float, float, float]


@pytest.fixture(scope="module")
def known(server: Any) -> dict[str, Any]:
    """What this ComfyUI says of its nodes."""
    return dict(server.get("/object_info"))


@pytest.fixture(params=FILES, ids=lambda file: file.stem)
def workflow(request: pytest.FixtureRequest, known: dict[str, Any]) -> dict[str, Any]:
    """A file's content, where this ComfyUI has all its nodes."""
    read: dict[str, Any] = json.loads(request.param.read_text(encoding="utf-8"))
    lacking = {one["type"] for one in read["nodes"]} - set(known) - {NOTE}
    assert not {kind for kind in lacking if kind.startswith("AMED")}
    if lacking:
        pytest.skip(f"this ComfyUI has no {', '.join(sorted(lacking))}")
    return read


def values_of(saved: dict[str, Any], kind: Kind) -> dict[str, Any]:
    """The values of a saved node by their names: the browser knows them by their places alone."""
    widgets = {one.name: one for one in kind.inputs if one.is_widget}
    rest, found = list(saved["widgets_values"]), {}
    for name in (one["name"] for one in saved["inputs"] if "widget" in one):
        found[name] = rest.pop(0)
        if name in widgets and widgets[name].has_seed_control:
            assert rest.pop(0) in AFTER_A_RUN
        if name in widgets and widgets[name].options.get("image_upload"):
            assert rest.pop(0) == "image"
    assert not rest, f"{saved['type']}: {rest} are too many"
    assert list(found)[: len(widgets)] == list(widgets), "a version without the last ones leaves them out"
    return {name: found[name] for name in widgets}


def api_graph(known: dict[str, Any], workflow: dict[str, Any]) -> Graph:
    """What the browser would queue."""
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    graph: Graph = {}
    for saved in workflow["nodes"]:
        if saved["type"] == NOTE:
            continue
        values = values_of(saved, Kind.of(saved["type"], known[saved["type"]]))
        values |= {one["name"]: links[one["link"]] for one in saved["inputs"] if one["link"] is not None}
        graph[str(saved["id"])] = node(saved["type"], **values)
    return graph


def fits(out: str, into: str) -> bool:
    return "*" in (out, into) or bool(set(out.split(",")) & set(into.split(",")))


def test_links_lead_from_outputs_to_inputs_of_their_types(known: dict[str, Any], workflow: dict[str, Any]) -> None:
    nodes = {one["id"]: one for one in workflow["nodes"]}
    for number, origin, slot, target, place, kind in workflow["links"]:
        out, into = nodes[origin]["outputs"][slot], nodes[target]["inputs"][place]
        assert number in out["links"]
        assert into["link"] == number
        real = Kind.of(nodes[origin]["type"], known[nodes[origin]["type"]]).outputs[slot]
        assert (real.name, real.kind) == (out["name"], out["type"])
        assert fits(real.kind, kind)
        asked = {one.name: one for one in Kind.of(nodes[target]["type"], known[nodes[target]["type"]]).inputs}
        assert fits(kind, asked[into["name"]].kind)
        assert not asked[into["name"]].is_widget


def test_every_input_is_linked_or_has_a_valid_value(known: dict[str, Any], workflow: dict[str, Any]) -> None:
    for saved in workflow["nodes"]:
        if saved["type"] == NOTE:
            continue
        kind = Kind.of(saved["type"], known[saved["type"]])
        linked = {one["name"] for one in saved["inputs"] if one["link"] is not None}
        values = values_of(saved, kind)
        for one in kind.inputs:
            if not one.is_widget:
                assert one.optional or one.name in linked, f"{saved['type']} lacks {one.name}"
                continue
            value, what = values[one.name], f"{saved['type']}.{one.name}"
            if one.kind == "COMBO":
                assert one.name in FILE_NAMES or value in one.options["options"], f"{what}: {value}"
                continue
            assert isinstance(value, PYTHON[one.kind]), what
            if one.kind in ("INT", "FLOAT"):
                assert one.options["min"] <= value <= one.options["max"], what


def box(saved: dict[str, Any]) -> Box:
    """A node with its title: left, top, right, bottom."""
    (x, y), (width, height) = saved["pos"], saved["size"]
    return x, y - TITLE, x + width, y + height


def overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_nothing_lies_on_anything(file: Path) -> None:
    """Neither node on node, in either canvas, nor a group's title under one; and no wire runs behind a node, nor
    behind the preview by which it grows.
    """
    workflow = json.loads(file.read_text(encoding="utf-8"))
    boxes = {one["id"]: box(one) for one in workflow["nodes"]}
    room = {one["id"]: ROOM.get(one["type"], 0) for one in workflow["nodes"]}
    grown = {name: (x, y, right, bottom + GROWS) for name, (x, y, right, bottom) in boxes.items()}
    for (a, first), (b, second) in itertools.combinations(grown.items(), 2):
        assert not overlap(first, second), f"nodes {a} and {b}"
    for group in workflow["groups"]:
        x, y, width, height = group["bounding"]
        for name, one in boxes.items():
            assert not overlap((x, y, x + width, y + HEADING), one), f"{group['title']} and node {name}"
            inside = x <= one[0] and y <= one[1] and one[2] <= x + width and one[3] <= y + height
            assert inside or not overlap((x, y, x + width, y + height), one), f"{group['title']} cuts node {name}"
    for link in workflow["links"]:
        for name, (x, y, right, bottom) in boxes.items():
            within = x + LETS_PASS, y + 4, right - LETS_PASS, bottom + room[name] - 4
            hit = [p for p in wire(workflow, link) if within[0] < p[0] < within[2] and within[1] < p[1] < within[3]]
            assert not hit, f"link {link} runs behind node {name} at {hit[0]}"


def wire(workflow: dict[str, Any], link: list[Any]) -> list[tuple[float, float]]:
    """Points of a link's curve, as the browser draws it from socket to socket, by the points it is led through."""
    nodes = {one["id"]: one for one in workflow["nodes"]}
    sockets = [one["name"] for one in nodes[link[3]]["inputs"] if "widget" not in one]
    place = sockets.index(nodes[link[3]]["inputs"][link[4]]["name"])
    (left, _, _, _), (_, _, right, _) = box(nodes[link[3]]), box(nodes[link[1]])
    begin = right, nodes[link[1]]["pos"][1] + 14 + 20 * link[2]
    end = left, nodes[link[3]]["pos"][1] + 14 + 20 * place
    points = {one["id"]: one for one in workflow["extra"].get("reroutes", [])}
    at = next((one["parentId"] for one in workflow["extra"].get("linkExtensions", []) if one["id"] == link[0]), None)
    path = [end]
    while at is not None:
        assert link[0] in points[at]["linkIds"]
        path.append(tuple(points[at]["pos"]))
        at = points[at].get("parentId")
    path.append(begin)
    return [point for a, b in itertools.pairwise(path[::-1]) for point in curve(a, b, straight=len(path) > 2)]


def curve(a: tuple[float, float], b: tuple[float, float], *, straight: bool) -> list[tuple[float, float]]:
    """A spline that leaves to the right and comes from the left, by a quarter of the distance; or a line."""
    away = 0.0 if straight else 0.25 * ((a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2) ** 0.5
    corners = a, (a[0] + away, a[1]), (b[0] - away, b[1]), b
    drawn = []
    for n in range(1, 60):
        t = n / 60
        weights = (1 - t) ** 3, 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3
        x, y = (sum(w * corner[i] for w, corner in zip(weights, corners, strict=True)) for i in (0, 1))
        drawn.append((x, y))
    return drawn


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_is_read_from_left_to_right_and_seen_whole(file: Path) -> None:
    workflow = json.loads(file.read_text(encoding="utf-8"))
    boxes = {one["id"]: box(one) for one in workflow["nodes"]}
    for link in workflow["links"]:
        assert boxes[link[1]][2] < boxes[link[3]][0], f"link {link} runs backwards"
    assert all(one["pos"][1] >= 150 for one in workflow["nodes"])
    (note,) = (one for one in workflow["nodes"] if one["type"] == NOTE)
    assert note["widgets_values"][0].startswith("## ")
    assert [group["title"].split()[0] for group in workflow["groups"]][:3] == ["1", "2", "3"]
    view = workflow["extra"]["ds"]
    assert view["scale"] > LEGIBLE
    for x, y in ((b[i], b[j]) for b in boxes.values() for i, j in ((0, 1), (2, 3))):
        seen = [(value + offset) * view["scale"] for value, offset in zip((x, y), view["offset"], strict=True)]
        assert 60 <= seen[0] <= 1536
        assert 80 <= seen[1] <= 922


def test_the_files_are_what_the_script_writes(known: dict[str, Any]) -> None:
    """In the version whose definitions they are made from: `python scripts/make_templates.py --server ...`."""
    assert COMFYUI is not None
    assert {file.stem for file in FILES} == set(TEMPLATES)
    if version_of(COMFYUI) != "0.33.0":
        pytest.skip("made from 0.33.0's definitions, with every node of this pack")
    for file, text in written(known).items():
        assert file.read_text(encoding="utf-8") == text, file.name


def test_the_template_browser_offers_them_with_square_pictures(server: Any) -> None:
    assert set(server.get("/api/workflow_templates")["ComfyUI-AMED"]) == {file.stem for file in FILES}
    for file in FILES:
        with Image.open(file.with_suffix(".jpg")) as picture:
            assert picture.size == (512, 512)


def test_the_blueprint_is_listed_and_its_links_fit(server: Any, known: dict[str, Any]) -> None:
    """Text to image in one node: what it asks for leads to inputs of these types, and a picture comes out."""
    file = PACK / "subgraphs" / f"{BLUEPRINT}.json"
    inside = json.loads(file.read_text(encoding="utf-8"))["definitions"]["subgraphs"][0]
    nodes = {one["id"]: one for one in inside["nodes"]}
    for link in inside["links"]:
        if link["origin_id"] == ENTRY:
            kind = inside["inputs"][link["origin_slot"]]["type"]
        else:
            kind = nodes[link["origin_id"]]["outputs"][link["origin_slot"]]["type"]
        if link["target_id"] == EXIT:
            assert kind == inside["outputs"][0]["type"] == "IMAGE"
            continue
        target = nodes[link["target_id"]]["inputs"][link["target_slot"]]
        asked = {one.name: one for one in Kind.of("", known[nodes[link["target_id"]]["type"]]).inputs}
        assert target["link"] == link["id"]
        assert target["type"] == kind == asked[target["name"]].kind
    if known_version() < (0, 33):
        pytest.skip("this ComfyUI has no blueprints")
    listed = [one["name"] for one in server.get("/global_subgraphs").values() if one["source"] == "custom_node"]
    assert listed == [BLUEPRINT]


def known_version() -> tuple[int, ...]:
    assert COMFYUI is not None
    return tuple(int(part) for part in version_of(COMFYUI).split(".")[:2])


PART = {"UNETLoader": 0, "CLIPLoader": 1, "DualCLIPLoader": 1, "VAELoader": 2}  # of the demo checkpoint's outputs
SMALL = {"width": 128, "height": 128, "cfg": 3.0, "effort": "quick", "trajectories": 4, "pictures": 1}


@pytest.fixture
def runnable(server: Any, known: dict[str, Any], workflow: dict[str, Any]) -> Graph:
    """A template with the demo model in the place of its loaders, small and cheap."""
    if any("LatentVideo" in one["type"] for one in workflow["nodes"]):
        pytest.skip("the bundled model draws no video")
    (server.base / "input").mkdir(exist_ok=True)
    picture = Image.new("RGBA", (128, 128), (200, 60, 40, 255))
    picture.paste((0, 0, 0, 0), (32, 32, 96, 96))  # transparent is what a mask covers
    picture.save(server.base / "input" / "example.png")
    graph = api_graph(known, workflow)
    for name, one in list(graph.items()):
        if one["class_type"] == "CheckpointLoaderSimple":
            graph[name] = node("AMEDDemoCheckpoint")
    parts = {name: PART[one["class_type"]] for name, one in graph.items() if one["class_type"] in PART}
    for one in graph.values():
        inputs = one["inputs"]
        for name, value in inputs.items():
            if isinstance(value, list) and value[0] in parts:
                inputs[name] = ["demo", parts[value[0]]]
        inputs |= {name: value for name, value in SMALL.items() if name in inputs}
    kept = {name: one for name, one in graph.items() if name not in parts}
    return kept | {"demo": node("AMEDDemoCheckpoint")}


def test_it_runs_with_the_bundled_model(server: Any, runnable: Graph) -> None:
    """As it is, or with one node in the place of its loaders, which is all that a model of one's own takes."""
    outputs = server.run(runnable)
    assert [picture for output in outputs.values() for picture in output.get("images", [])]
