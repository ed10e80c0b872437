"""What a predictor does, interval by interval: the errors that a report states are those to where the ODE leads."""

from pathlib import Path

import pytest
from problems import SIGMA_MAX, Gaussian, midpoint_config, multistep_config, noise

from amed_core.digits import SHAPE, DigitsDenoiser
from amed_core.driver import trajectory
from amed_core.files import load_predictor
from amed_core.fit.make import usual_settings
from amed_core.fit.protocol import FitConfig
from amed_core.fit.report import report
from amed_core.fit.teacher import Converged
from amed_core.predictor import build

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("student", ["amed_multistep", "amed"])
def test_errors_are_those_to_the_exact_solution(student: str) -> None:
    """A Gaussian's ODE is known in closed form."""
    model = Gaussian()
    predictor = build(multistep_config(5) if student == "amed_multistep" else midpoint_config(student, 5))
    config, x = predictor.config, SIGMA_MAX * noise(4, 1, 4, 4)
    steps = trajectory(model, x, predictor.method())
    exact = [
        float((step.x - model.exact(x, SIGMA_MAX, level)).square().mean().sqrt())
        for step, level in zip(steps, config.sigmas[1:], strict=True)
    ]
    found = report("", "", predictor, model, x, teacher=Converged.of(config, 60))
    assert list(found.errors) == pytest.approx(exact, rel=2e-2, abs=2e-3)


def test_the_teacher_of_a_fit_is_near_enough_to_tell_a_good_predictor_from_a_bad_one() -> None:
    """On the bundled model the shipped table ends at less than half its base solver's error."""
    predictor = load_predictor(ROOT / "predictors" / "digits_amed_multistep_5.safetensors")
    x = SIGMA_MAX * noise(20, *SHAPE, seed=5).float()
    model = DigitsDenoiser().for_rows(range(20))
    settings = usual_settings(predictor.config)
    assert isinstance(settings, FitConfig)
    teachers = (Converged.of(predictor.config, calls) for calls in (settings.teacher_calls, 100))
    few, many = (report("", "", predictor, model, x, teacher=one) for one in teachers)
    assert few.errors[-1] == pytest.approx(many.errors[-1], rel=0.12)
    assert few.errors[-1] < 0.5 * few.base_errors[-1]


def test_its_text_has_a_line_per_interval_and_parts_have_errors_of_their_own() -> None:
    predictor, x = build(multistep_config(4)), SIGMA_MAX * noise(4, 1, 4, 4)
    found = report("ours", "base", predictor, Gaussian(), x, parts=lambda end: {"top": end[..., :2, :], "all": end})
    lines = found.text().splitlines()
    assert len(lines) == 1 + 4 + 2
    assert found.parts["all"] == pytest.approx((found.errors[-1], found.base_errors[-1]))
    assert len(found.weights) == len(found.told) == 4
    assert found.errors == pytest.approx(found.base_errors, rel=1e-3), "an unfitted table is its base solver"
