"""Derivatives through one model call."""

import pytest
import torch
from problems import SHAPE, noise
from torch import Tensor

from amed_core.fit.call_derivative import central, disagreement, reverse_disagreement

AT = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64).reshape(3, 1, 1, 1)
X = noise(3, *SHAPE)


def ask(value: Tensor) -> Tensor:
    return X * torch.sin(3 * value) + value**3


EXACT = 3 * X * torch.cos(3 * AT) + 3 * AT**2


def test_differences_err_by_the_square_of_their_step() -> None:
    errors = [disagreement(central(ask, AT, 0.0, 1.0, step), EXACT) for step in (2e-2, 1e-2)]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)


def test_at_the_end_of_the_range_differences_are_one_sided() -> None:
    asked: list[Tensor] = []

    def heard(value: Tensor) -> Tensor:
        asked.append(value)
        return ask(value)

    for end in (0.0, 1.0):
        derivative = central(heard, torch.full_like(AT, end), 0.0, 1.0, 1e-4)
        assert disagreement(derivative, 3 * X * torch.cos(torch.tensor(3 * end)) + 3 * end**2) < 1e-3
    assert all(0 <= float(value.min()) <= float(value.max()) <= 1 for value in asked)


def test_autograd_agrees_with_the_true_derivative_and_not_with_another() -> None:
    assert reverse_disagreement(ask, AT, EXACT) < 1e-12
    assert reverse_disagreement(ask, AT, 2 * EXACT) == pytest.approx(0.5)
    assert reverse_disagreement(lambda value: X * torch.sin(3 * value.detach()) + value**3, AT, EXACT) > 0.1


def test_where_an_operation_has_no_derivative_it_says_so() -> None:
    with pytest.raises(RuntimeError):
        reverse_disagreement(lambda value: ask(value.detach()), AT, EXACT)
