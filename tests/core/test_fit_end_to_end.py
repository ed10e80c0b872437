"""Fits to the end of the trajectory: what they reach, what they cost, and the step they take."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from problems import (
    SHAPE,
    SIGMA_MAX,
    SMALL,
    SWITCH,
    Counting,
    Gaussian,
    Guided,
    end_to_end_fit,
    midpoint_config,
    mixture,
    multistep_config,
    noise,
    two_models,
)
from torch import Tensor

from amed_core import PredictorConfig, make_fit
from amed_core.fit.end_to_end import EndToEnd, damped_step
from amed_core.fit.trajectories import HELD_OUT, gaussian
from amed_core.samplers import TYPES
from amed_core.types import Denoiser

FITTED = [*(midpoint_config(name, 5) for name in TYPES), multistep_config(4)]


@pytest.mark.parametrize("config", FITTED, ids=[*TYPES, "multistep"])
def test_the_final_sample_comes_nearer_to_the_teacher_with_every_iteration(config: PredictorConfig) -> None:
    fit = end_to_end_fit(config)
    events = list(fit.events())
    assert all(after.loss <= before.loss for before, after in pairwise(events[1:]))
    gain = fit.summary().gain
    assert gain is not None
    assert gain > (0.5 if config.kind == "multistep" else 0.1)
    base = fit.summary().baseline_error
    assert base is not None
    assert events[0].held_out is not None
    assert 0.5 * events[0].held_out < base <= events[0].held_out, "odd samples count less"


@pytest.mark.parametrize(("config", "below"), [(midpoint_config(), 0.01), (multistep_config(4), 1e-3)])
def test_a_gaussians_trajectories_are_hit_exactly(config: PredictorConfig, below: float) -> None:
    """The exact solution is linear in x with one factor per interval, which r alone can give."""
    iterations = 12 if config.kind == "table" else 3
    settings = replace(SMALL, teacher_calls=100, iterations=iterations, tolerance=0.0, budget=0)
    events = list(end_to_end_fit(config, settings, Gaussian()).events())
    assert events[-1].held_out is not None
    assert events[0].held_out is not None
    assert events[-1].held_out < below * max(1.0, events[0].held_out)


@pytest.mark.parametrize(
    ("config", "denoiser", "derivatives"),
    [
        # Five calls of amed are start 0, mid 0, start 1, mid 1, plain: r and scale_time of the first interval are
        # followed by four, its scale_dir by three; those of the second by two, two and one.
        (midpoint_config("amed", 5), mixture, 2 * 4 - 1 + 4 + 2 + 2 + 1),
        (midpoint_config("amed_ipndm", 6), mixture, None),
        (midpoint_config("amed", 6), mixture, None),
        # Of 4 calls: weights 3 + 2 * 2 + 3 * 1, first 3 + 2 + 1, told levels 4 + 3 + 2 + 1.
        (multistep_config(4), mixture, 26),
        (multistep_config(4, guided=True), Guided(3.0), None),
        (multistep_config(4, switch_sigma=SWITCH), two_models, None),
    ],
)
def test_no_model_call_is_made_twice(config: PredictorConfig, denoiser: Any, derivatives: int | None) -> None:
    """An iteration takes what lies behind each number, one or more runs of all, and what is held out."""
    model = Counting(denoiser)
    fit = end_to_end_fit(config, replace(SMALL, iterations=3, tolerance=0.0), model)
    counts = {event.iteration: event.model_calls for event in fit.events()}
    assert counts[max(counts)] == model.samples
    run, judged = config.calls * SMALL.trajectories, config.calls * SMALL.held_out
    if derivatives is None:
        derivatives = sum(fit.parameters(fit.predictor.config).calls_after())
    begun = max(number for number in counts if number <= 1)  # a start that is its own baseline has no number 1
    for before, after in pairwise(count for number, count in counts.items() if number >= begun):
        attempts = (after - before - judged - derivatives * SMALL.trajectories) / run
        assert attempts in range(1, 6)


def test_it_stops_before_its_budget_is_exceeded() -> None:
    settings = replace(SMALL, teacher_calls=100)  # good enough: a budget also decides whether all begins anew
    unlimited = end_to_end_fit(multistep_config(4), settings)
    counts = [event.model_calls for event in unlimited.events()]
    for budget in (counts[1] + 1, counts[2] + 1):
        limited = end_to_end_fit(multistep_config(4), replace(settings, budget=budget))
        assert limited.expected_calls <= budget
        list(limited.events())
        assert limited.model_calls <= budget
        assert len(limited.losses) < len(unlimited.losses)


def test_one_odd_sample_that_is_held_out_does_not_choose_the_table() -> None:
    """One of the samples that are held out ends elsewhere, whatever one does, and rules their RMSE."""

    def source(rows: range) -> tuple[Tensor, Denoiser]:
        x, _ = gaussian(mixture, SHAPE, SIGMA_MAX)(rows)
        odd = torch.tensor([row == HELD_OUT for row in rows])[:, None, None, None]

        def answer(x: Tensor, sigma: Tensor) -> tuple[Tensor, None]:
            usual = mixture(x, sigma)[0]
            return torch.where(odd, usual + 0.6 * torch.sin(500 * sigma.log()), usual), None

        return x, answer

    fit = make_fit(multistep_config(5), replace(SMALL, iterations=1, held_out=16), source)
    events = list(fit.events())
    assert events[-1].held_out is not None
    assert events[0].held_out is not None
    assert events[-1].held_out > 100 * events[-1].loss, "or the RMSE would have shown it as well"
    assert events[-1].loss < 0.1 * events[0].loss
    assert (fit.summary().gain or 0) > 0


def test_one_odd_sample_that_is_held_out_does_not_forbid_the_first_table() -> None:
    """Seven of eight are three times nearer, and one, which both decide wrongly, is farther: the table is kept.

    It is not where as many are farther as are nearer.
    """
    settings = replace(SMALL, trajectories=8, held_out=8)
    fit = make_fit(multistep_config(4), settings, gaussian(mixture, SHAPE, SIGMA_MAX))
    assert isinstance(fit, EndToEnd)
    base = torch.full((16,), 0.06, dtype=torch.float64)
    base[-1] = 0.3
    at = replace(fit.at, base_distances=base, best_distances=base)
    nearer = base / 3
    nearer[-1] = 0.6
    error, of_base = fit._held_out_errors(nearer, base)
    assert error > of_base, "or the test shows nothing"
    assert fit._holds(nearer, at)
    mixed = base.clone()
    mixed[8:12], mixed[12:15] = 0.03, 0.12
    assert not fit._holds(mixed, at)
    later = replace(at, best_distances=0.9 * base)  # there is a table already
    assert not fit._holds(nearer, later)


def test_it_ends_no_worse_on_what_is_held_out_than_it_began() -> None:
    """Iterations fit trajectories that are nearly those of another model, of which few show what they do."""

    def source(rows: range) -> tuple[Tensor, Denoiser]:
        x, _ = gaussian(mixture, SHAPE, SIGMA_MAX)(rows)
        scale = 1.0 if rows.start >= HELD_OUT else 1.1
        return x, lambda x, sigma: mixture(x, scale * sigma)[0]

    few = replace(SMALL, trajectories=4, iterations=5, grids=2)  # a worse start, from which iterations lead farther
    fit = make_fit(multistep_config(3), few, source)
    worse = 0
    for event in fit.events():
        held_out, _ = fit._held_out_errors(fit.at.best_distances, fit.at.base_distances)
        assert held_out <= fit.at.begun_error
        worse += event.held_out is not None and event.iteration > 1 and event.held_out > fit.at.begun_error
    assert worse, "or the test shows nothing"


def test_where_nothing_is_gained_on_what_is_held_out_it_stays_with_its_baseline() -> None:
    """The trajectories that are held out are those of another model."""

    def another(x: Tensor, sigma: Tensor) -> Tensor:
        return mixture(x, 3 * sigma)[0]

    def source(rows: range) -> Any:
        return gaussian(another if rows.start >= HELD_OUT else mixture, SHAPE, SIGMA_MAX)(rows)

    fit = make_fit(multistep_config(4), SMALL, source)
    errors = [event.held_out for event in fit.events() if event.held_out is not None]
    assert min(errors) == errors[0], "or the test shows nothing"
    assert fit.summary().gain == 0
    assert (dict(fit.predictor.named_parameters())["scale_time"] == 1).all()


@pytest.mark.parametrize("config", [midpoint_config(), multistep_config(4)], ids=["midpoints", "multistep"])
def test_one_trajectory_is_enough_not_to_explode(config: PredictorConfig) -> None:
    fit = end_to_end_fit(config, replace(SMALL, trajectories=1, batch_size=1))
    list(fit.events())
    summary = fit.summary()
    assert summary.error is not None
    assert summary.baseline_error is not None
    assert summary.error <= summary.baseline_error


def test_the_plans_stay_in_their_ranges() -> None:
    fit = end_to_end_fit(midpoint_config(scale_dir=0.01, scale_time=0.0))
    for event in fit.events():
        for plan in event.plans:
            assert 0 <= float(plan.r) < 1
            assert abs(float(plan.scale_dir) - 1) <= 0.01 + 1e-6
            assert plan.scale_time == 1.0


# The damped step


def problem(seed: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """A normal matrix of correlated columns (count, count), a gradient (count,), and numbers (count,) in [-1, 1]."""
    jacobian = noise(count + 3, count, seed=seed) + noise(count + 3, 1, seed=seed + 1)
    return jacobian.T @ jacobian, 3 * noise(count, seed=seed + 2), noise(count, seed=seed + 3).tanh()


def damped(normal: Tensor, damping: float) -> Tensor:
    return normal + damping * normal.diagonal().diag()


@pytest.mark.parametrize("damping", [0.0, 1e-2, 5.0])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_a_step_without_bounds_is_the_linear_solve(count: int, damping: float) -> None:
    normal, gradient, here = problem(count, count)
    far = torch.full((count,), torch.inf, dtype=torch.float64)
    found = damped_step(here, normal, gradient, damping, -far, far)
    torch.testing.assert_close(found, torch.linalg.solve(damped(normal, damping), -gradient), rtol=1e-6, atol=1e-8)
    wide = torch.full((count,), 1e6, dtype=torch.float64)
    torch.testing.assert_close(damped_step(here, normal, gradient, damping, -wide, wide), found, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("width", [0.02, 0.2, 1.0])
@pytest.mark.parametrize("damping", [0.0, 1e-2, 1.0])
def test_a_bounded_step_is_the_best_one_inside_its_bounds(width: float, damping: float) -> None:
    """There the gradient is zero for what is free, and points outward at a bound (Karush, Kuhn and Tucker)."""
    bound = 0
    for seed in range(0, 120, 4):
        normal, gradient, here = problem(seed, 6)
        low, high = here - width * (0.5 + noise(6, seed=seed).abs()), here + width
        step = damped_step(here, normal, gradient, damping, low, high)
        reached, tiny = here + step, 1e-9
        assert bool(((reached >= low - tiny) & (reached <= high + tiny)).all())
        slope = damped(normal, damping) @ step + gradient
        at_low, at_high = reached <= low + tiny, reached >= high - tiny
        scale = 1e-6 * float(gradient.abs().max())
        assert bool((slope[at_low] > -scale).all())
        assert bool((slope[at_high] < scale).all())
        assert float(slope[~at_low & ~at_high].abs().amax() if (~at_low & ~at_high).any() else 0.0) < scale
        bound += int((at_low | at_high).sum())
    assert bound > 0 or width == 1, "some bounds are reached"


def test_a_bounded_step_is_that_of_a_search_over_all_points_inside() -> None:
    for seed in range(0, 40, 4):
        normal, gradient, here = problem(seed, 2)
        low, high = here - 0.3, here + 0.2
        axes = [torch.linspace(float(a), float(b), 301, dtype=torch.float64) for a, b in zip(low, high, strict=True)]
        steps = torch.cartesian_prod(*axes) - here
        values = torch.einsum("ni,ij,nj->n", steps, normal, steps) + 2 * steps @ gradient
        found = damped_step(here, normal, gradient, 0.0, low, high)
        value = found @ normal @ found + 2 * found @ gradient
        assert float(value) <= float(values.min()) + 1e-9
        torch.testing.assert_close(found, steps[values.argmin()], atol=4e-3, rtol=0)


def test_a_number_that_nothing_depends_on_is_left_where_it_is() -> None:
    normal, gradient, here = problem(0, 3)
    normal[1], normal[:, 1], gradient[1] = 0, 0, 0
    far = torch.full((3,), torch.inf, dtype=torch.float64)
    for bounds in ((-far, far), (here - 0.5, here + 0.5)):
        assert float(damped_step(here, normal, gradient, 1e-2, *bounds)[1]) == 0
