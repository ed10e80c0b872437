"""The fit for a config and a model: the only place that knows all fits."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ..config import PredictorConfig
from ..driver import in_full
from ..features import Look
from ..network import AMEDPredictor
from ..predictor import build
from ..samplers import MULTISTEP_STUDENT, ModelFacts, student_config
from ..types import Answer, Model, Source
from .baselines import baselines
from .call_derivative import Gradient
from .end_to_end import EndToEnd
from .midpoint_start import MidpointStart
from .multistep_start import MultistepStart
from .parameters import MidpointParameters, MultistepParameters
from .per_interval import PerInterval
from .protocol import Fit, FitConfig, TrainConfig
from .runs import Runs
from .scales import SeveralScales
from .teacher import Teacher
from .trajectories import Metered, conditioned, gaussian
from .workers import ALONE, Workers

Settings = TrainConfig | FitConfig


def usual_settings(config: PredictorConfig, trajectories: int = 0, *, differentiable: bool = False) -> Settings:
    """How to fit a predictor of these settings; `trajectories` are those of the fit, 0 for as many as usual."""
    if config.kind == "network":
        count = trajectories or TrainConfig.trajectories
        # A short fit still takes about 60 optimiser steps per interval.
        batch = min(max(4, min(32, count // 60)), count)
        gradient: Gradient = "reverse" if differentiable else "finite difference"
        return TrainConfig(trajectories=count, batch_size=batch, gradient=gradient)
    if config.kind == "table":
        count = trajectories or 32
        return FitConfig(trajectories=count, held_out=count, iterations=9, budget=0)
    usual = 96 if config.calls <= 3 else FitConfig.trajectories  # few calls leave budget for more
    count = trajectories or usual
    return FitConfig(trajectories=count, budget=FitConfig.budget * -(-count // usual))


def make_fit(
    config: PredictorConfig,
    settings: Settings,
    sources: Source | Sequence[Source],
    *,
    model_sigmas: Tensor | None = None,
    seed: int = 0,
    look: Look | None = None,
    workers: Workers = ALONE,
    device: torch.device | str = "cpu",
    teacher: Teacher | None = None,
) -> Fit:
    """The fit of a predictor of these settings, not begun.

    `sources` are one per guidance scale of the config. `teacher` says where tables should lead, if not where the ODE
    itself does. `model_sigmas` (levels,) are a discrete model's. `seed` is that
    of a network's weights. Raises ValueError for settings of another kind of fit, or another number of sources.
    """
    listed = (sources,) if callable(sources) else tuple(sources)
    if len(listed) != max(len(config.guidances), 1):
        raise ValueError(f"There are {len(listed)} sources for guidance scales {list(config.guidances)}.")
    if config.kind == "network":
        if not isinstance(settings, TrainConfig):
            raise ValueError("A network is fitted per interval: give a TrainConfig.")
        predictor = AMEDPredictor(config, torch.Generator().manual_seed(seed)).to(device)
        return PerInterval(predictor, listed[0], settings, look, workers)
    if not isinstance(settings, FitConfig):
        raise ValueError("A table is fitted to the end of the trajectory: give a FitConfig.")

    def single(number: int, on: PredictorConfig | None) -> Fit:
        """The fit at guidance scale `number`, on the grid of the table of another scale if there is one."""
        scale = config.guidances[number] if config.guidances else config.guidance
        own = replace(config, guidance=scale, guidances=())
        runs = Runs.of(own, settings, Metered(listed[number]), workers, teacher)
        initial = build(own).to(device if own.kind == "table" else "cpu")
        if own.kind == "table":
            return EndToEnd(initial, MidpointParameters, MidpointStart(runs, initial), runs)
        levels = (own.calls, own.sigma_min, own.sigmas[0])
        listing = partial(baselines, flow=own.flow, model_sigmas=model_sigmas, switch_sigma=own.switch_sigma)
        return EndToEnd(initial, MultistepParameters, MultistepStart(runs, listing(*levels), on), runs)

    return SeveralScales(config.guidances, single) if config.guidances else single(0, None)


def fit_predictor(
    model: Model,
    student: str | PredictorConfig = MULTISTEP_STUDENT,
    calls: int = 5,
    *,
    trajectories: int = 0,
    seed: int = 0,
    guidance: float = 1.0,
    progress: Callable[[Fit], object] = lambda fit: None,
) -> Fit:
    """Fit a predictor to a model at so many model calls, and return the finished fit.

    `student` is a sampler type's name, or the settings, which then say how many calls, and at what guidance.
    `trajectories` are those of the fit, 0 for as many as usual. `seed` is that of noise and weights. `guidance` is
    noted in the predictor; the model itself answers at its own scale. `progress` hears of every step. Raises ValueError
    for a name or a number of calls that cannot be. Raises FloatingPointError for samples that are not finite.
    """
    config = student
    if isinstance(config, str):
        config = student_config(config, calls, facts_of(model), guidance=guidance)
    settings = usual_settings(config, trajectories, differentiable=is_differentiable(model))
    device = getattr(model, "device", "cpu")
    source = gaussian(model, tuple(model.shape), config.sigmas[0], seed, device)
    fit = make_fit(config, settings, source, model_sigmas=getattr(model, "sigmas", None), seed=seed, device=device)
    for _ in fit.events():
        progress(fit)
    return fit


def facts_of(model: Model) -> ModelFacts:
    """What recipes must know of a model, found out by one call of it."""
    _, features, guidance = in_full(_asked_once(model))
    return ModelFacts(
        float(model.sigma_min),
        float(model.sigma_max),
        getattr(model, "sigmas", None),
        getattr(model, "flow", False),
        bottleneck=features is not None,
        guided=guidance is not None,
        fingerprint=getattr(model, "fingerprint", {}),
    )


def is_differentiable(model: Model) -> bool:
    """Whether autograd runs through the model, found out by one call of it."""
    with torch.enable_grad():
        return in_full(_asked_once(model, requires_grad=True))[0].requires_grad


def _asked_once(model: Model, requires_grad: bool = False) -> Answer:
    x = torch.zeros(1, *model.shape, requires_grad=requires_grad)
    sigma = torch.tensor(float(model.sigma_max))
    with torch.set_grad_enabled(requires_grad):
        return conditioned(model, range(1))(x.to(getattr(model, "device", "cpu")), sigma)
