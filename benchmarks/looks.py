"""How pictures look beside those of a teacher: sharpness, variety, colour, and two measures of likeness.

Pictures are (count, height, width, 3) in [0, 1], as a VAE node of ComfyUI gives them. Needs numpy; `similarity` also
needs scikit-image, and `flip` flip-evaluator (benchmarks/requirements.txt).
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
NYQUIST = 0.5  # cycles a pixel
BANDS = 12  # half octaves below Nyquist's frequency
FINE = 2  # the uppermost of them show how sharp a picture is
LUMINANCE = np.array([0.2126, 0.7152, 0.0722])  # of red, green and blue (ITU-R BT.709)
RESAMPLES = 2000


def each_error(drawn: Array, truth: Array) -> Array:
    """The RMSE of every sample (count,), infinite where it is no number."""
    squares = np.square(drawn.astype(float) - truth.astype(float)).reshape(len(drawn), -1).mean(1)
    return np.sqrt(np.where(np.isfinite(squares), squares, math.inf))


def rms(errors: Array) -> float:
    """The root of the mean square."""
    return float(np.sqrt(np.square(errors).mean()))


def interval(groups: Array, statistic: Callable[[Array], Array], seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of a statistic by bootstrap over groups (groups, ...): seeds of one prompt go together.

    `statistic` is of many draws at once (draws, groups, ...), and gives (draws,).
    """
    drawn = np.random.default_rng(seed).integers(len(groups), size=(RESAMPLES, len(groups)))
    low, high = np.percentile(statistic(groups[drawn]), [2.5, 97.5])
    return float(low), float(high)


def rms_interval(errors: Array) -> tuple[float, float]:
    """That of the RMSE of errors (prompts, seeds)."""
    return interval(np.square(errors), lambda drawn: np.sqrt(drawn.mean((1, 2))))


def ratio_interval(errors: Array, others: Array) -> tuple[float, float]:
    """That of the ratio of two RMSEs, of errors (prompts, seeds) on the same seeds."""
    both = np.stack([np.square(errors), np.square(others)], -1)

    def ratio(drawn: Array) -> Array:
        ours, theirs = np.moveaxis(drawn.mean((1, 2)), -1, 0)
        return np.sqrt(ours / theirs)

    return interval(both, ratio)


def sign_test(won: int, lost: int) -> float:
    """How likely chance alone gives a difference as large as this, either way (the two-sided sign test)."""
    count, least = won + lost, min(won, lost)
    below = sum(math.comb(count, k) for k in range(least + 1))
    return min(1.0, 2 * below / 2**count)


def spectrum(pictures: Array) -> Array:
    """The mean power (BANDS,) of pictures by half octave of spatial frequency, the lowest first.

    The uppermost band ends at Nyquist's frequency, so that the corners of the spectrum are in none. A Hann window
    keeps the borders, where a picture does not go on at its other side, from looking like fine detail.
    """
    height, width = pictures.shape[1:3]
    window = np.outer(np.hanning(height + 1)[:-1], np.hanning(width + 1)[:-1])[None, :, :, None]
    centred = pictures - pictures.mean((1, 2), keepdims=True)
    power = np.square(np.abs(np.fft.fft2(centred * window, axes=(1, 2)))).mean((0, 3))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    edges = NYQUIST * 2.0 ** (-np.arange(BANDS, -1, -1) / 2)
    inside = [(frequency > low) & (frequency <= high) for low, high in pairwise(edges)]
    return np.array([power[band].mean() if band.any() else math.nan for band in inside])


def sharpness(pictures: Array, teacher: Array) -> tuple[list[float], float]:
    """The power of pictures over the teacher's: in every band, and in the two finest together. 1 is as sharp."""
    ours, theirs = spectrum(pictures), spectrum(teacher)
    return (ours / theirs).tolist(), float(ours[-FINE:].sum() / theirs[-FINE:].sum())


def variety(pictures: Array, prompts: int) -> float:
    """The mean distance (RMS of pixels) between pictures of the same prompt from different seeds.

    Picture i is of prompt i modulo `prompts`. No number where each prompt has one seed.
    """
    seeds = pictures.reshape(-1, prompts, math.prod(pictures.shape[1:]))
    pairs = [(one, other) for one in range(len(seeds)) for other in range(one)]
    if not pairs:
        return math.nan
    return float(np.mean([np.sqrt(np.square(seeds[one] - seeds[other]).mean(-1)).mean() for one, other in pairs]))


def saturation(pictures: Array) -> float:
    """The mean over pixels of how far the strongest of red, green and blue is above the weakest."""
    return float(np.ptp(pictures, axis=-1).mean())


def contrast(pictures: Array) -> float:
    """The standard deviation of the luminance of each picture, in the mean."""
    return float((pictures @ LUMINANCE).std((1, 2)).mean())


def similarity(pictures: Array, teacher: Array) -> list[float]:
    """The SSIM of every picture, with the Gaussian window of Wang et al. (2004). 1 is the same picture."""
    from skimage.metrics import structural_similarity  # noqa: PLC0415 - only benchmarks need it

    how = {"channel_axis": -1, "data_range": 1.0, "gaussian_weights": True, "sigma": 1.5}
    return [
        float(structural_similarity(theirs, ours, use_sample_covariance=False, **how))
        for ours, theirs in zip(pictures, teacher, strict=True)
    ]


def flip(pictures: Array, teacher: Array) -> list[float]:
    """The mean FLIP of every picture (Andersson et al. 2020), at 67 pixels a degree. 0 is the same picture."""
    import flip_evaluator  # noqa: PLC0415 - only benchmarks need it

    ours, theirs = (np.ascontiguousarray(some, dtype=np.float32) for some in (pictures, teacher))
    pairs: Sequence[tuple[Array, Array]] = list(zip(theirs, ours, strict=True))
    return [float(flip_evaluator.evaluate(*pair, "LDR", applyMagma=False)[1]) for pair in pairs]
