"""The distances the tables are made of."""

import pytest
import torch

from amed_core.tools.measures import FRECHET_DIMENSIONS, error, frechet


def normal(n: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_error_is_zero_only_for_the_teacher_itself_and_scales() -> None:
    teacher = normal(50, 1, 4, 4)
    assert error(teacher, teacher).rmse == 0
    once, twice = (error(teacher + d * normal(50, 1, 4, 4, seed=1), teacher) for d in (1.0, 2.0))
    assert twice.rmse == pytest.approx(2 * once.rmse)
    assert once.low < once.rmse < once.high
    assert once.median <= once.p90


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(100):
        e = error(normal(40, 3, seed=seed), torch.zeros(40, 3))
        covered += e.low <= 1.0 <= e.high
    assert 0.88 < covered / 100 <= 1.0


def test_frechet_of_gaussians_is_the_closed_form() -> None:
    a, b = normal(200_000, 2), normal(200_000, 2, seed=1) @ torch.diag(torch.tensor([2.0, 3.0]).double()) + 1.0
    # means differ by (1, 1); standard deviations are (1, 1) and (2, 3)
    assert frechet(a, b) == pytest.approx(2 + 1 + 4, rel=0.02)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_of_large_samples_still_sees_a_shift() -> None:
    a = normal(600, 2 * FRECHET_DIMENSIONS)
    assert frechet(a, a + 1.0) > frechet(a, a) + 0.2 * FRECHET_DIMENSIONS
