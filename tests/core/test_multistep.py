"""Learned multistep methods: what solvers are when they are written out, and tables of weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import (
    GRID,
    SCALES,
    SHAPE,
    SIGMA_MAX,
    SIGMA_MIN,
    SWITCH,
    ConstantGuidance,
    FlowGaussian,
    Gaussian,
    Guided,
    X,
    mixture,
    multistep_config,
    noise,
    on,
    table_on,
    two_models,
)
from torch import Tensor

from amed_core import (
    Dpm2,
    DpmSolverPP,
    FixedMidpoint,
    Ipndm,
    MultistepTable,
    NoMidpoint,
    PredictorConfig,
    load_predictor,
    sample,
    save_predictor,
)
from amed_core.call_list import all_plain, run_of
from amed_core.fit.trajectories import Metered, gaussian
from amed_core.multistep import coefficients
from amed_core.predictor import stacked
from amed_core.solvers import Multistep

FLOW_GRID = (1.0, 0.9, 0.6, 0.3, 0.1, 0.0)
HALVES = FixedMidpoint(0.5, plain=frozenset({2}))


def run(table: MultistepTable, denoiser: Any = mixture, guidance: float | None = None) -> Tensor:
    return sample(denoiser, X, table.method(guidance=guidance))


@pytest.mark.parametrize(
    ("solver", "grid", "planner"),
    [
        *((Ipndm(order), GRID, NoMidpoint()) for order in (1, 2, 3, 4)),
        *((DpmSolverPP(order, prediction), GRID, NoMidpoint()) for order in (2, 3) for prediction in ("data", "noise")),
        (Dpm2(), (80.0, 3.0, 0.2, 0.0), HALVES),
    ],
)
def test_a_solver_written_out_samples_as_itself(solver: Any, grid: Any, planner: Any) -> None:
    own = sample(mixture, X, on(grid, solver, planner))
    visited, weights = coefficients(on(grid, solver, planner))
    rows = tuple(tuple(row[: k + 1]) for k, row in enumerate(weights))
    assert all(not any(row[k + 1 :]) for k, row in enumerate(weights)), "no slope is used before it is known"
    written = sample(mixture, X, on(visited, Multistep(rows), NoMidpoint()))
    torch.testing.assert_close(written, own, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("order", [2, 3])
def test_so_does_a_flow_solver(order: int) -> None:
    solver, x = DpmSolverPP(order, flow=True), noise(6, 4)
    own = sample(FlowGaussian(0.3, 0.5), x, on(FLOW_GRID, solver, NoMidpoint()))
    rows = tuple(tuple(row[: k + 1]) for k, row in enumerate(coefficients(on(FLOW_GRID, solver, NoMidpoint()))[1]))
    torch.testing.assert_close(sample(FlowGaussian(0.3, 0.5), x, on(FLOW_GRID, Multistep(rows), NoMidpoint())), own)


def test_heuns_method_is_no_multistep_method() -> None:
    with pytest.raises(ValueError, match="twice at the noise level 3"):
        coefficients(on((80.0, 3.0, 0.2, 0.0), Dpm2(), FixedMidpoint(1.0, plain=frozenset({2}))))


def test_a_solver_that_scales_its_sample_is_no_multistep_method() -> None:
    class Scaling(Ipndm):
        def to_next(self, history: Any, sigma: Any, plan: Any, stage: Any) -> Tensor:
            return 1.1 * super().to_next(history, sigma, plan, stage)

    with pytest.raises(ValueError, match="no linear multistep method"):
        coefficients(on(GRID, Scaling(1), NoMidpoint()))


def test_with_the_first_denoised_sample_it_is_any_combination_of_the_noise_and_the_answers() -> None:
    ours, of_noise, of_answer = 5.0, 0.3, 0.6
    weight = (of_noise - 1) * SIGMA_MAX / (ours - SIGMA_MAX)
    solver = Multistep(((weight,),), ((of_answer + of_noise - 1) / (ours - SIGMA_MAX),))
    reached = sample(mixture, X, on([SIGMA_MAX, ours], solver, NoMidpoint()))
    answer = mixture(X, torch.tensor(SIGMA_MAX, dtype=torch.float64))[0]
    torch.testing.assert_close(reached, of_noise * X + of_answer * answer)


def test_an_unfitted_table_is_ipndm_on_its_grid_and_on_every_other() -> None:
    table = table_on()
    for grid in (GRID, (80.0, 5.0, 0.5, 0.0)):
        plain = sample(mixture, X, on(grid, Ipndm(3), NoMidpoint()))
        learned = sample(mixture, X, table.method(all_plain(grid)))
        torch.testing.assert_close(learned, plain, rtol=1e-5, atol=1e-5)
    assert isinstance(table.method(all_plain(GRID[:3])).solver, Multistep), "the beginning of its grid is its own"
    assert isinstance(table.method(all_plain(GRID[1:])).solver, Ipndm), "its weights are of slopes from the very first"


def test_the_model_is_told_the_learned_levels_and_none_outside_its_own() -> None:
    table, model = table_on(), Gaussian()
    table.scale_time.copy_(torch.tensor([1.5, 0.9, 1.0, 1.2, 1e-9]))
    run(table, model)
    expected = [80.0, 0.9 * 12.0, 3.0, 1.2 * 0.7, SIGMA_MIN]
    assert [float(sigma) for sigma in model.asked] == pytest.approx(expected)


def test_between_guidance_scales_it_interpolates() -> None:
    alone = [table_on() for _ in range(2)]
    alone[1].weights.mul_(1.5)
    alone[1].scale_time.mul_(0.8)
    both = stacked(replace(alone[0].config, guidances=(1.0, 3.0)), alone)
    assert isinstance(both, MultistepTable)
    middle = both.method(guidance=2.0).solver
    assert isinstance(middle, Multistep)
    torch.testing.assert_close(torch.tensor(middle.weights[1]), 1.25 * alone[0].weights[1, :2])
    for scale, own, again in zip((1.0, 3.0), alone, both.alone(), strict=True):
        torch.testing.assert_close(run(both, guidance=scale), run(own))
        torch.testing.assert_close(again.weights, own.weights)


@pytest.mark.parametrize("more", [{}, {"guided": True, "negatives": (0, 2)}])
def test_it_survives_its_file(tmp_path: Path, more: dict[str, Any]) -> None:
    table = table_on(GRID, guidances=(1.0, 2.0), **more)
    table.weights.add_(noise(*table.weights.shape).float().tril())
    save_predictor(table, tmp_path / "table.safetensors")
    loaded = load_predictor(tmp_path / "table.safetensors")
    assert isinstance(loaded, MultistepTable)
    assert loaded.config == table.config
    model = Guided(3.0) if more else mixture
    assert (run(loaded, model, guidance=1.3) == run(table, model, guidance=1.3)).all()


# Guidance


def test_a_weight_of_guidance_changes_the_guidance_scale_of_its_step() -> None:
    """u_kk = 1 in every interval is a run at the next higher scale."""
    table = table_on(GRID, guided=True)
    table.guided.copy_(torch.eye(5))
    table.weights.copy_(torch.eye(5))
    expected = sample(Guided(4.0), X, on(GRID, Ipndm(1), NoMidpoint()))
    torch.testing.assert_close(run(table, Guided(3.0)), expected, rtol=1e-5, atol=1e-5)


def test_a_model_that_does_not_show_its_two_answers_is_refused() -> None:
    table = table_on(GRID, guided=True)
    with pytest.raises(ValueError, match="did not show its two answers"):
        run(table, mixture)


# Calls that ask no negative


def test_where_every_call_asks_the_negative_saying_so_changes_nothing() -> None:
    plain, said = (table_on(GRID, guided=True, guidance=3.0, negatives=n) for n in ((), tuple(range(5))))
    for table in (plain, said):
        table.weights.add_(noise(*table.weights.shape).float().tril())
        table.guided.add_(0.1 * noise(*table.weights.shape).float().tril())
    assert (run(said, Guided(3.0)) == run(plain, Guided(3.0))).all()
    assert said.config.passes == plain.config.passes == 2 * plain.config.calls


@pytest.mark.parametrize("negatives", [(0,), (0, 3), (0, 1, 4)])
def test_guidance_that_stays_the_same_is_carried_exactly_before_any_fit(negatives: tuple[int, ...]) -> None:
    model = ConstantGuidance(3.0)
    asked, saving = (table_on(GRID, guided=True, guidance=3.0, negatives=n) for n in ((), negatives))
    torch.testing.assert_close(run(saving, model), run(asked, model), rtol=1e-4, atol=1e-4)


def test_guidance_that_was_not_asked_yet_is_left_out() -> None:
    """The first two calls are the conditional model's, and so is where they lead."""
    model, table = Guided(3.0), table_on(GRID, guided=True, guidance=3.0, negatives=(2, 3))
    both = (table.method(all_plain(GRID[:3])), on(GRID[:3], Ipndm(3), NoMidpoint()))
    without, expected = sample(model, X, both[0]), sample(model.conditional, X, both[1])
    torch.testing.assert_close(without, expected, rtol=1e-5, atol=1e-5)


def test_passes_are_counted_where_the_negative_is_asked() -> None:
    table = table_on(GRID, guided=True, guidance=3.0, negatives=(1, 3))
    x, meter = SIGMA_MAX * noise(4, *SHAPE), Metered(gaussian(Guided(3.0), SHAPE, SIGMA_MAX))
    sample(meter(range(4))[1], x, table.method())
    assert (meter.calls, meter.passes) == (4 * 5, 4 * 7)
    assert (table.config.calls, table.config.passes) == (5, 7)


def test_a_model_that_cannot_leave_out_its_negative_is_refused() -> None:
    with pytest.raises(ValueError, match="does not answer without it"):
        run(table_on(GRID, guided=True, guidance=3.0, negatives=(1, 3)), mixture)


def test_the_second_model_alone_asks_the_negatives_of_its_own_intervals() -> None:
    def model(x: Tensor, sigma: Tensor) -> tuple[Tensor, None, Tensor]:
        return two_models(x, sigma), None, 0.1 * x

    model.conditional = two_models  # type: ignore[attr-defined]
    at = table_on(GRID, switch_sigma=SWITCH).config.switch
    for negatives in ((0, at + 1), (0,), (at,)):
        table = table_on(GRID, guided=True, guidance=3.0, switch_sigma=SWITCH, negatives=negatives)
        table.guided.add_(0.1 * noise(*table.guided.shape).float().tril())
        whole, between = sample(model, X, table.method()), sample(model, X, table.method(all_plain(GRID[: at + 1])))
        torch.testing.assert_close(sample(model, between, table.method(all_plain(GRID[at:]))), whole)


@pytest.mark.parametrize("settings", [multistep_config(), multistep_config(guidances=SCALES)])
def test_tables_of_single_guidance_scales_are_copies(settings: PredictorConfig) -> None:
    table = MultistepTable(settings)
    for single in table.alone():
        single.weights.add_(1.0)
        assert (table.weights - single.weights).abs().max() == 1.0


def test_what_two_models_share_a_run_or_take_one_each_is_the_same() -> None:
    """Below a level another model answers: no step of its own knows the first one's answers, so that its part of the
    run may be a run of its own.
    """
    table = table_on(GRID, switch_sigma=SWITCH)
    at, x = table.config.switch, SIGMA_MAX * noise(4, *SHAPE)
    assert GRID[at - 1] >= SWITCH > GRID[at]
    table.weights.add_(0.1 * noise(*table.weights.shape).float().tril())
    table.scale_time.mul_(0.9)
    whole = sample(two_models, x, table.method())
    between = sample(two_models, x, table.method(all_plain(GRID[: at + 1])))
    torch.testing.assert_close(sample(two_models, between, table.method(all_plain(GRID[at:]))), whole)
    assert run_of(GRID[at:], table.config).own_grid
    assert not run_of(GRID[at - 1 :], table.config).own_grid, "it begins with the first model's last call"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_list_in_half_precision_is_crossed_on_the_tables_own_levels(dtype: torch.dtype) -> None:
    """Two of its levels lie so near to one another that rounding would change the step between them by a tenth."""
    config = multistep_config(4, sigmas=(1.0, 0.97, 0.5, 0.1, 0.0))
    rounded = torch.tensor(config.sigmas).to(dtype).tolist()
    found = MultistepTable(config).method(run_of(rounded, config))
    assert isinstance(found.solver, Multistep)
    assert found.sigmas == config.sigmas
