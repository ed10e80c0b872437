"""Fitting: what it reaches, what it costs, and that it can be stopped anywhere."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import SIGMA_MAX, SIGMA_MIN, Gaussian, mixture
from torch import Tensor

from amed_core import AMEDPredictor, TrainConfig, Trainer
from amed_core.files import load_state, save_state
from amed_core.fit.call_derivative import STEPS
from amed_core.fit.trajectories import noise
from amed_core.samplers import DEFAULT, predictor_config
from amed_core.types import Denoiser

SHAPE = (1, 4, 4)
SHORT = TrainConfig(trajectories=24, batch_size=8)


def source(denoiser: Denoiser = mixture, seed: int = 0) -> Any:
    """Starting noise in float64, so that gradients can be compared closely."""

    def draw(rows: range) -> tuple[Tensor, Denoiser]:
        return SIGMA_MAX * noise(rows, SHAPE, seed).double(), denoiser

    return draw


def trainer(name: str = "amed", calls: int = 5, training: TrainConfig = SHORT, **overrides: Any) -> Trainer:
    config = predictor_config(name, calls, SIGMA_MIN, SIGMA_MAX, **overrides)
    return Trainer(AMEDPredictor(config).double(), source(), training)


def held_out_loss(predictor: AMEDPredictor) -> float:
    """The loss over all intervals on noise that no training here draws."""
    fresh = Trainer(predictor, source(Gaussian(), seed=10**6), TrainConfig(trajectories=400, batch_size=400))
    batch, total = fresh.begin(), 0.0
    for interval in range(predictor.config.planned):
        loss, student, _, history = fresh.loss(batch)
        total += loss.item()
        batch.x, batch.history, batch.interval = student, history, interval + 1
    return total


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("name", DEFAULT)
def test_a_fit_comes_nearer_to_its_teacher_on_noise_it_never_saw(name: str, published: bool) -> None:
    config = predictor_config(name, 5, SIGMA_MIN, SIGMA_MAX, published=published)
    training = TrainConfig(trajectories=2400, batch_size=16)
    fitted = Trainer(AMEDPredictor(config).double(), source(Gaussian()), training)
    before = held_out_loss(fitted.predictor)
    list(fitted.events())
    assert held_out_loss(fitted.predictor) < 0.95 * before


@pytest.mark.parametrize(("name", "calls"), [("amed", 5), ("amed_ipndm", 6), ("amed_dpmpp_3m", 7)])
def test_resumed_equals_uninterrupted_bit_for_bit_wherever_it_was_stopped(
    tmp_path: Path, name: str, calls: int
) -> None:
    whole = trainer(name, calls)
    events = sum(1 for _ in whole.events())
    for stop in range(events + 1):
        first = trainer(name, calls)
        running = first.events()
        for _ in range(stop):
            next(running)
        save_state(tmp_path / "state.safetensors", first.state_dict())
        second = trainer(name, calls)
        second.load_state_dict(load_state(tmp_path / "state.safetensors"))
        assert sum(1 for _ in second.events()) == events - stop
        for a, b in zip(whole.predictor.parameters(), second.predictor.parameters(), strict=True):
            assert (a == b).all()
        assert second.losses == whole.losses
        assert second.model_calls == whole.model_calls


def test_leaving_the_events_and_coming_back_goes_on() -> None:
    whole, broken = trainer(), trainer()
    list(whole.events())
    while any(True for _ in broken.events()):  # takes one event of a new iterator at a time
        pass
    assert all((a == b).all() for a, b in zip(whole.predictor.parameters(), broken.predictor.parameters(), strict=True))


def test_a_state_of_another_training_is_refused() -> None:
    state = trainer().state_dict()
    with pytest.raises(ValueError, match="learning_rate"):
        trainer(training=replace(SHORT, learning_rate=0.1)).load_state_dict(state)
    with pytest.raises(ValueError, match="sigmas"):
        trainer(calls=7).load_state_dict(state)


@pytest.mark.parametrize("name", DEFAULT)
@pytest.mark.parametrize("scale_time", [0.0, 0.2])
def test_finite_differences_give_the_gradient_of_autograd(name: str, scale_time: float) -> None:
    gradients, students = [], []
    for gradient in ("reverse", "finite difference"):
        fitted = trainer(name, 5, replace(SHORT, gradient=gradient), scale_time=scale_time)  # type: ignore[arg-type]
        batch = fitted.begin()
        loss, student, _, history = fitted.loss(batch)
        batch.x, batch.history, batch.interval = student, history, 1
        second = fitted.loss(batch)[0]
        (loss + second).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in fitted.predictor.parameters() if p.grad is not None]))
        students.append(student)
    torch.testing.assert_close(students[1], students[0])
    assert float((gradients[1] - gradients[0]).norm() / gradients[0].norm()) < 2e-3


@pytest.mark.parametrize("gradient", ["reverse", "finite difference"])
@pytest.mark.parametrize(("name", "calls"), [("amed", 5), ("amed", 4), ("amed_ipndm", 5), ("amed_dpmpp_2m", 6)])
def test_model_calls_are_counted_truly(name: str, calls: int, gradient: Any) -> None:
    model = Gaussian()
    config = predictor_config(name, calls, SIGMA_MIN, SIGMA_MAX)
    counted = Trainer(AMEDPredictor(config), source(model), replace(SHORT, gradient=gradient))
    list(counted.events())
    assert counted.model_calls == 8 * len(model.asked)


def test_a_single_step_student_asks_only_at_its_midpoints() -> None:
    """The teacher (Heun, one point in each of two intervals) makes 8 calls per trajectory, the student 2."""
    fitted = trainer("amed", 5)
    list(fitted.events())
    assert fitted.model_calls == 24 * (8 + 2)


def test_training_leaves_the_models_weights_and_torchs_generator_alone() -> None:
    layer = torch.nn.Linear(16, 16).double()
    weights = layer.weight.clone()
    state = torch.get_rng_state()

    def network(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return layer(x.flatten(1) / (1 + sigma**2).sqrt().reshape(-1, 1)).reshape(x.shape), x.new_zeros(len(x), 8, 8)

    config = predictor_config("amed", 5, SIGMA_MIN, SIGMA_MAX)
    list(Trainer(AMEDPredictor(config).double(), source(network), SHORT).events())
    assert layer.weight.grad is None
    assert (layer.weight == weights).all()
    assert (torch.get_rng_state() == state).all()


def test_a_loss_that_is_not_finite_names_the_interval_and_keeps_the_weights() -> None:
    def broken(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        denoised, features = mixture(x, sigma)
        return torch.where(sigma < 2.0, math.nan, denoised), features

    config = predictor_config("amed", 5, SIGMA_MIN, SIGMA_MAX)
    fitted = Trainer(AMEDPredictor(config).double(), source(broken), SHORT)
    running = fitted.events()
    assert next(running).interval == 0
    kept = [p.detach().clone() for p in fitted.predictor.parameters()]
    with pytest.raises(FloatingPointError, match="interval 2"):
        next(running)
    assert all((a == b).all() for a, b in zip(kept, fitted.predictor.parameters(), strict=True))


@pytest.mark.parametrize("gradient", ["reverse", "finite difference", "forward"])
@pytest.mark.parametrize(("name", "calls"), [("amed", 5), ("amed", 4), ("amed_ipndm", 5), ("amed_dpmpp_2m", 6)])
@pytest.mark.parametrize("scale_time", [0.0, 0.2])
def test_no_call_is_made_beyond_those_on_paper(name: str, calls: int, gradient: Any, scale_time: float) -> None:
    """Over two epochs, with validation. Only the start-up check of forward mode comes on top."""
    training = replace(SHORT, epochs=2, gradient=gradient, held_out=8, validations=3, teacher_calls=10)
    fitted = trainer(name, calls, training, scale_time=scale_time)
    list(fitted.events())
    check = 0
    if gradient == "forward":
        count = 1 + (scale_time > 0)
        check = 8 * count * (2 * len(STEPS) + 1)
    assert fitted.model_calls == fitted.floor + check


def test_the_teacher_crosses_a_trajectory_once_however_many_epochs(tmp_path: Path) -> None:
    once, thrice = (trainer(training=replace(SHORT, epochs=epochs)) for epochs in (1, 3))
    list(once.events())
    list(thrice.events())
    teacher, student = 24 * 8, 24 * 2
    assert once.model_calls == teacher + student
    assert thrice.model_calls == teacher + 3 * student
    forgetful = trainer(training=replace(SHORT, epochs=3, keep_bytes=0))
    list(forgetful.events())
    assert forgetful.model_calls == 3 * (teacher + student)
    for a, b in zip(thrice.predictor.parameters(), forgetful.predictor.parameters(), strict=True):
        assert (a == b).all()


def test_the_weights_that_did_best_on_what_is_held_out_are_kept() -> None:
    settings = replace(SHORT, trajectories=64, held_out=16, validations=8, learning_rate=0.05, teacher_calls=20)
    fitted = trainer(training=settings)
    best, at_best = math.inf, {}
    for event in fitted.events():
        if event.held_out is not None and event.held_out < best:
            best = event.held_out
            at_best = {name: weight.clone() for name, weight in fitted.predictor.state_dict().items()}
    assert len(fitted.errors) == 8
    assert all((at_best[name] == weight).all() for name, weight in fitted.predictor.state_dict().items())
    summary = fitted.summary()
    assert summary["error"] == best
    assert summary["gain"] == pytest.approx(1 - best / summary["base_solver_error"])


@pytest.mark.parametrize("call", [5, 30, 61])
def test_stopped_inside_a_model_call_it_goes_on_as_if_it_had_not_been(tmp_path: Path, call: int) -> None:
    made = 0

    def cancelled(x: Tensor, sigma: Tensor) -> Any:
        nonlocal made
        made += 1
        if made == call:
            raise KeyboardInterrupt
        return mixture(x, sigma)

    settings = replace(SHORT, epochs=2, held_out=8, validations=3, teacher_calls=10, gradient="finite difference")
    config = predictor_config("amed_ipndm", 5, SIGMA_MIN, SIGMA_MAX)
    whole, first, second = (
        Trainer(AMEDPredictor(config).double(), source(model), settings) for model in (mixture, cancelled, mixture)
    )
    list(whole.events())
    with pytest.raises(KeyboardInterrupt):
        list(first.events())
    save_state(tmp_path / "state.safetensors", first.state_dict())
    second.load_state_dict(load_state(tmp_path / "state.safetensors"))
    list(second.events())
    for a, b in zip(whole.predictor.parameters(), second.predictor.parameters(), strict=True):
        assert (a == b).all()
