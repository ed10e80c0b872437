"""Directional derivatives through a model, and what happens where a model does not offer them."""

from typing import Any

import pytest
import torch
from problems import SIGMA_MAX, SIGMA_MIN, mixture, noise
from torch import Tensor

from amed_core import AMEDPredictor, TrainConfig, Trainer
from amed_core.fit.call_derivative import central, directional, disagreement, tangents
from amed_core.samplers import DEFAULT, predictor_config
from amed_core.types import Denoiser, Sample, Sigma

SHAPE = (1, 4, 4)


def trainer(denoiser: Denoiser, name: str = "amed", calls: int = 5, **training: Any) -> Trainer:
    config = predictor_config(name, calls, SIGMA_MIN, SIGMA_MAX, scale_time=0.2, features="latent")
    settings = TrainConfig(trajectories=8, batch_size=8, **training)

    def source(rows: range) -> tuple[Sample, Denoiser]:
        return SIGMA_MAX * noise(len(rows), *SHAPE), denoiser

    return Trainer(AMEDPredictor(config).double(), source, settings)


def gradients(fitted: Trainer) -> Tensor:
    """Of the losses of the first two intervals, by the predictor's weights."""
    batch = fitted.begin()
    total = torch.zeros(())
    for interval in range(2):
        loss, student, _, history = fitted.loss(batch)
        total = total + loss
        batch.x, batch.history, batch.interval = student, history, interval + 1
    total.backward()
    return torch.cat([p.grad.flatten() for p in fitted.predictor.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", DEFAULT)
def test_forward_mode_gives_the_gradient_of_autograd(name: str) -> None:
    reverse, forward = (gradients(trainer(mixture, name, gradient=g)) for g in ("reverse", "forward"))
    assert disagreement(forward, reverse) < 1e-10


def test_a_directional_derivative_is_the_limit_of_differences() -> None:
    x, sigma = noise(3, *SHAPE), torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64).reshape(3, 1, 1, 1)
    dx, dsigma = noise(3, *SHAPE, seed=1), torch.full_like(sigma, 0.3)
    denoised, derivative = directional(mixture, x, sigma, dx, dsigma)
    torch.testing.assert_close(denoised, mixture(x, sigma)[0])

    def along(h: Tensor) -> Tensor:
        return mixture(x + h * dx, sigma + h * dsigma)[0]

    differences = central(along, torch.zeros(3, 1, 1, 1, dtype=torch.float64), -1.0, 1.0, 1e-5)
    assert disagreement(derivative, differences) < 1e-7


def test_tangents_are_derivatives_of_what_is_asked() -> None:
    def place(r: Tensor) -> tuple[Tensor, Tensor]:
        return r**2 * torch.ones(2, 3), 2.0**r

    at = torch.tensor([[0.3], [0.7]])
    x, sigma, dx, dsigma = tangents(place, at)
    torch.testing.assert_close(x, at**2 * torch.ones(2, 3))
    torch.testing.assert_close(dx, 2 * at * torch.ones(2, 3))
    torch.testing.assert_close(sigma, 2.0**at)
    torch.testing.assert_close(dsigma, 2.0**at * torch.log(torch.tensor(2.0)))


class SilentlyWrong(torch.autograd.Function):
    """An operation whose forward derivative is half of what it should be, as in-place kernels can have it."""

    generate_vmap_rule = False

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def jvp(ctx: Any, dx: Tensor) -> Tensor:
        return dx


class NoForwardMode(torch.autograd.Function):
    """An operation without a forward derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize("operation", [SilentlyWrong, NoForwardMode])
def test_forward_mode_that_fails_its_check_gives_way_to_differences(operation: Any) -> None:
    def through(x: Sample, sigma: Sigma) -> Sample:
        return mixture(operation.apply(x) / 2, sigma)[0]

    checked, differences = (trainer(through, gradient=g) for g in ("forward", "finite difference"))
    assert disagreement(gradients(checked), gradients(differences)) < 1e-6
    assert checked.gradient == "finite difference"
    assert checked.summary()["gradient"] == "finite difference"


@pytest.mark.parametrize("roughness", [0.0, 30.0, 300.0])
def test_a_step_is_found_that_is_small_enough_for_the_model(roughness: float) -> None:
    """The derivative of sin(roughness x) needs steps well below 1 / roughness."""

    def rough(x: Sample, sigma: Sigma) -> Sample:
        return mixture(x, sigma)[0] + 0.1 * torch.sin(roughness * x / (1 + sigma**2).sqrt())

    found = trainer(rough, gradient="finite difference", step=0.0)
    reverse = gradients(trainer(rough, gradient="reverse"))
    assert disagreement(gradients(found), reverse) < 0.1
    assert found.step <= {0.0: 3e-2, 30.0: 3e-2, 300.0: 3e-3}[roughness]
