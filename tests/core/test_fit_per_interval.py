"""The paper's fit of its network: what it reaches, what it costs, and derivatives that are true."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from problems import (
    FACTS,
    SHORT,
    Counting,
    Gaussian,
    in_float64,
    mixture,
    per_interval_fit,
    same,
)
from torch import Tensor

from amed_core import AMEDPredictor, TrainConfig
from amed_core.fit.call_derivative import disagreement
from amed_core.fit.per_interval import PerInterval
from amed_core.fit.workers import Workers
from amed_core.samplers import TYPES, student_config
from amed_core.types import Sample, Sigma


def held_out_loss(predictor: AMEDPredictor) -> float:
    """The loss over all intervals on noise that no training here draws."""
    fresh = PerInterval(predictor, in_float64(Gaussian(), seed=10**6), TrainConfig(trajectories=400, batch_size=400))
    batch, total = fresh.begin(), 0.0
    for interval in range(predictor.config.planned):
        loss, student, _, history = fresh.loss(batch)
        total += loss.item()
        batch.x, batch.history, batch.interval = student, history, interval + 1
    return total


@pytest.mark.parametrize(("name", "published"), [*((name, False) for name in TYPES), ("amed", True)])
def test_a_fit_comes_nearer_to_its_teacher_on_noise_it_never_saw(name: str, published: bool) -> None:
    settings = TrainConfig(trajectories=800, batch_size=16, learning_rate=0.01)
    fit = per_interval_fit(name, 5, settings, Gaussian(), published=published)
    before = held_out_loss(fit.predictor)
    list(fit.events())
    assert held_out_loss(fit.predictor) < 0.95 * before


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("scale_time", [0.0, 0.2])
def test_finite_differences_give_the_gradient_of_autograd(name: str, scale_time: float) -> None:
    gradients, students = [], []
    for gradient in ("reverse", "finite difference"):
        settings = replace(SHORT, gradient=gradient)  # type: ignore[arg-type]
        fitted = per_interval_fit(name, 5, settings, scale_time=scale_time)
        batch = fitted.begin()
        loss, student, _, history = fitted.loss(batch)
        batch.x, batch.history, batch.interval = student, history, 1
        second = fitted.loss(batch)[0]
        (loss + second).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in fitted.predictor.parameters() if p.grad is not None]))
        students.append(student)
    torch.testing.assert_close(students[1], students[0])
    assert float((gradients[1] - gradients[0]).norm() / gradients[0].norm()) < 2e-3


def test_a_loss_that_is_not_finite_names_the_interval_and_keeps_the_weights() -> None:
    """The teacher has answers that are, and the student's second interval has none."""
    broken = False

    def breaking(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        denoised, features = mixture(x, sigma)
        return (math.nan * denoised if broken else denoised), features

    fitted = per_interval_fit(denoiser=breaking)
    running = fitted.events()
    assert next(running).interval == 0
    kept = [p.detach().clone() for p in fitted.predictor.parameters()]
    broken = True
    with pytest.raises(FloatingPointError, match="interval 2"):
        next(running)
    assert all((a == b).all() for a, b in zip(kept, fitted.predictor.parameters(), strict=True))


@pytest.mark.parametrize("gradient", ["reverse", "finite difference"])
@pytest.mark.parametrize(("name", "calls"), [("amed", 5), ("amed", 4), ("amed_ipndm", 5), ("amed_dpmpp_2m", 6)])
def test_model_calls_are_counted_truly(name: str, calls: int, gradient: Any) -> None:
    model = Counting(Gaussian())
    counted = per_interval_fit(name, calls, replace(SHORT, gradient=gradient), model)
    list(counted.events())
    assert counted.model_calls == model.samples


def test_a_single_step_student_asks_only_at_its_midpoints() -> None:
    """The teacher (Heun, one point in each of two intervals) makes 8 calls per trajectory, the student 2."""
    fitted = per_interval_fit(settings=replace(SHORT, gradient="finite difference"))
    list(fitted.events())
    assert fitted.model_calls == 24 * (8 + 2 * 3), "with finite differences by r: three calls for one"


def test_training_leaves_the_models_weights_and_torchs_generator_alone() -> None:
    layer = torch.nn.Linear(16, 16).double()
    weights = layer.weight.clone()
    state = torch.get_rng_state()

    def network(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return layer(x.flatten(1) / (1 + sigma**2).sqrt().reshape(-1, 1)).reshape(x.shape), x.new_zeros(len(x), 8, 8)

    list(per_interval_fit(denoiser=network).events())
    assert layer.weight.grad is None
    assert (layer.weight == weights).all()
    assert (torch.get_rng_state() == state).all()


def test_a_teacher_that_is_not_finite_names_the_interval_and_keeps_the_weights() -> None:
    def broken(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        denoised, features = mixture(x, sigma)
        return torch.where(sigma < 2.0, math.nan, denoised), features

    fitted = per_interval_fit(denoiser=broken)
    kept = [p.detach().clone() for p in fitted.predictor.parameters()]
    with pytest.raises(FloatingPointError, match="interval 2"):
        next(fitted.events())
    assert not fitted.losses, "not even the intervals before, whose batch a state would hold"
    assert all((a == b).all() for a, b in zip(kept, fitted.predictor.parameters(), strict=True))


@pytest.mark.parametrize("gradient", ["reverse", "finite difference"])
@pytest.mark.parametrize(("name", "calls"), [("amed", 5), ("amed", 4), ("amed_ipndm", 5), ("amed_dpmpp_2m", 6)])
@pytest.mark.parametrize("scale_time", [0.0, 0.2])
def test_no_call_is_made_beyond_those_on_paper(name: str, calls: int, gradient: Any, scale_time: float) -> None:
    """Over two epochs, with validation. Only the check of reverse mode, in the first batch, comes on top."""
    training = replace(SHORT, epochs=2, gradient=gradient, held_out=8, validations=3, teacher_calls=10)
    fitted = per_interval_fit(name, calls, training, scale_time=scale_time)
    events = fitted.events()
    begun = next(events).model_calls
    list(events)
    check = 0
    if gradient == "reverse":
        unchecked = per_interval_fit(
            name, calls, replace(training, gradient="finite difference"), scale_time=scale_time
        )
        check = begun - next(unchecked.events()).model_calls + 8 * 2 * (1 + (scale_time > 0))
        assert fitted.gradient == gradient
    assert fitted.model_calls == fitted.expected_calls + check


def test_the_teacher_crosses_a_trajectory_once_however_many_epochs() -> None:
    settings = replace(SHORT, gradient="finite difference")
    once, thrice = (per_interval_fit(settings=replace(settings, epochs=epochs)) for epochs in (1, 3))
    list(once.events())
    list(thrice.events())
    teacher, student = 24 * 8, 24 * 2 * 3
    assert once.model_calls == teacher + student
    assert thrice.model_calls == teacher + 3 * student
    forgetful = per_interval_fit(settings=replace(settings, epochs=3, keep_bytes=0))
    list(forgetful.events())
    assert forgetful.model_calls == 3 * (teacher + student)
    assert same(thrice.predictor, forgetful.predictor)


def test_the_weights_that_did_best_on_what_is_held_out_are_kept() -> None:
    settings = replace(SHORT, trajectories=64, held_out=16, validations=8, learning_rate=0.05, teacher_calls=20)
    fitted = per_interval_fit(settings=settings)
    best, at_best = math.inf, {}
    for event in fitted.events():
        if event.held_out is not None and event.held_out < best:
            best = event.held_out
            at_best = {name: weight.clone() for name, weight in fitted.predictor.state_dict().items()}
    assert len(fitted.errors) == 8
    assert all((at_best[name] == weight).all() for name, weight in fitted.predictor.state_dict().items())
    summary = fitted.summary()
    assert summary.error == best


class SilentlyWrong(torch.autograd.Function):
    """An operation that answers half of its derivative, as kernels of other people's models may."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def half_of_the_derivative(x: Sample, sigma: Sigma) -> Any:
    return mixture(SilentlyWrong.apply(x) / 2, sigma)  # type: ignore[no-untyped-call]


def of_x_none(x: Sample, sigma: Sigma) -> Any:
    return mixture(x.detach(), sigma)


@torch.no_grad()
def none_at_all(x: Sample, sigma: Sigma) -> Any:
    return mixture(x, sigma)


@pytest.mark.parametrize("lying", [half_of_the_derivative, of_x_none, none_at_all])
@pytest.mark.parametrize("name", ["amed", "amed_ipndm"])
def test_reverse_mode_that_lies_gives_way_and_trains_as_finite_differences_do(lying: Any, name: str) -> None:
    checked = per_interval_fit(name, 5, replace(SHORT, gradient="reverse"), lying, scale_time=0.2)
    differences = per_interval_fit(name, 5, replace(SHORT, gradient="finite difference"), mixture, scale_time=0.2)
    for fit in (checked, differences):
        list(fit.events())
    assert same(checked.predictor, differences.predictor)
    assert checked.summary().details["gradient"] == "finite difference"


def test_reverse_mode_that_is_true_is_kept() -> None:
    fit = per_interval_fit(settings=replace(SHORT, gradient="reverse"))
    list(fit.events())
    assert fit.summary().details["gradient"] == "reverse"


def gradients(fit: PerInterval) -> Tensor:
    """Of the losses of the first two intervals, by the predictor's weights."""
    batch, total = fit.begin(), torch.zeros(())
    for interval in range(2):
        loss, student, _, history = fit.loss(batch)
        total = total + loss
        batch.x, batch.history, batch.interval = student, history, interval + 1
    total.backward()  # type: ignore[no-untyped-call]
    return torch.cat([p.grad.flatten() for p in fit.predictor.parameters() if p.grad is not None])


@pytest.mark.parametrize("roughness", [0.0, 30.0, 300.0])
def test_a_step_is_found_that_is_small_enough_for_the_model(roughness: float) -> None:
    """The derivative of sin(roughness x) needs steps well below 1 / roughness."""

    def rough(x: Sample, sigma: Sigma) -> Sample:
        return mixture(x, sigma)[0] + 0.1 * torch.sin(roughness * x / (1 + sigma**2).sqrt())

    def fit(**settings: Any) -> PerInterval:
        return per_interval_fit(settings=replace(SHORT, **settings), denoiser=rough, scale_time=0.2, features="latent")

    found = fit(gradient="finite difference", step=0.0)
    assert disagreement(gradients(found), gradients(fit(gradient="reverse"))) < 0.1
    assert found.step <= {0.0: 3e-2, 30.0: 3e-2, 300.0: 3e-3}[roughness]


def test_a_batch_that_workers_cannot_share_is_refused() -> None:
    predictor = AMEDPredictor(student_config("amed", 5, FACTS))
    with pytest.raises(ValueError, match="3 processes"):
        PerInterval(predictor, in_float64(), SHORT, workers=Workers(0, 3))
