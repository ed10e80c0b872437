"""The fit for a config and a model: the only place that knows all fits."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..config import PredictorConfig
from ..driver import in_full
from ..midpoints import TablePredictor, table_config
from ..multistep import MultistepTable
from ..network import AMEDPredictor
from ..samplers import DEFAULT, MULTISTEP_STUDENT, multistep_student, predictor_config
from ..types import Answer, Model
from .baselines import Start, starts
from .end_to_end import EndToEnd
from .multistep_fit import MultistepFit
from .per_interval import Trainer
from .protocol import FitConfig, TrainConfig
from .trajectories import conditioned, gaussian

MULTISTEP_FIT = FitConfig(trajectories=64, held_out=32, teacher_calls=24, iterations=6, budget=16_000)


def multistep_fit(calls: int) -> FitConfig:
    """How to fit a multistep table for so many model calls: few calls leave budget for more trajectories."""
    return replace(MULTISTEP_FIT, trajectories=96) if calls <= 3 else MULTISTEP_FIT


PUBLISHED_SUFFIX, TABLE_SUFFIX = " published", " table"


def students() -> list[str]:
    """The learned methods: every sampler type as it measures best, as a table, and as published."""
    suffixes = ("", TABLE_SUFFIX, PUBLISHED_SUFFIX)
    return [MULTISTEP_STUDENT, *(name + suffix for suffix in suffixes for name in DEFAULT)]


def student_config(name: str, calls: int, denoiser: Model, **overrides: Any) -> PredictorConfig:
    """The settings of a learned method at a number of calls."""
    low, high = float(denoiser.sigma_min), float(denoiser.sigma_max)
    if name == MULTISTEP_STUDENT:
        overrides.setdefault("guided", shows_guidance(denoiser))
        return multistep_student(calls, low, high, flow=getattr(denoiser, "flow", False), **overrides)
    published = name.endswith(PUBLISHED_SUFFIX)
    overrides.setdefault("features", "bottleneck" if shows_features(denoiser) else "latent")
    overrides.setdefault("table", getattr(denoiser, "sigmas", None))
    if name.endswith(TABLE_SUFFIX):
        return table_config(predictor_config(name.removesuffix(TABLE_SUFFIX), calls, low, high, **overrides))
    return predictor_config(name.removesuffix(PUBLISHED_SUFFIX), calls, low, high, published=published, **overrides)


@torch.no_grad()
def shows_features(model: Model) -> bool:
    """Whether the model gives bottleneck features, found out by one call."""
    return in_full(_asked_once(model))[1] is not None


@torch.no_grad()
def shows_guidance(model: Model) -> bool:
    """Whether the model is guided and gives its two answers, found out by one call."""
    return in_full(_asked_once(model))[2] is not None


def _asked_once(model: Model) -> Answer:
    return conditioned(model, range(1))(torch.zeros(1, *model.shape), torch.tensor(float(model.sigma_max)))


def differentiable(model: Model) -> bool:
    """Whether autograd runs through the model, found out by one call."""
    x = torch.zeros(1, *model.shape, requires_grad=True)
    with torch.enable_grad():
        answer = conditioned(model, range(1))(x, torch.tensor(float(model.sigma_max)))
    denoised: Tensor = answer[0] if isinstance(answer, tuple) else answer
    return denoised.requires_grad


def fit_settings(trajectories: int, model: Model, seed: int) -> TrainConfig:
    """A batch of 32, or smaller so that a short fit still takes about 60 optimiser steps per interval."""
    batch = max(4, min(32, trajectories // 60))
    return TrainConfig(
        trajectories=trajectories,
        batch_size=min(batch, trajectories),
        seed=seed,
        gradient="reverse" if differentiable(model) else "finite difference",
    )


Fit = Trainer | EndToEnd | MultistepFit


def fit(
    model: Model,
    config: PredictorConfig,
    training: TrainConfig,
    progress: Callable[[str], None] = lambda text: None,
) -> Fit:
    """Train a network with `training`, or fit a table with its seed and usual settings; `progress` hears how far."""
    source = gaussian(model, tuple(model.shape), config.sigmas[0], training.seed)
    if config.kind != "network":
        fitting: EndToEnd | MultistepFit
        if config.kind == "multistep":
            usual = replace(multistep_fit(config.calls), seed=training.seed)
            fitting = MultistepFit(MultistepTable(config), source, usual, starts_for(model, config))
        else:
            fitting = EndToEnd(TablePredictor(config), source, FitConfig(seed=training.seed))
        for iteration in fitting.events():
            progress(f"iteration {iteration.iteration}")
        return fitting
    trainer = Trainer(AMEDPredictor(config, torch.Generator().manual_seed(training.seed)), source, training)
    for event in trainer.events():
        progress(f"{event.trajectory}/{training.trajectories}")
    return trainer


def starts_for(model: Model, config: PredictorConfig) -> list[Start]:
    """What a multistep fit of this model begins with."""
    table = getattr(model, "sigmas", None)
    return starts(config.calls, config.sigma_min, config.sigmas[0], flow=config.flow, table=table)
