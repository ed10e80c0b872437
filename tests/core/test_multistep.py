"""Learned multistep methods: what solvers are when they are written out, searched grids, weights in closed form."""

import itertools
import json
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import SIGMA_MAX, SIGMA_MIN, FlowGaussian, Gaussian, mixture, noise
from torch import Tensor

from amed_core import (
    Dpm2,
    DpmSolverPP,
    FixedMidpoint,
    Ipndm,
    NoMidpoint,
    PredictorConfig,
    load_predictor,
    polynomial,
    sample,
    save_predictor,
)
from amed_core.call_list import call_sigmas, read
from amed_core.fit.baselines import starts
from amed_core.fit.closed_form import least_squares
from amed_core.fit.grid_search import RULES, search, searched
from amed_core.fit.targets import Goal
from amed_core.fit.teacher import Path as TeacherPath
from amed_core.fit.teacher import gram, levels, path
from amed_core.multistep import MultistepTable, coefficients, together
from amed_core.samplers import multistep_student, predictor_config
from amed_core.solvers import Multistep

GRID = (80.0, 12.0, 3.0, 0.7, 0.2, 0.0)
FLOW_GRID = (1.0, 0.9, 0.6, 0.3, 0.1, 0.0)
X = SIGMA_MAX * noise(6, 1, 4, 4)
HALVES = FixedMidpoint(0.5, plain=frozenset({2}))
CONFIG = multistep_student(5, SIGMA_MIN, SIGMA_MAX)


def run(table: MultistepTable, denoiser: Any = mixture, x: Tensor = X, guidance: float | None = None) -> Tensor:
    grid = torch.tensor(table.config.sigmas, dtype=torch.float64)
    return sample(denoiser, x, on(grid, table.solver(guidance=guidance), table.planner(guidance=guidance)))


def table_on(grid: tuple[float, ...], **changes: Any) -> MultistepTable:
    return MultistepTable(replace(CONFIG, sigmas=grid, **changes))


@pytest.mark.parametrize(
    ("solver", "grid", "planner"),
    [
        *((Ipndm(order), GRID, NoMidpoint()) for order in (1, 2, 3, 4)),
        *((DpmSolverPP(order, prediction), GRID, NoMidpoint()) for order in (2, 3) for prediction in ("data", "noise")),
        (Dpm2(), (80.0, 3.0, 0.2, 0.0), HALVES),
    ],
)
def test_a_solver_written_out_samples_as_itself(solver: Any, grid: Any, planner: Any) -> None:
    own = sample(mixture, X, on(torch.tensor(grid, dtype=torch.float64), solver, planner))
    visited, weights = coefficients(solver, grid, planner)
    rows = tuple(tuple(row[: k + 1]) for k, row in enumerate(weights))
    assert all(not any(row[k + 1 :]) for k, row in enumerate(weights)), "no slope is used before it is known"
    written = sample(mixture, X, on(torch.tensor(visited, dtype=torch.float64), Multistep(rows), NoMidpoint()))
    torch.testing.assert_close(written, own, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("order", [2, 3])
def test_so_does_a_flow_solver(order: int) -> None:
    solver, x = DpmSolverPP(order, flow=True), noise(6, 4)
    own = sample(FlowGaussian(0.3, 0.5), x, on(torch.tensor(FLOW_GRID, dtype=torch.float64), solver, NoMidpoint()))
    rows = tuple(tuple(row[: k + 1]) for k, row in enumerate(coefficients(solver, FLOW_GRID)[1]))
    grid = torch.tensor(FLOW_GRID, dtype=torch.float64)
    torch.testing.assert_close(sample(FlowGaussian(0.3, 0.5), x, on(grid, Multistep(rows), NoMidpoint())), own)


def test_heuns_method_is_no_multistep_method() -> None:
    with pytest.raises(ValueError, match="twice at the noise level 3"):
        coefficients(Dpm2(), (80.0, 3.0, 0.2, 0.0), FixedMidpoint(1.0, plain=frozenset({2})))


def test_a_solver_that_scales_its_sample_is_no_multistep_method() -> None:
    class Scaling(Ipndm):
        def to_next(self, history: Any, sigma: Any, plan: Any, stage: Any) -> Tensor:
            return 1.1 * super().to_next(history, sigma, plan, stage)

    with pytest.raises(ValueError, match="no linear multistep method"):
        coefficients(Scaling(1), GRID)


def test_with_the_first_denoised_sample_it_is_any_combination_of_the_noise_and_the_answers() -> None:
    ours, of_noise, of_answer = 5.0, 0.3, 0.6
    weight = (of_noise - 1) * SIGMA_MAX / (ours - SIGMA_MAX)
    solver = Multistep(((weight,),), ((of_answer + of_noise - 1) / (ours - SIGMA_MAX),))
    reached = sample(mixture, X, on(torch.tensor([SIGMA_MAX, ours], dtype=torch.float64), solver, NoMidpoint()))
    answer = mixture(X, torch.tensor(SIGMA_MAX, dtype=torch.float64))[0]
    torch.testing.assert_close(reached, of_noise * X + of_answer * answer)


def test_an_unfitted_table_is_ipndm_on_its_grid_and_on_every_other() -> None:
    table = table_on(GRID)
    for grid in (GRID, (80.0, 5.0, 0.5, 0.0)):
        levels_ = torch.tensor(grid, dtype=torch.float64)
        plain = sample(mixture, X, on(levels_, Ipndm(3), NoMidpoint()))
        learned = sample(mixture, X, on(levels_, table.solver(grid), table.planner(grid)))
        torch.testing.assert_close(learned, plain, rtol=1e-5, atol=1e-5)
    assert isinstance(table.solver(GRID[:3]), Multistep), "the beginning of its grid is its own"
    assert isinstance(table.solver(GRID[1:]), Ipndm), "its weights are of slopes from the very first"


def test_the_model_is_told_the_learned_levels_and_none_outside_its_own() -> None:
    table, model = table_on(GRID), Gaussian()
    table.scale_time.copy_(torch.tensor([1.5, 0.9, 1.0, 1.2, 1e-9]))
    run(table, model)
    expected = [80.0, 0.9 * 12.0, 3.0, 1.2 * 0.7, SIGMA_MIN]
    assert [float(sigma) for sigma in model.asked] == pytest.approx(expected)


def test_between_guidance_scales_it_interpolates() -> None:
    alone = [table_on(GRID) for _ in range(2)]
    alone[1].weights.mul_(1.5)
    alone[1].scale_time.mul_(0.8)
    both = together(replace(alone[0].config, guidances=(1.0, 3.0)), alone)
    middle = both.solver(guidance=2.0)
    assert isinstance(middle, Multistep)
    torch.testing.assert_close(torch.tensor(middle.weights[1]), 1.25 * alone[0].weights[1, :2])
    for scale, own, again in zip((1.0, 3.0), alone, both.alone(), strict=True):
        torch.testing.assert_close(run(both, guidance=scale), run(own))
        torch.testing.assert_close(again.weights, own.weights)


def test_it_survives_its_file(tmp_path: Path) -> None:
    table = table_on(GRID, guidances=(1.0, 2.0))
    table.weights.add_(noise(*table.weights.shape).float().tril())
    save_predictor(table, tmp_path / "table.safetensors")
    loaded = load_predictor(tmp_path / "table.safetensors")
    assert isinstance(loaded, MultistepTable)
    assert loaded.config == table.config
    assert (run(loaded, guidance=1.3) == run(table, guidance=1.3)).all()


def test_a_list_of_levels_is_its_own_only_from_the_beginning() -> None:
    config = table_on(GRID).config
    assert config.calls == 5
    assert call_sigmas(config, 5) == GRID
    assert read(GRID, config).own_grid
    assert read(GRID[:4], config).own_grid
    for other in (GRID[2:], (80.0, 5.0, 0.5, 0.0)):
        found = read(other, config)
        assert not found.own_grid
        assert found.calls == len(other) - 1
    with pytest.raises(ValueError, match="Set steps to 5"):
        read(call_sigmas(config, 8), config)


@pytest.mark.parametrize("last", [0.5, SIGMA_MIN])
@pytest.mark.parametrize("calls", [1, 2, 3, 4, 7, 10, 25])
def test_any_number_of_calls_spans_its_grid(last: float, calls: int) -> None:
    levels = call_sigmas(table_on((*GRID[:-2], last, 0.0)).config, calls)
    assert len(levels) == calls + 1
    assert all(a > b for a, b in pairwise(levels))
    assert (levels[0], levels[-1]) == (GRID[0], 0.0)
    assert min(levels[:-1]) >= SIGMA_MIN * (1 - 1e-9)


def test_settings_for_several_guidance_scales() -> None:
    config = multistep_student(5, SIGMA_MIN, SIGMA_MAX, guidance=2.0, guidances=(2.0, 4.0))
    assert (config.guidances, config.kind, config.intervals) == ((2.0, 4.0), "multistep", 5)


def test_settings_that_no_multistep_table_has_are_refused() -> None:
    for changes in ({"sigmas": GRID[:-1]}, {"analytic_first_step": True}, {"plain_last": True}):
        with pytest.raises(ValueError, match="once per interval"):
            replace(CONFIG, **changes)
    with pytest.raises(ValueError, match="at least 2"):
        multistep_student(1, SIGMA_MIN, SIGMA_MAX)


# Searched grids


def passed(denoiser: Any = mixture, x: Tensor = X, calls: int = 9, sigma_max: float = SIGMA_MAX) -> TeacherPath:
    return path(denoiser, x, levels(SIGMA_MIN, sigma_max, calls, flow=False))


def cost_of(found: TeacherPath, grid: tuple[int, ...], rule: str) -> float:
    """What the points `grid` of a path cost, from the samples and slopes themselves."""
    variance, total = found.end.square().mean(), 0.0
    for n, (i, j) in enumerate(itertools.pairwise(grid)):
        moved, step = found.x[j] - found.x[i], found.levels[j] - found.levels[i]
        last = j == len(found.levels) - 1
        if rule == "midpoint" and not last:
            errors = []
            for m in range(i, j):
                reached = found.x[m] - found.x[i] - (found.levels[m] - found.levels[i]) * found.slopes[i]
                missed = (step / found.levels[m]) ** 2 * reached.square().sum()
                errors.append((moved - step * found.slopes[m]).square().sum() + missed)
            error = torch.stack(errors).min()
        elif rule == "euler" or n == 0 or (rule in ("ipndm", "midpoint") and last):
            error = (moved - step * found.slopes[i]).square().sum()
        elif rule == "ipndm":
            error = (moved - step * (1.5 * found.slopes[i] - 0.5 * found.slopes[grid[n - 1]])).square().sum()
        else:
            slopes = torch.stack([found.slopes[i], found.slopes[grid[n - 1]]]).flatten(1)
            error = (moved.flatten() - torch.linalg.lstsq(slopes.T, moved.flatten()).solution @ slopes).square().sum()
        total += float(error * variance / (variance + found.levels[j] ** 2))
    return total


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("intervals", [2, 3, 4])
def test_the_searched_grid_is_the_cheapest_of_all(rule: Any, intervals: int) -> None:
    found = passed()
    last = len(found.levels) - 1
    every = [(0, *inner, last) for inner in itertools.combinations(range(1, last), intervals - 1)]
    cheapest = min(every, key=lambda grid: cost_of(found, grid, rule))
    grid = searched(gram(found, finer=1), intervals, rule)
    assert grid == tuple(found.levels[n] for n in cheapest)


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


def test_more_intervals_than_levels_and_unknown_rules_are_refused() -> None:
    products = gram(passed(), finer=1)
    with pytest.raises(ValueError, match="Raise teacher_calls"):
        searched(products, 10, "euler")
    with pytest.raises(ValueError, match="midpoint"):
        searched(products, 2, "heun")  # type: ignore[arg-type]


# Weights in closed form


def test_on_a_gaussian_the_closed_form_is_exact() -> None:
    """All slopes and samples lie in the plane of x and the mean: two weights reach every level."""
    model = Gaussian(mean=0.3)
    teacher = passed(model, calls=60)
    goal = Goal(0, 0, X, model, teacher.end)
    made, (end,) = least_squares(table_on(GRID), [(goal, teacher)], ridge=0.0)
    first = (teacher.at(GRID[1])[0] - X - (GRID[1] - GRID[0]) * teacher.slopes[0]).square().mean().sqrt()
    assert float(first) > 5e-3, "one slope does not reach the first level"
    assert float((end - teacher.end).square().mean().sqrt()) < 1e-4
    torch.testing.assert_close(run(made, model), end, rtol=1e-4, atol=1e-4)


def test_a_strong_ridge_keeps_the_weights_it_starts_from() -> None:
    teacher = passed()
    start = table_on(GRID)
    goal = Goal(0, 0, X, mixture, teacher.end)
    held, free = (least_squares(start, [(goal, teacher)], ridge=ridge)[0].weights for ridge in (1e9, 1e-6))
    torch.testing.assert_close(held, start.weights, rtol=1e-4, atol=1e-4)
    assert float((free - start.weights).abs().max()) > 0.05


def test_every_start_ends_at_zero_and_has_a_call_per_level() -> None:
    for calls in (2, 3, 4, 7):
        found = starts(calls, SIGMA_MIN, SIGMA_MAX)
        assert len({start.name for start in found}) == len(found)
        for start in found:
            assert len(start.levels) == calls + 1
            assert start.levels[-1] == 0
            assert len(start.weights) == calls
    assert any("dpm_2" in start.name for start in starts(5, SIGMA_MIN, SIGMA_MAX))


def test_a_models_own_timesteps_are_a_grid_to_start_from() -> None:
    table = torch.linspace(0.001, 1.0, 1000, dtype=torch.float64)
    names = [start.name for start in starts(4, 0.003, 1.0, flow=True, table=table)]
    assert "dpmpp-2 discrete zero" in names
    assert polynomial(4, 0.003, 1.0)[0] == pytest.approx(1.0)
    assert PredictorConfig is type(CONFIG)


@pytest.mark.parametrize("name", ["amed", "amed_euler", "amed_dpm_2", "amed_ipndm", "amed_dpmpp_3m"])
@pytest.mark.parametrize("calls", [3, 4, 5, 6, 7])
def test_students_with_two_calls_per_interval_have_searched_grids_too(name: str, calls: int) -> None:
    config = predictor_config(name, calls, SIGMA_MIN, SIGMA_MAX)
    found = search(mixture, X, config)
    assert found.schedule == "searched"
    assert (found.calls, found.intervals, found.plain_last) == (calls, config.intervals, config.plain_last)
    assert found.sigmas[0] == pytest.approx(SIGMA_MAX)
    assert found.sigmas[-1] == 0.0
    assert len(call_sigmas(found, calls)) == calls + 1
    assert PredictorConfig.from_header(json.loads(json.dumps(asdict(found)))) == found


def test_published_grids_are_not_searched() -> None:
    with pytest.raises(ValueError, match="ends at 0"):
        search(mixture, X, predictor_config("amed", 5, SIGMA_MIN, SIGMA_MAX, published=True))


# Guidance


class Guided:
    """A mixture under guidance, which shows both of its answers."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def answers(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        cond = mixture(x, sigma)[0]
        return cond, cond + 0.1 * cond.roll(1, -1)

    def __call__(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, None, Tensor]:
        cond, uncond = self.answers(x, sigma)
        return uncond + self.scale * (cond - uncond), None, cond - uncond


def test_a_weight_of_guidance_changes_the_guidance_scale_of_its_step() -> None:
    """u_kk = 1 in every interval is a run at the next higher scale."""
    table = table_on(GRID, guided=True)
    table.guided.copy_(torch.eye(5))
    table.weights.copy_(torch.eye(5))
    grid = torch.tensor(GRID, dtype=torch.float64)
    expected = sample(Guided(4.0), X, on(grid, Ipndm(1), NoMidpoint()))
    torch.testing.assert_close(run(table, Guided(3.0)), expected, rtol=1e-5, atol=1e-5)


def test_a_model_that_does_not_show_its_two_answers_is_refused() -> None:
    table = table_on(GRID, guided=True)
    with pytest.raises(ValueError, match="did not show its two answers"):
        run(table, mixture)


def test_with_both_answers_the_closed_form_comes_nearer() -> None:
    model = Guided(3.0)
    teacher = path(model, X, levels(SIGMA_MIN, SIGMA_MAX, 60, flow=False))
    goal, errors = Goal(0, 0, X, model, teacher.end), {}
    for guided in (False, True):
        made, (end,) = least_squares(table_on((80.0, 2.0, 0.5, 0.0), guided=guided), [(goal, teacher)])
        torch.testing.assert_close(run(made, model), end, rtol=1e-4, atol=1e-4)
        errors[guided] = float((end - teacher.end).square().mean().sqrt())
    assert errors[True] < 0.8 * errors[False]


@pytest.mark.parametrize("guided", [False, True])
def test_a_table_with_all_that_there_is_survives_its_file(tmp_path: Path, guided: bool) -> None:
    model = Guided(3.0)
    teacher = path(model, X, levels(SIGMA_MIN, SIGMA_MAX, 20, flow=False))
    goal = Goal(0, 0, X, model, teacher.end)
    begun = table_on(GRID, guided=guided, spectral=True, first_sigma=20.0, channels=1)
    made, (end,) = least_squares(begun, [(goal, teacher)])
    torch.testing.assert_close(run(made, model), end, rtol=1e-4, atol=1e-4)
    save_predictor(made, tmp_path / "table.safetensors", {})
    loaded = load_predictor(tmp_path / "table.safetensors")
    assert isinstance(loaded, MultistepTable)
    assert loaded.config == made.config
    assert (run(loaded, model) == run(made, model)).all()


def test_weights_of_bands_are_least_squares_of_their_own() -> None:
    """Two bands that the teacher takes at different speeds: one weight misses both, a weight for each misses none."""
    from amed_core.spectrum import combined  # noqa: PLC0415

    model = Gaussian()
    speeds = torch.linspace(0.2, 1.0, 16, dtype=torch.float64)[None]

    def moved(x: Tensor, sigma: float) -> Tensor:
        slope = (x - model(x, torch.tensor(SIGMA_MAX))[0]) / SIGMA_MAX
        return x + (sigma - SIGMA_MAX) * combined([slope], speeds)

    there = torch.stack([X, moved(X, 12.0), moved(X, 12.0)])
    teacher = TeacherPath((SIGMA_MAX, 12.0, 0.0), there, torch.zeros_like(there[:-1]))
    errors = {}
    for spectral in (False, True):
        made, _ = least_squares(table_on((80.0, 12.0, 0.0), spectral=spectral), [(Goal(0, 0, X, model, X), teacher)])
        start = sample(model, X, on(torch.tensor([80.0, 12.0]), made.solver((80.0, 12.0)), made.planner((80.0, 12.0))))
        errors[spectral] = float((start - there[1]).square().mean().sqrt())
    assert errors[True] < 0.1 * errors[False]
