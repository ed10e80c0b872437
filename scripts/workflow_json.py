"""Workflows as ComfyUI's browser saves them, from a description of columns of nodes.

A sheet is filled from left to right, column by column, each from top to bottom. A node's inputs are its keyword
arguments: a value, or `node["OUTPUT"]`. What is not given keeps its default. Links run from left to right only.
"""

import json
import math
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

TOP = 250  # where the first node's body begins: room for its title, its group's title, and the browser's own bars
TITLE, SLOT, WIDGET = 30, 20, 24  # pixels of the browser's canvas: a title, a socket, a widget with its gap
GAP, BETWEEN = 50, 60  # below a node, and between columns
ROOM = {  # what a node grows by while it runs, in the classic canvas: a preview, and lines of text
    "KSampler": 212,
    "AMEDLoadPredictor": 50,
    "AMEDSavePredictor": 50,
    "AMEDTrainPredictor": 260,
}
HEADING, MARGIN = 34, 14  # a group's title, and its margin
SEEN = (70, 104, 1530, 915)  # of a window of 1600x1000, what the bars of either version leave free
ENTRY, EXIT = -10, -20  # the numbers of a blueprint's own inputs and outputs
AFTER = "control_after_generate"
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
NOTE = "MarkdownNote"  # exists in the browser alone
LETTER, LINE = 5.7, 18  # pixels of a note's text
COLOUR = {"group": "#3f789e", "note": ("#432", "#653")}


@dataclass
class Socket:
    """One input or output of a kind of node."""

    name: str
    kind: str
    default: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    optional: bool = False

    @property
    def is_widget(self) -> bool:
        return self.kind in WIDGETS and not self.options.get("forceInput")

    @property
    def has_seed_control(self) -> bool:
        """Whether the browser adds a widget that says what becomes of a seed after a run."""
        return bool(self.options.get(AFTER, self.name in ("seed", "noise_seed")))


@dataclass
class Kind:
    """What ComfyUI says of a kind of node; sockets first, then widgets, as the browser has them."""

    name: str
    inputs: list[Socket]
    outputs: list[Socket]

    @classmethod
    def of(cls, name: str, known: dict[str, Any]) -> "Kind":
        """From what a running ComfyUI says at /object_info."""
        inputs = []
        for group in ("required", "optional"):
            for one, (given, *more) in known["input"].get(group, {}).items():
                options = dict(more[0]) if more else {}
                options["options"] = given if isinstance(given, list) else options.get("options")
                default = options.get("default", (options["options"] or [None])[0])
                kind = "COMBO" if isinstance(given, list) else given
                inputs.append(Socket(one, kind, default, options, group == "optional"))
        outputs = [Socket(*both) for both in zip(known["output_name"], known["output"], strict=True)]
        return cls(name, sorted(inputs, key=lambda i: i.is_widget), outputs)

    @property
    def height(self) -> int:
        """What the browser needs at least, if no widget is a field of several lines."""
        sockets = max(sum(not i.is_widget for i in self.inputs), len(self.outputs))
        rows = sum(1 + i.has_seed_control for i in self.inputs if i.is_widget)
        return SLOT * sockets + 6 + (WIDGET * rows + 8 if rows else 0)


@dataclass(frozen=True)
class Output:
    """One output of a node, and the points that a wire from it passes."""

    node: "Node"
    slot: int
    path: tuple[tuple[int, int], ...] = ()

    def via(self, *path: tuple[int, int]) -> "Output":
        """The same by a way of its own: of each point x, and how far it is below the top."""
        return Output(self.node, self.slot, tuple((x, TOP + below) for x, below in path))


@dataclass
class Node:
    """A node on a sheet."""

    number: int
    kind: Kind
    x: int
    y: int
    width: int
    height: int
    values: dict[str, Any]
    sources: dict[str, Output]
    title: str | None = None
    after: str = "fixed"  # a run: what becomes of the seed
    models: list[dict[str, str]] = field(default_factory=list)
    grows: bool = True

    @property
    def bottom(self) -> int:
        """Where it may end while it runs."""
        return self.y + self.height + (ROOM.get(self.kind.name, 0) if self.grows else 0)

    def __getitem__(self, output: str) -> Output:
        return Output(self, [one.name for one in self.kind.outputs].index(output))

    def saved(self, links: list[list[Any]]) -> dict[str, Any]:
        """As the browser saves it."""
        inputs = []
        for one in self.kind.inputs:
            link = next((k[0] for k in links if k[3] == self.number and self.kind.inputs[k[4]] is one), None)
            inputs.append({"name": one.name, "type": one.kind, "link": link})
            if one.is_widget:
                inputs[-1]["widget"] = {"name": one.name}
        outputs = []
        for slot, one in enumerate(self.kind.outputs):
            leaving = [k[0] for k in links if k[1] == self.number and k[2] == slot]
            outputs.append({"name": one.name, "type": one.kind, "links": leaving or None})
        saved: dict[str, Any] = {
            "id": self.number,
            "type": self.kind.name,
            "pos": [self.x, self.y],
            "size": [self.width, self.height],
            "flags": {},
            "order": self.number - 1,
            "mode": 0,
            "inputs": inputs,
            "outputs": outputs,
        }
        if self.title:
            saved["title"] = self.title
        saved["properties"] = {} if self.kind.name == NOTE else {"Node name for S&R": self.kind.name}
        if self.models:
            saved["properties"]["models"] = self.models
        if self.kind.name == NOTE:
            saved["color"], saved["bgcolor"] = COLOUR["note"]
        values = []
        for one in self.kind.inputs:
            if one.is_widget:
                values.append(self.values.get(one.name, one.default))
                values += [self.after] if one.has_seed_control else []
                values += ["image"] if one.options.get("image_upload") else []
        saved["widgets_values"] = values
        return saved


class Sheet:
    """One workflow, in the making."""

    def __init__(self, known: dict[str, Any]) -> None:
        self.known = known  # what ComfyUI says at /object_info
        self.nodes: list[Node] = []
        self.groups: list[dict[str, Any]] = []
        self.x = self.right = 0
        self.y = TOP

    def column(self, width: int, below: int = 0, gap: int = BETWEEN) -> None:
        """Go on in a new column, `below` the top."""
        self.x = self.right + gap if self.nodes else 0
        self.right = self.x + width
        self.y = TOP + below

    def skip(self, height: int) -> None:
        """Leave room below the latest node."""
        self.y += height

    def down_to(self, below: int) -> None:
        """Go on in this column, `below` the top."""
        self.y = TOP + below

    def add(
        self,
        kind: str,
        title: str | None = None,
        *,
        tall: int | None = None,
        wide: int | None = None,
        after: str = "fixed",
        models: list[dict[str, str]] | None = None,
        grows: bool = True,
        **inputs: Any,
    ) -> Node:
        """Put a node below the latest one of this column."""
        known = Kind.of(kind, self.known[kind])
        names = {one.name: one for one in known.inputs}
        if unknown := set(inputs) - set(names):
            raise ValueError(f"{kind} has no inputs {sorted(unknown)}, but {sorted(names)}.")
        sources = {k: v for k, v in inputs.items() if isinstance(v, Output)}
        values = {k: v for k, v in inputs.items() if k not in sources}
        missing = [i.name for i in known.inputs if not (i.is_widget or i.optional or i.name in sources)]
        if missing:
            raise ValueError(f"{kind} needs {missing}.")
        width, height = wide or self.right - self.x, tall or known.height
        made = Node(len(self.nodes) + 1, known, 0, 0, width, height, values, sources, title, after, models or [], grows)
        return self._place(made)

    def note(self, text: str) -> Node:
        """Put a text below the latest node of this column."""
        lines = [math.ceil(len(part) * LETTER / (self.right - self.x - 30)) for part in text.split("\n\n")]
        tall = LINE * sum(lines) + 8 * len(lines) + 45
        known = Kind(NOTE, [Socket("text", "STRING")], [])
        made = Node(len(self.nodes) + 1, known, 0, 0, self.right - self.x, tall, {"text": text}, {}, "Read me")
        return self._place(made)

    def _place(self, node: Node) -> Node:
        node.x, node.y = self.x, self.y
        self.nodes.append(node)
        self.y = node.bottom + GAP + TITLE
        return node

    def group(self, title: str, *nodes: Node) -> None:
        """A frame with a title around nodes."""
        left, right = min(n.x for n in nodes), max(n.x + n.width for n in nodes)
        top, bottom = min(n.y for n in nodes), max(n.bottom for n in nodes)
        top -= TITLE + 10 + HEADING
        box = [left - MARGIN, top, right - left + 2 * MARGIN, bottom + 2 * MARGIN - top]
        made = {"id": len(self.groups) + 1, "title": title, "bounding": box, "color": COLOUR["group"]}
        self.groups.append({**made, "font_size": 24, "flags": {}})

    def saved(self) -> dict[str, Any]:
        """As the browser saves it."""
        links, points, passing = self._links()
        extra: dict[str, Any] = {"ds": self._view(), "workflowRendererVersion": "LG"}
        if passing:
            extra |= {"reroutes": points, "linkExtensions": passing}
        return {
            "id": "00000000-0000-0000-0000-000000000000",
            "revision": 0,
            "last_node_id": len(self.nodes),
            "last_link_id": len(links),
            "nodes": [node.saved(links) for node in self.nodes],
            "links": links,
            "groups": self.groups,
            "config": {},
            "extra": extra,
            "version": 0.4,
        }

    def blueprint(
        self, name: str, about: str, asked: Sequence[tuple[Node, str, str]], result: Output
    ) -> dict[str, Any]:
        """All of it as one node, as the browser saves a blueprint: of each asked input its node, name and label."""
        links, _, _ = self._links()
        inputs: list[dict[str, Any]] = []
        shown, proxies, controls = [], [], []
        for slot, (node, one, label) in enumerate(asked):
            place = [i.name for i in node.kind.inputs].index(one)
            kind, number = node.kind.inputs[place].kind, len(links) + 1
            links.append([number, ENTRY, slot, node.number, place, kind])
            own = f"{one}_1" if one in [other["name"] for other in inputs] else one
            known = {"id": _uuid(name, own), "name": own, "type": kind, "label": label, "linkIds": [number]}
            inputs.append({**known, "pos": [-120, TOP + 20 * slot]})
            shown.append({"label": label, "name": own, "type": kind, "widget": {"name": own}, "link": None})
            proxies.append([str(node.number), one])
            if node.kind.inputs[place].has_seed_control:
                controls.append([str(node.number), AFTER])
        kind, number = result.node.kind.outputs[result.slot].kind, len(links) + 1
        links.append([number, result.node.number, result.slot, EXIT, 0, kind])
        out = {"id": _uuid(name, kind), "name": kind, "type": kind, "linkIds": [number], "pos": [self.right + 80, TOP]}
        names = "id", "origin_id", "origin_slot", "target_id", "target_slot", "type"
        inside = {
            "id": _uuid(name),
            "version": 1,
            "state": {
                "lastGroupId": len(self.groups),
                "lastNodeId": len(self.nodes),
                "lastLinkId": len(links),
                "lastRerouteId": 0,
            },
            "revision": 0,
            "config": {},
            "name": name,
            "inputNode": {"id": ENTRY, "bounding": [-220, TOP - 20, 120, 40 + 20 * len(asked)]},
            "outputNode": {"id": EXIT, "bounding": [self.right + 60, TOP - 20, 120, 60]},
            "inputs": inputs,
            "outputs": [out],
            "widgets": [],
            "nodes": [node.saved(links) for node in self.nodes],
            "groups": self.groups,
            "links": [dict(zip(names, link, strict=True)) for link in links],
            "extra": {"workflowRendererVersion": "LG"},
            "category": "AMED",
            "description": about,
        }
        outside = {
            "id": len(self.nodes) + 1,
            "type": inside["id"],
            "pos": [0, TOP],
            "size": [400, 430],
            "flags": {},
            "order": 0,
            "mode": 0,
            "inputs": shown,
            "outputs": [{"name": kind, "type": kind, "links": []}],
            "properties": {"proxyWidgets": proxies + controls},
            "widgets_values": [],
            "title": name,
        }
        return {
            "revision": 0,
            "last_node_id": len(self.nodes) + 1,
            "last_link_id": 0,
            "nodes": [outside],
            "links": [],
            "version": 0.4,
            "definitions": {"subgraphs": [inside]},
            "extra": {},
        }

    def _links(self) -> tuple[list[list[Any]], list[dict[str, Any]], list[dict[str, int]]]:
        """Links, the points that some of them pass, and the last point of each of those."""
        links: list[list[Any]] = []
        points: dict[tuple[Any, ...], dict[str, Any]] = {}
        passing = []
        for node in self.nodes:
            for slot, one in enumerate(node.kind.inputs):
                if (source := node.sources.get(one.name)) is None:
                    continue
                origin, number = source.node, len(links) + 1
                if origin.x + origin.width >= node.x:
                    raise ValueError(f"{origin.kind.name} is not left of {node.kind.name}.")
                kind = origin.kind.outputs[source.slot].kind
                links.append([number, origin.number, source.slot, node.number, slot, kind])
                before = None
                for n in range(len(source.path)):
                    key = origin.number, source.slot, source.path[: n + 1]
                    new = {"id": len(points) + 1, "pos": list(source.path[n]), "linkIds": []}
                    point = points.setdefault(key, new if before is None else {**new, "parentId": before})
                    point["linkIds"].append(number)
                    before = point["id"]
                if before is not None:
                    passing.append({"id": number, "parentId": before})
        return links, list(points.values()), passing

    def _view(self) -> dict[str, Any]:
        """Scale and offset at which all of it is seen in a window of 1600x1000."""
        boxes = [(n.x, n.y - TITLE, n.x + n.width, n.bottom) for n in self.nodes]
        boxes += [(x, y, x + w, y + h) for x, y, w, h in (g["bounding"] for g in self.groups)]
        left, top = (min(box[i] for box in boxes) for i in (0, 1))
        right, bottom = (max(box[i] for box in boxes) for i in (2, 3))
        x0, y0, x1, y1 = SEEN
        scale = min(1.0, (x1 - x0) / (right - left), (y1 - y0) / (bottom - top))
        scale = int(scale * 100) / 100
        offset = [round((x0 + x1) / 2 / scale - (left + right) / 2), round(y0 / scale - top)]
        return {"scale": scale, "offset": offset}


def as_text(saved: dict[str, Any]) -> str:
    """A file's content."""
    return json.dumps(saved, indent=1, ensure_ascii=False) + "\n"


def _uuid(*parts: Any) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, "/".join(map(str, parts))))
