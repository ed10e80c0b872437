"""Train the bundled text-to-picture model on the drawings of Noto Color Emoji, and save it in float16.

    apt-get install fonts-noto-color-emoji
    python scripts/train_pictures.py --seconds 500                              # on one large GPU
    python scripts/train_pictures.py --seconds 10800 --learning-rate 3e-4 --resume amed_core/pictures.safetensors

First the VAE learns to redraw pictures, then the transformer learns the velocity of flow matching on
the VAE's latents. What is trained so far is written every minute; `--resume` goes on from there, or
from published weights. Needs fonttools and Pillow for the drawings; `--data` keeps them in a file.
"""

import argparse
import copy
import json
import math
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

sys.path.append(str(Path(__file__).parents[1]))
from amed_core.fit.teacher import heun_samples
from amed_core.pictures import (
    PIXELS,
    SHAPE,
    SIGMA_MIN,
    WORDS,
    PicturesConfig,
    PicturesDenoiser,
    PicturesModel,
    PicturesVae,
    config_of,
    metadata_of,
    words_of,
)

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")  # of the Debian package fonts-noto-color-emoji
SOURCE = "the drawings of Noto Color Emoji (fonts-noto-color-emoji), SIL Open Font License 1.1"
SIZE = SHAPE[-1] * PIXELS
SMALLEST = 0.88  # scale of a drawing in its picture
ONE_SIDED = {"left", "right", "leftwards", "rightwards", "west", "east", "clock", "clockwise", "anticlockwise"} | {
    *("arrow", "latin", "squared", "ideograph", "input", "question", "numbers", "sign", "mark")
}  # what has one of these in its name would be wrong in the mirror
NO_PROMPT, FEWER_WORDS, WORD_KEPT = 0.1, 0.3, 0.6  # shares of the prompts, and of the words in those with fewer
LATENT_NOISE = 0.15  # at most, in deviations of the latents: the decoder learns to bear a sampler's errors
TOWARDS_ZERO = 1e-4  # weight of the latents' squares, which keeps them near 1
SMALLER = 0.25  # weight of half-size pictures from half-size latents, which keeps latents smooth (arXiv 2502.09509)
VAE_LEARNING_RATE, LEARNING_RATE = 1.5e-3, 1e-3
WARM_UP = 300  # steps, after every start
AVERAGE = 0.999  # the moving average of weights forgets this slowly
CONSTANT = 0.35  # of the time at the full learning rate, then it falls to nothing
REPORT, SAVE = 10.0, 60.0  # seconds between two lines, and between two files
PROMPTS = (
    *("cat face", "hot pepper", "slice of pizza", "rocket", "snowman", "smiling face with sunglasses"),
    *("rose", "penguin", "guitar", "volcano", "octopus", "hamburger"),
    *("robot face", "tulip", "elephant", "umbrella", "bicycle", "strawberry"),
    *("owl", "sailboat", "jack-o-lantern", "balloon", "birthday cake", "dog face"),
)


def rendered(font_file: Path) -> tuple[np.ndarray, list[str]]:
    """Every drawing of one code point, (n, 128, 128, 4) uint8 with transparency, and its Unicode name."""
    from fontTools.ttLib import TTFont  # noqa: PLC0415 - not needed where the drawings are at hand
    from PIL import Image, ImageDraw, ImageFont  # noqa: PLC0415

    font = ImageFont.truetype(font_file, 109)  # the size of its bitmaps, 136x128
    drawings, names = [], []
    for code in sorted(TTFont(font_file)["cmap"].getBestCmap()):
        name = unicodedata.name(chr(code), "").lower()
        if not name or _is_text(code) or _is_part(code):
            continue
        bitmap = Image.new("RGBA", (136, 128))
        ImageDraw.Draw(bitmap).text((0, 0), chr(code), font=font, embedded_color=True)
        if bitmap.getbbox():
            square = Image.new("RGBA", (136, 136))
            square.alpha_composite(bitmap, (0, 4))
            drawings.append(np.asarray(square.resize((SIZE, SIZE), Image.Resampling.LANCZOS)))
            names.append(name)
    return np.stack(drawings), names


def _is_text(code: int) -> bool:
    return code < 0x203C and chr(code) not in "©®"


def _is_part(code: int) -> bool:
    """Letters of flags, tones of skin, kinds of hair, joiners and selectors."""
    ranges = ((0x1F1E6, 0x1F1FF), (0x1F3FB, 0x1F3FF), (0x1F9B0, 0x1F9B3), (0xFE00, 0xFE0F), (0xE0000, 0x10FFFF))
    return code in (0x200D, 0x20E3) or any(low <= code <= high for low, high in ranges)


class Drawings:
    """The drawings on the training device, put into ever new pictures."""

    def __init__(self, drawings: np.ndarray, names: list[str], device: torch.device) -> None:
        self.names, self.device = names, device
        self.drawings = torch.from_numpy(drawings).to(device).permute(0, 3, 1, 2)
        self.mirrored = torch.tensor([not ONE_SIDED & set(words_of(name)) for name in names], device=device)

    def __len__(self) -> int:
        return len(self.names)

    def pictures(self, which: Tensor) -> Tensor:
        """Drawings number `which`, a little smaller and moved, half of them mirrored, on plain or shaded grounds.

        (n, 3, 128, 128) in [-1, 1].
        """
        n = len(which)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, device=self.device)

        drawn = self.drawings[which].float() / 255
        colour, opacity = drawn[:, :3] * drawn[:, 3:], drawn[:, 3:]
        scale = SMALLEST + (1 - SMALLEST) * uniform(n)
        side = torch.where((uniform(n) < 0.5) & self.mirrored[which], -1.0, 1.0)
        moved = (2 * uniform(2, n) - 1) * (1 - scale)
        affine = torch.zeros(n, 2, 3, device=self.device)
        affine[:, 0, 0], affine[:, 1, 1] = side / scale, 1 / scale
        affine[:, :, 2] = (moved / scale).T
        grid = functional.affine_grid(affine, [n, 4, SIZE, SIZE], align_corners=False)
        placed = functional.grid_sample(torch.cat([colour, opacity], 1), grid, align_corners=False)

        top = 0.62 + 0.38 * uniform(n, 3, 1, 1)
        bottom = (top * (0.8 + 0.35 * uniform(n, 3, 1, 1))).clamp(0, 1)
        down = torch.linspace(0, 1, SIZE, device=self.device)[:, None]
        ground = torch.where(uniform(n, 1, 1, 1) < 0.2, 1.0, top * (1 - down) + bottom * down)
        pictures = 2 * (placed[:, :3] + (1 - placed[:, 3:]) * ground) - 1
        return pictures.contiguous(memory_format=torch.channels_last)


def vae_loss(vae: PicturesVae, pictures: Tensor, noise: Tensor) -> Tensor:
    """Mean absolute error of pictures and of their edges, at full and half size, from latents with a little noise."""
    with torch.autocast(pictures.device.type, torch.bfloat16):
        latents = vae.encoder(pictures).float()
        noisy = latents + latents.detach().std((0, 2, 3), keepdim=True) * noise
        again = vae.decoder(noisy)
        smaller = vae.decoder(functional.avg_pool2d(noisy, 2))
    half_size = functional.avg_pool2d(pictures, 2)
    loss = _unlike(again.float(), pictures) + SMALLER * _unlike(smaller.float(), half_size)
    return loss + TOWARDS_ZERO * latents.square().mean()


def _unlike(a: Tensor, b: Tensor) -> Tensor:
    edges = sum((a.diff(dim=axis) - b.diff(dim=axis)).abs().mean() for axis in (2, 3))
    return (a - b).abs().mean() + 0.5 * edges


def velocity_loss(networks: nn.ModuleDict, latents: Tensor, noise: Tensor, sigma: Tensor, numbers: Tensor) -> Tensor:
    """Squared error of the velocity noise - latents on the straight line between them (Lipman et al. 2023)."""
    with torch.autocast(latents.device.type, torch.bfloat16):
        x = latents.lerp(noise, sigma[:, None, None, None])
        velocity = networks["transformer"](x, sigma, networks["words"](numbers))
    return (velocity.float() - (noise - latents)).square().mean()


class Training:
    """One network's training: its weights, their moving average and the optimiser, at a time-bound learning rate."""

    def __init__(
        self,
        network: nn.Module,
        average: nn.Module,
        loss: Callable[..., Tensor],
        batches: Iterator[tuple[Tensor, ...]],
        learning_rate: float,
    ) -> None:
        self.network, self.average, self.batches, self.learning_rate = network, average, batches, learning_rate
        self.on_gpu = next(network.parameters()).is_cuda
        self.plain_loss = loss
        self.loss = torch.compile(loss) if self.on_gpu else loss
        self.steps, self.smoothed = 0, math.nan
        self._restart()

    def _restart(self) -> None:
        self.optimiser = torch.optim.AdamW(
            self.network.parameters(), self.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=self.on_gpu
        )
        self.steps_of_optimiser = 0

    def run(self, title: str, deadline: float, save: Callable[[], None]) -> None:
        """Train until `deadline` (of the monotonic clock): a line every 10 s, a call of `save` every minute."""
        self._first_step()
        begin = reported = saved = time.monotonic()
        first, total, count, best = self.steps, 0.0, 0, math.inf
        healthy = self._copy()
        while reported < deadline:
            now = time.monotonic()
            self._set_learning_rate((now - begin) / (deadline - begin))
            total, count = total + self._step(self.loss), count + 1
            if now < min(reported + REPORT, deadline):
                continue
            self.smoothed, reported = float(total) / count, time.monotonic()
            speed = (self.steps - first) / (reported - begin)
            print(f"{title}: {self.steps} steps, {speed:.1f} a second, loss {self.smoothed:.4f}", flush=True)
            if self.smoothed < 1.5 * best:
                best, healthy = min(best, self.smoothed), self._copy()
            else:  # also where it is not a number
                print(f"{title}: the loss has risen. Going back, at half the learning rate.", flush=True)
                self.learning_rate /= 2
                self._paste(healthy)
                self._restart()
            total, count = 0.0, 0
            if reported - saved > SAVE:
                save()
                saved = reported
        save()

    def _first_step(self) -> None:
        """Compile, or do without."""
        self._set_learning_rate(0.0)
        begin = time.monotonic()
        try:
            self._step(self.loss)
        except Exception as error:  # whatever a compiler may raise
            if self.loss is self.plain_loss:
                raise
            print(f"Not compiled: {type(error).__name__}: {str(error)[:500]}", flush=True)
            self.loss = self.plain_loss
            self._step(self.loss)
        if self.on_gpu:
            torch.cuda.synchronize()
            print(f"First step: {time.monotonic() - begin:.0f} s", flush=True)

    def _set_learning_rate(self, done: float) -> None:
        falling = 1.0 if done < CONSTANT else max(0.01, (1 - done) / (1 - CONSTANT))
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate * falling * min(1.0, (self.steps_of_optimiser + 1) / WARM_UP)

    def _step(self, loss: Callable[..., Tensor]) -> Tensor:
        self.optimiser.zero_grad()
        value = loss(self.network, *next(self.batches))
        value.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimiser.step()
        self.steps, self.steps_of_optimiser = self.steps + 1, self.steps_of_optimiser + 1
        decay = min(AVERAGE, self.steps / (self.steps + 9))
        with torch.no_grad():
            torch._foreach_lerp_([*self.average.parameters()], [*self.network.parameters()], 1 - decay)
        return value.detach()

    def _copy(self) -> list[Tensor]:
        return [p.detach().clone() for module in (self.network, self.average) for p in module.parameters()]

    def _paste(self, copied: list[Tensor]) -> None:
        with torch.no_grad():
            for p, value in zip([*self.network.parameters(), *self.average.parameters()], copied, strict=True):
                p.copy_(value)

    def state_dict(self) -> dict[str, Tensor]:
        """What a later run needs to go on besides the average."""
        state = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        for number, moments in self.optimiser.state_dict()["state"].items():
            state |= {f"optimiser.{number}.{name}": torch.as_tensor(value) for name, value in moments.items()}
        return state | {"steps": torch.tensor(self.steps), "learning_rate": torch.tensor(self.learning_rate)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on where another run was saved."""
        start = "network."
        self.network.load_state_dict({k.removeprefix(start): v for k, v in state.items() if k.startswith(start)})
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in state.items():
            if key.startswith("optimiser."):
                _, number, name = key.split(".")
                moments.setdefault(int(number), {})[name] = value
        self.optimiser.load_state_dict({"state": moments, "param_groups": self.optimiser.state_dict()["param_groups"]})
        self.steps, self.learning_rate = int(state["steps"]), float(state["learning_rate"])


class Run:
    """Everything under way, and its two files: the weights to publish, and the state to go on from."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.begin, self.arguments = time.monotonic(), arguments
        self.on_gpu = torch.cuda.is_available()
        self.device = torch.device("cuda" if self.on_gpu else "cpu")
        torch.manual_seed(arguments.seed)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
        arguments.output.mkdir(parents=True, exist_ok=True)

        self.drawings = Drawings(*drawings_of(arguments.font, arguments.data), self.device)
        names = self.drawings.names
        self.config = PicturesConfig(tuple(sorted({word for name in names for word in words_of(name)})), tuple(names))
        self.history: dict[str, Any] = {}  # of the training, for the header of the weights
        tensors: dict[str, Tensor] = {}
        if arguments.resume:
            with safe_open(arguments.resume, framework="pt") as file:
                self.config, self.history = config_of(file.metadata()), json.loads(file.metadata()["training"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if self.config.names != tuple(names):
                raise SystemExit(f"{arguments.resume} was trained on other drawings: {len(self.config.names)} of them.")
        under_way = "training."
        self.under_way = {k.removeprefix(under_way): v for k, v in tensors.items() if k.startswith(under_way)}
        weights = {k: v.float() for k, v in tensors.items() if not k.startswith(under_way)}

        self.model = PicturesModel(self.config)
        self.model.load_state_dict(weights or self.model.state_dict())
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        for model in (self.model, self.average):
            model.to(self.device).vae.to(memory_format=torch.channels_last)
        parameters = sum(p.numel() for p in self.model.parameters())
        self.say(f"{len(names)} drawings, {len(self.config.vocabulary)} words, {parameters:,} weights, {self.device}")

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.begin:.0f} s: {text}", flush=True)

    def save(self, training: "Training | None" = None) -> None:
        """Write the averages in half precision: the rounded networks are the model from here on."""
        header = metadata_of(self.config) | {"training": json.dumps(self.history), "data": SOURCE}
        weights = {name: value.contiguous() for name, value in self.average.state_dict().items()}
        written(self.arguments.output / "pictures.safetensors", {k: v.half() for k, v in weights.items()}, header)
        if training:
            state = {f"training.{name}": value.contiguous() for name, value in training.state_dict().items()}
            written(self.arguments.state or self.arguments.output / "state.safetensors", weights | state, header)

    def train_vae(self, seconds: float) -> None:
        batch = self.arguments.vae_batch or (64 if self.on_gpu else 4)

        def batches() -> Iterator[tuple[Tensor, ...]]:
            while True:
                which = torch.randint(len(self.drawings), (batch,), device=self.device)
                amount = LATENT_NOISE * torch.rand(batch, 1, 1, 1, device=self.device)
                yield self.drawings.pictures(which), amount * torch.randn(batch, *SHAPE, device=self.device)

        training = Training(self.model.vae, self.average.vae, vae_loss, batches(), VAE_LEARNING_RATE)
        training.run("VAE", time.monotonic() + seconds, self.save)
        self.history["vae"] = {"steps": training.steps, "batch": batch, "loss": round(training.smoothed, 4)}

    @torch.no_grad()
    def latents(self, new_vae: bool) -> tuple[Tensor, Tensor]:
        """Latents of several pictures of every drawing, and which drawing each shows.

        A new VAE is told their mean, their deviation and their colours here.
        """
        vae, count = self.average.vae, len(self.drawings)
        which = torch.arange(count, device=self.device).repeat(self.arguments.copies or (128 if self.on_gpu else 2))
        latents = torch.empty(len(which), *SHAPE, device=self.device)
        if new_vae:
            vae.mean.zero_()
            vae.std.fill_(1)
        colours, errors = [], []
        for start in range(0, len(which), 256):
            rows = slice(start, start + 256)
            pictures = self.drawings.pictures(which[rows])
            with torch.autocast(self.device.type, torch.bfloat16):
                latents[rows] = vae.encode(pictures).float()
            if start < count:
                colours.append(functional.avg_pool2d(pictures, PIXELS))
                errors.append((vae.decode(latents[rows]).clamp(-1, 1) - pictures).square().mean())
        self.history["psnr"] = round(-10 * math.log10(float(torch.stack(errors).mean()) / 4), 2)
        if new_vae:
            mean, std = latents.mean((0, 2, 3), keepdim=True), latents.std((0, 2, 3), keepdim=True)
            latents = (latents - mean) / std
            seen = latents[: len(torch.cat(colours))].movedim(1, -1).flatten(0, 2)
            seen = torch.cat([seen, torch.ones_like(seen[:, :1])], 1)
            preview = torch.linalg.lstsq(seen.cpu(), torch.cat(colours).movedim(1, -1).flatten(0, 2).cpu()).solution
            for each in (self.model.vae, vae):
                each.mean.copy_(mean)
                each.std.copy_(std)
                each.preview.copy_(preview)
        self.say(f"{len(latents)} latents, PSNR {self.history['psnr']} dB")
        return latents, which

    def train_transformer(self, latents: Tensor, which: Tensor) -> None:
        batch = self.arguments.batch or (512 if self.on_gpu else 32)
        numbers = torch.tensor([self.model.words.numbers(name) for name in self.drawings.names], device=self.device)

        def batches() -> Iterator[tuple[Tensor, ...]]:
            while True:
                rows = torch.randint(len(latents), (batch,), device=self.device)
                fewer, none = torch.rand(2, batch, 1, device=self.device)
                kept = torch.rand(batch, WORDS, device=self.device) < WORD_KEPT
                prompts = numbers[which[rows]] * (kept | (fewer > FEWER_WORDS)) * (none > NO_PROMPT)
                noise = torch.randn(batch, *SHAPE, device=self.device)
                yield latents[rows], noise, torch.randn(batch, device=self.device).sigmoid(), prompts

        networks, averages = (
            nn.ModuleDict({"words": model.words, "transformer": model.transformer})
            for model in (self.model, self.average)
        )
        training = Training(networks, averages, velocity_loss, batches(), self.arguments.learning_rate)
        done = self.history.get("transformer", {"steps": 0})
        training.steps = done["steps"]
        if self.under_way:
            training.load_state_dict(self.under_way)

        def save() -> None:
            self.history["transformer"] = {
                "steps": training.steps,
                "batch": batch,
                "loss": round(training.smoothed, 4),
            }
            self.save(training)

        training.run("transformer", self.begin + self.arguments.seconds, save)

    @torch.no_grad()
    def sheet(self) -> None:
        """Draw all of `PROMPTS` with two seeds into `look.png`: 12 to a row, Heun's method, guidance 3."""
        from PIL import Image  # noqa: PLC0415 - not needed to train

        model = self.average.eval()
        noise = torch.randn(2 * len(PROMPTS), *SHAPE, generator=torch.Generator().manual_seed(0)).to(self.device)
        denoiser = PicturesDenoiser(3.0, model).for_prompts(PROMPTS * 2)
        drawn = model.vae.decode(heun_samples(denoiser, noise, SIGMA_MIN, 1.0, 40, flow=True))
        tiles = ((drawn.clamp(-1, 1) + 1) * 127.5).round().byte().reshape(4, 12, 3, SIZE, SIZE)
        Image.fromarray(tiles.permute(0, 3, 1, 4, 2).reshape(4 * SIZE, 12 * SIZE, 3).cpu().numpy()).save(
            self.arguments.output / "look.png"
        )
        self.say("look.png")


def drawings_of(font: Path, data: Path | None) -> tuple[np.ndarray, list[str]]:
    """The drawings in `data`; first put there from the font if it does not exist."""
    if data and data.exists():
        kept = np.load(data)
        return kept["drawings"], [str(name) for name in kept["names"]]
    if not font.exists():
        raise SystemExit(f"There is no font {font}. Install the package fonts-noto-color-emoji, or give --data.")
    drawings, names = rendered(font)
    if data:
        np.savez_compressed(data, drawings=drawings, names=np.array(names))
    return drawings, names


def written(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    """Save, so that whoever ends the run at any moment finds the old file or the new one."""
    new = path.with_suffix(".new")
    save_file(tensors, new, metadata=header)
    new.replace(path)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=500.0, help="of the whole run but the last drawings")
    parser.add_argument("--vae-seconds", type=float, help="of these for the VAE: 140, or 0 with --resume")
    parser.add_argument("--font", type=Path, default=FONT)
    parser.add_argument("--data", type=Path, help="drawings as .npz; written from the font if it does not exist")
    parser.add_argument("--output", type=Path, default=Path("pictures-training"), help="a folder")
    parser.add_argument("--state", type=Path, help="the file to go on from later; OUTPUT/state.safetensors")
    parser.add_argument("--resume", type=Path, help="such a file, or weights")
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE)
    parser.add_argument("--batch", type=int, help="latents in a step: 512, or 32 on the CPU")
    parser.add_argument("--vae-batch", type=int, help="pictures in a step: 64, or 4 on the CPU")
    parser.add_argument("--copies", type=int, help="latents kept of each drawing: 128, or 2 on the CPU")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)

    run = Run(arguments)
    vae_seconds = (0.0 if arguments.resume else 140.0) if arguments.vae_seconds is None else arguments.vae_seconds
    if vae_seconds:
        run.train_vae(vae_seconds)
    run.train_transformer(*run.latents(new_vae=vae_seconds > 0))
    run.sheet()


if __name__ == "__main__":
    main()
