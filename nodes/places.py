"""Where predictor files lie."""

from pathlib import Path

import folder_paths

FOLDER = "amed_predictors"  # of the models folder
UNFINISHED = "unfinished"  # its folder of what a stopped fit leaves
SHIPPED = Path(__file__).parents[1] / "predictors"


def own() -> Path:
    """The user's own folder, where it usually is."""
    return Path(folder_paths.models_dir) / FOLDER


def folders() -> list[Path]:
    """All of them; predictors are saved in the first. ComfyUI knows them, unless its table could not be added to."""
    if FOLDER not in folder_paths.folder_names_and_paths:
        return [own(), SHIPPED]
    return [Path(place) for place in folder_paths.get_folder_paths(FOLDER)]
