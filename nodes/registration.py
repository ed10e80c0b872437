"""The one place where our names join ComfyUI's lists: added at the end, in place, never replaced, and only once."""

import os
from pathlib import Path

import comfy.k_diffusion.sampling
import comfy.samplers
import folder_paths

from .places import FOLDER, SHIPPED
from .sampling import sampler_functions, scheduler
from .values import SCHEDULER

LEAVE_LISTS = "AMED_LEAVE_LISTS"  # an environment variable: set, ComfyUI's lists stay as they are


def register() -> None:
    """Add the folder of predictor files, our samplers and our scheduler.

    Another pack may hold copies of ComfyUI's lists, which then differ from them. For its users the lists can be left
    alone; "AMED Sampler" and "AMED Scheduler" need no list.
    """
    own = Path(folder_paths.models_dir) / FOLDER
    own.mkdir(parents=True, exist_ok=True)
    folder_paths.add_model_folder_path(FOLDER, str(own), is_default=True)
    folder_paths.add_model_folder_path(FOLDER, str(SHIPPED))
    paths, _ = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, {".safetensors"})
    if os.environ.get(LEAVE_LISTS):
        return
    for name, function in sampler_functions().items():
        if name not in comfy.samplers.SAMPLER_NAMES:
            setattr(comfy.k_diffusion.sampling, f"sample_{name}", function)
            comfy.samplers.SAMPLER_NAMES.append(name)
    if SCHEDULER not in comfy.samplers.SCHEDULER_HANDLERS:
        comfy.samplers.SCHEDULER_HANDLERS[SCHEDULER] = comfy.samplers.SchedulerHandler(scheduler)
        comfy.samplers.SCHEDULER_NAMES.append(SCHEDULER)
