"""Where the negative is asked: on paper, in a fit, and what came of it."""

from dataclasses import replace
from functools import cache
from itertools import combinations

import pytest
import torch
from problems import (
    GRID,
    SHAPE,
    SIGMA_MAX,
    SIGMA_MIN,
    ConstantGuidance,
    Guided,
    X,
    mixture,
    multistep_config,
    noise,
    table_on,
)

from amed_core import FitConfig, fit_predictor, sample
from amed_core.config import PredictorConfig
from amed_core.fit.closed_form import Walk, least_squares
from amed_core.fit.huber import squares
from amed_core.fit.make import make_passes
from amed_core.fit.passes import LEAST_GAIN, Shown, UnderPasses
from amed_core.fit.protocol import PassesSummary, StateError
from amed_core.fit.teacher import levels, path
from amed_core.fit.trajectories import Metered, gaussian
from amed_core.types import Denoiser

SHORT = FitConfig(
    trajectories=4, held_out=8, batch_size=4, teacher_calls=16, iterations=1, baselines=1, grids=1, finalists=1, few=4
)


def guided(calls: int, **changes: object) -> PredictorConfig:
    return multistep_config(calls, guided=True, guidance=3.0, **changes)


def fit_of(model: Denoiser, passes: int = 6) -> UnderPasses:
    made = make_passes(passes, guided, lambda calls: SHORT, gaussian(model, SHAPE, SIGMA_MAX))
    for _ in made.events():
        pass
    return made


class Unsteady(Guided):
    """What guidance adds changes its sign with every level: an earlier call says nothing of it."""

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor]:
        cond = mixture(x, sigma)[0]
        guidance = 0.5 * sigma * (7.0 * sigma.log()).sin() * x.roll(1, -1).sign()
        return cond + (self.scale - 1) * guidance, None, guidance


steady = cache(lambda: fit_of(ConstantGuidance(3.0)))
unsteady = cache(lambda: fit_of(Unsteady(3.0)))


def test_on_paper_a_single_interval_is_what_it_is_in_a_run() -> None:
    """It begins on the path itself."""
    model = Guided(3.0)
    passed = path(model, X, levels(SIGMA_MIN, SIGMA_MAX, 40, flow=False))
    begun, walk = table_on((80.0, 0.0), guided=True, guidance=3.0), Walk(model, X, passed)
    shown = Shown.of(begun, [Walk(model, X, passed)])
    least_squares(begun, [walk])
    real = (walk.x - passed.end).double().flatten(1).norm(dim=1)
    torch.testing.assert_close(shown.distances((0,)), real, rtol=1e-4, atol=1e-4)


def test_on_paper_a_pattern_that_asks_more_is_no_worse() -> None:
    """On the same path every vector more is a choice more, but for the ridge."""
    model = Guided(3.0)
    passed = path(model, X, levels(SIGMA_MIN, SIGMA_MAX, 40, flow=False))
    shown = Shown.of(table_on(GRID, guided=True, guidance=3.0), [Walk(model, X, passed)])
    errors = {p: float(shown.distances(p).square().sum()) for m in (1, 5) for p in combinations(range(5), m)}
    assert errors[0, 1, 2, 3, 4] < 1.05 * min(errors[p] for p in errors if len(p) == 1)


def test_guidance_that_stays_the_same_is_asked_less_often() -> None:
    fit = steady()
    assert fit.kept
    config, summary = fit.predictor.config, fit.summary()
    assert config.passes == 6
    assert config.calls > 3 > len(config.negatives)
    assert isinstance(summary, PassesSummary)
    assert summary.error is not None
    assert summary.guided_error is not None
    assert summary.error < (1 - LEAST_GAIN) * summary.guided_error
    assert f"{len(config.negatives)} of {config.calls} calls ask the negative, which is 6 passes" in summary.sentence()


def test_what_it_makes_takes_as_many_passes_as_were_asked_for() -> None:
    meter = Metered(gaussian(ConstantGuidance(3.0), SHAPE, SIGMA_MAX))
    x, denoiser = meter(range(5))
    sample(denoiser, x, steady().predictor.method())
    assert meter.passes == 5 * 6


def test_on_new_noise_it_errs_less_than_the_guided_one() -> None:
    """In the median: of so few trajectories a fit knows little of forks."""
    fit, model, x = steady(), ConstantGuidance(3.0), SIGMA_MAX * noise(32, *SHAPE)
    truth = path(model, x, levels(SIGMA_MIN, SIGMA_MAX, 100, flow=False)).end
    ours, plain = (
        float(squares(sample(model, x, one.method()), truth).median()) for one in (fit.predictor, fit.plain.predictor)
    )
    assert ours < plain


def test_guidance_that_no_earlier_call_knows_is_asked_at_every_call() -> None:
    fit = unsteady()
    assert not fit.kept
    assert fit.predictor is fit.plain.predictor
    assert fit.predictor.config.negatives == ()
    summary = fit.summary()
    assert "All 3 calls ask the negative" in summary.sentence()
    assert fit.model_calls == summary.model_calls


def test_a_state_of_other_passes_is_refused() -> None:
    fresh = make_passes(8, guided, lambda calls: SHORT, gaussian(ConstantGuidance(3.0), SHAPE, SIGMA_MAX))
    with pytest.raises(StateError, match="another number of passes"):
        fresh.load_state_dict(steady().state_dict())


@pytest.mark.parametrize(
    ("passes", "changes"), [(3, {}), (6, {"guided": False}), (6, {"guidance": 1.0}), (6, {"guidances": (2.0, 3.0)})]
)
def test_passes_that_cannot_be_saved_are_refused(passes: int, changes: dict[str, object]) -> None:
    source = gaussian(ConstantGuidance(3.0), SHAPE, SIGMA_MAX)
    with pytest.raises(ValueError, match=r"passes|Passes"):
        make_passes(passes, lambda calls: replace(guided(calls), **changes), lambda calls: SHORT, source)  # type: ignore[arg-type]


def test_only_multistep_predictors_are_fitted_for_passes() -> None:
    model = ConstantGuidance(3.0)
    model.shape, model.sigma_min, model.sigma_max = SHAPE, SIGMA_MIN, SIGMA_MAX  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="number of passes"):
        fit_predictor(model, "amed", passes=6)  # type: ignore[arg-type]
