"""The fit for a config and a model, and the public way to make one."""

from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from problems import (
    FACTS,
    SHAPE,
    SHORT,
    SIGMA_MAX,
    SIGMA_MIN,
    SMALL,
    Guided,
    Mixture,
    midpoint_config,
    mixture,
    multistep_config,
    noise,
    on,
    same,
)
from torch import Tensor

import amed_core
from amed_core import FitConfig, TrainConfig, facts_of, fit_predictor, make_fit, sample, usual_settings
from amed_core.fit.baselines import baselines, bench_methods
from amed_core.fit.end_to_end import EndToEnd
from amed_core.fit.make import is_differentiable
from amed_core.fit.per_interval import PerInterval
from amed_core.fit.scales import SeveralScales
from amed_core.fit.teacher import heun_samples
from amed_core.fit.trajectories import gaussian
from amed_core.samplers import NAMES, student_config
from amed_core.types import Denoiser

SOURCE = gaussian(mixture, SHAPE, SIGMA_MAX)


def test_a_fitted_predictor_is_nearer_to_the_teacher_than_every_unlearned_method() -> None:
    """On noise that the fit has not seen, and every one that a benchmark or a fit compares with."""
    model = Mixture()
    heard: list[int] = []
    fit = fit_predictor(model, calls=4, trajectories=32, progress=lambda fit: heard.append(fit.model_calls))
    assert heard == sorted(heard)
    assert heard[-1] == fit.model_calls
    assert (fit.summary().gain or 0) > 0.5
    x = SIGMA_MAX * noise(64, *SHAPE, seed=5).float()
    teacher = heun_samples(model, x, SIGMA_MIN, SIGMA_MAX, 200)

    def error(method: amed_core.Method) -> float:
        """The median: a few samples near the fork of the ODE decide the mean, whatever the method."""
        return float((sample(model, x, method) - teacher).square().flatten(1).mean(1).sqrt().median())

    unlearned = [
        on(
            one.levels,
            amed_core.Multistep(tuple(tuple(row[: k + 1]) for k, row in enumerate(one.weights))),
            amed_core.NoMidpoint(),
        )
        for one in baselines(4, SIGMA_MIN, SIGMA_MAX)
    ]
    best = min(map(error, [*unlearned, *bench_methods(model, 4)]))
    assert error(fit.predictor.method()) < 0.5 * best


@pytest.mark.parametrize("name", NAMES)
def test_every_sampler_type_can_be_fitted_by_its_name(name: str) -> None:
    fit = fit_predictor(Mixture(), name, 3, trajectories=4, seed=3)
    assert fit.predictor.config.calls == 3
    assert fit.summary().settings["trajectories"] == 4
    again = fit_predictor(Mixture(), name, 3, trajectories=4, seed=3)
    assert same(fit.predictor, again.predictor)
    other = fit_predictor(Mixture(), name, 3, trajectories=4, seed=4)
    assert not same(fit.predictor, other.predictor), "the seed is that of noise and weights"


def test_each_kind_of_predictor_has_its_fit() -> None:
    network = student_config("amed", 5, FACTS)
    assert isinstance(make_fit(network, SHORT, SOURCE), PerInterval)
    for config in (midpoint_config(), multistep_config()):
        assert isinstance(make_fit(config, SMALL, SOURCE), EndToEnd)
        assert isinstance(make_fit(replace(config, guidances=(1.0, 2.0)), SMALL, [SOURCE] * 2), SeveralScales)
    first, second, third = (make_fit(network, SHORT, SOURCE, seed=seed).predictor for seed in (0, 0, 1))
    assert same(first, second)
    assert not same(first, third)


def test_settings_of_another_kind_of_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="give a TrainConfig"):
        make_fit(student_config("amed", 5, FACTS), SMALL, SOURCE)
    for config in (midpoint_config(), multistep_config()):
        with pytest.raises(ValueError, match="give a FitConfig"):
            make_fit(config, SHORT, SOURCE)


@pytest.mark.parametrize(("scales", "sources"), [((), 2), ((1.0, 2.0, 4.0), 1)])
def test_the_number_of_sources_must_be_that_of_guidance_scales(scales: tuple[float, ...], sources: int) -> None:
    with pytest.raises(ValueError, match=f"{sources} sources"):
        make_fit(midpoint_config(guidances=scales), SMALL, [SOURCE] * sources)


@pytest.mark.parametrize("trajectories", [0, 1, 7, 60, 5000])
@pytest.mark.parametrize("name", ["network", "midpoints", "multistep"])
def test_usual_settings_fit_the_kind_and_take_the_trajectories_that_are_asked_for(name: str, trajectories: int) -> None:
    config = {
        "network": student_config("amed", 5, FACTS),
        "midpoints": midpoint_config(),
        "multistep": multistep_config(),
    }
    settings = usual_settings(config[name], trajectories)
    assert isinstance(settings, TrainConfig if name == "network" else FitConfig)
    assert trajectories in (settings.trajectories, 0)
    if isinstance(settings, TrainConfig):
        assert settings.batch_size <= settings.trajectories
        assert settings.gradient == "finite difference"
        reverse = usual_settings(config[name], trajectories, differentiable=True)
        assert isinstance(reverse, TrainConfig)
        assert reverse.gradient == "reverse"


class Bare(Mixture):
    """It shows neither bottleneck nor guidance."""

    fingerprint: ClassVar[dict[str, str]] = {"family": "mixture"}

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:  # type: ignore[override]
        return super().__call__(x, sigma)[0]


class Showing(Guided):
    """It shows what guidance adds."""

    shape, sigma_min, sigma_max = SHAPE, SIGMA_MIN, SIGMA_MAX


class Conditioned(Mixture):
    """It answers only for trajectories by their number."""

    def for_rows(self, rows: Any) -> Denoiser:
        assert list(rows) == [0]
        return mixture


class Frozen(Mixture):
    """It cannot be differentiated."""

    @torch.no_grad()
    def __call__(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return super().__call__(x, sigma)


def test_a_models_facts_are_found_out_by_asking_it() -> None:
    facts = {kind: facts_of(kind(1.0)) for kind in (Mixture, Bare, Showing, Conditioned)}
    assert [(one.bottleneck, one.guided) for one in facts.values()] == [
        (True, False),
        (False, False),
        (False, True),
        (True, False),
    ]
    assert facts[Bare].fingerprint == {"family": "mixture"}
    assert (facts[Mixture].sigma_min, facts[Mixture].sigma_max, facts[Mixture].flow) == (SIGMA_MIN, SIGMA_MAX, False)
    assert [is_differentiable(model(1.0)) for model in (Mixture, Frozen)] == [True, False]
