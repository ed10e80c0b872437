"""The one place where our names join ComfyUI's lists: added, never replaced, and only once."""

from pathlib import Path

import comfy.k_diffusion.sampling
import comfy.samplers
import folder_paths

from .sampling import SCHEDULER, sampler_functions, scheduler

FOLDER = "amed_predictors"
SHIPPED = Path(__file__).parents[1] / "predictors"


def register() -> None:
    """Add our samplers, our scheduler and the folder of predictor files."""
    for name, function in sampler_functions().items():
        if name not in comfy.samplers.SAMPLER_NAMES:
            setattr(comfy.k_diffusion.sampling, f"sample_{name}", function)
            comfy.samplers.SAMPLER_NAMES.append(name)
    if SCHEDULER not in comfy.samplers.SCHEDULER_HANDLERS:
        comfy.samplers.SCHEDULER_HANDLERS[SCHEDULER] = comfy.samplers.SchedulerHandler(scheduler)
        comfy.samplers.SCHEDULER_NAMES.append(SCHEDULER)
    own = Path(folder_paths.models_dir) / FOLDER
    own.mkdir(parents=True, exist_ok=True)
    folder_paths.add_model_folder_path(FOLDER, str(own), is_default=True)
    folder_paths.add_model_folder_path(FOLDER, str(SHIPPED))
    paths, _ = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, {".safetensors"})
