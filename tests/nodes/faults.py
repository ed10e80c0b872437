"""This pack where something of others is at fault: a script that loads it once under each of some faults.

    python faults.py COMFYUI ANSWERS.json FAULT...

ComfyUI is imported once. Every fault has a process of its own, forked from there, and so never meets another.
"""

import asyncio
import json
import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

if __name__ == "__main__":
    import torch

    sys.path.insert(0, sys.argv[1])
    import comfy.cli_args
    import utils.extra_config  # noqa: F401 - as ComfyUI does, before another `utils` is on the path

    comfy.cli_args.args.cpu = True

    torch.set_num_threads(1)

sys.path.append(str(Path(__file__).parent))
from bits import digest, drawn
from comfyui import PACK
from families import make

STOCK = (("euler", "normal"), ("dpmpp_2m", "karras"), ("uni_pc", "simple"))
MODULE = "module "  # how faults begin of which a module of ours is named, that fails
Place = Path  # a folder of a fault's own, in which the models folder lies


class Frozen(list[str]):
    """A list that takes a few names, and then no more."""

    room = 0

    def append(self, name: str) -> None:
        if not self.room:
            raise TypeError("this list is frozen")
        self.room -= 1
        super().append(name)


def _nothing(place: Place) -> None:
    del place


def _file_in_its_place(place: Place) -> None:
    (place / "models").mkdir()
    (place / "models" / "amed_predictors").write_text("a file")


def _models_is_a_file(place: Place) -> None:
    (place / "models").write_text("a file")


def _read_only(place: Place) -> None:
    del place  # the superuser may write anywhere, so that the system is asked to say it

    def refuse(path: Any, *_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system", str(path))

    os.mkdir = refuse  # type: ignore[assignment]


def _missing_drive(place: Place) -> None:
    del place
    import folder_paths  # noqa: PLC0415

    folder_paths.models_dir = "/proc/no drive/models"


def _freeze(which: str, kind: Callable[[Any], Any], classes: bool = True) -> Callable[[Place], None]:
    """Another pack puts something else in the place of a list of ComfyUI's, and of KSampler's, too."""

    def fault(place: Place) -> None:
        del place
        import comfy.samplers  # noqa: PLC0415

        setattr(comfy.samplers, which, kind(getattr(comfy.samplers, which)))
        own = {"SAMPLER_NAMES": "SAMPLERS", "SCHEDULER_NAMES": "SCHEDULERS"}.get(which)
        if own and classes:
            setattr(comfy.samplers.KSampler, own, getattr(comfy.samplers, which))

    return fault


def _with_room(names: Any) -> Any:
    frozen = Frozen(names)
    frozen.room = 3
    return frozen


def _table(kind: Callable[[Any], Any]) -> Callable[[Place], None]:
    def fault(place: Place) -> None:
        del place
        import folder_paths  # noqa: PLC0415

        folder_paths.folder_names_and_paths = kind(folder_paths.folder_names_and_paths)

    return fault


def _entry(entry: Any) -> Callable[[Place], None]:
    return _table(lambda table: dict(table) | {"amed_predictors": entry})


def _user_is_a_file(place: Place) -> None:
    import folder_paths  # noqa: PLC0415

    (place / "a file").touch()
    folder_paths.set_user_directory(str(place / "a file"))


def _raising(*_: Any, **__: Any) -> Any:
    raise PermissionError(13, "Permission denied")


def _unlistable(place: Place) -> None:
    del place
    import folder_paths  # noqa: PLC0415

    folder_paths.get_filename_list = _raising


def _server(instance: Any) -> Callable[[Place], None]:
    def fault(place: Place) -> None:
        del place
        import server  # noqa: PLC0415

        server.PromptServer.instance = instance

    return fault


def _without(name: str) -> Callable[[Place], None]:
    """A package is not installed."""

    def fault(place: Place) -> None:
        _real_server(place)
        for module in list(sys.modules):
            if module == name or module.startswith(f"{name}."):
                del sys.modules[module]
        sys.modules[name] = None  # type: ignore[assignment]

    return fault


def _real_server(place: Place) -> None:
    del place
    import server  # noqa: PLC0415

    server.PromptServer(asyncio.new_event_loop())


FAULTS: dict[str, Callable[[Place], None]] = {
    "none": _nothing,
    "two copies of the pack": _real_server,
    "a file in the folder's place": _file_in_its_place,
    "models is a file": _models_is_a_file,
    "read-only": _read_only,
    "a missing drive": _missing_drive,
    "sampler list a tuple": _freeze("SAMPLER_NAMES", tuple),
    "sampler list a tuple, KSampler's is not": _freeze("SAMPLER_NAMES", tuple, classes=False),
    "scheduler list a tuple": _freeze("SCHEDULER_NAMES", tuple),
    "scheduler table read-only": _freeze("SCHEDULER_HANDLERS", MappingProxyType),
    "sampler list frozen": _freeze("SAMPLER_NAMES", Frozen),
    "sampler list frozen half way": _freeze("SAMPLER_NAMES", _with_room),
    "sampler list copied": _freeze("SAMPLER_NAMES", list, classes=False),
    "scheduler list copied": _freeze("SCHEDULER_NAMES", list, classes=False),
    "folder table read-only": _table(MappingProxyType),
    "folder entry with tuples": _entry(((), frozenset())),
    "folder entry of three": _entry(([], set(), "more")),
    "folder entry none": _entry(None),
    "files cannot be listed": _unlistable,
    "the user folder is a file": _user_is_a_file,
    "a server without routes": _server(SimpleNamespace()),
    "a server with other routes": _server(SimpleNamespace(routes={})),
    "no server": _server(None),
    "no aiohttp": _without("aiohttp"),
    "no scipy": _without("scipy"),
}


class Failing:
    """An import hook under which one module of ours cannot be imported."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        del path, target
        if name.endswith(f"ComfyUI-AMED.{self.name}"):
            raise RuntimeError(f"{self.name} is at fault")


def answer(fault: str, place: Place, expected: list[str]) -> dict[str, Any]:
    """How ComfyUI is after it has loaded the pack under a fault."""
    import comfy.k_diffusion.sampling  # noqa: PLC0415
    import comfy.samplers  # noqa: PLC0415
    import folder_paths  # noqa: PLC0415

    import nodes  # noqa: PLC0415

    folder_paths.models_dir = str(place / "models")
    (place / "custom_nodes").mkdir()
    copies = [place / "custom_nodes" / "ComfyUI-AMED"]
    copies += [place / "custom_nodes" / "again-ComfyUI-AMED"] if fault.startswith("two copies") else []
    if fault.startswith(MODULE):
        sys.meta_path.insert(0, Failing(fault.removeprefix(MODULE)))  # type: ignore[arg-type]
    else:
        FAULTS[fault](place)
    before = _lists(comfy.samplers)
    log: list[str] = []
    logging.getLogger().addHandler(_Hearing(log))
    for copy in copies:
        copy.symlink_to(PACK)
        loaded = asyncio.run(nodes.load_custom_node(str(copy)))
    started = _started() if FAULTS.get(fault) is _real_server else True
    after = _lists(comfy.samplers)
    sampling, own = comfy.k_diffusion.sampling, {"ddim", "uni_pc", "uni_pc_bh2"}  # of which KSampler makes others
    family = make("flux")
    shown = nodes.NODE_CLASS_MAPPINGS.get("AMEDLoadPredictor")
    return {
        "loaded": loaded,
        "started": started,
        "kept": all(after[name][: len(names)] == names for name, names in before.items()),
        "ours": {name: after[name][len(names) :] for name, names in before.items()},
        "functions": all(n in own or hasattr(sampling, f"sample_{n}") for n in comfy.samplers.KSampler.SAMPLERS),
        "handlers": all(name in comfy.samplers.SCHEDULER_HANDLERS for name in comfy.samplers.KSampler.SCHEDULERS),
        "nodes": sorted(name for name in nodes.NODE_CLASS_MAPPINGS if name.startswith("AMED")),
        "shipped": shown is not None and "digits_amed_5.safetensors" in json.dumps(shown.INPUT_TYPES()),
        "log": [line for line in log if "AMED" in line and not line.startswith("Traceback")],
        "stock": [digest(drawn(family, *names)) for names in STOCK] == expected,
        "saves": _saves(nodes.NODE_CLASS_MAPPINGS),
        "modules": sorted(name.partition("ComfyUI-AMED.")[2] for name in sys.modules if "ComfyUI-AMED." in name),
        "learns": "amed" in comfy.samplers.KSampler.SAMPLERS and bool(drawn(family, "amed", "simple").isfinite().all()),
    }


def _saves(found: dict[str, Any]) -> str:
    """What comes of loading a shipped predictor and of saving it."""
    if "AMEDLoadPredictor" not in found:
        return "there is none to save"
    try:
        predictor, _ = found["AMEDLoadPredictor"].execute("digits_amed_5.safetensors").args
        return "saved as " + str(found["AMEDSavePredictor"].execute(predictor, "again").args[0])
    except Exception as error:
        return f"{type(error).__name__}: {error}"


class _Hearing(logging.Handler):
    def __init__(self, heard: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.heard = heard

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append(record.getMessage())


def _lists(samplers: Any) -> dict[str, list[str]]:
    return {
        "samplers": list(samplers.SAMPLER_NAMES),
        "schedulers": list(samplers.SCHEDULER_NAMES),
        "handlers": list(samplers.SCHEDULER_HANDLERS),
        "KSampler's samplers": list(samplers.KSampler.SAMPLERS),
        "KSampler's schedulers": list(samplers.KSampler.SCHEDULERS),
    }


def _started() -> bool:
    """Whether the server gives out its addresses, among them ours."""
    import server  # noqa: PLC0415

    running = server.PromptServer.instance
    running.add_routes()
    return any(route.resource.canonical == "/amed/predictor" for route in running.app.router.routes())


def main(answers: Path, names: list[str]) -> None:
    """Each fault in a fork of this process, which itself never sees the pack."""
    import comfy.samplers  # noqa: PLC0415, F401
    import folder_paths  # noqa: PLC0415
    import server  # noqa: PLC0415, F401

    import nodes  # noqa: PLC0415, F401

    family, found = make("flux"), {}
    expected = [digest(drawn(family, *stock)) for stock in STOCK]
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(names):
            place = Path(folder) / str(number)
            (place / "user").mkdir(parents=True)
            folder_paths.set_user_directory(str(place / "user"))
            sys.stdout.flush()
            if not os.fork():
                try:
                    (place / "answer.json").write_text(json.dumps(answer(name, place, expected)))
                except BaseException:
                    traceback.print_exc()
                    sys.stderr.flush()
                os._exit(0)
            os.wait()
            file = place / "answer.json"
            found[name] = json.loads(file.read_text()) if file.exists() else None
    answers.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[2]), sys.argv[3:])
