"""The bundled model draws what it is asked for."""

import pytest
import torch
from problems import on
from sklearn.svm import SVC

from amed_core import Dpm2, FixedMidpoint, polynomial, sample
from amed_core.digits import CLASSES, SHAPE, SIGMA_MAX, SIGMA_MIN, WEIGHTS, DigitsDenoiser, load_images

PER_CLASS = 20


@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_a_classifier_of_real_digits_recognises_the_asked_class(cfg: float) -> None:
    images, labels = load_images()
    classifier = SVC(gamma="scale").fit(images.flatten(1), labels)
    rows = range(CLASSES * PER_CLASS)
    x = SIGMA_MAX * torch.randn(len(rows), *SHAPE, generator=torch.Generator().manual_seed(0))
    grid = polynomial(25, SIGMA_MIN, SIGMA_MAX)  # Heun in 48 calls: within an RMSE of 0.006 of 200 calls
    drawn = sample(DigitsDenoiser(cfg).for_rows(rows), x, on(grid, Dpm2(), FixedMidpoint(1.0)))
    asked = torch.tensor(rows) % CLASSES
    recognised = torch.as_tensor(classifier.predict(drawn.flatten(1))) == asked
    assert recognised.double().mean() >= 0.95


def test_the_model_fits_the_repository() -> None:
    assert WEIGHTS.stat().st_size <= 3_000_000


def test_guidance_of_one_is_the_conditional_model() -> None:
    x, sigma = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(1)), torch.tensor(0.5)
    plain, guided, strong = (DigitsDenoiser(cfg).for_rows(range(4))(x, sigma)[0] for cfg in (1.0, 1.0 + 1e-6, 3.0))
    torch.testing.assert_close(plain, guided, rtol=0, atol=1e-4)
    unconditional = DigitsDenoiser()(x, sigma)[0]
    torch.testing.assert_close(strong, unconditional + 3 * (plain - unconditional))


def test_a_sample_does_not_depend_on_its_batch_mates() -> None:
    x, sigma = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(1)), torch.tensor(0.5)
    together = DigitsDenoiser().for_rows(range(4))(x, sigma)[0]
    alone = torch.cat([DigitsDenoiser().for_rows([row])(x[row : row + 1], sigma)[0] for row in range(4)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
