"""Pictures for people who compare methods: a labelled sheet, and errors over model calls; both on a dark ground."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

Color = tuple[int, int, int]
GROUND, PANEL, RULE = (17, 18, 22), (27, 29, 35), (58, 61, 70)
INK, MUTED = (238, 239, 242), (157, 161, 171)
OURS, BEST = (255, 179, 71), (122, 178, 255)
SERIES = (BEST, (128, 214, 160), (214, 142, 232), (240, 128, 128), (120, 214, 214), (200, 200, 120))
WIDEST = 2400  # pixels of a sheet
LEAST_TILE, USUAL_TILE = 96, 240  # pixels of the longer side of a picture
LABELS = 430  # pixels beside the pictures
LEAST_ROW = 200  # pixels that the labels of a row need
ONE_LINE = 5  # pictures that stand in one line
GAP, MARGIN = 6, 28
SMOOTH = 2  # times as large the plot is drawn, and then shrunk
PLOT = (960 * SMOOTH, 640 * SMOOTH)


@dataclass(frozen=True)
class Line:
    """One method: what it is, what it costs, its pictures, and how far each is from the teacher's."""

    title: str
    notes: tuple[str, ...]
    pictures: tuple[Tensor, ...]  # (height, width, 3) in [0, 1]
    differences: tuple[Tensor, ...] = ()
    error: float = math.nan  # of a bar that is as long as the error is large
    color: Color = INK


@dataclass(frozen=True)
class Block:
    """Methods that are compared with one another."""

    title: str
    lines: tuple[Line, ...]


def sheet(headline: str, about: str, amplified: str, blocks: Sequence[Block]) -> Image.Image:
    """All lines below one another: labels, pictures, and beside them the differences, which `amplified` explains."""
    first = blocks[0].lines[0].pictures
    lines = 1 if len(first) <= ONE_LINE else math.ceil(math.sqrt(len(first) / 3))
    columns = math.ceil(len(first) / lines)
    width, height = _tile(first[0], columns)
    half = columns * (width + GAP) - GAP
    left, right = MARGIN + LABELS, MARGIN + LABELS + half + 3 * GAP
    total = right + half + MARGIN
    title, small = ImageFont.load_default(36), ImageFont.load_default(21)
    heads = [*wrapped(headline, title, total - 2 * MARGIN)]
    notes = [*wrapped(about, small, total - 2 * MARGIN)]
    top = MARGIN + 46 * len(heads) + 28 * len(notes) + 10
    row = max(lines * (height + GAP) - GAP, LEAST_ROW) + 2 * GAP
    drawn = Image.new("RGB", (total, top + sum(54 + row * len(block.lines) for block in blocks) + MARGIN), GROUND)
    draw = ImageDraw.Draw(drawn)
    for n, text in enumerate(heads):
        draw.text((MARGIN, MARGIN + 46 * n), text, INK, title)
    for n, text in enumerate(notes):
        draw.text((MARGIN, MARGIN + 46 * len(heads) + 28 * n), text, MUTED, small)
    for block in blocks:
        draw.line([(MARGIN, top + 4), (total - MARGIN, top + 4)], RULE)
        draw.text((MARGIN, top + 14), block.title, INK, ImageFont.load_default(26))
        draw.text((total - MARGIN, top + 18), amplified, MUTED, small, "ra")
        top += 54
        longest = max([line.error for line in block.lines if math.isfinite(line.error)], default=1.0)
        for line in block.lines:
            for begin, shown in ((left, line.pictures), (right, line.differences)):
                for n, picture in enumerate(shown):
                    down, across = divmod(n, columns)
                    at = (begin + across * (width + GAP), top + GAP + down * (height + GAP))
                    drawn.paste(_sized(picture, (width, height)), at)
            _label(draw, line, (MARGIN, top + GAP), longest)
            top += row
    return drawn


def _tile(picture: Tensor, count: int) -> tuple[int, int]:
    """Width and height of a picture among so many side by side."""
    height, width, _ = picture.shape
    room = (WIDEST - 2 * MARGIN - LABELS) // (2 * count) - GAP
    scale = max(min(USUAL_TILE, room), LEAST_TILE) / max(width, height)
    return max(round(scale * width), 1), max(round(scale * height), 1)


def _sized(picture: Tensor, size: tuple[int, int]) -> Image.Image:
    pixels = (picture.float().cpu().nan_to_num().clamp(0, 1) * 255).round().byte().numpy()
    return Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)


def _label(draw: ImageDraw.ImageDraw, line: Line, at: tuple[int, int], longest: float) -> None:
    x, y = at
    width = LABELS - 24
    font, small = ImageFont.load_default(27), ImageFont.load_default(21)
    for text in wrapped(line.title, font, width):
        draw.text((x, y), text, line.color, font)
        y += 33
    y += 4
    if math.isfinite(line.error):
        draw.rounded_rectangle([x, y, x + width, y + 10], 5, PANEL)
        draw.rounded_rectangle([x, y, x + max(10.0, width * line.error / longest), y + 10], 5, line.color)
        y += 20
    for note in line.notes:
        for text in wrapped(note, small, width):
            draw.text((x, y), text, INK if note is line.notes[0] else MUTED, small)
            y += 27


def wrapped(text: str, font: Any, width: float) -> Iterator[str]:
    """The lines of a text that is no wider than so many pixels, but for words that are."""
    line = ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and font.getlength(longer) > width:
            yield line
            longer = word
        line = longer
    if line:
        yield line


def error_plot(title: str, ours: str, series: Mapping[str, Sequence[tuple[int, float]]]) -> Image.Image:
    """Errors over model calls, both logarithmic; the points (calls, error) of the one that is `ours` stand out."""
    drawn = Image.new("RGB", PLOT, GROUND)
    draw, at = ImageDraw.Draw(drawn), MARGIN * SMOOTH
    font, small = ImageFont.load_default(20 * SMOOTH), ImageFont.load_default(15 * SMOOTH)
    known = {name: [(c, e) for c, e in sorted(points) if 0 < e < math.inf] for name, points in series.items()}
    every = [point for points in known.values() for point in points]
    y = 18 * SMOOTH
    for text in wrapped(title, font, PLOT[0] - 2 * at):
        draw.text((at, y), text, INK, font)
        y += 26 * SMOOTH
    others = iter(SERIES * len(known))
    colors = {name: OURS if name == ours else next(others) for name in known}
    y += 8 * SMOOTH
    for n, (name, color) in enumerate(colors.items()):
        left, top = at + (PLOT[0] / 2 - at) * (n % 2), y + 24 * SMOOTH * (n // 2)
        draw.ellipse([left, top + 4 * SMOOTH, left + 10 * SMOOTH, top + 14 * SMOOTH], color)
        draw.text((left + 18 * SMOOTH, top), name, color, small)
    if every:
        axes = _Axes.of(every, top=y + SMOOTH * (24 * math.ceil(len(known) / 2) + 24))
        axes.draw(draw, small, sorted({calls for calls, _ in every}))
        for point in known.get(ours, ()):
            axes.guide(draw, *point)
        for name in sorted(known, key=lambda name: name == ours):
            axes.line(draw, known[name], colors[name], SMOOTH * (7 if name == ours else 5))
    return drawn.resize((PLOT[0] // SMOOTH, PLOT[1] // SMOOTH), Image.Resampling.LANCZOS)


@dataclass(frozen=True)
class _Axes:
    """Where calls and errors are on the plot."""

    calls: tuple[float, float]
    errors: tuple[float, float]
    top: float

    LEFT, RIGHT, BOTTOM = 92.0 * SMOOTH, PLOT[0] - 36.0 * SMOOTH, PLOT[1] - 66.0 * SMOOTH

    @classmethod
    def of(cls, points: Sequence[tuple[int, float]], top: float) -> "_Axes":
        calls, errors = zip(*points, strict=True)
        return cls((0.92 * min(calls), 1.08 * max(calls)), (0.8 * min(errors), 1.25 * max(errors)), top)

    def place(self, calls: float, error: float) -> tuple[float, float]:
        """A point in pixels."""
        across = math.log(calls / self.calls[0]) / math.log(self.calls[1] / self.calls[0])
        up = math.log(error / self.errors[0]) / math.log(self.errors[1] / self.errors[0])
        return self.LEFT + across * (self.RIGHT - self.LEFT), self.BOTTOM - up * (self.BOTTOM - self.top)

    def line(self, draw: ImageDraw.ImageDraw, points: Sequence[tuple[int, float]], color: Color, size: float) -> None:
        """Points, with lines between them."""
        places = [self.place(*point) for point in points]
        for pair in pairwise(places):
            draw.line(pair, color, width=round(size / 2))
        for x, y in places:
            draw.ellipse([x - size, y - size, x + size, y + size], color)

    def guide(self, draw: ImageDraw.ImageDraw, calls: float, error: float) -> None:
        """Dashes to the right, to where others have the same error."""
        x, y = self.place(calls, error)
        while x < self.RIGHT:
            draw.line([(x, y), (min(x + 6 * SMOOTH, self.RIGHT), y)], OURS, SMOOTH)
            x += 14 * SMOOTH

    def draw(self, draw: ImageDraw.ImageDraw, font: Any, calls: Sequence[int]) -> None:
        """The scales, with a line for some round errors."""
        draw.rectangle([self.LEFT, self.top, self.RIGHT, self.BOTTOM], PANEL)
        low, high = self.errors
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        digits = (1, 2, 5) if high > 8 * low else (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)
        for value in (digit * 10.0**power for power in powers for digit in digits):
            if low <= value <= high:
                y = self.place(self.calls[0], value)[1]
                draw.line([(self.LEFT, y), (self.RIGHT, y)], RULE, SMOOTH)
                draw.text((self.LEFT - 10 * SMOOTH, y), f"{value:.3g}", MUTED, font, "rm")
        free = -math.inf
        for number in calls:
            x = self.place(number, low)[0]
            draw.line([(x, self.BOTTOM), (x, self.BOTTOM + 6 * SMOOTH)], MUTED, SMOOTH)
            if x >= free:
                draw.text((x, self.BOTTOM + 12 * SMOOTH), str(number), MUTED, font, "mt")
                free = x + 28 * SMOOTH
        middle = (self.LEFT + self.RIGHT) / 2
        draw.text((middle, PLOT[1] - 12 * SMOOTH), "model calls of a picture", MUTED, font, "mb")
        draw.text((self.LEFT, self.top - 6 * SMOOTH), "error", MUTED, font, "lb")


def as_image(drawn: Image.Image) -> Tensor:
    """A picture as an IMAGE (1, height, width, 3) in [0, 1]."""
    pixels = torch.frombuffer(bytearray(drawn.tobytes()), dtype=torch.uint8).reshape(1, drawn.height, drawn.width, 3)
    return pixels.float() / 255
