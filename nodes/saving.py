"""Names of predictor files, and saving under them: nothing is overwritten, and a name travels to every system."""

import contextlib
import errno
import re
from pathlib import Path

import folder_paths

from ..amed_core.contents import in_short, path_in_short
from ..amed_core.files import save_new
from ..amed_core.samplers import MULTISTEP_STUDENT, sampler_name
from .places import FOLDER, UNFINISHED, folders
from .states import Unfinished
from .values import NotedPredictor, spans

AUTOMATIC = "auto"  # a name that says what the predictor is for
ENDING = ".safetensors"
FORBIDDEN = '<>:"|?*'  # on Windows; and nowhere anything that cannot be printed
# Stems that Windows keeps for itself.
DEVICES = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[\d\u00b9\u00b2\u00b3])\s*(\.|$)", re.IGNORECASE)
LONGEST = 120  # characters of a part of a name, so that the number and the ending fit,
LONGEST_BYTES = 200  # of a part as file systems store it,
LONGEST_NAME = 200  # and characters of a name with its folders
LONGEST_REASON = 60  # characters of what a system says
REMEDIES = {  # of what a system says
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "Free space in"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "Let ComfyUI write in"),
}
LONGEST_FAMILY = 40  # characters of a model's family in a name


def why_not(prefix: str, node: str) -> str | None:
    """Why a predictor cannot be saved under this name, and what to do, as a sentence; None if it can."""
    written = prefix.strip()
    if not written or written[-1] in "/\\":
        return f'The name is empty. Name the file in "{node}", for example "sdxl_5".'
    parts = [part.strip() for part in re.split(r"[/\\]", written)]
    if ".." in parts or not parts[0] or re.match(r"[A-Za-z]:", written):
        return (
            f"{written[:60]!r} leads out of models/{FOLDER}. Write a name, or folder/name, without .. and without a "
            f'slash or a drive at its beginning, in "{node}".'
        )
    if any(part.startswith(".") for part in parts):
        return f'{written[:60]!r} has a part that begins with a dot, so that nothing lists it. Change it in "{node}".'
    name = portable(prefix)
    if name.split("/")[0].lower() == UNFINISHED:
        return f'The folder {UNFINISHED} is for what a stopped training leaves. Choose another one in "{node}".'
    return _why_too_long(name, node)


def _why_too_long(name: str, node: str) -> str | None:
    longest = max(name.split("/"), key=lambda part: len(part.encode()))
    if len(longest) > LONGEST:
        return f'A part of the name has {len(longest)} characters. Write at most {LONGEST} in "{node}".'
    if len(longest.encode()) > LONGEST_BYTES:
        return f'A part of the name has {len(longest)} characters of many bytes. Write fewer of them in "{node}".'
    if len(name) > LONGEST_NAME:
        return f'The name has {len(name)} characters with its folders. Write at most {LONGEST_NAME} in "{node}".'
    return None


def portable(prefix: str) -> str:
    """The name with what no system minds: Windows' forbidden characters, endings and stems are exchanged."""
    written = prefix.strip()
    if written.lower().endswith(ENDING):
        written = written[: -len(ENDING)]
    plain = "".join(sign if sign.isprintable() and sign not in FORBIDDEN else "_" for sign in written)
    parts = (part.strip().rstrip(". ") or "_" for part in re.split(r"[/\\]+", plain))
    return "/".join(f"_{part}" if DEVICES.match(part) else part for part in parts)


def telling(predictor: NotedPredictor) -> str:
    """A name that says model, sampler, steps and cfg: SDXL_5_cfg7, Flux_3-10_cfg1_images."""
    config, every = predictor.config, predictor.every
    family = re.sub(r"[^\w-]", "", str(config.model.get("family", "")))[:LONGEST_FAMILY] or "model"
    sampler = "" if sampler_name(config) == MULTISTEP_STUDENT else f"_{sampler_name(config)}"
    scales = sorted({scale for one in every.predictors for scale in (one.config.guidances or (one.config.guidance,))})
    ends = "-".join(f"{scale:g}" for scale in dict.fromkeys((scales[0], scales[-1])))
    images = "_images" if len(every.from_noise) < len(every.predictors) else ""
    return f"{family}{sampler}_{spans(every.calls).replace(' to ', '-').replace(', ', '+')}_cfg{ends}{images}"


class NotSavedError(ValueError):
    """A predictor cannot be written. The message has the system's reason, `why`, and what to do, `remedy`."""

    def __init__(self, folder: Path, error: OSError, node: str) -> None:
        self.why = in_short(error.strerror or str(error), LONGEST_REASON)
        self.remedy = f"{REMEDIES.get(error.errno or 0, 'See what is wrong with')} {path_in_short(folder)}"
        if (way := _in_the_way(folder)) is not None:
            self.remedy = f"{path_in_short(way)} is a file where a folder belongs: move it away"
        super().__init__(f'The predictor is not saved ({self.why}). {self.remedy}, then run "{node}" again.')


def _in_the_way(folder: Path) -> Path | None:
    """The file that stands where a folder, or one that it lies in, should be; None if there is none."""
    with contextlib.suppress(OSError):
        return next((place for place in (folder, *folder.parents) if place.is_file()), None)
    return None


def saved(predictor: NotedPredictor, prefix: str, node: str) -> str:
    """Write a predictor under the next free number of a name, and return how it is listed.

    What was kept of it until then goes.

    Raises ValueError for a name that `why_not` refuses, and NotSavedError if nothing can be written there.
    """
    if (refusal := why_not(prefix, node)) is not None:
        raise ValueError(refusal)
    name = telling(predictor) if prefix.strip() == AUTOMATIC else portable(prefix)
    root = folders()[0]
    try:
        folder, stem, counter, subfolder, _ = folder_paths.get_save_image_path(name, str(root))
        path = save_new(
            predictor.every, lambda number: Path(folder) / f"{stem}_{number:05}_{ENDING}", predictor.notes, counter
        )
    except OSError as error:
        raise NotSavedError((root / name).parent, error, node) from error
    if predictor.unfinished:
        Unfinished(predictor.unfinished).remove()
    return (Path(subfolder) / path.name).as_posix()
