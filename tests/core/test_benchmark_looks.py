"""What benchmarks/looks.py measures, on pictures whose answer is known."""

import math

import numpy as np
import pytest

from benchmarks import looks
from benchmarks.looks import Array

SIDE = 128
EDGES = looks.NYQUIST * 2.0 ** (-np.arange(looks.BANDS, -1, -1) / 2)


def grey(plane: Array) -> Array:
    """One picture of the same plane (height, width) in every colour."""
    return np.repeat(plane[None, :, :, None], 3, axis=3)


def wave(frequency: float) -> Array:
    """A picture of waves of so many cycles a pixel."""
    return grey(np.tile(0.5 + 0.4 * np.sin(2 * math.pi * frequency * np.arange(SIDE)), (SIDE, 1)))


def _inside(low: float, high: float) -> Array:
    """Which frequencies of a picture's transform are between two."""
    one = np.fft.fftfreq(SIDE)
    ring = np.hypot(one[:, None], one[None])
    return (ring > low) & (ring <= high)


def noise(count: int, seed: int = 0) -> Array:
    """White noise (count, SIDE, SIDE, 3)."""
    return np.random.default_rng(seed).normal(0.5, 0.1, (count, SIDE, SIDE, 3))


def blurred(pictures: Array) -> Array:
    """The mean of every pixel and its neighbours to the right and below."""
    right = (pictures + np.roll(pictures, 1, 2)) / 2
    return (right + np.roll(right, 1, 1)) / 2


@pytest.mark.parametrize("band", range(5, looks.BANDS))
def test_a_wave_has_its_power_in_its_own_half_octave(band: int) -> None:
    frequencies = [np.sum(_inside(EDGES[n], EDGES[n + 1])) for n in range(looks.BANDS)]
    power = looks.spectrum(wave(math.sqrt(EDGES[band] * EDGES[band + 1]))) * frequencies
    assert power[band] > 0.9 * power.sum()


def test_white_noise_has_the_same_power_at_every_frequency() -> None:
    power = looks.spectrum(noise(20))[4:]  # below there are few frequencies
    assert power == pytest.approx(np.full(len(power), power.mean()), rel=0.1)


def test_power_is_quadratic_in_contrast_and_knows_no_brightness() -> None:
    pictures = noise(2)
    assert looks.spectrum(0.3 + 0.5 * pictures) == pytest.approx(0.25 * looks.spectrum(pictures))


def test_the_same_pictures_are_as_sharp_and_blurred_ones_lose_the_more_the_finer() -> None:
    pictures = noise(4)
    bands, fine = looks.sharpness(pictures, pictures)
    assert [*bands, fine] == pytest.approx([1.0] * (looks.BANDS + 1))
    bands, fine = looks.sharpness(blurred(pictures), pictures)
    assert np.all(np.diff(bands[4:]) < 0)
    assert bands[4] > 0.95
    # The transfer of the mean of two neighbours is cos^2(pi f), in both directions.
    one = np.cos(math.pi * np.fft.fftfreq(SIDE)) ** 2
    assert fine == pytest.approx(np.outer(one, one)[_inside(EDGES[-3], EDGES[-1])].mean(), abs=0.05)


def test_a_bright_border_is_not_fine_detail() -> None:
    slope = grey(np.tile(np.linspace(0, 1, SIDE), (SIDE, 1)))
    power = looks.spectrum(slope)
    assert power[-1] < 1e-6 * power[0]


def test_variety_is_the_distance_between_seeds_of_the_same_prompt() -> None:
    def plain(value: float) -> Array:
        return np.full((8, 8, 3), value)

    pictures = np.stack([plain(v) for v in (0.0, 0.9, 0.2, 0.9)])  # two prompts take turns
    assert looks.variety(pictures, 2) == pytest.approx((0.2 + 0.0) / 2)
    assert looks.variety(0.5 * pictures, 2) == pytest.approx(0.05)
    assert looks.variety(pictures[:3], 1) == pytest.approx((0.9 + 0.2 + 0.7) / 3)
    assert math.isnan(looks.variety(pictures, 4))


def test_grey_has_no_saturation_and_a_pure_colour_has_all() -> None:
    assert looks.saturation(wave(0.1)) == pytest.approx(0.0)
    red = np.zeros((1, 8, 8, 3))
    red[..., 0] = 1.0
    assert looks.saturation(red) == 1.0
    assert looks.saturation(0.25 + 0.5 * red) == 0.5


def test_contrast_is_none_on_a_plain_picture_and_half_between_black_and_white() -> None:
    halves = grey(np.repeat([[0.0, 1.0]], SIDE, 0).repeat(SIDE // 2, 1))
    assert looks.contrast(halves) == pytest.approx(0.5)
    assert looks.contrast(np.full((1, 8, 8, 3), 0.7)) == pytest.approx(0.0)


def test_an_error_is_the_root_of_a_mean_square_and_none_is_lost() -> None:
    truth = np.zeros((3, 2, 2))
    drawn = np.stack([np.full((2, 2), 0.3), np.array([[1.0, 0.0], [0.0, 0.0]]), np.full((2, 2), math.nan)])
    assert looks.each_error(drawn, truth) == pytest.approx([0.3, 0.5, math.inf])
    assert looks.rms(np.array([3.0, 4.0])) == pytest.approx(math.sqrt(12.5))


def test_the_sign_test_is_the_two_sided_binomial() -> None:
    assert looks.sign_test(5, 0) == looks.sign_test(0, 5) == 2 / 32
    assert looks.sign_test(4, 1) == pytest.approx(12 / 32)
    assert looks.sign_test(3, 3) == 1.0
    assert looks.sign_test(0, 0) == 1.0


def test_an_interval_holds_the_value_and_has_no_width_where_nothing_varies() -> None:
    errors = np.random.default_rng(0).gamma(2.0, 1.0, (60, 5))
    low, high = looks.rms_interval(errors)
    assert low < looks.rms(errors) < high
    assert looks.ratio_interval(2 * errors, errors) == pytest.approx((2.0, 2.0))
    assert looks.rms_interval(np.full((6, 2), 0.7)) == pytest.approx((0.7, 0.7))


def test_seeds_of_one_prompt_that_agree_are_one_witness() -> None:
    one = np.random.default_rng(0).gamma(2.0, 1.0, (60, 1))
    (low, high), (low_of_one, high_of_one) = looks.rms_interval(one.repeat(5, 1)), looks.rms_interval(one)
    assert (low, high) == pytest.approx((low_of_one, high_of_one))
    low, high = looks.rms_interval(np.random.default_rng(1).gamma(2.0, 1.0, (60, 5)))
    assert high - low < 0.7 * (high_of_one - low_of_one)


def test_a_picture_is_like_itself_and_the_less_so_the_noisier() -> None:
    pytest.importorskip("skimage")
    pytest.importorskip("flip_evaluator")
    picture = np.clip(wave(0.05), 0, 1)
    worse = [np.clip(picture + scale * (noise(1) - 0.5), 0, 1) for scale in (0.0, 0.5, 2.0)]
    alike = [looks.similarity(one, picture)[0] for one in worse]
    unlike = [looks.flip(one, picture)[0] for one in worse]
    assert alike[0] == pytest.approx(1.0)
    assert unlike[0] == pytest.approx(0.0)
    assert alike == sorted(alike, reverse=True)
    assert unlike == sorted(unlike)
