"""Draw the pack's icon and banner: a teacher's path from noise to a sample, and the five calls that keep to it.

    python scripts/draw_icon.py --output assets

Nothing in them is random but for grains of noise, whose seed is fixed.
"""

import argparse
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

ICON, BANNER = (400, 400), (1260, 540)  # pixels; the registry shows at most 400 x 400, and a banner of 21:9
FINER = 4  # all is drawn so many times larger, and then made small
GROUND = ((20, 22, 54), (58, 24, 92))  # from the top left to the bottom right
ALONG = ((255, 138, 76), (244, 114, 182), (167, 139, 250), (94, 234, 212))  # a path's colours, from noise to sample
CALLS = (0.0, 0.26, 0.5, 0.74, 1.0)  # where on the path the five calls are
Point = tuple[float, float]


def mixed(first: tuple[int, ...], last: tuple[int, ...], part: float) -> tuple[int, ...]:
    """The colour at `part` of the way from `first` to `last`."""
    return tuple(round(a + part * (b - a)) for a, b in zip(first, last, strict=True))


def along(t: float) -> tuple[int, ...]:
    """The colour of a path at `t`, which is 0 in noise and 1 at the sample."""
    last = len(ALONG) - 1
    n = min(int(t * last), last - 1)
    return mixed(ALONG[n], ALONG[n + 1], t * last - n)


def ground(size: tuple[int, int]) -> Image.Image:
    """A plain gradient along the diagonal."""
    width, height = size
    part = (np.linspace(0, 1, width)[None, :] + np.linspace(0, 1, height)[:, None])[..., None] / 2
    first, last = (np.array(colour, dtype=float) for colour in GROUND)
    return Image.fromarray((first + part * (last - first)).round().astype(np.uint8))


class Curve:
    """A cubic from noise to a sample."""

    def __init__(self, *corners: Point) -> None:
        self.corners = corners

    def at(self, t: float) -> Point:
        weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3)
        x, y = (sum(w * corner[axis] for w, corner in zip(weights, self.corners, strict=True)) for axis in (0, 1))
        return x, y

    def draw(self, image: Image.Image, width: float, opacity: float) -> None:
        """The whole path, its colour from noise to sample."""
        layer = Image.new("RGBA", image.size)
        brush, pieces = ImageDraw.Draw(layer), 400
        for n in range(pieces + 1):
            dot(brush, self.at(n / pieces), width / 2, (*along(n / pieces), round(255 * opacity)))
        image.paste(layer, mask=layer)


def dot(brush: ImageDraw.ImageDraw, centre: Point, radius: float, colour: tuple[int, ...]) -> None:
    x, y = centre
    brush.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def grains(image: Image.Image, centre: Point, spread: float, radius: float, count: int) -> None:
    """Noise: grains around where a path starts, the thinner the farther."""
    layer, random = Image.new("RGBA", image.size), np.random.default_rng(0)
    brush = ImageDraw.Draw(layer)
    for distance, angle, size in random.random((count, 3)):
        away = spread * (0.35 + 0.65 * distance)
        place = centre[0] + away * math.cos(2 * math.pi * angle), centre[1] + away * math.sin(2 * math.pi * angle)
        dot(brush, place, radius * (0.5 + 0.5 * size), (*ALONG[0], round(220 * (1 - distance))))
    image.paste(layer, mask=layer)


def steps(image: Image.Image, path: Curve, radius: float) -> None:
    """The five calls on the path, the straight steps between them, and a ring around the sample."""
    brush, places = ImageDraw.Draw(image), [path.at(t) for t in CALLS]
    brush.line(places, fill="white", width=round(radius * 0.3))
    dot(brush, places[-1], radius * 1.65, ALONG[-1])
    dot(brush, places[-1], radius * 1.4, mixed(*GROUND, 0.8))
    for t, place in zip(CALLS, places, strict=True):
        dot(brush, place, radius * 1.12, (255, 255, 255))
        dot(brush, place, radius * 0.86, along(t))


def finished(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image.resize(size, Image.Resampling.LANCZOS)


def icon() -> Image.Image:
    """Five points that can be counted at 64 pixels, too; round corners."""
    side = ICON[0] * FINER
    image = ground((side, side))
    path = Curve(*((x * side, y * side) for x, y in ((0.18, 0.2), (0.66, 0.08), (0.32, 0.92), (0.79, 0.79))))
    grains(image, path.at(0), 0.22 * side, 0.014 * side, 70)
    path.draw(image, 0.05 * side, 0.5)
    steps(image, path, 0.063 * side)
    corners = Image.new("L", image.size)
    ImageDraw.Draw(corners).rounded_rectangle((0, 0, side - 1, side - 1), 0.18 * side, fill=255)
    image.putalpha(corners)
    return finished(image, ICON)


def banner() -> Image.Image:
    """Paths of many noises to their samples, one of them with its five calls, and what it is about."""
    width, height = (FINER * pixels for pixels in BANNER)
    image = ground((width, height))

    def path(start: float, end: float) -> Curve:
        corners = ((0.52, start), (0.78, start), (0.66, end), (0.93, end))
        return Curve(*((x * width, y * height) for x, y in corners))

    for start, end in ((0.06, 0.3), (0.36, 0.12), (0.55, 0.9), (0.74, 0.5), (0.95, 0.62)):
        path(start, end).draw(image, 0.006 * height, 0.3)
    teacher = path(0.2, 0.76)
    grains(image, teacher.at(0), 0.17 * height, 0.009 * height, 80)
    teacher.draw(image, 0.032 * height, 0.5)
    steps(image, teacher, 0.042 * height)
    brush = ImageDraw.Draw(image)
    brush.text((0.055 * width, 0.47 * height), "AMED", "white", ImageFont.load_default(0.27 * height), anchor="ls")
    for line, words in enumerate(("Good samples in 5 model calls.", "Your model teaches the solver.")):
        place = 0.058 * width, (0.6 + 0.1 * line) * height
        brush.text(place, words, (214, 208, 240), ImageFont.load_default(0.062 * height), anchor="ls")
    return finished(image, BANNER)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("assets"))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    icon().save(arguments.output / "icon.png", optimize=True)
    banner().save(arguments.output / "banner.png", optimize=True)


if __name__ == "__main__":
    main()
