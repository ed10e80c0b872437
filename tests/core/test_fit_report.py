"""What a predictor does, interval by interval: the errors that a report states are those to where the ODE leads."""

from pathlib import Path

import pytest
import torch
from problems import SIGMA_MAX, SIGMA_MIN, Gaussian, noise

from amed_core.digits import SHAPE, DigitsDenoiser
from amed_core.driver import trajectory
from amed_core.files import load_predictor
from amed_core.fit.make import MULTISTEP_FIT
from amed_core.fit.protocol import outcome, verdict
from amed_core.fit.report import learned
from amed_core.midpoints import TablePredictor
from amed_core.multistep import MultistepTable
from amed_core.predictor import AnyPredictor
from amed_core.samplers import multistep_student, predictor_config

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("student", ["amed_multistep", "amed"])
def test_errors_are_those_to_the_exact_solution(student: str) -> None:
    """A Gaussian's ODE is known in closed form."""
    model = Gaussian()
    predictor: AnyPredictor
    if student == "amed_multistep":
        predictor = MultistepTable(multistep_student(5, SIGMA_MIN, SIGMA_MAX))
    else:
        predictor = TablePredictor(predictor_config(student, 5, SIGMA_MIN, SIGMA_MAX, kind="table"))
    config, x = predictor.config, SIGMA_MAX * noise(4, 1, 4, 4)
    grid = torch.tensor(config.sigmas, dtype=torch.float64)
    steps = trajectory(model, x, grid, predictor.solver(), predictor.planner(), first=config.first)
    exact = [
        float((step.x - model.exact(x, SIGMA_MAX, level)).square().mean().sqrt())
        for step, level in zip(steps, config.sigmas[1:], strict=True)
    ]
    found = learned("", "", predictor, model, x, teacher_calls=60)
    assert list(found.errors) == pytest.approx(exact, rel=2e-2, abs=2e-3)


def test_the_teacher_of_a_fit_is_near_enough_to_tell_a_good_predictor_from_a_bad_one() -> None:
    """On the bundled model the shipped table ends at less than half its base solver's error."""
    predictor = load_predictor(ROOT / "predictors" / "digits_amed_multistep_5.safetensors")
    x = SIGMA_MAX * noise(20, *SHAPE, seed=5).float()
    model = DigitsDenoiser().for_rows(range(20))
    few, many = (
        learned("", "", predictor, model, x, teacher_calls=calls) for calls in (MULTISTEP_FIT.teacher_calls, 100)
    )
    assert few.errors[-1] == pytest.approx(many.errors[-1], rel=0.05)
    assert few.errors[-1] < 0.5 * few.base_errors[-1]


@pytest.mark.parametrize(
    ("error", "base", "words"), [(0.02, 0.08, "75% less"), (0.08, 0.08, "NOT better"), (0.0, 0.0, "NOT")]
)
def test_few_words_say_the_same_as_the_verdict(error: float, base: float, words: str) -> None:
    summary = {"error": error, "base_solver_error": base}
    assert outcome(summary).startswith(words)
    assert words in verdict(summary)
    assert outcome({}) == verdict({}) == ""
