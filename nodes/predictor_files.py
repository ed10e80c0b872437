"""Predictor files: saved into models/amed_predictors, loaded from there or from those shipped with this pack.

What the samplers have learned is listed with them.
"""

import difflib
import hashlib
from pathlib import Path

import folder_paths
from comfy_api.latest import io, ui

from ..amed_core.files import load_with_notes
from .learning import predictor_of
from .pairing import ANOTHER_MODEL
from .places import FOLDER
from .previews import levels_plot
from .saving import AUTOMATIC, saved, why_not
from .situations import named
from .values import CATEGORY, NotedPredictor, PredictorSocket, at_a_glance, describe, say, schema, shortened

NONE_FOUND = "(no predictor found)"
NEAREST = 3  # names that are told where one is not there
LOOKED_AT = 1 << 20  # bytes: more than the header of a predictor


def _names() -> list[str]:
    return [*folder_paths.get_filename_list(FOLDER), *named()]


def loaded(name: str) -> NotedPredictor:
    """What is listed under this name. Raises ValueError, of which PredictorFileError is one, if it cannot be read."""
    if (learned := named().get(name)) is not None:
        return predictor_of(learned)
    path = folder_paths.get_full_path(FOLDER, name) if name in folder_paths.get_filename_list(FOLDER) else None
    if path is None:
        raise ValueError(f'There is no predictor file {name!r:.80}. Choose another one in "AMED Load Predictor".')
    return NotedPredictor.of(*load_with_notes(Path(path)))


def _version(path: Path) -> str:
    """What differs between versions of a file; of one that is large, and so no predictor, little is read."""
    about = path.stat()
    with path.open("rb") as file:
        begin = file.read(LOOKED_AT)
    return hashlib.sha256(f"{about.st_size} {about.st_mtime_ns} ".encode() + begin).hexdigest()


class AMEDSavePredictor(io.ComfyNode):
    NAME = "AMED Save Predictor"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AMEDSavePredictor",
            display_name=cls.NAME,
            category=CATEGORY,
            description="Writes a predictor to models/amed_predictors. Nothing is overwritten: names are numbered. "
            'KSampler with the sampler "amed" finds it there by itself.',
            inputs=[
                PredictorSocket.Input("predictor", tooltip='From "AMED Train Predictor" or "AMED Load Predictor".'),
                io.String.Input(
                    "filename_prefix",
                    default=AUTOMATIC,
                    tooltip='The file becomes PREFIX_00001_.safetensors; a slash makes a subfolder. "auto" is a name '
                    "that says model, steps and cfg. Characters that Windows forbids become _.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="predictor_name", tooltip='The name under which "AMED Load Predictor" lists the file.'
                )
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, filename_prefix: str) -> bool | str:
        return why_not(filename_prefix, cls.NAME) or True

    @classmethod
    def execute(cls, predictor: NotedPredictor, filename_prefix: str) -> io.NodeOutput:
        listed = saved(predictor, filename_prefix, cls.NAME)
        say(cls, f"Saved as {shortened(listed)}")
        return io.NodeOutput(listed, ui=ui.PreviewText(listed))


class AMEDLoadPredictor(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        names = _names()
        return schema(
            node_id="AMEDLoadPredictor",
            display_name="AMED Load Predictor",
            category=CATEGORY,
            description="Reads a predictor. It belongs to the model, number of calls and cfg that it was trained for.",
            inputs=[
                io.Combo.Input(
                    "predictor_name",
                    options=names or [NONE_FOUND],
                    tooltip="Files in models/amed_predictors, those that come with this pack, and as learned/... what "
                    "the samplers have learned by themselves. Press R to refresh the list after saving a new one.",
                )
            ],
            outputs=[
                PredictorSocket.Output(
                    display_name="predictor",
                    tooltip='Connect to "AMED Apply Predictor", or to "AMED Sampler" and "AMED Scheduler".',
                ),
                io.Image.Output(
                    display_name="plot",
                    tooltip="At which noise levels it asks the model, a line for each number of steps. For Preview "
                    "Image.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, predictor_name: str) -> bool | str:
        names = _names()
        if predictor_name in names:
            return True
        near = difflib.get_close_matches(predictor_name, names, n=NEAREST, cutoff=0.0)
        listed = f"there are {len(names)}, as {', '.join(map(shortened, near))}" if names else "there is none at all"
        return (
            f"No predictor {predictor_name!r:.36}: {listed}. Press R to list the folders anew, train one with "
            f'"AMED Train Predictor", or copy a file into models/{FOLDER}.'
        )

    @classmethod
    def fingerprint_inputs(cls, predictor_name: str) -> str:
        path = named().get(predictor_name) or folder_paths.get_full_path(FOLDER, predictor_name)
        return _version(Path(path)) if path else ""

    @classmethod
    def execute(cls, predictor_name: str) -> io.NodeOutput:
        predictor = loaded(predictor_name)
        say(cls, at_a_glance(predictor))
        return io.NodeOutput(predictor, levels_plot(predictor.every, describe(predictor)))


class AMEDMergePredictors(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AMEDMergePredictors",
            display_name="AMED Merge Predictors",
            category=CATEGORY,
            description="Puts the predictors of two files together: other numbers of steps, other cfg, starts for "
            "image to image, or what the samplers have learned by themselves. Save the result as one file.",
            inputs=[
                PredictorSocket.Input("predictor", tooltip="The first one; what it alone is for stays."),
                PredictorSocket.Input(
                    "other",
                    tooltip="Its predictors are added. For the same use they take the place of the first one's.",
                ),
            ],
            outputs=[PredictorSocket.Output(display_name="predictor", tooltip="All of both, for a model of theirs.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, predictor: NotedPredictor, other: NotedPredictor) -> io.NodeOutput:
        differing = [k for k in ANOTHER_MODEL if predictor.config.model.get(k) != other.config.model.get(k)]
        if differing:
            both = ", ".join(f"{k} {predictor.config.model.get(k)} and {other.config.model.get(k)}" for k in differing)
            raise ValueError(
                f'These predictors are of two models ({both}). Connect two of one model to "AMED Merge Predictors".'
            )
        try:
            every = predictor.every.merged(other.every)
        except ValueError as error:
            raise ValueError(f'{error} Choose others in "AMED Merge Predictors".') from error
        made = NotedPredictor.of(every, {**predictor.notes, "merged": [dict(other.notes)]})
        say(cls, at_a_glance(made))
        return io.NodeOutput(made)
