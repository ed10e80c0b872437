"""Bands of frequency: what a first step without a call does, and how the weights of a band differ."""

import pytest
import torch
from memory import Peak
from problems import SIGMA_MAX, SIGMA_MIN, noise, table_on
from torch import Tensor

from amed_core import sample
from amed_core.fit.teacher import TeacherPath, levels
from amed_core.spectrum import (
    AT_ONCE,
    BANDS,
    bands,
    carried,
    combined,
    cosines,
    from_spectrum,
    gains,
    moments,
    shows_frequencies,
    spectrum,
)

SHAPES = [(2, 96), (3, 8, 8), (4, 16, 12), (2, 3, 8, 6)]
TO = 8.0


@pytest.mark.parametrize("size", [1, 2, 7, 16, 129])
def test_the_cosines_are_an_orthonormal_basis(size: int) -> None:
    basis = cosines(size, torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(basis @ basis.T, torch.eye(size, dtype=torch.float64))
    in_float32 = cosines(size, torch.zeros(()))
    torch.testing.assert_close(in_float32.double(), basis, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_spectrum_has_an_inverse_and_keeps_inner_products(shape: tuple[int, ...]) -> None:
    x, y = noise(3, *shape), noise(3, *shape).roll(1, 0)
    torch.testing.assert_close(from_spectrum(spectrum(x)), x)
    torch.testing.assert_close((spectrum(x) * spectrum(y)).sum(), (x * y).sum())


@pytest.mark.parametrize("shape", SHAPES)
def test_every_coefficient_has_a_band_and_higher_frequencies_no_lower_one(shape: tuple[int, ...]) -> None:
    found = bands(torch.zeros(1, *shape))
    assert found.shape == shape[1:]
    assert int(found.flatten()[0]) == 0, "the mean"
    assert (found.flatten()[1:] >= 1).all()
    assert int(found.max()) < BANDS
    for axis in range(found.ndim):
        assert (found.diff(dim=axis) >= 0).all()


def test_a_band_means_the_same_frequencies_at_every_size() -> None:
    """In cycles per element: every second coefficient of twice the size."""
    small, large = bands(torch.zeros(1, 1, 16, 16)), bands(torch.zeros(1, 1, 32, 32))
    assert (large[::2, ::2] == small).all()


def gaussian_path(variance: Tensor, x: Tensor, flow: bool) -> TeacherPath:
    """Where the ODE takes noise if the data is Gaussian with this variance (bands,) of its cosine coefficients."""
    high = 1.0 if flow else SIGMA_MAX
    grid = levels(SIGMA_MIN, high, 30, flow)
    of_band = variance[bands(x)]

    def scaled(sigma: float) -> Tensor:
        signal = 1 - sigma if flow else 1.0
        return (signal**2 * of_band + sigma**2).sqrt()

    there = torch.stack([from_spectrum(spectrum(x) * scaled(sigma) / scaled(high)) for sigma in grid])
    return TeacherPath(grid, there, torch.zeros_like(there[:-1]))


@pytest.mark.parametrize("flow", [False, True])
def test_for_gaussian_data_the_first_step_is_exact(flow: bool) -> None:
    """Its gains are sqrt((s'^2 v + sigma'^2) / (s^2 v + sigma^2))."""
    high = 1.0 if flow else SIGMA_MAX
    variance = 4.0 * 2.0 ** -torch.arange(BANDS, dtype=torch.float64)
    passed = gaussian_path(variance, high * noise(64, 2, 16, 16), flow)
    to = passed.levels[6]
    found = gains(moments(passed.x[0], passed.x[6]), to, high)
    assert found.shape == (2, BANDS)
    signal = 1 - to if flow else 1.0
    start = high if flow else (variance + high**2).sqrt()
    expected = (signal**2 * variance + to**2).sqrt() / start
    with_some = bands(passed.x[0]).unique()
    torch.testing.assert_close(found[:, with_some], expected[with_some].expand(2, -1), rtol=2e-2, atol=0)
    torch.testing.assert_close(carried(passed.x[0], found), passed.x[6], rtol=0, atol=2e-2 * float(passed.x[6].std()))
    lowest = int(with_some[1])
    assert (found[:, 1:lowest] == found[:, lowest : lowest + 1]).all(), "empty bands take the next one's"


def test_few_coefficients_hold_a_gain_near_that_of_a_model_that_answers_nothing() -> None:
    x = SIGMA_MAX * noise(1, 1, 8, 8)
    found = gains(moments(1e-6 * x, 1e-6 * x), TO, SIGMA_MAX)
    torch.testing.assert_close(found, torch.full_like(found, TO / SIGMA_MAX), rtol=1e-6, atol=0)


def test_samples_of_other_channels_are_refused_and_packed_ones_have_no_frequencies() -> None:
    with pytest.raises(ValueError, match="4 channels, but these have 3"):
        carried(noise(1, 3, 8, 8), torch.ones(4, BANDS))
    assert [shows_frequencies(shape) for shape in ((4, 8, 8), (64, 96), (1, 5000), (5,))] == [True, True, False, False]


def test_equal_weights_of_all_bands_are_one_weight() -> None:
    vectors = [noise(2, 3, 8, 8), noise(2, 3, 8, 8).flip(0)]
    weights = torch.tensor([[0.3], [-2.0]]).expand(2, BANDS)
    torch.testing.assert_close(combined(vectors, weights), 0.3 * vectors[0] - 2.0 * vectors[1], rtol=1e-5, atol=1e-5)


def test_after_a_first_step_without_a_call_the_model_is_asked_where_it_led() -> None:
    """It is asked as often as the grid has intervals, and for data of variance 0 ends where a usual run does."""
    asked: list[tuple[float, Tensor]] = []

    def nothing(x: Tensor, sigma: Tensor) -> Tensor:
        asked.append((float(sigma), x))
        return torch.zeros_like(x)

    table = table_on((80.0, 2.0, 0.3, 0.0), first_sigma=TO, channels=1)
    x = SIGMA_MAX * noise(2, 1, 8, 8)
    end = sample(nothing, x, table.method())
    assert [sigma for sigma, _ in asked] == pytest.approx([TO, 2.0, 0.3])
    torch.testing.assert_close(asked[0][1], x * TO / SIGMA_MAX, rtol=1e-5, atol=1e-5)
    assert float(end.abs().max()) < 1e-4 * float(x.abs().max())


def test_large_samples_are_combined_one_after_the_other_in_little_memory() -> None:
    vectors, weights = [torch.randn(1, 16, 5, 120, 208) for _ in range(6)], torch.randn(6, BANDS)
    assert vectors[0].numel() > AT_ONCE / 6, "they are taken apart"
    with Peak() as peak:
        found = combined(vectors, weights)
    assert peak.most < 10 * found.numel() * found.element_size()
    apart = sum(combined([v], w[None]) for v, w in zip(vectors, weights, strict=True))
    torch.testing.assert_close(found, apart, rtol=1e-4, atol=1e-4)


def test_moments_of_large_samples_are_those_of_each() -> None:
    x, y = torch.randn(3, 2, 8, 300, 400), torch.randn(3, 2, 8, 300, 400)
    assert 3 * x[0].numel() > AT_ONCE, "they are taken apart"
    apart = sum(moments(x[n : n + 1], y[n : n + 1]) for n in range(3))
    torch.testing.assert_close(moments(x, y), apart)
