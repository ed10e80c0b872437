"""The fit for a config and a model: the only place that knows all fits."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import cast

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
from .efforts import Effort, of_images, settings_of
from .end_to_end import EndToEnd
from .midpoint_start import MidpointStart
from .multistep_start import MultistepStart, calls_to_begin
from .parameters import MidpointParameters, MultistepParameters
from .passes import LEAST_HELD_OUT, LEAST_PASSES, MORE_CALLS, UnderPasses
from .per_interval import PerInterval
from .protocol import Fit, FitConfig, TrainConfig
from .runs import LEVELS_EACH, Runs
from .scales import SeveralScales
from .several import FitSet, Use
from .teacher import Teacher
from .trajectories import Metered, conditioned, gaussian
from .workers import ALONE, Workers

Settings = TrainConfig | FitConfig


def usual_settings(
    config: PredictorConfig,
    trajectories: int = 0,
    *,
    effort: Effort = "standard",
    uses: int = 1,
    differentiable: bool = False,
) -> Settings:
    """How to fit a predictor of these settings; `trajectories` are those of the fit, 0 for as many as usual.

    The effort is that of multistep weights, whose teacher may serve several uses. Raises ValueError for an unknown one.
    """
    if config.kind == "network":
        count = trajectories or TrainConfig.trajectories
        # A short fit still takes about 60 optimiser steps per interval.
        batch = min(max(4, min(32, count // 60)), count)
        gradient: Gradient = "reverse" if differentiable else "finite difference"
        return TrainConfig(trajectories=count, batch_size=batch, gradient=gradient)
    if config.kind == "table":
        count = trajectories or 32
        return FitConfig(trajectories=count, held_out=count, iterations=9, budget=0)
    usual = settings_of(effort, config.calls, uses)
    if not trajectories:
        return usual
    return replace(usual, trajectories=trajectories, budget=usual.budget * -(-trajectories // usual.trajectories))


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
    itself does. `model_sigmas` (levels,) are a discrete model's. `seed` is that of a network's weights. Raises
    ValueError for settings of another kind of fit, or another number of sources.
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
        own = _at_scale(config, number)
        runs = Runs.of(own, settings, Metered(listed[number]), workers, teacher, scales=len(listed))
        if own.kind == "table":
            initial = build(own).to(device)
            return EndToEnd(initial, MidpointParameters, MidpointStart(runs, initial), runs)
        return _multistep(runs, model_sigmas, on, alone=not config.guidances)

    return SeveralScales(config.guidances, single) if config.guidances else single(0, None)


def make_set(
    uses: Sequence[Use],
    config: Callable[[int], PredictorConfig],
    settings: Callable[[int], FitConfig],
    sources: Source | Sequence[Source],
    *,
    model_sigmas: Tensor | None = None,
    workers: Workers = ALONE,
    teacher: Teacher | None = None,
) -> FitSet:
    """The fit of multistep predictors for several uses, which share a teacher's paths, not begun.

    `config` and `settings` are those for a number of calls. Trajectories and the teacher are those of the most calls.
    `sources` are one per guidance scale. Raises ValueError for no use, another number of sources, and images in several
    processes.
    """
    if not uses:
        raise ValueError("There is no use to make a predictor for.")
    most = max((use for use in uses if not use.level), key=lambda use: use.calls, default=None)
    if most is None:
        raise ValueError("Predictors for images need one from pure noise, whose teacher passes their levels.")
    listed = [Metered(source) for source in ((sources,) if callable(sources) else sources)]
    first = config(most.calls)
    if len(listed) != max(len(first.guidances), 1):
        raise ValueError(f"There are {len(listed)} sources for guidance scales {list(first.guidances)}.")
    shared = settings(most.calls)
    about = {name: getattr(shared, name) for name in ("trajectories", "held_out", "batch_size", "teacher_calls")}
    about["keep_bytes"] = shared.keep_bytes
    images = any(use.level for use in uses)
    if images and workers.count > 1:
        raise ValueError("Predictors for images are fitted by one process, which knows all of the teacher's paths.")
    scales, others = len(listed), sum(not use.level for use in uses)
    bases = [
        Runs.of(_at_scale(first, n), shared, source, workers, teacher, scales=scales, others=others, below=images)
        for n, source in enumerate(listed)
    ]
    # By level and number of the guidance scale, of one level at a time.
    of_level: dict[tuple[float, int], Runs] = {}

    def lower(calls: int, number: int, level: float) -> tuple[PredictorConfig, FitConfig]:
        """The settings of a fit for so many calls on images from a level."""
        grid = torch.linspace(level, 0, calls + 1).tolist()
        own = replace(_at_scale(config(calls), number), sigmas=(level, *grid[1:-1], 0.0))
        return own, of_images(replace(settings(calls), keep_bytes=about["keep_bytes"]))

    def make(use: Use) -> Fit:
        own, how = config(use.calls), replace(settings(use.calls), keep_bytes=about["keep_bytes"])

        def single(number: int, on: PredictorConfig | None) -> Fit:
            scaled = _at_scale(own, number)
            if not use.level:
                runs = bases[number] if use == most else bases[number].for_calls(scaled, how)
                return _multistep(runs, model_sigmas, on, alone=not own.guidances)
            if any(level != use.level for level, _ in of_level):
                of_level.clear()
            if (key := (use.level, number)) not in of_level:  # of the most calls, for which the teacher must be best
                calls = max(other.calls for other in uses if other.level == use.level)
                of_level[key] = bases[number].below(*lower(calls, number, use.level))
                if calls == use.calls:
                    return _multistep(of_level[key], model_sigmas, on, alone=not own.guidances)
            runs = of_level[key].for_calls(*lower(use.calls, number, use.level))
            return _multistep(runs, model_sigmas, on, alone=not own.guidances)

        return SeveralScales(own.guidances, single) if own.guidances else single(0, None)

    def least(use: Use) -> int:
        how = settings(use.calls)
        if not use.level:
            return len(listed) * calls_to_begin(how, use.calls, how.grids)
        how = of_images(replace(how, **about))
        first = use.calls == max(other.calls for other in uses if other.level == use.level)
        slow = bases[0].fitted.teacher.below(use.level, LEVELS_EACH * use.calls)
        taught = slow.model_calls * (how.trajectories + how.held_out) if first else 0
        return len(listed) * (taught + calls_to_begin(how, use.calls, how.grids))

    targets = [targets for base in bases for targets in (base.fitted, base.judged)]
    return FitSet(uses, make, listed, targets, least)


def make_passes(
    passes: int,
    config: Callable[[int], PredictorConfig],
    settings: Callable[[int], FitConfig],
    source: Source,
    *,
    model_sigmas: Tensor | None = None,
    workers: Workers = ALONE,
    teacher: Teacher | None = None,
) -> UnderPasses:
    """The fit of a multistep predictor for so many passes of the network, not begun.

    `config` and `settings` are those for a number of calls. Trajectories and the teacher are those of the most calls
    that are tried. Raises ValueError for fewer than LEAST_PASSES, and for a model that is not guided, or at several
    scales.
    """
    if passes < LEAST_PASSES:
        raise ValueError(f"Two guided calls are {LEAST_PASSES} passes, but {passes} are asked for.")
    half, own = passes // 2, config(passes // 2)
    if own.kind != "multistep" or not own.guided or own.guidances or own.guidance == 1:
        raise ValueError("Passes can be saved by a multistep predictor of a model that is guided, at one scale.")
    most = settings(half + MORE_CALLS)
    counts = {name: getattr(most, name) for name in ("trajectories", "batch_size", "teacher_calls")}
    how = replace(settings(half), **counts, held_out=max(most.held_out, LEAST_HELD_OUT))
    base = Runs.of(own, how, Metered(source), workers, teacher, others=2)  # one asks fewer negatives

    def make(calls: int, negatives: tuple[int, ...]) -> EndToEnd:
        runs = base.for_calls(replace(config(calls), negatives=negatives), settings(calls))
        return _multistep(runs, model_sigmas, None)

    return UnderPasses(passes, _multistep(base, model_sigmas, None), make)


def _at_scale(config: PredictorConfig, number: int) -> PredictorConfig:
    """The settings of the table of guidance scale `number` alone."""
    scale = config.guidances[number] if config.guidances else config.guidance
    return replace(config, guidance=scale, guidances=())


def _multistep(runs: Runs, model_sigmas: Tensor | None, on: PredictorConfig | None, *, alone: bool = True) -> EndToEnd:
    """The fit of one table, whose grid is its own if it is `alone`: the only one of its scales of guidance."""
    config = runs.config
    levels = (config.calls, config.sigma_min, config.sigmas[0])
    listed = baselines(*levels, flow=config.flow, model_sigmas=model_sigmas, switch_sigma=config.switch_sigma)
    grid = runs.settings.moves_grid and alone and not config.switch_sigma  # nor does a change of models move
    return EndToEnd(build(config), partial(MultistepParameters, grid=grid), MultistepStart(runs, listed, on), runs)


def fit_predictor(
    model: Model,
    student: str | PredictorConfig = MULTISTEP_STUDENT,
    calls: int = 5,
    *,
    effort: Effort = "standard",
    trajectories: int = 0,
    seed: int = 0,
    guidance: float = 1.0,
    passes: int = 0,
    progress: Callable[[Fit], object] = lambda fit: None,
) -> Fit:
    """Fit a predictor to a model at so many model calls, and return the finished fit.

    `student` is a sampler type's name, or the settings, which then say how many calls, and at what guidance. `effort`
    is how much a multistep one may cost: quick, standard or thorough. `trajectories` are those of the fit, 0 for as
    many as usual. `seed` is that of noise and weights. `guidance` is noted in the predictor; the model itself answers
    at its own scale. `passes`, if not 0, are those of the network that a multistep predictor of a guided model may
    take, which then chooses its number of calls. `progress` hears of every step. Raises ValueError for a name or a
    number of calls or passes that cannot be.
    Raises FloatingPointError for samples that are not finite.
    """
    facts = None if isinstance(student, PredictorConfig) else facts_of(model)
    differentiable = is_differentiable(model)
    device, sigmas = getattr(model, "device", "cpu"), getattr(model, "sigmas", None)

    def config_of(calls: int) -> PredictorConfig:
        if isinstance(student, PredictorConfig):
            return student
        assert facts is not None
        return student_config(student, calls, facts, guidance=guidance)

    def settings(calls: int) -> Settings:
        return usual_settings(config_of(calls), trajectories, effort=effort, differentiable=differentiable)

    first = config_of(passes // 2 or calls)
    source = gaussian(model, tuple(model.shape), first.sigmas[0], seed, device)
    fit: Fit
    if not passes:
        fit = make_fit(first, settings(calls), source, model_sigmas=sigmas, seed=seed, device=device)
    elif student != MULTISTEP_STUDENT:
        raise ValueError(f"Only {MULTISTEP_STUDENT} is fitted for a number of passes.")
    else:
        fit = make_passes(
            passes, config_of, lambda calls: cast(FitConfig, settings(calls)), source, model_sigmas=sigmas
        )
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
