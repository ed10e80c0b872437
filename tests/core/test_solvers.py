"""Update rules against exact solutions."""

import math
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from problems import SIGMA_MAX, SIGMA_MIN, FlowGaussian, Gaussian, mixture, noise, on, slope_of
from torch import Tensor

from amed_core import Amed, Dpm2, DpmSolverPP, FixedMidpoint, Ipndm, NoMidpoint, logsnr, polynomial, sample, trajectory
from amed_core.solvers import SOLVERS, dynamic_threshold, restarted, solver
from amed_core.types import Evaluation, Planner, Solver, Stage, StepPlan

NO, HALF, END = NoMidpoint(), FixedMidpoint(0.5), FixedMidpoint(1.0)

ORDERS: list[tuple[Solver, Planner, int]] = [
    (Amed(), HALF, 2),
    (Amed(), FixedMidpoint(0.3), 1),
    (Dpm2(), HALF, 2),
    (Dpm2(), END, 2),
    (Ipndm(1), NO, 1),
    (Ipndm(2), NO, 2),
    (Ipndm(1), HALF, 1),
    (DpmSolverPP(1), NO, 1),
    (DpmSolverPP(2), NO, 2),
    (DpmSolverPP(2, "noise"), NO, 2),
    (DpmSolverPP(2), HALF, 2),
]
EVERY: list[tuple[Solver, Planner]] = [
    (rule, planner)
    for planner in (NO, FixedMidpoint(0.4, sigma_floor=SIGMA_MIN))
    for rule in (
        Amed(),
        Dpm2(),
        *map(Ipndm, range(1, 5)),
        *map(DpmSolverPP, range(1, 4)),
        DpmSolverPP(3, "noise"),
        DpmSolverPP(3, lower_order_final=False),
    )
]


@pytest.mark.parametrize(("rule", "planner", "order"), ORDERS)
def test_error_falls_with_the_expected_order(rule: Solver, planner: Planner, order: int) -> None:
    """On a grid even in ln(sigma); in sigma its steps are uneven, which caps Adams-Bashforth at 2."""
    model, x = Gaussian(), 10.0 * noise(20, 4)
    exact = model.exact(x, 10.0, 0.1)
    errors = [
        float((sample(model, x, on(logsnr(n + 1, 0.1, 10.0), rule, planner)) - exact).abs().max())
        for n in (128, 256, 512)
    ]
    assert slope_of(errors) == pytest.approx(order, abs=0.15)


def test_heun_is_dpm2_with_the_midpoint_at_the_end() -> None:
    model, x, grid = Gaussian(), 80.0 * noise(5, 3), torch.tensor([80.0, 10.0], dtype=torch.float64)
    first = model(x, grid[0])[0]
    slope = (x - first) / 80.0
    euler = x - 70.0 * slope
    second = (euler - model(euler, grid[1])[0]) / 10.0
    torch.testing.assert_close(sample(model, x, on(grid, Dpm2(), END)), x - 35.0 * (slope + second))


def test_euler_is_ipndm_and_dpm_solver_pp_of_order_one() -> None:
    grid, x = polynomial(7, SIGMA_MIN, SIGMA_MAX), SIGMA_MAX * noise(5, 1, 4, 4)
    by_ipndm, by_data, by_noise = (
        sample(mixture, x, on(grid, rule, NO)) for rule in (Ipndm(1), DpmSolverPP(1), DpmSolverPP(1, "noise"))
    )
    torch.testing.assert_close(by_data, by_ipndm)
    torch.testing.assert_close(by_noise, by_ipndm)


def test_order_two_with_a_midpoint_at_half_is_dpm_solver_2() -> None:
    grid, x = polynomial(5, SIGMA_MIN, SIGMA_MAX), SIGMA_MAX * noise(5, 1, 4, 4)
    torch.testing.assert_close(sample(mixture, x, on(grid, Amed(), HALF)), sample(mixture, x, on(grid, Dpm2(), HALF)))


@pytest.mark.parametrize(("rule", "planner"), EVERY)
def test_a_straight_trajectory_is_followed_exactly(rule: Solver, planner: Planner) -> None:
    """Where the denoised sample is one point, x(sigma) = x0 + sigma * noise, and any number of steps is exact."""
    x0, z = noise(3, 5), noise(3, 5, seed=1)
    for end in (SIGMA_MIN, 0.0):
        grid = polynomial(6, SIGMA_MIN, SIGMA_MAX)
        grid[-1] = end
        reached = sample(lambda x, sigma: x0.expand_as(x), x0 + SIGMA_MAX * z, on(grid, rule, planner))
        torch.testing.assert_close(reached, x0 + end * z, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("rule", "planner"), EVERY)
def test_any_rank_gives_the_same_numbers(rule: Solver, planner: Planner) -> None:
    grid, x = polynomial(6, SIGMA_MIN, SIGMA_MAX), SIGMA_MAX * noise(3, 16)
    flat = sample(mixture, x, on(grid, rule, planner))
    for shape in ((4, 4), (1, 4, 4), (2, 2, 2, 2)):
        torch.testing.assert_close(sample(mixture, x.reshape(3, *shape), on(grid, rule, planner)).reshape(3, 16), flat)


@pytest.mark.parametrize("rule", [Amed(), Dpm2(), Ipndm(4), DpmSolverPP(3), DpmSolverPP(3, "noise")])
def test_a_plan_per_sample_does_not_depend_on_batch_mates(rule: Solver) -> None:
    class PerSample(FixedMidpoint):
        def __call__(self, start: Evaluation, sigma_next: Tensor, interval: int) -> StepPlan:
            r = torch.sigmoid(start.x.flatten(1).mean(1) / start.sigma).reshape(-1, *[1] * (start.x.ndim - 1))
            return StepPlan(r, scale_dir=0.9 + 0.2 * r, scale_time=1.1 - 0.2 * r)

    grid, x = polynomial(5, SIGMA_MIN, SIGMA_MAX), SIGMA_MAX * noise(4, 1, 4, 4)
    together = sample(mixture, x, on(grid, rule, PerSample(0.5)))
    alone = torch.cat([sample(mixture, x[i : i + 1], on(grid, rule, PerSample(0.5))) for i in range(4)])
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(sample(mixture, x, on(grid, rule, PerSample(0.5))), together, rtol=0, atol=0)


@pytest.mark.parametrize(("rule", "planner"), EVERY)
def test_an_interval_that_ends_at_zero_is_finite_and_a_plain_one_ends_at_the_denoised_sample(
    rule: Solver, planner: Planner
) -> None:
    grid = torch.cat([polynomial(4, 0.4, SIGMA_MAX), torch.zeros(1, dtype=torch.float64)])
    x = SIGMA_MAX * noise(3, 1, 4, 4)
    assert sample(mixture, x, on(grid, rule, planner)).isfinite().all()
    if isinstance(planner, NoMidpoint):
        *_, last = trajectory(mixture, x, on(grid, rule, NO))
        torch.testing.assert_close(last.x, last.start.denoised)


@pytest.mark.parametrize(("rule", "planner"), [(Amed(), HALF), (Dpm2(), HALF), (Dpm2(), END), (Ipndm(1), NO)])
def test_two_halves_equal_one_go_for_single_step_solvers(rule: Solver, planner: Planner) -> None:
    grid, x = polynomial(7, SIGMA_MIN, SIGMA_MAX), SIGMA_MAX * noise(3, 1, 4, 4)
    first = sample(mixture, x, on(grid[:4], rule, planner))
    torch.testing.assert_close(
        sample(mixture, first, on(grid[3:], rule, planner)), sample(mixture, x, on(grid, rule, planner)), rtol=0, atol=0
    )


@pytest.mark.parametrize("rule", [Amed(), Dpm2(), Ipndm(1), Ipndm(4), DpmSolverPP(3, "noise")])
def test_scale_dir_multiplies_the_update_and_not_the_carried_sample(rule: Solver) -> None:
    x, start, mid, end = noise(2, 4), torch.tensor(10.0), torch.tensor(5.0), torch.tensor(2.0)
    history = (Evaluation(x, start, 0 * x + 0.5), Evaluation(x - 1, mid, 0 * x + 0.2))
    carried = history[0].x if isinstance(rule, Amed | Dpm2) else history[1].x

    def update(scale_dir: float) -> Tensor:
        return rule.to_next(history, end, StepPlan(0.4, scale_dir), Stage(0, 2, 2)) - carried

    torch.testing.assert_close(update(1.5), 1.5 * update(1.0))


@pytest.mark.parametrize("rule", [Ipndm(4), DpmSolverPP(3), DpmSolverPP(2, "noise")])
def test_history_is_read_and_not_changed(rule: Solver) -> None:
    levels = torch.tensor([10.0, 5.0, 3.0, 2.0, 1.0])
    history = tuple(Evaluation(noise(2, 4, seed=i), s, noise(2, 4, seed=9 + i)) for i, s in enumerate(levels[:-1]))
    before = [e.x.clone() for e in history]
    first, second = (rule.to_next(history, levels[-1], None, Stage(3, 4, 9)) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert all((e.x == b).all() for e, b in zip(history, before, strict=True))


def test_the_final_order_drop_counts_updates() -> None:
    """The last of six updates (three planned intervals) is of order 1, so it sees one evaluation only."""
    levels = torch.tensor([10.0, 5.0, 3.0])
    history = tuple(Evaluation(noise(2, 4, seed=i), s, noise(2, 4, seed=9 + i)) for i, s in enumerate(levels))
    dropped = DpmSolverPP(3).to_next(history, torch.tensor(1.0), None, Stage(2, 6, 6))
    torch.testing.assert_close(dropped, DpmSolverPP(1).to_next(history, torch.tensor(1.0), None, Stage(2, 6, 6)))
    kept = DpmSolverPP(3, lower_order_final=False).to_next(history, torch.tensor(1.0), None, Stage(2, 6, 6))
    assert not torch.allclose(kept, dropped)


def test_dynamic_thresholding_is_imagens() -> None:
    x = 3 * noise(4, 3, 8, 8)
    s = x.abs().flatten(1).quantile(0.995, dim=1).clamp(min=1)[:, None, None, None]
    torch.testing.assert_close(dynamic_threshold(x), x.clamp(-s, s) / s)
    small = x / x.abs().max()
    torch.testing.assert_close(dynamic_threshold(small), small, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Ipndm(0), "orders 1 to 4"),
        (lambda: Ipndm(5), "orders 1 to 4"),
        (lambda: DpmSolverPP(4), "orders 1 to 3"),
        (lambda: DpmSolverPP(2, "velocity"), '"data" or "noise"'),  # type: ignore[arg-type]
        (lambda: DpmSolverPP(2, "noise", thresholding=True), "data prediction"),
        (lambda: solver("rk4"), ", ".join(SOLVERS)),
    ],
)
def test_settings_that_do_not_exist_are_refused(build: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build()  # type: ignore[operator]


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("planner", [NO, FixedMidpoint(0.4)])
def test_on_a_flow_model_dpm_solver_pp_takes_the_same_steps_as_on_its_noise_prediction_twin(
    order: int, planner: Planner
) -> None:
    """x / (1 + sigma) at sigma / (1 + sigma) turns one model into the other; half-log-SNRs are equal."""

    def flow(x: Tensor, sigma: Tensor) -> Tensor:
        return mixture(x / (1 - sigma), sigma / (1 - sigma))[0]

    grid, x = polynomial(6, 0.02, 20.0), 20.0 * noise(5, 1, 4, 4)
    twin = sample(mixture, x, on(grid, DpmSolverPP(order), planner))
    planner = Moved(planner) if planner is not NO else NO
    ours = sample(flow, x / 21.0, on(grid / (1 + grid), DpmSolverPP(order, flow=True), planner))
    torch.testing.assert_close(ours * (1 + grid[-1]), twin, rtol=1e-9, atol=1e-9)


@dataclass(frozen=True)
class Moved(Planner):
    """A planner whose midpoints lie at the same signal-to-noise ratio for a flow model."""

    planner: Planner

    def updates(self, interval: int) -> Literal[1, 2]:
        return self.planner.updates(interval)

    def __call__(self, start: Evaluation, sigma_next: Tensor, interval: int) -> StepPlan | None:
        levels = start.sigma / (1 - start.sigma), sigma_next / (1 - sigma_next)
        plan = self.planner(start, sigma_next, interval)
        assert plan is not None
        middle = plan.midpoint(*levels)
        middle = middle / (1 + middle)
        return StepPlan((middle / start.sigma).log() / (sigma_next / start.sigma).log())


@pytest.mark.parametrize("order", [1, 2, 3])
def test_from_sigma_1_dpm_solver_pp_is_finite_and_so_are_its_gradients(order: int) -> None:
    """There lambda is -infinity."""
    grid = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0], dtype=torch.float64)
    r = torch.full((), 0.5, dtype=torch.float64, requires_grad=True)

    class Learned(FixedMidpoint):
        def __call__(self, start: Evaluation, sigma_next: Tensor, interval: int) -> StepPlan:
            return StepPlan(r, sigma_floor=0.01)

    x = noise(5, 4)
    for step in trajectory(FlowGaussian(0.3, 0.5), x, on(grid, DpmSolverPP(order, flow=True), Learned(0.5))):
        assert step.x.isfinite().all()
    (gradient,) = torch.autograd.grad(step.x.sum(), r)
    assert gradient.isfinite()


def test_the_flow_models_solver_converges_with_its_order() -> None:
    """To the exact solution, which for a Gaussian keeps (x - signal mean) / spread constant."""
    model, x = FlowGaussian(0.3, 0.5), 0.9 * noise(20, 4)

    def spread(sigma: float) -> float:
        return ((1 - sigma) ** 2 * 0.25 + sigma**2) ** 0.5

    exact = 0.9 * 0.3 + (x - 0.1 * 0.3) * spread(0.1) / spread(0.9)
    for order, rule in ((1, DpmSolverPP(1, flow=True)), (2, DpmSolverPP(2, flow=True))):
        errors = []
        for n in (128, 256, 512):
            lambdas = torch.linspace(math.log(0.9 / 0.1), math.log(0.1 / 0.9), n + 1, dtype=torch.float64)
            drawn = sample(model, x, on(lambdas.sigmoid(), rule, NO))
            errors.append(float((drawn - exact).abs().max()))
        assert slope_of(errors) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("way", [Ipndm(4), DpmSolverPP(3, lower_order_final=False), Ipndm(1)], ids=str)
def test_a_solver_that_restarts_is_two_runs_of_it(way: Solver) -> None:
    model, x = Gaussian(), noise(3, 1, 4, 4)
    grid = torch.tensor([80.0, 20.0, 8.0, 3.0, 1.0, 0.3, 0.0], dtype=torch.float64)
    parts = sample(model, sample(model, 80 * x, on(grid[:4], way, NoMidpoint())), on(grid[3:], way, NoMidpoint()))
    whole = sample(model, 80 * x, on(grid, restarted(way, 3), NoMidpoint()))
    torch.testing.assert_close(whole, parts, rtol=1e-12, atol=1e-12)
    assert restarted(way, 0) is way
