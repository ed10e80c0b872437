"""Writes the English texts of all nodes as ComfyUI's translations have them: what locales/*/nodeDefs.json translate.

    COMFYUI_PATH=~/comfy/ComfyUI python scripts/node_texts.py      # in ComfyUI's environment

A translation has the same keys; names of inputs and outputs stay as they are, for they are ComfyUI's own.
"""

import json
import sys
from pathlib import Path
from typing import Any

PACK = Path(__file__).parents[1]
sys.path.append(str(PACK / "tests" / "nodes"))
from comfyui import load_pack


def texts(pack: Any) -> dict[str, Any]:
    """By node: its name and description, and the tooltips of its inputs and outputs."""
    found = {}
    for node in pack.nodes.NODES:
        about = node.GET_SCHEMA()
        found[about.node_id] = {
            "display_name": about.display_name,
            "description": about.description,
            "inputs": {one.id: {"tooltip": one.tooltip} for one in about.inputs},
            "outputs": {str(n): {"tooltip": one.tooltip} for n, one in enumerate(about.outputs)},
        }
    return found


def main() -> None:
    file = PACK / "locales" / "en" / "nodeDefs.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(texts(load_pack()), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
