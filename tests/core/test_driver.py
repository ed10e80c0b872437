"""The one loop."""

from dataclasses import replace

import pytest
import torch
from problems import SIGMA_MAX, SIGMA_MIN, FlowGaussian, Gaussian, midpoint_config, mixture, noise, on, table_on
from torch import Tensor

from amed_core import (
    Amed,
    Dpm2,
    DpmSolverPP,
    FixedMidpoint,
    Ipndm,
    NoMidpoint,
    advance,
    analytic_first,
    analytic_first_flow,
    build,
    evaluate,
    polynomial,
    sample,
    trajectory,
)
from amed_core.driver import Resume
from amed_core.samplers import TYPES
from amed_core.types import Evaluation, StepPlan

GRID = polynomial(5, SIGMA_MIN, SIGMA_MAX)
X = SIGMA_MAX * noise(3, 1, 4, 4)


@pytest.mark.parametrize("analytic", [False, True])
@pytest.mark.parametrize("plain", [frozenset(), frozenset({3}), frozenset({0, 3})])
def test_true_model_calls(analytic: bool, plain: frozenset[int]) -> None:
    planner = FixedMidpoint(0.5, plain=plain)
    model = Gaussian()
    steps = list(trajectory(model, X, on(GRID, Dpm2(), planner, analytic_first if analytic else None)))
    assert len(model.asked) == 2 * 4 - len(plain) - analytic
    assert [step.index for step in steps] == [0, 1, 2, 3]
    assert sum(step.model_calls for step in steps) == len(model.asked)


def test_stopping_the_iteration_stops_the_calls() -> None:
    model = Gaussian()
    steps = trajectory(model, X, on(GRID, Ipndm(4), NoMidpoint()))
    assert model.asked == []
    next(steps)
    next(steps)
    assert len(model.asked) == 2


def test_the_analytic_slope_of_unit_variance_data_is_off_by_one_over_twice_sigma_squared() -> None:
    model = Gaussian(mean=0.0, std=1.0)
    for sigma in torch.tensor([10.0, 40.0, 160.0], dtype=torch.float64):
        x = sigma * noise(5, 4)
        analytic, called = analytic_first(x, sigma), evaluate(model, x, sigma)
        torch.testing.assert_close(analytic.slope / called.slope - 1, (x / x) / (2 * sigma**2), rtol=1e-2, atol=0)


def test_the_analytic_first_step_is_a_good_guess_only_at_large_sigma() -> None:
    model = Gaussian(mean=0.0, std=0.5)

    def difference(start: float) -> float:
        grid = torch.tensor([start, start / 2], dtype=torch.float64)
        x = start * noise(100, 4)
        called, analytic = (
            sample(model, x, on(grid, Ipndm(1), NoMidpoint(), analytic_first if a else None)) for a in (False, True)
        )
        return float((called - analytic).abs().max() / start)

    assert difference(80.0) < 0.01 * difference(1.0)


@pytest.mark.parametrize("sigma", [1.0, 0.9, 0.5, 0.01])
def test_the_flow_models_analytic_evaluation_is_exact_for_unit_variance_data(sigma: float) -> None:
    x, level = noise(5, 4), torch.tensor(sigma, dtype=torch.float64)
    analytic, called = analytic_first_flow(x, level), evaluate(FlowGaussian(), x, level)
    torch.testing.assert_close(analytic.denoised, called.denoised, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(analytic.slope, called.slope, rtol=1e-12, atol=1e-12)
    assert analytic.analytic


def test_at_sigma_1_the_flow_models_analytic_evaluation_is_exact_for_any_centred_data() -> None:
    one = torch.tensor(1.0, dtype=torch.float64)
    x = noise(5, 4)
    slope = analytic_first_flow(x, one).slope
    torch.testing.assert_close(slope, evaluate(FlowGaussian(std=0.1), x, one).slope)
    assert not torch.allclose(slope, evaluate(FlowGaussian(mean=0.3), x, one).slope, atol=0.1)


def test_the_analytic_first_step_of_eps_models_is_wrong_for_flow_models() -> None:
    x, one = noise(5, 4), torch.tensor(1.0, dtype=torch.float64)
    assert not torch.allclose(analytic_first(x, one).slope, evaluate(FlowGaussian(), x, one).slope, rtol=0.1)


def test_time_scaling_changes_what_the_network_is_asked_and_not_the_slopes_sigma() -> None:
    class Scaled(FixedMidpoint):
        def __call__(self, start: Evaluation, sigma_next: Tensor, interval: int) -> StepPlan:
            return StepPlan(self.r, scale_time=1.2)

    model = Gaussian()
    (step,) = trajectory(model, X, on(torch.tensor([80.0, 10.0], dtype=torch.float64), Amed(), Scaled(0.5)))
    assert step.mid is not None
    middle = (80.0 * 10.0) ** 0.5
    assert float(step.mid.sigma) == pytest.approx(middle)
    assert float(model.asked[1]) == pytest.approx(1.2 * middle)
    torch.testing.assert_close(step.mid.slope, (step.mid.x - step.mid.denoised) / step.mid.sigma)


def test_sigma_is_a_scalar_or_one_per_sample() -> None:
    class PerSample(FixedMidpoint):
        def __call__(self, start: Evaluation, sigma_next: Tensor, interval: int) -> StepPlan:
            return StepPlan(torch.linspace(0.2, 0.8, 3, dtype=torch.float64).reshape(3, 1, 1, 1))

    model = Gaussian()
    sample(model, X, on(GRID, Dpm2(), PerSample(0.5)))
    assert {tuple(s.shape) for s in model.asked} == {(), (3, 1, 1, 1)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_samples_dtype_is_kept(dtype: torch.dtype) -> None:
    for rule, planner in ((Dpm2(), FixedMidpoint(0.5)), (DpmSolverPP(3), NoMidpoint())):
        assert sample(mixture, X.to(dtype), on(GRID, rule, planner, analytic_first)).dtype == dtype


def test_a_bad_answer_names_the_interval_and_the_call() -> None:
    def broken(x: Tensor, sigma: Tensor) -> Tensor:
        return x * float("nan") if float(sigma) < 1 else x / (1 + sigma**2)

    with pytest.raises(FloatingPointError, match="interval 3, model call 2"):  # sigma 2.5, then 0.22
        sample(broken, X, on(GRID, Dpm2(), FixedMidpoint(0.9)))


@pytest.mark.trust("files")
def test_weights_that_lead_too_far_are_told_in_words_though_the_model_answered_well() -> None:
    """As numbers may be in a file: each is usual, and all together are too much for half of float32's range."""
    table = table_on()
    table.weights.fill_(1e4).tril_()
    with pytest.raises(FloatingPointError, match="finished sample is NaN or infinite") as caught:
        sample(lambda x, sigma: torch.zeros_like(x), (X * 1e20).float(), table.method())
    assert len(str(caught.value)) <= 300


def test_weights_that_are_all_zero_leave_the_sample_as_it_is() -> None:
    table = table_on()
    table.weights.fill_(0.0)
    assert (sample(mixture, X, table.method()) == X).all()


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("calls", [5, 6])
def test_a_trajectory_goes_on_from_any_interval_as_if_it_had_not_stopped(name: str, calls: int) -> None:
    method = build(midpoint_config(name, calls)).method()
    steps = list(trajectory(mixture, X, method))
    for k, step in enumerate(steps):
        history = steps[k - 1].history if k else ()
        for mid in (None, step.mid):
            again = list(trajectory(mixture, X, method, resume=Resume(k, step.start, history, mid)))
            assert (again[-1].x == steps[-1].x).all()
            assert len(again) == len(steps) - k


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("calls", [5, 6])
def test_one_interval_after_the_other_is_the_whole_trajectory(name: str, calls: int) -> None:
    """Which is what training does."""
    method = build(midpoint_config(name, calls)).method()
    sigmas = torch.tensor(method.sigmas, dtype=torch.float64)
    x, history = X, ()
    for interval in range(len(sigmas) - 1):
        first = method.first if interval == 0 else None
        start = first(x, sigmas[0]) if first else evaluate(mixture, x, sigmas[interval])
        step = advance(mixture, method, interval, start, history, sigmas[interval + 1])
        x, history = step.x, step.history
    assert (x == sample(mixture, X, method)).all()


@pytest.mark.parametrize(("plain", "done"), [(frozenset(), (2, 4, 6)), (frozenset({0, 2}), (1, 3, 4))])
def test_the_stages_of_a_method_count_its_updates(plain: frozenset[int], done: tuple[int, ...]) -> None:
    method = on((80.0, 5.0, 1.0, 0.0), Dpm2(), FixedMidpoint(0.5, plain=plain))
    assert [(s.interval, s.index, s.count, s.to_zero) for s in method.stages] == [
        (k, index, done[-1], k == 2) for k, index in enumerate(done)
    ]
    assert method.calls == done[-1]
    assert replace(method, first=analytic_first).calls == done[-1] - 1
