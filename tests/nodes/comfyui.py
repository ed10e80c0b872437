"""Where ComfyUI is on this machine, and how to use it and this pack without a server."""

import asyncio
import importlib.util
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PACK = Path(__file__).parents[2]
WHY_NOT = (
    "no ComfyUI found: set COMFYUI_PATH to its folder, or to several, or install it at ~/comfy/ComfyUI or "
    "~/comfy/ComfyUI-..."
)


def is_comfyui(place: Path) -> bool:
    """Whether a ComfyUI stands there."""
    return (place / "comfy" / "samplers.py").exists()


def named() -> list[Path]:
    """What COMFYUI_PATH names, one folder or several, as PATH does; there need not be a ComfyUI."""
    return [Path(name).expanduser() for name in os.environ.get("COMFYUI_PATH", "").split(os.pathsep) if name]


def found(pack: Path = PACK) -> list[Path]:
    """The ComfyUI whose custom_nodes the pack stands in, and those at home."""
    home = Path.home() / "comfy"
    places = [pack.parents[1]] if pack.parent.name == "custom_nodes" else []
    return list(filter(is_comfyui, [*places, home / "ComfyUI", *sorted(home.glob("ComfyUI-*"))]))


def each_once(places: Iterable[Path]) -> list[Path]:
    """Without a folder that is the same as one before."""
    return list({place.resolve(): place for place in reversed(list(places))}.values())[::-1]


def version_of(place: Path) -> str:
    """Which version stands there."""
    file = place / "comfyui_version.py"
    stated = re.search(r'__version__ = "(.+)"', file.read_text(encoding="utf-8")) if file.exists() else None
    return stated[1] if stated else "of an unknown version"


def summary(place: Path, passed: int, failed: int, skipped: int, errors: int) -> str:
    """How many node tests ran there, in one line."""
    counts = f"{passed} passed, {failed} failed, {skipped} skipped, {errors} errors"
    return f"node tests in ComfyUI {version_of(place)} ({place}): {counts}"


COMFYUI = next(iter(filter(is_comfyui, named()) if named() else found()), None)  # this process's


def load_pack() -> Any:
    """This pack, imported as ComfyUI imports it, in this process and on the CPU; with AMED_GPU on the GPU."""
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
