"""Pictures of samples."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from amed_core.tools.plots import as_pixels, is_image, save_samples, sheet


def test_the_range_of_bytes_is_that_of_samples() -> None:
    shades = torch.tensor([-1.0, 0.0, 1.0, 5.0]).reshape(4, 1, 1, 1).expand(4, 1, 96, 96)
    pixels = as_pixels(shades)
    assert pixels.shape == (4, 96, 96, 3)
    assert pixels[:, 0, 0, 0].tolist() == [0, 128, 255, 255]


def test_a_grid_holds_every_sample_in_order(tmp_path: Path) -> None:
    shades = torch.linspace(-1, 1, 5).reshape(5, 1, 1, 1).expand(5, 1, 96, 96)
    save_samples(shades, tmp_path / "made" / "s.png")
    drawn = np.array(Image.open(tmp_path / "made" / "s.png"))
    assert drawn.shape == (2 * 96, 3 * 96, 3)
    found = [int(drawn[96 * (n // 3) + 48, 96 * (n % 3) + 48, 0]) for n in range(6)]
    assert found[:5] == sorted(found[:5])
    assert (found[0], found[4], found[5]) == (0, 255, 0)


def test_what_is_no_image_goes_to_a_tensor_file_alone(tmp_path: Path) -> None:
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert not is_image(latents)
    save_samples(latents, tmp_path / "s.safetensors")
    assert (load_file(tmp_path / "s.safetensors")["samples"] == latents).all()
    with pytest.raises(ValueError, match=r"go to a \.safetensors file, but"):
        save_samples(latents, tmp_path / "s.png")
    with pytest.raises(ValueError, match=r"or a \.png"):
        save_samples(torch.zeros(1, 3, 8, 8), tmp_path / "s.gif")


def test_a_sheet_has_a_column_per_title_and_a_row_per_label() -> None:
    pictures = torch.stack([torch.full((3, 64, 64), shade) for shade in (-1.0, 1.0)])
    drawn = sheet(["black", "white"], [("one", pictures), ("two", -pictures)])
    right, bottom = drawn.size
    corners = [drawn.getpixel((right - 32 - 64 * (1 - n), bottom - 32 - 64 * (1 - m))) for m in (0, 1) for n in (0, 1)]
    assert corners == [(0, 0, 0), (255, 255, 255), (255, 255, 255), (0, 0, 0)]
