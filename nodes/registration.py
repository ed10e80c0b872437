"""The one place where our names join ComfyUI's lists: at their end, in place, never replaced, once, and all or none."""

import contextlib
import os
from collections.abc import Callable, Iterable
from typing import Any

import comfy.k_diffusion.sampling
import comfy.samplers
import folder_paths

from .places import FOLDER, SHIPPED, own
from .sampling import sampler_functions, scheduler
from .values import SCHEDULER

LEAVE_LISTS = "AMED_LEAVE_LISTS"  # an environment variable: set, ComfyUI's lists stay as they are


def add_folder() -> list[str]:
    """Add the folder of predictor files; what is missing then and why, as sentences.

    A folder that cannot be made now is made when something is saved.
    """
    missing = []
    try:
        own().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        missing.append(f"The folder of your predictors cannot be made ({error}), so only those shipped are listed.")
    try:
        known = folder_paths.folder_names_and_paths.get(FOLDER) or ((), ())
        others = [path for path in known[0] if path not in (str(own()), str(SHIPPED))]
        folder_paths.folder_names_and_paths[FOLDER] = ([str(own()), *others, str(SHIPPED)], {".safetensors"})
    except Exception as error:  # whatever another pack made of that table
        missing.append(f"Predictor files cannot be listed, since ComfyUI's table of folders takes no more ({error}).")
    return missing


def add_names() -> list[str]:
    """Add our samplers and our scheduler to the lists; what is missing then and why, as sentences.

    Another pack may hold copies of ComfyUI's lists, which then differ from them. For its users the lists can be left
    alone; "AMED Sampler" and "AMED Scheduler" need no list.
    """
    if os.environ.get(LEAVE_LISTS):
        return []
    try:
        with contextlib.ExitStack() as undo:
            _add(undo.callback)
            undo.pop_all()  # nothing failed, so that nothing is taken back
    except Exception as error:  # whatever another pack made of the lists
        return [
            f"The lists of samplers and schedulers are without ours, since another pack has frozen them ({error}). Use "
            '"AMED Sampler" and "AMED Scheduler" with SamplerCustom.'
        ]
    return []


def _add(undo: Callable[..., Any]) -> None:
    """Add functions before the names that stand for them, and tell `undo` how to take each back."""
    theirs, lists = comfy.samplers, comfy.samplers.KSampler
    if SCHEDULER not in theirs.SCHEDULER_HANDLERS:
        theirs.SCHEDULER_HANDLERS[SCHEDULER] = theirs.SchedulerHandler(scheduler)
        undo(theirs.SCHEDULER_HANDLERS.pop, SCHEDULER)
    for name, function in sampler_functions().items():
        if name not in theirs.SAMPLER_NAMES:
            setattr(comfy.k_diffusion.sampling, f"sample_{name}", function)
            undo(delattr, comfy.k_diffusion.sampling, f"sample_{name}")
    _append([SCHEDULER], (theirs.SCHEDULER_NAMES, lists.SCHEDULERS), undo)
    _append(sampler_functions(), (theirs.SAMPLER_NAMES, lists.SAMPLERS), undo)


def _append(names: Iterable[str], lists: tuple[list[str], list[str]], undo: Callable[..., Any]) -> None:
    """Add names to lists, which are one but where another pack has replaced it."""
    for known in lists:
        for name in names:
            if name not in known:
                known.append(name)
                undo(known.remove, name)
