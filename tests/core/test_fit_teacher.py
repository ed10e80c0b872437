"""The teachers: where they lead, what of their way is kept, and the paper's finer grids."""

from itertools import pairwise

import pytest
import torch
from memory import Peak
from problems import (
    FACTS,
    SIGMA_MAX,
    SIGMA_MIN,
    SWITCH,
    Counting,
    FlowGaussian,
    Gaussian,
    X,
    mixture,
    noise,
    two_models,
)

from amed_core import Method, NoMidpoint, PredictorConfig, sample, student_config
from amed_core.fit import teacher as teacher_module
from amed_core.fit.teacher import (
    Converged,
    Heun,
    Teacher,
    TeacherPath,
    below,
    levels,
    own_errors,
    papers_teacher,
    passed_at,
    path,
    path_of,
    products_of,
    refine,
    sum_of,
)
from amed_core.samplers import TYPES
from amed_core.schedules import SCHEDULES, schedule
from amed_core.solvers import CautiousIpndm, Ipndm
from amed_core.types import Solver

every_teacher = pytest.mark.parametrize("kind", [Converged, Heun])


def test_between_its_levels_a_path_is_where_the_ode_goes() -> None:
    model, grid = Gaussian(), levels(SIGMA_MIN, SIGMA_MAX, 24, flow=False)
    x = torch.stack([model.exact(X, SIGMA_MAX, sigma) for sigma in grid])
    slopes = torch.stack([(x[n] - model(x[n], torch.tensor(sigma))[0]) / sigma for n, sigma in enumerate(grid[:-1])])
    found = TeacherPath(grid, x, slopes)
    for sigma in (50.0, 3.3, 0.21):
        x, slope = found.at(sigma)
        torch.testing.assert_close(x, model.exact(X, SIGMA_MAX, sigma), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(slope, (x - model(x, torch.tensor(sigma))[0]) / sigma, rtol=1e-2, atol=1e-2)
    assert (found.at(0.0)[0] == found.end).all()


@pytest.mark.parametrize("end", [0.03, float(torch.tensor(0.03)), 0.03 * (1 - 1e-7)])
def test_the_teachers_way_is_known_at_every_level_down_to_the_lowest(end: float) -> None:
    """The lowest one may have been rounded: it is not 0 yet, where the sample would be 0.02 away."""
    model, x, wanted = Gaussian(std=0.05), SIGMA_MAX * noise(4, 1, 4, 4), (7.0, 0.5, end)
    found = passed_at(model, x, levels(0.03, SIGMA_MAX, 100, flow=False), wanted)
    for there, level in zip(found, wanted, strict=True):
        assert float((there - model.exact(x, SIGMA_MAX, level)).abs().max()) < 5e-3


@pytest.mark.parametrize("points", [1, 2, 5])
@pytest.mark.parametrize("end", ["sigma_min", "zero"])
@pytest.mark.parametrize("name", [*SCHEDULES, "own"])
def test_the_teachers_grid_contains_the_students(name: str, end: str, points: int) -> None:
    low, high = (0.05, 10.0)
    grid = torch.tensor([10.0, 3.0, 2.0, 0.05]).double() if name == "own" else schedule(name)(4, low, high, 3.0)
    if end == "zero":
        grid[-1] = 0.0
    config = PredictorConfig(
        "amed", tuple(grid.tolist()), low, high, schedule="polynomial" if name == "own" else name, rho=3.0
    )
    fine = refine(config, points)
    assert len(fine) == 3 * (points + 1) + 1
    torch.testing.assert_close(fine[:: points + 1], grid, rtol=0, atol=0)
    assert (fine.diff() < 0).all()
    if name in ("polynomial", "logsnr", "time_uniform") and end == "sigma_min":
        torch.testing.assert_close(fine, schedule(name)(len(fine), low, high, 3.0), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["polynomial", "logsnr", "time_uniform"])
def test_the_teachers_grid_follows_the_students_for_every_number_of_calls(name: str) -> None:
    for calls in range(2, 11):
        config = student_config("amed", calls, FACTS, schedule=name)
        fine = refine(config, 2)
        assert len(fine) == 3 * config.planned + 1
        assert fine[::3].tolist() == list(config.sigmas[: config.planned + 1])
        assert (fine.diff() < 0).all()


@every_teacher
def test_the_slow_samplers_reach_the_exact_solution(kind: type[Converged]) -> None:
    """Heun's method converges with order 2, iPNDM at least so."""
    model, x = Gaussian(), SIGMA_MAX * noise(20, 1, 4, 4)
    exact = model.exact(x, SIGMA_MAX, 0.0)
    errors = [
        float((kind(SIGMA_MIN, SIGMA_MAX, calls).samples(model, x) - exact).abs().max()) for calls in (50, 100, 200)
    ]
    assert errors[2] < 0.01 * model.std
    assert errors[0] > 3 * errors[1] > 9 * errors[2]


@every_teacher
@pytest.mark.parametrize("calls", [2, 3, 8, 41])
def test_the_slow_samplers_make_the_calls_that_they_say(kind: type[Converged], calls: int) -> None:
    model, slow = Counting(mixture), kind(SIGMA_MIN, SIGMA_MAX, calls)
    slow.samples(model, X)
    assert model.calls == slow.model_calls
    assert slow.in_calls(calls).calls == calls


def test_where_a_teacher_passes_it_says_with_or_without_its_whole_path() -> None:
    slow, wanted = Converged(SIGMA_MIN, SIGMA_MAX, 24), (10.0, 1.0, 0.1, 0.0)
    for found, expected in zip(
        slow.passed_at(mixture, X, wanted), Teacher.passed_at(slow, mixture, X, wanted), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_a_path_ends_where_its_teacher_alone_does_and_its_slopes_are_the_models() -> None:
    for denoiser, switch in ((mixture, 0.0), (two_models, SWITCH)):
        found = path(denoiser, X, levels(SIGMA_MIN, SIGMA_MAX, 12, flow=False), switch)
        end = Converged(SIGMA_MIN, SIGMA_MAX, 12, switch_sigma=switch).samples(denoiser, X)
        assert (found.end == end).all()
        for x, slope, sigma in zip(found.x[:-1], found.slopes, found.levels[:-1], strict=True):
            answer = denoiser(x, torch.tensor(sigma, dtype=torch.float64))
            denoised = answer[0] if isinstance(answer, tuple) else answer
            torch.testing.assert_close(slope, (x - denoised) / sigma)


def test_a_path_in_half_precision_is_nearly_the_same_and_its_end_is_the_very_same() -> None:
    high = 2e5  # above what half precision holds
    method = Method(levels(SIGMA_MIN, high, 24, flow=False), Ipndm(2), NoMidpoint())
    whole, half = (path_of(mixture, high * X.float(), method, half=half) for half in (False, True))
    assert torch.equal(half.end, whole.end)
    assert half.x.element_size() * 2 == whole.x.element_size()
    for sigma in (high, 900.0, 7.0, 0.5, 0.003, 0.0):
        # Where samples hardly change, a slope between two of them is less exact than they are.
        for found, expected, most in zip(half.at(sigma), whole.at(sigma), (1e-6, 2e-4), strict=True):
            assert found.dtype == expected.dtype
            assert (found - expected).square().mean() < most * expected.square().mean(), sigma


@pytest.mark.parametrize("half", [False, True])
def test_the_sums_over_a_path_take_little_memory_beside_it(half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, grid = SIGMA_MAX * noise(2, 4, 32, 64).float(), levels(SIGMA_MIN, SIGMA_MAX, 12, flow=False)
    made = path_of(Gaussian(), x, Method(grid, Ipndm(2), NoMidpoint()), half=half)
    held = made.x.nbytes + made.slopes.nbytes
    assert held == (2 * len(grid) - 1) * x.numel() * (2 if half else 4)
    at_once = products_of(made, finer=1).products
    monkeypatch.setattr(teacher_module, "PIECE", 1 << 8)
    with Peak() as peak:
        in_pieces = products_of(made, finer=1).products
    assert peak.most < 0.25 * held
    torch.testing.assert_close(in_pieces, at_once, rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize(("calls", "count"), [(24, 48), (63, 126), (64, 65), (100, 101), (300, 101)])
def test_grids_are_searched_on_no_more_levels_than_memory_allows(calls: int, count: int) -> None:
    grid = levels(SIGMA_MIN, SIGMA_MAX, calls, False)
    found = products_of(path(mixture, SIGMA_MAX * noise(1, 1, 2, 2), grid)).levels
    assert len(found) == count
    assert (found[0], *found[-2:]) == (grid[0], *grid[-2:])
    assert all(a > b for a, b in pairwise(found))


def test_products_of_several_paths_add_up_and_those_below_a_level_are_of_the_rest() -> None:
    grid = levels(SIGMA_MIN, SIGMA_MAX, 8, flow=False)
    whole, halves = path(mixture, X, grid), [path(mixture, X[rows], grid) for rows in (slice(0, 2), slice(2, 6))]
    total, added = products_of(whole), sum_of([products_of(half) for half in halves])
    torch.testing.assert_close(added.products, total.products)
    assert (added.levels, added.elements) == (total.levels, total.elements)
    rest = below(total, total.levels[4])
    n, of_rest = len(total.levels), len(rest.levels)
    assert rest.levels == total.levels[4:]
    torch.testing.assert_close(rest.products[0, of_rest], total.products[4, n + 4])


@pytest.mark.parametrize("name", TYPES)
def test_the_papers_teacher_passes_the_students_levels_and_with_more_points_is_nearer_to_the_truth(name: str) -> None:
    config = student_config(name, 6, FACTS, published=True)
    errors = []
    for points in (1, 4):
        method, found = papers_teacher(config, points=points)
        assert found == points
        assert set(config.sigmas) <= set(method.sigmas)
        end = sample(mixture, X, method)
        errors.append(float((end - sample(mixture, X, papers_teacher(config, points=60)[0])).square().mean().sqrt()))
    assert errors[1] < 0.6 * errors[0]


def test_a_flow_models_slow_sampler_is_exact_in_few_calls() -> None:
    """To the exact solution, which for a Gaussian keeps (x - signal mean) / spread constant."""
    x = noise(20, 4)
    end = Converged(0.001, 1.0, 40, flow=True).samples(FlowGaussian(0.3, 0.5), x)
    torch.testing.assert_close(end, 0.3 + 0.5 * x, rtol=0, atol=1e-2)


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("solver", [Ipndm(1), CautiousIpndm(3)])
def test_a_path_shows_how_far_it_ends_from_the_truth(flow: bool, solver: Solver) -> None:
    """Of a Gaussian, for which it is exact but for the quadrature's own error, and whatever the solver."""
    high, low = (1.0, 0.001) if flow else (SIGMA_MAX, 0.002)
    model = FlowGaussian(0.3, 0.5) if flow else Gaussian()
    x = high * noise(3, 1, 4, 4)
    grid = levels(low, high, 24, flow)
    shown = own_errors(path_of(model, x, Method(grid, solver, NoMidpoint())), flow).sqrt()
    truth = path_of(model, x, Method(levels(low, high, 800, flow), Ipndm(4), NoMidpoint())).end
    passed = path_of(model, x, Method(grid, solver, NoMidpoint())).end
    error = (passed - truth).square().flatten(1).mean(1).sqrt()
    assert (shown / error).tolist() == pytest.approx([1.0] * 3, rel=0.5)


def test_in_half_precision_and_in_pieces_a_path_shows_the_same_error(monkeypatch: pytest.MonkeyPatch) -> None:
    x = SIGMA_MAX * noise(2, 2, 4, 4).float()
    method = Method(levels(0.03, SIGMA_MAX, 12, False), Ipndm(1), NoMidpoint())
    whole = own_errors(path_of(mixture, x, method), False)
    monkeypatch.setattr(teacher_module, "PIECE", 10)
    torch.testing.assert_close(own_errors(path_of(mixture, x, method), False), whole)
    torch.testing.assert_close(own_errors(path_of(mixture, x, method, half=True), False), whole, rtol=0.05, atol=0)


def test_below_a_level_a_path_is_the_rest_of_the_same_one() -> None:
    whole = path(mixture, X.float(), levels(SIGMA_MIN, SIGMA_MAX, 24, flow=False))
    start = 0.5 * (whole.levels[9] + whole.levels[10])
    for passed in (whole, path_of(mixture, X.float(), Method(whole.levels, Ipndm(2), NoMidpoint()), half=True)):
        rest = passed.below(start)
        assert rest.levels == (start, *whole.levels[10:])
        assert torch.equal(rest.end, passed.end)
        for sigma in (start, *whole.levels[10:14], 0.0):
            tolerance = {"rtol": 0, "atol": 1e-6 if passed is whole else 5e-3}
            torch.testing.assert_close(rest.at(sigma)[0], passed.at(sigma)[0], **tolerance)
    first = whole.first(3)
    assert torch.equal(first.x, whole.x[:, :3])
    assert torch.equal(first.slopes, whole.slopes[:, :3])


def test_a_teacher_with_few_levels_below_a_start_is_made_anew_there_and_no_other() -> None:
    slow = Converged(SIGMA_MIN, SIGMA_MAX, 24)
    above = sum(level >= 2.0 for level in slow.grid)
    known, anew = slow.below(2.0, 24 - above), slow.below(2.0, 40)
    assert known.model_calls == 0
    assert known.in_calls(48) is known
    with pytest.raises(ValueError, match="made before"):
        known.path(mixture, X)
    assert (anew.calls, anew.passed_at(mixture, X, [0.0])[0].shape) == (40, X.shape)
