"""Where ComfyUI is on this machine, and how to use it and this pack without a server."""

import asyncio
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

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


def load_pack() -> Any:
    """This pack, imported as ComfyUI imports it, in this process and on the CPU."""
    sys.path.insert(0, str(COMFYUI))
    import comfy.cli_args  # noqa: PLC0415 - only now on the path

    comfy.cli_args.args.cpu = not os.environ.get("AMED_GPU")
    _load("nodes", COMFYUI / "nodes.py")  # pytest has given the name to this folder
    module = _load("amed_pack", PACK / "__init__.py")
    asyncio.run(module.comfy_entrypoint())
    return module


def _load(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
