"""Pictures of samples, for the command line."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from ..types import Sample

LEAST_SIDE = 96  # pixels a sample is at least enlarged to


def is_image(samples: Sample) -> bool:
    """Whether a person can look at these samples: (n, 1 or 3, height, width)."""
    return samples.ndim == 4 and samples.shape[1] in (1, 3)


def as_pixels(samples: Sample) -> Tensor:
    """Samples in [-1, 1] as bytes (n, height, width, 3), enlarged smoothly."""
    scale = max(1, math.ceil(LEAST_SIDE / samples.shape[-1]))
    large = functional.interpolate(samples.float().cpu(), scale_factor=scale, mode="bicubic", align_corners=False)
    return ((large.clamp(-1, 1) + 1) * 127.5).round().byte().expand(-1, 3, -1, -1).movedim(1, -1)


def save_samples(samples: Sample, path: Path) -> None:
    """Write samples (n, *shape) as a grid of images to a .png, or as a tensor to a .safetensors.

    Raises ValueError for other endings, and for a .png of what is no image.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file({"samples": samples.contiguous()}, path)
        return
    if path.suffix != ".png" or not is_image(samples):
        raise ValueError(
            f"Samples of shape {tuple(samples.shape[1:])} go to a .safetensors file"
            + (" or a .png" if is_image(samples) else "")
            + f", but --output is {path}."
        )
    pixels = as_pixels(samples)
    columns = math.ceil(len(pixels) ** 0.5)
    missing = -len(pixels) % columns
    pixels = torch.cat([pixels, pixels.new_zeros(missing, *pixels.shape[1:])])
    rows = [torch.cat(list(pixels[i : i + columns]), dim=1) for i in range(0, len(pixels), columns)]
    Image.fromarray(torch.cat(rows).numpy()).save(path)


def sheet(columns: Sequence[str], rows: Sequence[tuple[str, Tensor]]) -> Image.Image:
    """Rows of pictures (columns, 3, side, side) in [-1, 1], under the columns' titles and beside their labels."""
    side = rows[0][1].shape[-1]
    font, gap = ImageFont.load_default(side * 0.15), round(side * 0.1)
    titles = ["\n".join(textwrap.wrap(title, 11)) for title in columns]
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))

    def largest(texts: Sequence[str], axis: int) -> int:
        return round(max(ruler.multiline_textbbox((0, 0), text, font)[2 + axis] for text in texts)) + 2 * gap

    left, top = largest([label for label, _ in rows], 0), largest(titles, 1)
    drawn = Image.new("RGB", (left + side * len(columns), top + side * len(rows)), "white")
    draw = ImageDraw.Draw(drawn)
    for n, title in enumerate(titles):
        draw.text((left + side * (n + 0.5), top / 2), title, "black", font, "mm", align="center")
    for n, (label, pictures) in enumerate(rows):
        draw.text((left - gap, top + side * (n + 0.5)), label, "black", font, "rm", align="right")
        pixels = ((pictures.float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().movedim(1, -1)
        drawn.paste(Image.fromarray(torch.cat(list(pixels), dim=1).numpy()), (left, top + side * n))
    return drawn
