"""Tables: plans without a network, fitted to the end of the trajectory."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from problems import SIGMA_MAX, SIGMA_MIN, Gaussian, mixture, noise

from amed_core import load_predictor, save_predictor, trajectory
from amed_core.driver import Resume
from amed_core.fit.end_to_end import EndToEnd
from amed_core.fit.protocol import FitConfig
from amed_core.fit.trajectories import gaussian
from amed_core.midpoints import TablePredictor, table_config
from amed_core.samplers import DEFAULT, predictor_config
from amed_core.types import Denoiser

SMALL = FitConfig(trajectories=12, held_out=8, batch_size=5, teacher_calls=20, iterations=4)


def table(name: str = "amed", calls: int = 5, **changes: float) -> TablePredictor:
    return TablePredictor(table_config(predictor_config(name, calls, SIGMA_MIN, SIGMA_MAX), **changes))


def fit(predictor: TablePredictor, denoiser: Denoiser, config: FitConfig = SMALL) -> EndToEnd:
    return EndToEnd(predictor, gaussian(denoiser, (1, 4, 4), SIGMA_MAX), config)


def test_a_new_table_is_the_base_solver_with_its_midpoints_at_half() -> None:
    plan = table().planner().plan(next(trajectory(mixture, SIGMA_MAX * noise(3, 1, 4, 4), GRID, *PARTS)).start, 0)
    assert float(plan.r) == 0.5
    assert float(plan.scale_dir) == float(plan.scale_time) == 1.0


CONFIG = predictor_config("amed", 5, SIGMA_MIN, SIGMA_MAX)
GRID = torch.tensor(CONFIG.sigmas, dtype=torch.float64)
PARTS = (CONFIG.build_solver(), table().planner())


@pytest.mark.parametrize("name", DEFAULT)
@pytest.mark.parametrize("calls", [5, 6])
def test_a_trajectory_goes_on_from_any_interval_as_if_it_had_not_stopped(name: str, calls: int) -> None:
    predictor = table(name, calls)
    config, x = predictor.config, SIGMA_MAX * noise(3, 1, 4, 4)
    grid = torch.tensor(config.sigmas, dtype=torch.float64)
    parts = (grid, config.build_solver(), predictor.planner())
    steps = list(trajectory(mixture, x, *parts, first=config.first))
    for k, step in enumerate(steps):
        history = steps[k - 1].history if k else ()
        for mid in (None, step.mid):
            again = list(trajectory(mixture, x, *parts, first=config.first, resume=Resume(k, step.start, history, mid)))
            assert (again[-1].x == steps[-1].x).all()
            assert len(again) == len(steps) - k


@pytest.mark.parametrize("name", DEFAULT)
def test_the_fit_brings_the_final_sample_nearer_to_the_teacher(name: str) -> None:
    predictor = table(name)
    events = list(fit(predictor, mixture).events())
    errors = [event.error for event in events]
    assert all(after <= before for before, after in pairwise(errors))
    assert min(event.held_out for event in events) < 0.8 * events[0].held_out


def test_a_gaussians_trajectories_are_hit_exactly() -> None:
    """The exact solution is linear in x with one factor per interval, which r alone can give."""
    events = list(fit(table(), Gaussian(), replace(SMALL, teacher_calls=200, iterations=12, tolerance=0.0)).events())
    assert events[-1].held_out < 0.01 * events[0].held_out


@pytest.mark.parametrize(("name", "calls", "derivatives"), [("amed", 5, 16), ("amed_ipndm", 6, 24), ("amed", 6, 33)])
def test_no_model_call_is_made_twice(name: str, calls: int, derivatives: int) -> None:
    """Per trajectory and iteration: what lies behind each number, and a trial; the teacher but once.

    What is held out also has one run of the base solver with plain calls.

    Five calls of amed are start 0, mid 0, start 1, mid 1, plain: r and scale_time of the first interval are followed
    by four, its scale_dir by three; those of the second by two, two and one.
    """
    made = 0

    def counting(x: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal made
        made += len(x)
        return mixture(x, sigma)

    fitting = fit(table(name, calls), counting, replace(SMALL, iterations=1))
    before, after = fitting.events()
    assert after.model_calls == made
    teacher, run = 2 * (SMALL.teacher_calls // 2) + 1, calls
    assert before.model_calls == (SMALL.trajectories + SMALL.held_out) * (teacher + run) + SMALL.held_out * run
    spent = after.model_calls - before.model_calls - SMALL.held_out * run - SMALL.trajectories * derivatives
    assert spent in [SMALL.trajectories * run * trials for trials in range(1, 6)]
    assert fitting.floor == before.model_calls + SMALL.held_out * run + SMALL.trajectories * (derivatives + run)


def test_the_table_keeps_its_best_iteration_on_what_is_held_out() -> None:
    predictor = table("amed_ipndm")
    events = list(fit(predictor, mixture, replace(SMALL, trajectories=2, iterations=6, tolerance=0.0)).events())
    best = min(events, key=lambda event: event.held_out)
    assert torch.allclose(predictor.plans, torch.tensor([[p.r, p.scale_dir, p.scale_time] for p in best.plans]))


def test_the_plans_stay_in_their_ranges() -> None:
    predictor = table("amed", scale_dir=0.01, scale_time=0.0)
    for event in fit(predictor, mixture).events():
        for plan in event.plans:
            assert 0 <= plan.r < 1
            assert abs(plan.scale_dir - 1) <= 0.01 + 1e-6
            assert plan.scale_time == 1.0


def test_the_same_seed_gives_the_same_table() -> None:
    tables = [table() for _ in range(2)]
    for predictor in tables:
        list(fit(predictor, mixture).events())
    assert (tables[0].plans == tables[1].plans).all()


def test_a_table_survives_its_file(tmp_path: Path) -> None:
    predictor = table("amed_dpmpp_2m")
    list(fit(predictor, mixture).events())
    save_predictor(predictor, tmp_path / "table.safetensors")
    loaded = load_predictor(tmp_path / "table.safetensors")
    assert isinstance(loaded, TablePredictor)
    assert loaded.config == predictor.config
    assert (loaded.plans == predictor.plans).all()


def test_a_model_that_answers_nan_is_an_error() -> None:
    with pytest.raises(FloatingPointError):
        list(fit(table(), lambda x, sigma: x * float("nan")).events())


def test_settings_that_cannot_be_fitted_are_refused() -> None:
    for changes in ({"trajectories": 0}, {"held_out": 0}, {"batch_size": 0}, {"iterations": 0}, {"teacher_calls": 1}):
        with pytest.raises(ValueError, match="at least 1 trajectory"):
            replace(SMALL, **changes)
