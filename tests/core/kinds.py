"""Every kind of fit, of models with closed forms, small enough to be stopped and broken at every model call."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from problems import (
    SHAPE,
    SIGMA_MAX,
    SIGMA_MIN,
    SWITCH,
    ConstantGuidance,
    Counting,
    Guided,
    Mixture,
    midpoint_config,
    mixture,
    multistep_config,
    per_interval_fit,
    two_models,
)
from torch import Tensor

from amed_core import Fit, FitConfig, PredictorConfig, TrainConfig, build
from amed_core.fit.baselines import baselines
from amed_core.fit.end_to_end import EndToEnd
from amed_core.fit.make import make_passes, make_set
from amed_core.fit.midpoint_start import MidpointStart
from amed_core.fit.multistep_start import MultistepStart
from amed_core.fit.parameters import MidpointParameters, MultistepParameters
from amed_core.fit.runs import Runs
from amed_core.fit.scales import SeveralScales
from amed_core.fit.several import Use
from amed_core.fit.teacher import Teacher
from amed_core.fit.trajectories import Metered, gaussian
from amed_core.fit.workers import ALONE
from amed_core.types import Denoiser

TRAIN = TrainConfig(trajectories=8, batch_size=4, epochs=2, held_out=4, validations=2, teacher_calls=6)
TABLE = FitConfig(trajectories=4, held_out=2, batch_size=2, teacher_calls=8, iterations=3, tolerance=0.0)

Wrap = Callable[[Denoiser], Denoiser]  # around every model that a fit asks


def network(settings: Any, wrap: Wrap, name: str = "amed") -> Fit:
    return per_interval_fit(name, 4, settings, wrap(mixture), scale_time=0.2)


def midpoints(settings: Any, wrap: Wrap, config: PredictorConfig | None = None, denoiser: Denoiser = mixture) -> Fit:
    config = config or midpoint_config("amed", 3)
    runs = Runs.of(config, settings, Metered(gaussian(wrap(denoiser), SHAPE, SIGMA_MAX)), ALONE)
    initial = build(config)
    return EndToEnd(initial, MidpointParameters, MidpointStart(runs, initial), runs)


def multistep(
    settings: Any,
    wrap: Wrap,
    config: PredictorConfig | None = None,
    denoiser: Denoiser = mixture,
    grid: PredictorConfig | None = None,
    teacher: Teacher | None = None,
) -> Fit:
    """It begins with few baselines, so that it is short."""
    config = config or multistep_config(3)
    runs = Runs.of(config, settings, Metered(gaussian(wrap(denoiser), SHAPE, SIGMA_MAX)), ALONE, teacher)
    few = baselines(3, SIGMA_MIN, SIGMA_MAX, switch_sigma=config.switch_sigma)[::20]
    parameters = partial(MultistepParameters, grid=settings.moves_grid)
    return EndToEnd(build(config), parameters, MultistepStart(runs, few, grid), runs)


def several(settings: Any, wrap: Wrap, kind: Any = midpoints) -> Fit:
    """Fits at two guidance scales."""
    scales, own = (1.0, 2.0), midpoint_config("amed", 3) if kind is midpoints else multistep_config(3)

    def make(number: int, grid: PredictorConfig | None) -> Fit:
        config = replace(own, guidance=scales[number])
        more = {} if kind is midpoints else {"grid": grid}
        made: Fit = kind(settings, wrap, config, Mixture(scales[number]), **more)
        return made

    return SeveralScales(scales, make)


def uses(settings: Any, wrap: Wrap) -> Fit:
    """Fits for two numbers of calls, and for images at both."""
    source = gaussian(wrap(mixture), SHAPE, SIGMA_MAX)
    few = replace(settings, grids=2, baselines=2)
    return make_set([Use(2), Use(3), Use(2, 4.0), Use(3, 4.0)], multistep_config, lambda calls: few, source)


def uses_at_scales(settings: Any, wrap: Wrap) -> Fit:
    """Fits for two numbers of calls at two guidance scales each."""
    sources = [gaussian(wrap(Mixture(scale)), SHAPE, SIGMA_MAX) for scale in (1.0, 2.0)]
    config = partial(multistep_config, guidances=(1.0, 2.0))
    return make_set([Use(2), Use(3)], config, lambda calls: settings, sources)


def forgetful(settings: Any, wrap: Wrap) -> Fit:
    """A fit in whose states there is room for one batch of targets."""
    fit = multistep(settings, wrap)
    for targets in (fit.runs.fitted, fit.runs.judged):  # type: ignore[attr-defined]
        targets.state_bytes = settings.batch_size * math.prod(SHAPE) * torch.float32.itemsize
    return fit


def passes(settings: Any, wrap: Wrap, count: int = 4) -> Fit:
    """A fit that may leave out negatives."""
    source = gaussian(wrap(ConstantGuidance(3.0)), SHAPE, SIGMA_MAX)
    few = replace(settings, grids=2, baselines=2)
    return make_passes(count, partial(multistep_config, guided=True, guidance=3.0), lambda calls: few, source)


@dataclass(frozen=True)
class Case:
    """A fit, the settings it is made with, and others."""

    make: Callable[[Any, Wrap], Fit]
    settings: Any = TABLE

    def fit(self, interrupted_at: int = 0, **changes: Any) -> tuple[Fit, Counting]:
        """A new fit, and the model that it asks."""
        counting = Counting(mixture, interrupted_at)

        def wrap(denoiser: Denoiser) -> Denoiser:
            one = copy.copy(counting)
            one.denoiser, one.__class__ = denoiser, Shared
            one.total = counting  # type: ignore[attr-defined]
            return one

        return self.make(replace(self.settings, **changes), wrap), counting


class Shared(Counting):
    """One of several models that count together."""

    total: Counting

    def __call__(self, x: Tensor, sigma: Tensor) -> Any:
        self.total.denoiser = self.denoiser
        return self.total(x, sigma)

    def conditional(self, x: Tensor, sigma: Tensor) -> Any:
        self.total.denoiser = self.denoiser
        return self.total.conditional(x, sigma)


CASES = {
    "network, reverse": Case(network, replace(TRAIN, gradient="reverse")),
    "network, differences": Case(partial(network, name="amed_ipndm"), replace(TRAIN, gradient="finite difference")),
    "network, none held out": Case(network, replace(TRAIN, held_out=0, gradient="finite difference", step=0.0)),
    "midpoints": Case(midpoints),
    "multistep": Case(multistep),
    "multistep, grid moved": Case(multistep, replace(TABLE, moves_grid=True)),
    "multistep, states without all targets": Case(forgetful, replace(TABLE, trajectories=6)),
    "multistep, guided": Case(partial(multistep, config=multistep_config(3, guided=True), denoiser=Guided(3.0))),
    "multistep, two models": Case(
        partial(multistep, config=multistep_config(3, switch_sigma=SWITCH), denoiser=two_models)
    ),
    "midpoints, several scales": Case(several),
    "multistep, several uses": Case(uses, replace(TABLE, iterations=2)),
    "multistep, guided, passes": Case(passes, replace(TABLE, held_out=8, iterations=2)),
    "multistep, several scales": Case(partial(several, kind=multistep), replace(TABLE, iterations=2)),
}
every_fit = pytest.mark.parametrize("name", CASES)


@cache
def undisturbed(case: Case) -> tuple[Fit, Counting]:
    """A fit that nothing stopped, and its model."""
    fit, model = case.fit()
    list(fit.events())
    return fit, model


def finished(name: str) -> tuple[Fit, Counting]:
    """The same of one of CASES."""
    return undisturbed(CASES[name])


def equal(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)
