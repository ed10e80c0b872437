"""What efforts cost."""

from typing import get_args

import pytest
from problems import SHAPE, SIGMA_MAX, Counting, Mixture, mixture, multistep_config

from amed_core import FitConfig, PredictorConfig, make_fit, usual_settings
from amed_core.fit.efforts import FEW, MOST_CALLS, Effort, settings_of
from amed_core.fit.make import make_set
from amed_core.fit.several import Use
from amed_core.fit.trajectories import gaussian
from amed_core.fit.workers import Workers


@pytest.mark.parametrize("calls", [3, 5, 8, 10])
@pytest.mark.parametrize("effort", ["quick", "standard"])
def test_a_fit_takes_no_more_sample_calls_than_its_effort_allows(effort: Effort, calls: int) -> None:
    model, config = Counting(mixture), multistep_config(calls)
    settings = usual_settings(config, effort=effort)
    fit = make_fit(config, settings, gaussian(model, SHAPE, SIGMA_MAX))
    list(fit.events())
    assert 0.5 * MOST_CALLS[effort] < model.samples <= MOST_CALLS[effort]
    assert model.samples == fit.model_calls
    assert (fit.summary().gain or 0) > 0


def test_a_set_takes_less_than_its_fits_one_by_one() -> None:
    """They share the teacher."""
    uses = [Use(calls) for calls in (3, 4, 5)]

    def settings(calls: int) -> FitConfig:
        return settings_of("quick", calls, len(uses))

    model = Counting(mixture)
    fit = make_set(uses, multistep_config, settings, gaussian(model, SHAPE, SIGMA_MAX))
    list(fit.events())
    assert model.samples == fit.model_calls <= len(uses) * MOST_CALLS["quick"]
    assert fit.predictors.calls == (3, 4, 5)
    assert len(fit.summary().header()["uses"]) == len(uses)


def test_only_the_fit_that_makes_the_targets_chooses_their_teacher() -> None:
    """The others' errors are distances to those: a teacher of 6 calls is too poor for all of these."""
    few = FitConfig(4, 2, 2, teacher_calls=6, iterations=2, budget=0, grids=2, baselines=2)
    fit = make_set([Use(2), Use(3), Use(4)], multistep_config, lambda calls: few, gaussian(mixture, SHAPE, SIGMA_MAX))
    teachers = []
    for _ in fit.events():
        teachers.append(fit.targets[0].teacher.calls)
    assert len(set(teachers)) == 1
    assert len({one.summary().teacher for one in fit.fits.values()}) == 1


def test_a_set_is_fitted_over_a_range_of_guidance_scales() -> None:
    """Each of its tables holds all of them, those for images, too."""
    scales = (1.0, 2.0)
    few = FitConfig(4, 2, 2, teacher_calls=12, iterations=1, grids=2, baselines=2)
    sources = [gaussian(Mixture(scale), SHAPE, SIGMA_MAX) for scale in scales]

    def config(calls: int) -> PredictorConfig:
        return multistep_config(calls, guidances=scales)

    fit = make_set([Use(2), Use(3), Use(2, 4.0)], config, lambda calls: few, sources)
    list(fit.events())
    assert fit.begun
    assert [one.config.guidances for one in fit.predictors.predictors] == [scales] * 3
    assert fit.predictors.from_level(4.0, 2, 1.5) is fit.predictors.predictors[2]


def test_images_are_fitted_by_one_process() -> None:
    few = FitConfig(4, 2, 2)
    with pytest.raises(ValueError, match="one process"):
        make_set(
            [Use(2), Use(2, 4.0)],
            multistep_config,
            lambda calls: few,
            gaussian(mixture, SHAPE, SIGMA_MAX),
            workers=Workers(0, 2),
        )


def test_every_effort_has_settings_for_every_number_of_calls_and_no_other_has() -> None:
    for effort in get_args(Effort):
        for numbers in (range(2, FEW + 1), range(FEW + 1, 21)):  # which have other iterations
            trajectories = [settings_of(effort, calls).trajectories for calls in numbers]
            assert trajectories == sorted(trajectories, reverse=True)
    with pytest.raises(ValueError, match="quick, standard, thorough"):
        settings_of("hasty", 5)  # type: ignore[arg-type]
