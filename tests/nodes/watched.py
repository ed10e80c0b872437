"""A script: everything that this pack does in ComfyUI, once, under an audit hook, which cannot be taken away.

    python watched.py COMFYUI FOLDER

It prints as JSON what happened of what SECURITY.md rules out. ComfyUI is imported before, and does what it does. Python
itself reports `exec` and `compile` for every import and every dataclass.
"""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

ANYONES = (
    *("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostby", "socket.sendto", "urllib.", "http."),
    *("ftplib.", "smtplib.", "subprocess.", "os.system", "os.exec", "os.spawn", "os.posix_spawn", "os.fork"),
    *("os.startfile", "pickle.find_class", "ctypes.dlopen", "webbrowser."),
)
OURS = ("exec", "compile", "import")  # only where a file of ours is the one that does it
PACK = Path(__file__).parents[2]


class Watch:
    """What happened, and which files were opened to be written."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.written: set[str] = set()

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(ANYONES):
            self.events.append(f"{event} {arguments!r:.200}")
        elif event in ("exec", "compile"):
            file = sys._getframe(1).f_code.co_filename
            if file.startswith((str(PACK / "nodes"), str(PACK / "amed_core"), str(PACK / "__init__.py"))):
                self.events.append(f"{event} by {file}")
        elif event == "open" and isinstance(arguments[0], str) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            self.written.add(arguments[0])


def everything(place: Path) -> None:
    """The pack is loaded, and trains, saves, loads, samples with what it loaded, and learns."""
    import comfy.sample  # noqa: PLC0415
    import folder_paths  # noqa: PLC0415
    import torch  # noqa: PLC0415

    import nodes  # noqa: PLC0415

    folder_paths.models_dir = str(place / "models")
    folder_paths.set_user_directory(str(place / "user"))
    folder_paths.set_temp_directory(str(place / "temp"))
    assert asyncio.run(nodes.load_custom_node(str(PACK)))
    ours = nodes.NODE_CLASS_MAPPINGS
    model, positive, negative, latent, _ = ours["AMEDDemoModel"].execute("3", 1).args

    def sampled(model: Any, sampler: str, scheduler: str) -> torch.Tensor:
        noise = comfy.sample.prepare_noise(latent["samples"], 1)
        given = (sampler, scheduler, positive, negative, latent["samples"])
        drawn: torch.Tensor = comfy.sample.sample(model, noise, 5, 1.0, *given, seed=1, disable_pbar=True)
        assert drawn.isfinite().all()
        return drawn

    asked = {"model": model, "positive": positive, "negative": negative, "latent_image": latent, "cfg": 1.0}
    asked |= {"steps": 5, "effort": "quick", "save_as": "", "starts": "noise"}
    with torch.inference_mode():
        trained = ours["AMEDTrainPredictor"].execute(**{name: [value] for name, value in asked.items()}).args[0]
        name = ours["AMEDSavePredictor"].execute(trained, "watched").args[0]
        loaded, _ = ours["AMEDLoadPredictor"].execute(name).args
        sampled(ours["AMEDApplyPredictor"].execute(model, loaded).args[0], "amed", "amed")
        for _ in range(2):  # where there is no file that fits, the first teaches
            (place / "models" / "amed_predictors" / name).unlink(missing_ok=True)
            sampled(model, "amed", "amed")


def main(comfyui: str, folder: str) -> None:
    """Watch everything, and at last something that is ruled out, which must be seen."""
    sys.path.insert(0, comfyui)
    import comfy.cli_args  # noqa: PLC0415

    comfy.cli_args.args.cpu = True
    import comfy.sample  # noqa: PLC0415
    import scipy.optimize  # noqa: F401, PLC0415
    import torch  # noqa: PLC0415
    import utils.extra_config  # noqa: F401, PLC0415 - as ComfyUI does, before another `utils` is on the path

    import nodes  # noqa: F401, PLC0415

    torch.set_num_threads(1)
    watch = Watch()
    sys.addaudithook(watch)
    everything(Path(folder))
    events = list(watch.events)
    import pickle  # noqa: PLC0415

    pickle.loads(pickle.dumps(Path("a")))
    print("WATCHED", json.dumps({"events": events, "then": watch.events[len(events) :], "written": [*watch.written]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
