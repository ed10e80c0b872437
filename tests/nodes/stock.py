"""ComfyUI's own nodes, called as its executor calls them: by their ids, and their inputs by name."""

import asyncio
from functools import cache
from typing import Any


@cache
def known() -> dict[str, Any]:
    """The class of every stock node."""
    import nodes  # noqa: PLC0415 - ComfyUI's

    asyncio.run(nodes.init_builtin_extra_nodes())
    classes: dict[str, Any] = nodes.NODE_CLASS_MAPPINGS
    return classes


def stock(kind: str, **inputs: Any) -> Any:
    """The NodeOutput of a stock node, whatever its kind is; an input that is not given has its schema's default."""
    from comfy_api.latest import io  # noqa: PLC0415

    node = known()[kind]
    owner = node.PREPARE_CLASS_CLONE(None) if issubclass(node, io.ComfyNode) else node()
    answer = getattr(owner, node.FUNCTION)(**defaults(node) | inputs)
    if isinstance(answer, dict):  # of an output node of the older kind
        return io.NodeOutput(*answer.get("result", ()), ui=answer["ui"])
    if isinstance(answer, tuple):
        return io.NodeOutput(*answer)
    if hasattr(answer.ui, "as_dict"):
        answer.ui = answer.ui.as_dict()
    return answer


def defaults(node: Any) -> dict[str, Any]:
    """What the browser would send for the inputs that have a widget."""
    asked = node.INPUT_TYPES()
    found = {}
    for name, (kind, *settings) in (asked.get("required", {}) | asked.get("optional", {})).items():
        options = settings[0] if settings else {}
        choices = kind if isinstance(kind, list) else options.get("options")
        if "default" in options or choices:
            found[name] = options.get("default", choices and choices[0])
    return found
