"""What efforts cost."""

from typing import get_args

import pytest
from problems import SHAPE, SIGMA_MAX, Counting, mixture, multistep_config

from amed_core import FitConfig, make_fit, usual_settings
from amed_core.fit.efforts import MOST_CALLS, Effort, settings_of
from amed_core.fit.make import make_set
from amed_core.fit.several import Use
from amed_core.fit.trajectories import gaussian


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


def test_every_effort_has_settings_for_every_number_of_calls_and_no_other_has() -> None:
    for effort in get_args(Effort):
        trajectories = [settings_of(effort, calls).trajectories for calls in range(2, 21)]
        assert trajectories == sorted(trajectories, reverse=True)
    with pytest.raises(ValueError, match="quick, standard, thorough"):
        settings_of("hasty", 5)  # type: ignore[arg-type]
