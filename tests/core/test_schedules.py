"""Grids of noise levels."""

import math

import pytest
import torch
from problems import SIGMA_MAX, SIGMA_MIN

from amed_core.schedules import SCHEDULES, arctan, discrete, fine, logsnr, polynomial, schedule, stable_diffusion_sigmas

SD_MIN, SD_MAX = (float(s) for s in stable_diffusion_sigmas()[[0, -1]])


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("rho", [0.5, 1.0, 3.0, 7.0])
@pytest.mark.parametrize("points", [2, 3, 11])
def test_a_grid_falls_from_sigma_max_to_sigma_min(name: str, rho: float, points: int) -> None:
    low, high = (SD_MIN, SD_MAX) if name == "discrete" else (SIGMA_MIN, SIGMA_MAX)
    grid = schedule(name)(points, low, high, rho)
    assert grid.shape == (points,)
    assert grid.dtype == torch.float64
    assert (grid.diff() < 0).all()
    if not (name == "discrete" and rho != 1):  # its smallest timestep is 0, exact for every rho but by rounding
        assert float(grid[0]) == pytest.approx(high, rel=1e-9)
    assert float(grid[0]) == pytest.approx(high, rel=1e-6)
    assert float(grid[-1]) == pytest.approx(low, rel=1e-6)


def test_a_finer_grid_contains_the_coarser_one() -> None:
    for name in ("polynomial", "logsnr", "time_uniform"):
        coarse, fine = (schedule(name)(n, SIGMA_MIN, SIGMA_MAX, 2.0) for n in (4, 10))
        torch.testing.assert_close(fine[::3], coarse, rtol=1e-9, atol=0)


def test_polynomial_is_linear_for_rho_one_and_tends_to_logsnr_for_large_rho() -> None:
    steps = polynomial(9, SIGMA_MIN, SIGMA_MAX, 1.0).diff()
    torch.testing.assert_close(steps, steps[:1].expand(8))
    torch.testing.assert_close(
        polynomial(9, SIGMA_MIN, SIGMA_MAX, 1e6), logsnr(9, SIGMA_MIN, SIGMA_MAX), rtol=1e-3, atol=0
    )


def test_logsnr_has_equal_ratios() -> None:
    ratios = logsnr(9, SIGMA_MIN, SIGMA_MAX).log().diff()
    torch.testing.assert_close(ratios, ratios[:1].expand(8))


def test_discrete_is_uniform_in_timesteps() -> None:
    table = stable_diffusion_sigmas()
    torch.testing.assert_close(discrete(28, SD_MIN, SD_MAX), table.flip(0)[::37], rtol=1e-9, atol=0)


def test_discrete_raises_both_ends_to_one_over_rho() -> None:
    """The published formula starts at t_max^rho, far above the table, for rho other than 1."""
    table = stable_diffusion_sigmas()
    halfway = discrete(3, float(table[100]), float(table[900]), 2.0)[1]
    timestep = ((math.sqrt(900) + math.sqrt(100)) / 2) ** 2
    assert float(halfway) == pytest.approx(float(table[int(timestep)]), rel=1e-9)


def test_discrete_uses_the_models_own_table() -> None:
    table = torch.linspace(0.1, 5.0, 50)
    torch.testing.assert_close(discrete(50, 0.1, 5.0, table=table), table.double().flip(0), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((1, 0.1, 1.0, 1.0), "at least 2 points"),
        ((3, 1.0, 1.0, 1.0), "sigma_min < sigma_max"),
        ((3, 0.0, 1.0, 1.0), "sigma_min < sigma_max"),
        ((3, 0.1, math.nan, 1.0), "sigma_min < sigma_max"),
        ((3, 0.1, math.inf, 1.0), "sigma_min < sigma_max"),
        ((3, 0.1, 1.0, 0.0), "rho must be positive"),
    ],
)
@pytest.mark.parametrize("name", SCHEDULES)
def test_bad_settings_are_refused(name: str, arguments: tuple[int, float, float, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        schedule(name)(*arguments)


def test_unknown_names_and_levels_outside_a_table_are_refused() -> None:
    with pytest.raises(ValueError, match="polynomial, logsnr, time_uniform, discrete"):
        schedule("karras")
    with pytest.raises(ValueError, match="Choose another schedule"):
        discrete(4, SIGMA_MIN, SIGMA_MAX)


def test_arctan_has_equal_steps_in_it() -> None:
    grid = arctan(7, SIGMA_MIN, SIGMA_MAX)
    torch.testing.assert_close(grid.atan().diff(), grid.atan().diff().mean().expand(6))
    assert (float(grid[0]), float(grid[-1])) == (pytest.approx(SIGMA_MAX), pytest.approx(SIGMA_MIN))


def test_the_slow_grid_of_a_flow_model_is_dense_at_both_ends() -> None:
    steps = -fine(25, 0.001, 1.0, flow=True).diff()
    assert float(steps.argmax()) == pytest.approx(11.5, abs=0.5)
    torch.testing.assert_close(steps, steps.flip(0))
    assert float(steps[0]) < 0.1 * float(steps.max())
    assert (fine(9, SIGMA_MIN, SIGMA_MAX, flow=False) == polynomial(9, SIGMA_MIN, SIGMA_MAX)).all()
