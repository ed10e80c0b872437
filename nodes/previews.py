"""Pictures of a fit: a preview while it runs, and a plot of what it learned."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import latent_preview
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..amed_core.fit.report import IntervalReport
from ..amed_core.predictor import PredictorSet, asked_levels
from ..amed_core.types import COLUMNS
from .sheets import SERIES, Color, as_image, wrapped
from .states import harmless
from .streams import Balance, streams

NO_PREVIEW = "there is no preview of this model's latents"
SHOWN = 4  # samples side by side
SIDE = 128  # pixels of each at least
WIDTH, HEIGHT, MARGIN = 480, 300, 46  # of one panel of the plot
GROUND, INK, GREY, PALE = (24, 26, 30), (225, 225, 225), (150, 150, 150), (56, 60, 66)
BLUE, RED, GREEN = (90, 170, 250), (255, 110, 110), (100, 210, 120)
COLORS = {"predictor": BLUE, "base solver": GREY, "r": BLUE, "scale_dir": RED}
COLORS |= {"scale_time": GREEN, "newest": BLUE, "before": RED}


class Preview:
    """The teacher's samples above the student's, from the same noise; None where ComfyUI cannot show latents.

    Of packed latents it shows the first stream. A preview that fails is the last one, and ends no fit.
    """

    def __init__(self, guider: Any, like: Tensor, balance: Balance, told: set[str]) -> None:
        self.previewer: Any = None
        self.balance = balance
        self.told = told  # of what went wrong beside the fit
        if (len(balance.shapes[0]) if balance.shapes else like.ndim) in (4, 5):
            with harmless(NO_PREVIEW, told):
                self.previewer = previewer_of(like.device, guider.inner_model.latent_format)

    def __call__(self, teacher: Tensor, student: Tensor) -> Image.Image | None:
        return self._drawn(**{"slow sampler": teacher.detach(), "predictor": student.detach()})

    def before(self, denoised: Tensor) -> Image.Image | None:
        """What the slow sampler is at, before there is a student."""
        return self._drawn(**{"slow sampler": self.balance.scaled(denoised.detach())})

    def _drawn(self, **samples: Tensor) -> Image.Image | None:
        """A sheet of samples by name; None without a previewer, which one that fails is no longer."""
        if self.previewer is None:
            return None
        with harmless(NO_PREVIEW, self.told):
            return self._sheet(**samples)
        self.previewer = None
        return None

    def _sheet(self, **named: Tensor) -> Image.Image:
        """A row of pictures for every name, which is written on it."""
        rows = [
            [self.previewer.decode_latent_to_preview(x[n : n + 1]) for n in range(min(SHOWN, len(x)))]
            for x in (streams(self.balance.unscaled(x), self.balance.shapes)[0] for x in named.values())
        ]
        width, height = rows[0][0].size
        scale = max(1, math.ceil(SIDE / min(width, height)))
        sheet = Image.new("RGB", (scale * width * len(rows[0]), scale * height * len(rows)))
        for y, row in enumerate(rows):
            for x, picture in enumerate(row):
                large = picture.convert("RGB").resize((scale * width, scale * height), Image.Resampling.BICUBIC)
                sheet.paste(large, (x * scale * width, y * scale * height))
        draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
        for y, name in enumerate(named):
            place = (4, y * scale * height + 2)
            draw.rectangle(draw.textbbox(place, name, font=font), fill="black")
            draw.text(place, name, "white", font=font)
        return sheet


def previewer_of(device: torch.device, latent_format: Any) -> Any:
    """What turns latents into pictures: that of the user's settings, else that of the latents' colours, else None."""
    previewer = latent_preview.get_previewer(device, latent_format)
    factors = getattr(latent_format, "latent_rgb_factors", None)
    if previewer is None and factors is not None:
        names = ("latent_rgb_factors_bias", "latent_rgb_factors_reshape")  # newer latents are rearranged first
        more = [getattr(latent_format, name) for name in names if hasattr(latent_format, name)]
        previewer = latent_preview.Latent2RGBPreviewer(factors, *more)
    return previewer


def plot(report: IntervalReport, title: str) -> Tensor:
    """The report as an IMAGE (1, height, width, 3): the error at the end of every interval, and the plans."""
    sheet = Image.new("RGB", (2 * WIDTH, HEIGHT + 30), GROUND)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    draw.text((MARGIN, 8), title, INK, font=font)
    errors = {"predictor": report.errors, "base solver": report.base_errors}  # the finished picture's is what counts
    labels = [f"{k}: to {level:.3g}" for k, level in enumerate(report.levels[1:], start=1)]
    _panel(draw, 0, "error at the end of every interval", errors, labels, font, logarithmic=True, last=7)
    if report.weights:
        learned = {"newest": [row[-1] for row in report.weights], "scale_time": list(report.told)}
        learned["before"] = [sum(row[:-1]) for row in report.weights]
        _panel(draw, WIDTH, "weights of the newest slope and of those before", learned, labels, font)
    else:
        means = {name: [float(plan[name].mean()) for plan in report.plans] for name in COLUMNS}
        _panel(draw, WIDTH, "plan (mean over samples)", means, labels[: len(report.plans)], font)
    return as_image(sheet)


def levels_plot(every: PredictorSet, title: str) -> Tensor:
    """At which noise levels predictors ask the model, as an IMAGE (1, height, width, 3).

    Every number of calls has a line. Of several guidance scales the first is shown.
    """
    asked = {str(one.config.calls): asked_levels(one) for one in every.from_noise}
    sheet = Image.new("RGB", (WIDTH, HEIGHT + 30), GROUND)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    draw.text((MARGIN, 8), next(wrapped(title, font, WIDTH - MARGIN), ""), INK, font=font)
    labels = [str(call) for call in range(1, max(map(len, asked.values())) + 1)]
    colors = {name: SERIES[n % len(SERIES)] for n, name in enumerate(asked)}
    about = "noise level of every model call, by steps"
    _panel(draw, 0, about, asked, labels, font, logarithmic=True, colors=colors)
    return as_image(sheet)


def notice(text: str) -> Tensor:
    """A text as an IMAGE (1, height, width, 3), where there is nothing to draw."""
    sheet = Image.new("RGB", (2 * WIDTH, HEIGHT + 30), GROUND)
    ImageDraw.Draw(sheet).text((MARGIN, 8), text, INK, font=ImageFont.load_default(13))
    return as_image(sheet)


def _panel(
    draw: ImageDraw.ImageDraw,
    left: int,
    title: str,
    lines: Mapping[str, Sequence[float]],
    labels: Sequence[str],
    font: Any,
    *,
    logarithmic: bool = False,
    colors: Mapping[str, Color] = COLORS,
    last: int = 4,
) -> None:
    """Lines over intervals, with a scale on the left and a legend on top; `last` is the radius of a line's end."""
    top, bottom = 74, HEIGHT - 10
    begin, end = left + MARGIN, left + WIDTH - 14
    values = [v for line in lines.values() for v in line if math.isfinite(v) and (v > 0 or not logarithmic)]
    low, high = (min(values), max(values)) if values else (1.0, 1.0)
    if logarithmic:
        low, high = 0.8 * low, 1.25 * high
    else:
        low, high = min(low, 0.0), max(high, 1.0) * 1.05

    def height(value: float) -> float:
        scaled = math.log(max(value, low) / low) / math.log(high / low) if logarithmic else (value - low) / (high - low)
        return bottom - scaled * (bottom - top)

    def place(k: int) -> float:
        return begin + (k + 0.5) / len(labels) * (end - begin)

    draw.text((begin, 32), title, INK, font=font)
    for part in (0.0, 0.5, 1.0):
        value = low * (high / low) ** part if logarithmic else low + part * (high - low)
        draw.line([(begin, height(value)), (end, height(value))], PALE)
        draw.text((left + 4, height(value) - 7), f"{value:.2g}", GREY, font=font)
    for k, label in enumerate(labels):
        draw.text((place(k) - 3 * len(label), bottom + 8), label, INK, font=font)
    for n, (name, line) in enumerate(lines.items()):
        color = colors[name]
        points = [(place(k), height(value)) for k, value in enumerate(line) if math.isfinite(value)]
        draw.line(points, color, width=2)
        for number, (x, y) in enumerate(points, start=1):
            radius = last if number == len(points) else 4
            draw.ellipse([x - radius, y - radius, x + radius, y + radius], color)
        draw.text((begin + n * (end - begin) / max(len(lines), 3), 52), name, color, font=font)
