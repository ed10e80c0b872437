"""Draw the cards of the example workflows: `example_workflows/*.jpg`, from the bundled text-to-picture model.

    python scripts/draw_thumbnails.py

Each is a square of pictures with a few bold words, to be read at 230 pixels. Those of models that are not here show
drawings of the bundled one under the model's name.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1]))
from amed_core import sample
from amed_core.driver import NoMidpoint
from amed_core.files import load_predictors
from amed_core.fit.teacher import heun_samples
from amed_core.pictures import SHAPE, SIGMA_MAX, SIGMA_MIN, PicturesDenoiser
from amed_core.solvers import Ipndm
from amed_core.types import Method

PACK = Path(__file__).parents[1]
WORKFLOWS, PREDICTOR = PACK / "example_workflows", PACK / "predictors" / "pictures_amed_multistep.safetensors"
SIDE, BAR, GAP = 512, 96, 4
CFG, CALLS, TEACHER_CALLS = 3.0, 5, 100
GAIN = 4  # of the differences that are shown
DARK, LIGHT, BLUE, GREEN, GREY = "#171a21", "#ffffff", "#3f789e", "#2f9e5f", "#6b7280"
Picture = Image.Image


class Studio:
    """Draws prompts by the three ways that are compared."""

    def __init__(self) -> None:
        self.model = PicturesDenoiser(CFG)
        every = load_predictors(PREDICTOR).predictors
        self.ours = next(one for one in every if one.config.calls == CALLS).method(guidance=CFG)
        levels = [SIGMA_MAX * (1 - n / CALLS) for n in range(CALLS + 1)]
        self.stock = Method(tuple(levels), Ipndm(1), NoMidpoint())

    def noise(self, count: int, seed: int) -> Tensor:
        return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))

    def teacher(self, prompts: Sequence[str], x: Tensor, highest: float = SIGMA_MAX) -> Tensor:
        """Pictures (n, 3, 128, 128) in [-1, 1] by a slow sampler, from noisy latents at `highest`."""
        asked = self.model.for_prompts(prompts)
        return self.seen(heun_samples(asked, x, SIGMA_MIN, highest, TEACHER_CALLS, flow=True))

    def drawn(self, prompts: Sequence[str], x: Tensor, method: Method) -> Tensor:
        return self.seen(sample(self.model.for_prompts(prompts), x, method))

    def seen(self, latents: Tensor) -> Tensor:
        return self.model.images(latents).clamp(-1, 1)


def as_picture(one: Tensor, side: int) -> Picture:
    """A picture (3, height, width) in [-1, 1] as a square."""
    pixels = ((one + 1) * 127.5).round().clamp(0, 255).byte().movedim(0, -1).numpy()
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS)


def write(card: Picture, at: tuple[float, float], text: str, size: int, colour: str = LIGHT) -> None:
    """Bold words, with their middle at a point."""
    font, bold = ImageFont.load_default(size), max(1, size // 22)
    ImageDraw.Draw(card).text(at, text, colour, font, "mm", align="center", stroke_width=bold, stroke_fill=colour)


def sheet(rows: Sequence[Sequence[Tensor]], heads: Sequence[tuple[str, str]], side: int) -> Picture:
    """Rows of pictures below the words of their columns, with the colours behind those."""
    card = Image.new("RGB", (SIDE, SIDE), DARK)
    wide, top = SIDE / len(heads), SIDE - len(rows) * (side + GAP)
    for n, (words, colour) in enumerate(heads):
        box = (n * wide + GAP / 2, GAP, (n + 1) * wide - GAP / 2, top - GAP)
        ImageDraw.Draw(card).rounded_rectangle(box, 10, colour)
        write(card, ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), words, 34)
    for i, row in enumerate(rows):
        for n, one in enumerate(row):
            card.paste(as_picture(one, side), (round(n * wide + (wide - side) / 2), top + i * (side + GAP)))
    return card


def named(pictures: Sequence[Tensor], words: str, colour: str = BLUE) -> Picture:
    """Four pictures, or one large one, above a bar with words."""
    card = Image.new("RGB", (SIDE, SIDE), DARK)
    columns = 1 if len(pictures) == 1 else 2
    side = (SIDE - BAR - GAP) // columns
    left = (SIDE - columns * side) // 2
    for n, one in enumerate(pictures):
        card.paste(as_picture(one, side - GAP), (left + n % columns * side + GAP // 2, n // columns * side + GAP))
    ImageDraw.Draw(card).rectangle((0, SIDE - BAR, SIDE, SIDE), colour)
    write(card, (SIDE / 2, SIDE - BAR / 2), words, 56 if len(words) < 14 else 42)
    return card


def start_here(studio: Studio) -> Picture:
    prompts, x = ["rocket", "owl", "hamburger"], studio.noise(3, 4)
    ways = [studio.teacher(prompts, x), studio.drawn(prompts, x, studio.stock), studio.drawn(prompts, x, studio.ours)]
    heads = [("slow\n100", GREY), ("stock\n5", GREY), ("AMED\n5", GREEN)]
    return sheet(list(zip(*ways, strict=True)), heads, 134)


def own_checkpoint(studio: Studio) -> Picture:
    prompts, x = ["penguin"] * 4, studio.noise(4, 11)
    pictures = [*studio.teacher(prompts[:1], x[:1]), *studio.drawn(prompts[1:], x[1:], studio.ours)]
    card = Image.new("RGB", (SIDE, SIDE), DARK)
    card.paste(as_picture(pictures[0], 332), (GAP, GAP))
    for n, one in enumerate(pictures[1:]):
        card.paste(as_picture(one, 168), (SIDE - 168 - GAP, GAP + n * 170))
    draw = ImageDraw.Draw(card)
    draw.rounded_rectangle((GAP, 342, 336, SIDE - GAP), 10, BLUE)
    write(card, (170, 424), "the first one\nteaches", 44)
    draw.rounded_rectangle((SIDE - 168 - GAP, 428, SIDE - GAP, SIDE - GAP), 10, GREEN)
    draw.rectangle((SIDE - 168 - GAP, 428, SIDE - GAP, 440), GREEN)
    write(card, (SIDE - 88, 470), "5 steps", 40)
    return card


def of_model(words: str, prompts: Sequence[str], seed: int) -> Callable[[Studio], Picture]:
    """A card of a model that is not here."""
    return lambda studio: named(list(studio.drawn(prompts, studio.noise(len(prompts), seed), studio.ours)), words)


def film(studio: Studio) -> Picture:
    """Frames between two noises, on a strip."""
    ends, card = studio.noise(2, 5), Image.new("RGB", (SIDE, SIDE), DARK)
    turned = [torch.pi / 2 * n / 3 * 0.5 for n in range(4)]
    x = torch.stack([ends[0] * torch.cos(torch.tensor(a)) + ends[1] * torch.sin(torch.tensor(a)) for a in turned])
    draw = ImageDraw.Draw(card)
    for row in range(2):
        frames = studio.drawn(["sailboat"] * 4, x, studio.ours)[2 * row : 2 * row + 2]
        top = row * 208
        for hole in range(9):
            for y in (top + 4, top + 192):
                draw.rounded_rectangle((12 + hole * 57, y, 40 + hole * 57, y + 10), 3, LIGHT)
        for n, one in enumerate(frames):
            card.paste(as_picture(one, 168), (60 + n * 224, top + 20))
    draw.rectangle((0, SIDE - BAR, SIDE, SIDE), BLUE)
    write(card, (SIDE / 2, SIDE - BAR / 2), "Wan video", 56)
    return card


def arrow(card: Picture, middle: tuple[int, int]) -> None:
    x, y = middle
    ImageDraw.Draw(card).ellipse((x - 40, y - 40, x + 40, y + 40), GREEN)
    ImageDraw.Draw(card).polygon([(x - 18, y - 22), (x - 18, y + 22), (x + 24, y)], LIGHT)


def before_after(first: Picture, second: Picture, words: str) -> Picture:
    """Two pictures beside each other, and an arrow from one to the other."""
    card, side = Image.new("RGB", (SIDE, SIDE), DARK), SIDE // 2 - GAP
    for n, one in enumerate((first, second)):
        card.paste(one.resize((side, side), Image.Resampling.LANCZOS), (n * (side + 2 * GAP), 82))
    arrow(card, (SIDE // 2, 82 + side // 2))
    ImageDraw.Draw(card).rectangle((0, SIDE - BAR, SIDE, SIDE), BLUE)
    write(card, (SIDE / 2, SIDE - BAR / 2), words, 50)
    return card


def image_to_image(studio: Studio) -> Picture:
    x = studio.noise(1, 3)
    first = studio.teacher(["cat face"], x)
    latent, level = studio.model.model.vae.encode(first), 0.7
    noisy = (1 - level) * latent + level * studio.noise(1, 8)
    second = studio.teacher(["tiger face"], noisy, level)
    return before_after(as_picture(first[0], SIDE), as_picture(second[0], SIDE), "image to image")


def inpainting(studio: Studio) -> Picture:
    whole = as_picture(studio.teacher(["snowman"], studio.noise(1, 0))[0], SIDE)
    masked, draw = whole.copy(), None
    hole = Image.new("RGB", (SIDE, SIDE), "#20242d")
    draw = ImageDraw.Draw(hole)
    for n in range(-SIDE, SIDE, 40):
        draw.line((n, SIDE, n + SIDE, 0), "#8b93a3", 10)
    mask = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(mask).ellipse((120, 60, 400, 320), 255)
    masked.paste(hole, (0, 0), mask)
    return before_after(masked, whole, "inpainting")


def compare(studio: Studio) -> Picture:
    prompts, x = ["rocket", "cat face"], studio.noise(2, 4)
    goal = studio.teacher(prompts, x)
    ways = [studio.drawn(prompts, x, studio.stock), studio.drawn(prompts, x, studio.ours)]
    rows = [(one, GAIN * (one - goal).abs() - 1) for one in ways]
    card, side = Image.new("RGB", (SIDE, SIDE), DARK), 206
    for n, ((drawn, off), words, colour) in enumerate(zip(rows, ("stock", "AMED"), (GREY, GREEN), strict=True)):
        left = n * (SIDE // 2) + (SIDE // 2 - side) // 2
        ImageDraw.Draw(card).rounded_rectangle((left, 6, left + side, 74), 10, colour)
        write(card, (left + side / 2, 40), words, 44)
        card.paste(as_picture(drawn[1], side), (left, 82))
        card.paste(as_picture(off[1], side), (left, 82 + side + 6))
    return card


def train(studio: Studio) -> Picture:
    """A picture, and an error that falls."""
    card = named(list(studio.drawn(["rose"], studio.noise(1, 2), studio.ours)), "train, and share", GREEN)
    draw = ImageDraw.Draw(card, "RGBA")
    draw.rounded_rectangle((212, 20, 450, 186), 14, (23, 26, 33, 220))
    errors = [0.62, 0.4, 0.29, 0.22, 0.17, 0.14, 0.12, 0.11]
    points = [(234 + 196 * n / 7, 164 - 124 * e / 0.7) for n, e in enumerate(errors)]
    draw.line(points, "#6ee7a0", 9, joint="curve")
    x, y = points[-1]
    draw.ellipse((x - 11, y - 11, x + 11, y + 11), LIGHT)
    return card


CARDS: dict[str, Callable[[Studio], Picture]] = {
    "1": start_here,
    "2": own_checkpoint,
    "3": of_model("SD 1.5, SDXL", ["owl", "slice of pizza", "tulip", "robot face"], 21),
    "4": of_model("Flux", ["strawberry"], 6),
    "5": of_model("Qwen, Z-Image", ["birthday cake", "octopus", "volcano", "balloon"], 9),
    "6": film,
    "7": image_to_image,
    "8": inpainting,
    "9": compare,
    "10": train,
}


@torch.no_grad()
def main() -> None:
    studio = Studio()
    for file in sorted(WORKFLOWS.glob("*.json")):
        CARDS[file.stem.split()[0]](studio).save(file.with_suffix(".jpg"), quality=90)


if __name__ == "__main__":
    main()
