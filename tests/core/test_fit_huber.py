"""Huber's loss, by which a few far samples cannot rule a fit."""

import pytest
import torch

from amed_core.fit.huber import LINEAR_BEYOND, compared, huber, linear_from

USUAL = torch.ones(999, dtype=torch.float64)


@pytest.mark.parametrize("odd", [2.0, 30.0])
def test_beyond_some_distance_errors_count_linearly(odd: float) -> None:
    """The usual distance is 1, and the limit LINEAR_BEYOND times that of all, one odd one included."""
    distances = torch.cat([USUAL, torch.tensor([odd])])
    limit = linear_from(distances)
    assert float(limit) == pytest.approx(LINEAR_BEYOND * odd ** (1 / 1000))
    of_odd = odd**2 if odd < LINEAR_BEYOND else float(limit) * (2 * odd - float(limit))
    assert float(huber(distances, limit)) == pytest.approx((999 + of_odd) / 1000)
    assert compared(distances, torch.ones_like(distances)) == pytest.approx((999 + of_odd) / 1000, rel=1e-2)


def test_the_loss_and_its_slope_have_no_jump_at_the_limit() -> None:
    limit = torch.tensor(3.0, dtype=torch.float64)
    around = torch.tensor([2.999, 3.0, 3.001], dtype=torch.float64)
    losses = torch.stack([huber(one[None], limit) for one in around])
    torch.testing.assert_close(losses.diff(), torch.full((2,), 2 * 3.0 * 1e-3).double(), rtol=1e-3, atol=0)


def test_two_sets_are_compared_by_the_nearer_limit() -> None:
    assert compared(USUAL, USUAL) == 1
    assert compared(USUAL, 2 * USUAL) == pytest.approx(0.25)
    assert compared(2 * USUAL, USUAL) == pytest.approx(4.0)
    far = torch.cat([USUAL, torch.tensor([1000.0])])
    assert compared(far, 2 * torch.ones_like(far)) == pytest.approx(1 / compared(2 * torch.ones_like(far), far))


def test_samples_that_are_not_finite_lose_to_all_others() -> None:
    assert compared(torch.full_like(USUAL, torch.inf), USUAL) > 1e300
    assert compared(USUAL, torch.full_like(USUAL, torch.inf)) < 1e-300
