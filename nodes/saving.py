"""Names of predictor files, and saving under them: nothing is overwritten, and a name travels to every system."""

import re
from pathlib import Path

import folder_paths

from ..amed_core.files import save_new
from ..amed_core.samplers import MULTISTEP_STUDENT, sampler_name
from .places import FOLDER, UNFINISHED
from .values import NotedPredictor, spans

AUTOMATIC = "auto"  # a name that says what the predictor is for
ENDING = ".safetensors"
FORBIDDEN = re.compile(r'[<>:"|?*\x00-\x1f\x7f]')  # on Windows
DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)  # stems that Windows keeps for itself
LONGEST = 120  # characters of a part of a name, so that the number and the ending fit


def why_not(prefix: str, node: str) -> str | None:
    """Why a predictor cannot be saved under this name, and what to do, as a sentence; None if it can."""
    written = prefix.strip()
    if not written or written[-1] in "/\\":
        return f'The name is empty. Name the file in "{node}", for example "sdxl_5".'
    parts = re.split(r"[/\\]", written)
    if ".." in parts or not parts[0] or re.match(r"[A-Za-z]:", written):
        return (
            f"{written[:60]!r} leads out of models/{FOLDER}. Write a name, or folder/name, without .. and without a "
            f'slash or a drive at its beginning, in "{node}".'
        )
    if parts[0] == UNFINISHED:
        return f'The folder {UNFINISHED} is for what a stopped training leaves. Choose another one in "{node}".'
    if (longest := max(parts, key=len)) and len(portable(longest)) > LONGEST:
        return f'A part of the name has {len(longest)} characters. Write at most {LONGEST} in "{node}".'
    return None


def portable(prefix: str) -> str:
    """The name with what no system minds: Windows' forbidden characters, endings and stems are exchanged."""
    written = prefix.strip()
    if written.lower().endswith(ENDING):
        written = written[: -len(ENDING)]
    parts = (FORBIDDEN.sub("_", part).rstrip(". ") or "_" for part in re.split(r"[/\\]+", written))
    return "/".join(f"_{part}" if DEVICES.match(part) else part for part in parts)


def telling(predictor: NotedPredictor) -> str:
    """A name that says model, sampler, steps and cfg: SDXL_5_cfg7, Flux_3-10_cfg1_images."""
    config, every = predictor.config, predictor.every
    family = re.sub(r"[^\w-]", "", str(config.model.get("family", ""))) or "model"
    sampler = "" if sampler_name(config) == MULTISTEP_STUDENT else f"_{sampler_name(config)}"
    scales = sorted({scale for one in every.predictors for scale in (one.config.guidances or (one.config.guidance,))})
    ends = "-".join(f"{scale:g}" for scale in dict.fromkeys((scales[0], scales[-1])))
    images = "_images" if len(every.from_noise) < len(every.predictors) else ""
    return f"{family}{sampler}_{spans(every.calls).replace(' to ', '-').replace(', ', '+')}_cfg{ends}{images}"


def saved(predictor: NotedPredictor, prefix: str, node: str) -> str:
    """Write a predictor under the next free number of a name, and return how it is listed.

    Raises ValueError for a name that `why_not` refuses.
    """
    if (refusal := why_not(prefix, node)) is not None:
        raise ValueError(refusal)
    name = telling(predictor) if prefix.strip() == AUTOMATIC else portable(prefix)
    root = Path(folder_paths.get_folder_paths(FOLDER)[0])
    folder, stem, counter, subfolder, _ = folder_paths.get_save_image_path(name, str(root))
    path = save_new(
        predictor.every, lambda number: Path(folder) / f"{stem}_{number:05}_{ENDING}", predictor.notes, counter
    )
    return (Path(subfolder) / path.name).as_posix()
