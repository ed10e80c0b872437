"""Where ComfyUI is on this machine."""

import os
from pathlib import Path

PACK = Path(__file__).parents[2]
WHY_NOT = "no ComfyUI found: set COMFYUI_PATH to its folder, or install it at ~/comfy/ComfyUI"


def comfyui_path() -> Path | None:
    """COMFYUI_PATH, else the ComfyUI whose custom_nodes this pack stands in, else ~/comfy/ComfyUI."""
    named = os.environ.get("COMFYUI_PATH")
    places = [Path(named)] if named else [*([PACK.parents[1]] if PACK.parent.name == "custom_nodes" else [])]
    if not named:
        places.append(Path.home() / "comfy" / "ComfyUI")
    return next((place for place in places if (place / "comfy" / "samplers.py").exists()), None)


COMFYUI = comfyui_path()
