"""Distilling a predictor from the loaded model, inside the UI, with no more memory than sampling needs."""

import logging
import time
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy_api.latest import io, ui

from ..amed_core.files import provenance
from ..amed_core.fit.equivalent import MOST
from ..amed_core.fit.protocol import FitSummary
from ..amed_core.fit.several import numbers_of
from .fitting import FLOW_PAIR, USUAL_PAIR, TrainSampler, duration
from .pairing import refuse_unfit
from .places import UNFINISHED
from .previews import notice, plot
from .recipes import advice
from .saving import NotSavedError, saved, why_not
from .states import Unfinished, harmless
from .training_inputs import ADVANCED, OTHER_SIZES, PAPER_ADVANCED, outputs, paper_inputs, predictor_inputs
from .training_job import job_of, subject_of
from .training_request import Asked, AskedPaper, AskedPredictor
from .training_subject import Subject, empty, shapes_of
from .values import CATEGORY, WARNING, NotedPredictor, describe, fold, say, schema, settings, tell

LONGEST_LIST = 1_000_000  # bytes of a file of prompts
LONGEST_NAME = 80  # characters of its name in an error


class AMEDTrainPredictor(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AMEDTrainPredictor",
            display_name="AMED Train Predictor",
            category=CATEGORY,
            description="Distils a predictor from the model, for the sampler amed_multistep. It learns, on random "
            "noise, to come as close in a few model calls as a slow sampler does in many. The model itself is not "
            "changed, and no more memory is used than for sampling a batch. Train once per model, prompt style, cfg "
            "and number of steps.",
            inputs=fold(predictor_inputs(), ADVANCED),
            outputs=outputs(),
            hidden=[io.Hidden.unique_id],
            is_input_list=True,
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, steps: Any = "5", passes: Any = 0, prompts: Any = "", save_as: Any = "") -> bool | str:
        try:
            None if _only(passes) else numbers_of(str(_only(steps)))
        except ValueError as error:
            return f'steps is {error} Set it in "{AskedPredictor.NODE}".'
        return _known_before(prompts, save_as, AskedPredictor.NODE)

    @classmethod
    def execute(cls, positive: list[Any], **inputs: Any) -> io.NodeOutput:
        return train(AskedPredictor.of(_one_each(inputs)), positive, cls)


class AMEDTrainPaperPredictor(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AMEDTrainPaperPredictor",
            display_name="AMED Train Paper Predictor",
            category=CATEGORY,
            description="Distils a predictor of the AMED paper from the model: AMED-Solver, or AMED-Plugin for another "
            'solver. "AMED Train Predictor" makes better ones in less time. The model itself is not changed. Train '
            "once per model, prompt style, cfg and number of steps.",
            inputs=fold(paper_inputs(), PAPER_ADVANCED),
            outputs=outputs(),
            hidden=[io.Hidden.unique_id],
            is_input_list=True,
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, prompts: Any = "", save_as: Any = "") -> bool | str:
        return _known_before(prompts, save_as, AskedPaper.NODE)

    @classmethod
    def execute(cls, positive: list[Any], **inputs: Any) -> io.NodeOutput:
        return train(AskedPaper.of(_one_each(inputs)), positive, cls)


def _one_each(inputs: Mapping[str, list[Any]]) -> dict[str, Any]:
    """A list of CONDITIONINGs is several prompts; of everything else there is one."""
    return {name: values[0] for name, values in inputs.items()}


def _only(value: Any) -> Any:
    """The value of an input; a node that takes lists may be given it in one."""
    return value[0] if isinstance(value, list) and value else value


def _known_before(prompts: Any, save_as: Any, node: str) -> bool | str:
    """What is wrong with a widget by itself, before anything runs; True if nothing is.

    What contradicts another widget is refused when the node begins: ComfyUI marks every widget that is looked at here.
    """
    try:
        lines_of(str(_only(prompts) or ""), node)
    except ValueError as error:
        return str(error)
    name = str(_only(save_as) or "")
    return (why_not(name, node) or True) if name.strip() else True


def train(asked: Asked, positive: list[Any], node: type[io.ComfyNode]) -> io.NodeOutput:
    """Do what a node was asked: its four outputs.

    Raises ValueError, naming what to set, for a MODEL that no sampler suits and for inputs that do not go together.
    """
    begin = time.monotonic()
    asked.refuse_without_effect(len(positive))
    if asked.save_as.strip() and (refusal := why_not(asked.save_as, asked.NODE)) is not None:
        raise ValueError(refusal)
    positives = [*positive, *encoded(asked.clip, asked.prompts, asked.NODE)]
    refuse_unfit(asked.model if asked.guider is None else asked.guider.model_patcher)
    # ComfyUI runs nodes in inference mode, where nothing can be trained.
    with torch.inference_mode(False), torch.no_grad():
        asked, subject = subject_of(asked, positives)
        job = job_of(asked, subject)
        sampler = TrainSampler(job, subject.prompts, partial(tell, node))
        with torch.enable_grad():
            noise, image = (empty(subject.latent, job.settings.batch_size) for _ in range(2))
            subject.guider.sample(noise, image, sampler, torch.tensor(job.config.sigmas), seed=asked.seed)
    predictor, summary = _made(sampler, asked, subject)
    file = _saved(predictor, asked, sampler) if asked.save_as.strip() else _kept(predictor, job.unfinished)
    return _shown(predictor, summary, file, sampler, subject, duration(time.monotonic() - begin), node)


def _made(sampler: TrainSampler, asked: Asked, subject: Subject) -> tuple[NotedPredictor, FitSummary]:
    """What was fitted, with notes on how, and the summary of the fit."""
    summary, every = sampler.finished.summary(), sampler.finished.predictors
    for one in every.predictors:
        one.cpu()
    about = {
        "prompts": len(subject.prompts),
        "seed": asked.seed,
        "model_calls": sampler.model_calls,
        "latents": [shape[1:] for shape in shapes_of(subject.latent)],
        "effort": getattr(asked, "effort", ""),
        "equal_calls": {str(n): c for n, c in sampler.equal.items()},
    }
    notes, unfinished = provenance(summary.header() | about), sampler.job.unfinished
    return NotedPredictor.of(every, notes, unfinished.name), summary


def _saved(predictor: NotedPredictor, asked: Asked, sampler: TrainSampler) -> str:
    """Save what was fitted, as a sentence. A full disk does not cost the fit, whose state then stays."""
    try:
        return f"Saved as {saved(predictor, asked.save_as, asked.NODE)}"
    except Exception as error:  # whatever it is, what was fitted is worth more
        sampler.job.unfinished.keep(sampler.finished)
        logging.warning(f"AMED: the predictor is not saved: {error}")
        why = getattr(error, "why", None) or getattr(error, "strerror", None) or error
        first = f"{error.remedy}, then " if isinstance(error, NotSavedError) else ""
        return f'NOT saved ({why}): {first}connect "AMED Save Predictor" and run again'


def _kept(predictor: NotedPredictor, unfinished: Unfinished) -> str:
    """Keep what was fitted until a node saves it, for ComfyUI forgets it; as a sentence, empty if nothing is kept."""
    if not unfinished.keep_result(predictor.every, predictor.notes):
        return ""
    return f'Not saved; "AMED Save Predictor" saves it. Until then it is {UNFINISHED}/{unfinished.best.name}'


def _shown(
    predictor: NotedPredictor,
    summary: FitSummary,
    file: str,
    sampler: TrainSampler,
    subject: Subject,
    took: str,
    node: type[io.ComfyNode],
) -> io.NodeOutput:
    """The outputs. What cannot be shown does not cost what was fitted."""
    told = sampler.job.unfinished.told
    usage, gained, config = describe(predictor), summary.sentence(), predictor.config
    cost = f"{sampler.model_calls:,} sample calls of training in {took}"
    cost += f", {sampler.shown_calls:,} of them to see what it is worth"
    if sampler.resumed:
        cost += ", of which some before it was stopped"
    if sampler.stopped:
        cost += "; the budget stopped it"
    equal = equalities(sampler.equal, config.flow)
    fitted_at = made_at(predictor.notes["training"]["latents"], config.kind)
    price = f"a picture takes {config.calls} model calls, which are {config.passes} passes of the network"
    warnings = summary.warnings()
    for one in warnings:
        logging.warning(f"AMED: {one}")
    lines = [usage, gained, *warnings, *equal, file, fitted_at, price, cost, advice(subject.model), *_failed(told)]
    table = "" if sampler.report is None else sampler.report.text()
    report = "\n".join([*filter(None, lines), "", table])
    drawn = notice("There is no report: the log says why.")
    with harmless("there is no plot", told):
        if sampler.report is not None:
            drawn = plot(sampler.report, f"{usage}; {summary.headline()}")
    # What it means, in as few lines as a node shows: first of all, whether it is any good.
    sign = f"{WARNING} " if summary.gain is not None and summary.gain <= 0 else ""
    short = [sign + (summary.headline() or gained), *(f"{WARNING} {one}" for one in warnings), *equal]
    meaning = "\n".join(filter(None, [*short, f"Choose {settings(predictor)}", file]))
    shown: dict[str, Any] = dict(ui.PreviewText(meaning).as_dict())
    with harmless("the plot is not shown", told):
        shown |= ui.PreviewImage(drawn, cls=node).as_dict()
    with harmless("what it means is not shown", told):
        say(node, meaning)
    return io.NodeOutput(predictor, {"loss": sampler.finished.losses}, report, drawn, ui=shown)


def _failed(told: Collection[str]) -> list[str]:
    """What went wrong beside the fit, as sentences."""
    return [f"{failure[0].upper()}{failure[1:]}: the log says why" for failure in sorted(told)]


def equalities(equal: Mapping[int, int | None], flow: bool) -> list[str]:
    """In how many calls a usual stock pair comes as near, as sentences."""
    pair = " ".join(FLOW_PAIR if flow else USUAL_PAIR)
    found = [
        f"{calls} calls come nearer than {MOST} of {pair}"
        if stock is None
        else f"{calls} calls equal {stock} of {pair}"
        for calls, stock in equal.items()
    ]
    return [f"{'; '.join(found)}, by the RMSE of noise that it never saw"] if found else []


def made_at(size: Sequence[Sequence[int]], kind: str) -> str:
    """At which size a predictor was fitted, without the batch, and what is lost at another."""
    shown = " and ".join(" x ".join(map(str, shape)) for shape in size)
    return f"fitted on latents of {shown}" + (f"; {OTHER_SIZES}" if kind == "multistep" else "")


def encoded(clip: Any, text: str, node: str = AskedPredictor.NODE) -> list[Any]:
    """The prompts of a text. Raises ValueError as `lines_of` does, and for prompts without a text encoder."""
    lines = lines_of(text, node)
    if lines and clip is None:
        raise ValueError(f'prompts need a text encoder: connect clip of "{node}", or clear prompts.')
    return [clip.encode_from_tokens_scheduled(clip.tokenize(line)) for line in lines]


def lines_of(text: str, node: str) -> list[str]:
    """The prompts of a text, one per line, or of a .txt file in ComfyUI's input folder that it names.

    Raises ValueError for a file that is not there, is empty or too long, or is no text.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) == 1 and lines[0].lower().endswith(".txt"):
        name = f'{lines[0][:LONGEST_NAME]} (prompts of "{node}")'
        lines = [line.strip() for line in _text_of(lines[0], name).splitlines() if line.strip()]
        if not lines:
            raise ValueError(f"{name} holds no prompt.")
    return lines


def _text_of(file: str, name: str) -> str:
    """The text of a file in ComfyUI's input folder, which errors call `name`. Raises ValueError if there is none."""
    folder = Path(folder_paths.get_input_directory()).resolve()
    try:
        path = (folder / file).resolve()
        there = path.is_relative_to(folder) and path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        there = False
    if not there:
        raise ValueError(f"There is no file {name} in {folder}. Put it there, or write the prompts themselves.")
    if path.stat().st_size > LONGEST_LIST:
        raise ValueError(f"{name} has more than {LONGEST_LIST:,} bytes. Take fewer prompts.")
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{name} is no text in UTF-8. Save it anew in that encoding.") from None
