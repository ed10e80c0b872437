"""The bundled text-to-picture model reads prompts and answers as any denoiser does."""

import time

import pytest
import torch

from amed_core.pictures import (
    CHANNELS,
    PIXELS,
    SHAPE,
    WEIGHTS,
    WORDS,
    PicturesConfig,
    PicturesDenoiser,
    PicturesModel,
    config_of,
    load_pictures,
    metadata_of,
)


@pytest.fixture(scope="module")
def model() -> PicturesModel:
    return load_pictures()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0))


SIGMA = torch.tensor(0.5)


def test_the_model_fits_the_repository() -> None:
    assert WEIGHTS.stat().st_size <= 14_000_000


def test_the_model_loads_in_a_second_or_so() -> None:
    begin = time.process_time()
    load_pictures()
    assert time.process_time() - begin < 3


def test_a_header_is_read_as_it_was_written() -> None:
    config = PicturesConfig(("a", "b"), ("a b",), width=128, depth=2, modulation=16, vae=(8, 16, 24))
    assert config_of(metadata_of(config)) == config


def test_every_drawing_can_be_asked_for_by_its_name(model: PicturesModel) -> None:
    assert all(any(model.words.numbers(name)) for name in model.config.names)


def test_unknown_words_are_passed_over(model: PicturesModel) -> None:
    assert model.words.numbers("a Penguin, masterpiece!") == model.words.numbers("penguin")
    assert model.words.numbers("") == [0] * WORDS
    torch.testing.assert_close(model.context(["masterpiece"]), torch.zeros(1, WORDS, model.config.width))


def test_guidance_of_one_is_the_conditional_model(model: PicturesModel, x: torch.Tensor) -> None:
    plain, guided, strong = (
        PicturesDenoiser(cfg, model).for_rows(range(4))(x, SIGMA)[0] for cfg in (1.0, 1.00001, 3.0)
    )
    torch.testing.assert_close(plain, guided, rtol=0, atol=1e-3)
    unconditional = PicturesDenoiser(1.0, model)(x, SIGMA)[0]
    torch.testing.assert_close(strong, unconditional + 3 * (plain - unconditional))


def test_a_sample_does_not_depend_on_its_batch_mates(model: PicturesModel, x: torch.Tensor) -> None:
    denoiser = PicturesDenoiser(3.0, model)
    together = denoiser.for_rows(range(4))(x, SIGMA)[0]
    alone = torch.cat([denoiser.for_rows([row])(x[row : row + 1], SIGMA)[0] for row in range(4)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [(16, 24), (10, 16), (17, 15)])
def test_latents_of_any_size_are_answered(model: PicturesModel, size: tuple[int, int]) -> None:
    x = torch.randn(1, CHANNELS, *size, generator=torch.Generator().manual_seed(0))
    assert PicturesDenoiser(1.0, model)(x, SIGMA)[0].shape == x.shape
    assert model.vae.decode(x).shape == (1, 3, PIXELS * size[0], PIXELS * size[1])


def test_joined_prompts_are_read_to_the_end(model: PicturesModel, x: torch.Tensor) -> None:
    one, two = model.context(["penguin"]), model.context(["guitar"])
    level = torch.tensor([0.5])
    joined = model.transformer(x[:1], level, torch.cat([one, two], 1))
    assert not torch.allclose(joined, model.transformer(x[:1], level, torch.cat([one, one], 1)))


def test_the_middle_can_be_seen_and_replaced(model: PicturesModel, x: torch.Tensor) -> None:
    context, level = model.context(["penguin"]).expand(4, -1, -1), torch.full((4,), 0.5)
    plain = model.transformer(x, level, context)
    torch.testing.assert_close(model.transformer(x, level, context, lambda h: h), plain)
    assert not torch.allclose(model.transformer(x, level, context, lambda h: 0 * h), plain)


def test_a_picture_comes_back_from_its_latents(model: PicturesModel) -> None:
    shade = torch.linspace(-0.5, 0.5, 128)[:, None].expand(128, 128)
    picture = torch.stack([shade, 0.3 - 0 * shade, -shade])[None]
    error = (model.vae.decode(model.vae.encode(picture)) - picture).square().mean().sqrt()
    assert error < 0.1
