"""Fits to the end of the trajectory: what they reach, and that they can be stopped, split and resumed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import SIGMA_MAX, SIGMA_MIN, mixture, noise
from torch import Tensor

from amed_core import AMEDPredictor, load_predictor, sample, save_predictor
from amed_core.files import load_state, save_state
from amed_core.fit.end_to_end import EndToEnd, bounded_step
from amed_core.fit.protocol import FitConfig
from amed_core.fit.trajectories import gaussian
from amed_core.midpoints import TablePredictor, centred_config, table_config
from amed_core.network import centred_on
from amed_core.samplers import predictor_config
from amed_core.types import Denoiser, Sample, Sigma

SHAPE = (1, 4, 4)
SMALL = FitConfig(trajectories=16, held_out=8, batch_size=4, teacher_calls=20, iterations=3, network_steps=20)
CONFIG = table_config(predictor_config("amed", 5, SIGMA_MIN, SIGMA_MAX, features="latent"))
SCALES = (1.0, 2.0, 4.0)


def guided(scale: float) -> Denoiser:
    """A model whose answer depends on a guidance scale."""
    return lambda x, sigma: mixture(x, sigma)[0] * (1 + 0.05 * scale / (1 + sigma))


def network(table: TablePredictor | None = None) -> AMEDPredictor:
    table = TablePredictor(CONFIG) if table is None else table
    return centred_on(table, centred_config(table.config, "latent"), torch.Generator().manual_seed(0))


def fit(predictor: Any, config: FitConfig = SMALL, denoiser: Denoiser = mixture) -> EndToEnd:
    return EndToEnd(predictor, gaussian(denoiser, SHAPE, SIGMA_MAX), config)


def weights(predictor: Any) -> Tensor:
    return torch.cat([value.flatten() for value in predictor.state_dict().values()])


def test_a_centred_network_plans_like_its_table_before_it_is_trained() -> None:
    table = TablePredictor(CONFIG)
    table.plans.copy_(torch.tensor([[0.0, 0.8, 1.3], [0.7, 1.2, 0.9]]))
    x = SIGMA_MAX * noise(5, *SHAPE).float()
    grid = torch.tensor(CONFIG.sigmas, dtype=torch.float64)
    drawn = [sample(mixture, x, grid, CONFIG.build_solver(), p.planner()) for p in (table, network(table))]
    assert (drawn[0] == drawn[1]).all()


def test_a_network_is_no_worse_than_the_table_it_starts_from() -> None:
    corrected = fit(network(), replace(SMALL, trajectories=64, held_out=32, batch_size=8, network_steps=60))
    errors = [event.error for event in corrected.events()]
    assert errors[-1] < errors[0]
    assert corrected.summary()["error"] <= corrected.history[0][1]


@pytest.mark.parametrize("kind", ["table", "network"])
def test_resumed_equals_uninterrupted_bit_for_bit_wherever_it_was_stopped(tmp_path: Path, kind: str) -> None:
    make = {"table": lambda: TablePredictor(CONFIG), "network": network}[kind]
    whole = fit(make())
    events = len(list(whole.events()))
    for stop in range(events + 1):
        first = fit(make())
        running = first.events()
        for _ in range(stop):
            next(running)
        save_state(tmp_path / "state.safetensors", first.state_dict())
        second = fit(make())
        second.load_state_dict(load_state(tmp_path / "state.safetensors"))
        assert len(list(second.events())) == events - stop
        assert (weights(second.predictor) == weights(whole.predictor)).all()
        assert second.history == whole.history


@pytest.mark.parametrize("call", [3, 60, 150, 260, 400])
def test_stopped_inside_any_model_call_it_goes_on_as_if_it_had_not_been(tmp_path: Path, call: int) -> None:
    made = 0

    def cancelled(x: Sample, sigma: Sigma) -> tuple[Sample, Tensor]:
        nonlocal made
        made += 1
        if made == call:
            raise KeyboardInterrupt
        return mixture(x, sigma)

    whole = fit(TablePredictor(CONFIG))
    list(whole.events())
    first = fit(TablePredictor(CONFIG), denoiser=cancelled)
    with pytest.raises(KeyboardInterrupt):
        list(first.events())
    save_state(tmp_path / "state.safetensors", first.state_dict())
    second = fit(TablePredictor(CONFIG))
    second.load_state_dict(load_state(tmp_path / "state.safetensors"))
    list(second.events())
    assert (weights(second.predictor) == weights(whole.predictor)).all()


def test_a_state_of_another_fit_is_refused() -> None:
    state = fit(TablePredictor(CONFIG)).state_dict()
    with pytest.raises(ValueError, match="trajectories"):
        fit(TablePredictor(CONFIG), replace(SMALL, trajectories=17)).load_state_dict(state)


def test_runs_that_are_not_kept_are_run_again_to_the_same_end() -> None:
    kept, again = (fit(TablePredictor(CONFIG), replace(SMALL, keep_bytes=size)) for size in (2**30, 0))
    for fitting in (kept, again):
        list(fitting.events())
    assert (weights(kept.predictor) == weights(again.predictor)).all()
    assert kept.model_calls < again.model_calls


@pytest.mark.parametrize(("kind", "learning_rate"), [("table", 0.02), ("network", 0.001)])
def test_autograd_through_the_whole_trajectory_lowers_the_error_too(kind: str, learning_rate: float) -> None:
    make = {"table": lambda: TablePredictor(CONFIG), "network": network}[kind]
    fitting = fit(make(), replace(SMALL, gradient="reverse", iterations=6, learning_rate=learning_rate))
    errors = [event.error for event in fitting.events()]
    assert errors[-1] < 0.95 * errors[0]


def test_the_expansion_is_that_of_autograd() -> None:
    """J^T e by differences is half the gradient of the squared error by the table's numbers."""
    fitting = fit(TablePredictor(CONFIG), replace(SMALL, trajectories=4))
    next(fitting.events())
    (goal,) = fitting.fitted
    with torch.no_grad():
        expanded = fitting._expanded(goal)
    table = TablePredictor(CONFIG).requires_grad_(True)
    grid = torch.tensor(CONFIG.sigmas, dtype=torch.float64)
    *_, last = fitting._run(goal, table)
    (last.x - goal.target).square().sum().backward()  # type: ignore[no-untyped-call]
    assert table.plans.grad is not None
    assert len(grid) == 4
    torch.testing.assert_close(2 * expanded.gradient.sum(0).float(), table.plans.grad.flatten(), rtol=0.15, atol=0.05)


def test_one_table_serves_a_range_of_guidance_scales(tmp_path: Path) -> None:
    """At the scales it was fitted at it is what a fit at that scale alone gives; between them it interpolates."""
    config = replace(CONFIG, guidances=SCALES, guidance=SCALES[0])
    several = TablePredictor(config)
    fitting = EndToEnd(several, [gaussian(guided(s), SHAPE, SIGMA_MAX) for s in SCALES], SMALL)
    list(fitting.events())
    for number, scale in enumerate(SCALES):
        alone = TablePredictor(CONFIG)
        list(fit(alone, denoiser=guided(scale)).events())
        torch.testing.assert_close(several.plans[number], alone.plans, rtol=1e-4, atol=1e-5)
    save_predictor(several, tmp_path / "p.safetensors")
    loaded = load_predictor(tmp_path / "p.safetensors")
    assert loaded.config.guidances == SCALES

    def r(guidance: float) -> float:
        start = sample_start()
        return float(loaded.planner(guidance=guidance).plan(start, 0).r)

    assert r(2.0) == pytest.approx(float(several.plans[1, 0, 0]))
    assert r(3.0) == pytest.approx(float(several.plans[1:, 0, 0].mean()))
    assert r(99.0) == pytest.approx(float(several.plans[2, 0, 0]))


def sample_start() -> Any:
    from amed_core import evaluate  # noqa: PLC0415

    return evaluate(mixture, SIGMA_MAX * noise(1, *SHAPE).float(), torch.tensor(SIGMA_MAX))


def test_a_network_over_a_range_of_guidance_scales() -> None:
    config = replace(CONFIG, guidances=SCALES, guidance=SCALES[0])
    sources = [gaussian(guided(s), SHAPE, SIGMA_MAX) for s in SCALES]
    corrected = EndToEnd(network(TablePredictor(config)), sources, replace(SMALL, trajectories=32, network_steps=60))
    errors = [event.error for event in corrected.events()]
    assert errors[-1] < errors[0]


def test_the_number_of_sources_must_be_that_of_guidance_scales() -> None:
    with pytest.raises(ValueError, match=r"1 sources for guidance scales \[1.0, 2.0, 4.0\]"):
        fit(TablePredictor(replace(CONFIG, guidances=SCALES)))


def test_a_bounded_step_is_the_best_one_inside_its_bounds() -> None:
    """Against a search over a fine grid of all points inside."""
    normal = torch.tensor([[2.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
    gradient = torch.tensor([-3.0, -1.2], dtype=torch.float64)
    start, low, high = torch.zeros(2).double(), torch.full((2,), -0.5).double(), torch.full((2,), 0.5).double()
    found = bounded_step(start, normal, gradient, 0.0, low, high)
    axis = torch.linspace(-0.5, 0.5, 201, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    values = torch.einsum("ni,ij,nj->n", points, normal, points) + 2 * points @ gradient
    torch.testing.assert_close(found, points[values.argmin()], atol=6e-3, rtol=0)


def test_the_summary_tells_the_error_the_base_solvers_and_the_gain() -> None:
    fitting = fit(TablePredictor(CONFIG))
    list(fitting.events())
    summary = fitting.summary()
    assert summary["gain"] == pytest.approx(1 - summary["error"] / summary["base_solver_error"])
    assert summary["model_calls"] >= summary["model_calls_on_paper"]
