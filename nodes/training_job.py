"""What a training node was asked, made into a fit: its subject, and the job with the name of what is kept of it."""

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import comfy.sample
import comfy.samplers
import torch
from comfyui_version import __version__ as COMFYUI_VERSION

from ..amed_core.files import STATE_VERSION
from ..amed_core.version import __version__
from .fitting import Job, prompt_names
from .gradients import without_inference_tensors
from .pairing import checkpoint, guidance, models_beside, on_several_gpus
from .states import NEVER, Unfinished
from .training_request import Asked
from .training_subject import Subject, digest, prepared, shapes_of, sized_for
from .two_models import TwoModelsGuider


def subject_of(asked: Asked, positives: Sequence[Any]) -> tuple[Asked, Subject]:
    """What is trained on, and the inputs with the MODEL and the cfg of a guider, if one is connected.

    Raises ValueError for a guider that brings no positive prompt.
    """
    given = asked.guider
    if given is not None:
        guider = _ready(given)
        if guider.cfg is None or "positive" not in guider.original_conds:
            raise ValueError(
                f"{type(given).__name__} is no guider with a positive prompt. Connect one such as CFGGuider or "
                f'"AMED Two Models Guider" to guider of "{asked.NODE}".'
            )
        asked = replace(asked, model=guider.model_patcher, cfg=float(guider.cfg), guider=None)
        names = ["positive"]
        guider.original_conds = without_inference_tensors(guider.original_conds)
        about = digest([guider.original_conds, type(guider).__qualname__, guidance(guider)])
        model = guider.model_patcher
    else:
        model = prepared(asked.model)
        guider, names = comfy.samplers.CFGGuider(model), prompt_names(len(positives))
        prompts = without_inference_tensors(dict(zip(names, positives, strict=True)))
        guider.inner_set_conds({**prompts, "negative": without_inference_tensors(asked.negative)})
        guider.set_cfg(asked.cfg)
        about = digest([*prompts.values(), asked.negative])
    if asked.reverse and on_several_gpus(model):
        raise ValueError(
            "Autograd does not reach the copies of a model that MultiGPU CFG Split asks. Set gradient to "
            f'"finite difference" in "{asked.NODE}", or connect the model before the MultiGPU node.'
        )
    latent, rows = sized_for(model, asked.latent_image), _rows(guider, names)
    return asked, Subject(model, guider, latent, tuple(names), about, rows)


def _ready(given: Any) -> Any:
    """A copy of a guider to train through."""
    if isinstance(given, TwoModelsGuider):
        return given.replaced(prepared(given.model_patcher), prepared(given.low))
    guider = copy.copy(given)
    guider.model_patcher = prepared(given.model_patcher)
    guider.model_options = guider.model_patcher.model_options
    return guider


def _rows(guider: Any, names: Sequence[str]) -> int:
    """The rows of the longest positive conditioning."""
    tensors = [cond.get("cross_attn") for name in names for cond in guider.original_conds[name]]
    return max((len(tensor) for tensor in tensors if tensor is not None), default=1)


def job_of(asked: Asked, subject: Subject) -> Job:
    """What to fit, for these inputs, and where an unfinished fit is kept."""
    fitted, held_out = split(len(subject.prompts))
    uses, teacher = asked.uses, asked.own_teacher(subject)
    numbers, passes = asked.tried([use.calls for use in uses]), asked.of_network
    configs = {calls: asked.config(subject, calls) for calls in numbers}
    counts = (len(fitted), len(held_out), subject.rows)
    settings = {calls: asked.settings(config, *counts) for calls, config in configs.items()}
    if teacher is not None:  # a run begins where its recipe does
        configs = {n: replace(config, sigmas=(teacher.levels[0], *config.sigmas[1:])) for n, config in configs.items()}
    most = numbers[-1]
    configs[most], spent = asked.on_grid(configs[most], subject, settings[most].batch_size)
    about = [
        [asdict(configs[n]) for n in numbers],
        [asdict(settings[n]) for n in numbers],
        [asked.seed, shapes_of(subject.latent), subject.digest, None if teacher is None else teacher.name],
        [[use.calls, use.level] for use in uses],
        passes,
        # Prompts and settings are alike for all fine-tunes of a family.
        [checkpoint(one) for one in (subject.model, *models_beside(subject.guider))],
        [__version__, STATE_VERSION, torch.__version__, COMFYUI_VERSION],
    ]
    return Job(
        uses,
        configs,
        settings,
        asked.seed,
        fitted,
        held_out,
        Unfinished(_name(about), asked.keep_state != NEVER),
        spent,
        reverse=asked.reverse,
        teacher=teacher,
        minutes=asked.minutes,
        passes=passes,
    )


def _name(about: Any) -> str:
    """A name for what JSON can say."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


def split(count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Which of so many prompts to fit on, and which to judge by: from 4 on, every fourth."""
    if count < 4:
        return tuple(range(count)), tuple(range(count))
    return tuple(n for n in range(count) if n % 4 != 3), tuple(n for n in range(count) if n % 4 == 3)
