"""What a network looks at: a bottleneck or a latent, averaged to 8 by 8."""

import pytest
import torch

from amed_core import evaluate
from amed_core.features import look_at_latent, pool, pooled_latent


@pytest.mark.parametrize("shape", [(2, 4, 4), (2, 12, 12), (2, 32, 20), (2, 5, 16, 16), (2, 5, 3, 8, 8)])
def test_a_bottleneck_of_any_resolution_is_averaged_to_8_by_8(shape: tuple[int, ...]) -> None:
    features = torch.rand(shape)
    assert pool(features).shape == (2, 8, 8)
    torch.testing.assert_close(pool(torch.ones(shape)), torch.ones(2, 8, 8))
    if len(shape) == 4:
        torch.testing.assert_close(pool(features), pool(features.mean(1)))


@pytest.mark.parametrize("shape", [(2, 6), (2, 8, 100), (2, 4, 12, 20), (2, 16, 3, 10, 8), (2, 1, 77)])
def test_the_latent_of_any_rank_is_seen_at_unit_scale(shape: tuple[int, ...]) -> None:
    """Vectors, audio, images and video; the denoised sample beside the noisy one."""
    for sigma in (0.5, 80.0):
        x = (1 + sigma**2) ** 0.5 * torch.ones(shape, dtype=torch.float64)
        seen = look_at_latent(evaluate(lambda x, sigma: 2 * torch.ones_like(x), x, torch.tensor(sigma)))
        assert seen.shape == (2, 2, 8, 8)
        torch.testing.assert_close(seen[:, 0], torch.ones(2, 8, 8, dtype=torch.float64))
        torch.testing.assert_close(seen[:, 1], 2 * torch.ones(2, 8, 8, dtype=torch.float64))


def test_the_latents_layout_is_seen() -> None:
    """A bright upper half of an image or video, and a loud beginning of a sound."""
    for shape in ((1, 4, 16, 16), (1, 4, 3, 16, 16), (1, 4, 128)):
        x = torch.zeros(shape)
        x[..., : shape[-2] // 2, :] = 1 if len(shape) > 3 else 0
        if len(shape) == 3:
            x[..., : shape[-1] // 2] = 1
        assert pooled_latent(x)[0, :4].min() == 1
        assert pooled_latent(x)[0, 4:].max() == 0


def test_features_of_other_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 7\)"):
        pool(torch.zeros(2, 7))
