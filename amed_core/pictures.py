"""The bundled text-to-picture model: it knows the 1,357 drawings of a colour font by their names.

A small copy of what large models are made of: a variational autoencoder (128x128 pixels to 16x16
latents of 8 channels), an embedding for each word, and a transformer over patches and words,
trained by flow matching (Lipman et al. 2023, arXiv 2210.02747) with prompts dropped for guidance
(`scripts/train_pictures.py`).
"""

import copy
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional

from .types import Answer, Sample, Sigma

CHANNELS = 8
SHAPE = (CHANNELS, 16, 16)
PIXELS = 8  # an image is this much larger than its latent
WORDS = 8  # of a prompt that are read
ARTICLES = ("a", "an", "the")
HEAD = 64  # channels of an attention head
SIGMA_MIN, SIGMA_MAX = 0.001, 1.0  # as of ComfyUI's flow models
FINGERPRINT: dict[str, str | int | float] = {  # what a predictor file remembers of this model
    "family": "AMEDPictures",
    "prediction": "CONST",  # ComfyUI's name for a flow
    "latent_channels": CHANNELS,
    "sigma_min": SIGMA_MIN,
    "sigma_max": SIGMA_MAX,
}
WEIGHTS = Path(__file__).with_name("pictures.safetensors")
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # of queries, keys, values (batch, heads, tokens, channels)


@dataclass(frozen=True)
class PicturesConfig:
    """The sizes of the networks, and the words and drawings they know."""

    vocabulary: tuple[str, ...]
    names: tuple[str, ...]  # of the drawings
    width: int = 256  # channels of the transformer
    depth: int = 5  # its blocks
    modulation: int = 64  # channels that carry the noise level and the prompt to every block
    vae: tuple[int, int, int] = (48, 80, 112)  # channels at 64x64, 32x32 and 16x16


class ResidualBlock(nn.Module):
    """Two convolutions beside a skip."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*_normalised(channels, channels), *_normalised(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, channels, h, w) to the same shape."""
        return x + self.layers(x)  # type: ignore[no-any-return]


def _normalised(channels: int, channels_out: int) -> tuple[nn.Module, ...]:
    return nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, channels_out, 3, padding=1)


def _larger(channels: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(channels, channels_out, 3, padding=1))


class PicturesVae(nn.Module):
    """Pictures (batch, 3, h, w) in [-1, 1] to latents (batch, 8, h / 8, w / 8) of unit variance, and back."""

    mean: Tensor
    std: Tensor
    preview: Tensor

    def __init__(self, channels: tuple[int, int, int]) -> None:
        super().__init__()
        fine, middle, coarse = channels
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(12, fine, 3, padding=1),
            ResidualBlock(fine),
            nn.Conv2d(fine, middle, 4, stride=2, padding=1),
            ResidualBlock(middle),
            nn.Conv2d(middle, coarse, 4, stride=2, padding=1),
            ResidualBlock(coarse),
            ResidualBlock(coarse),
            *_normalised(coarse, CHANNELS),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(CHANNELS, coarse, 3, padding=1),
            ResidualBlock(coarse),
            ResidualBlock(coarse),
            _larger(coarse, middle),
            ResidualBlock(middle),
            ResidualBlock(middle),
            _larger(middle, fine),
            ResidualBlock(fine),
            ResidualBlock(fine),
            *_normalised(fine, 12),
            nn.PixelShuffle(2),
        )
        self.register_buffer("mean", torch.zeros(1, CHANNELS, 1, 1))
        self.register_buffer("std", torch.ones(1, CHANNELS, 1, 1))
        # Latents to RGB in [-1, 1], as well as a linear map can: a row for each channel, then the constant.
        self.register_buffer("preview", torch.zeros(CHANNELS + 1, 3))

    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures (batch, 3, h, w) to latents (batch, 8, h / 8, w / 8)."""
        return (self.encoder(pictures) - self.mean) / self.std  # type: ignore[no-any-return]

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (batch, 8, h, w) to pictures (batch, 3, 8 h, 8 w)."""
        return self.decoder(latents * self.std + self.mean)  # type: ignore[no-any-return]


class Words(nn.Module):
    """A prompt's known words, the first 8 of them, each as a vector. No words are the unconditional prompt."""

    def __init__(self, vocabulary: Sequence[str], width: int) -> None:
        super().__init__()
        self.known = {word: number for number, word in enumerate(vocabulary, start=1)}
        self.vectors = nn.Embedding(len(vocabulary) + 1, width, padding_idx=0)

    def numbers(self, prompt: str) -> list[int]:
        """8 word numbers, 0 for none. Unknown words are passed over."""
        known = [self.known[word] for word in words_of(prompt) if word in self.known][:WORDS]
        return known + [0] * (WORDS - len(known))

    def forward(self, numbers: Tensor) -> Tensor:
        """(batch, 8) to (batch, 8, width)."""
        return self.vectors(numbers)  # type: ignore[no-any-return]


def words_of(text: str) -> list[str]:
    """The words of a prompt or a name, without articles."""
    return [word for word in re.findall(r"[a-z0-9]+", text.lower()) if word not in ARTICLES]


def grid_positions(height: int, width: int, channels: int, device: torch.device) -> Tensor:
    """Sine and cosine of each patch's row and column: (height * width, channels)."""
    count = channels // 4
    frequencies = torch.exp(-math.log(100.0) * torch.arange(count, device=device) / count)
    rows, columns = (torch.arange(size, device=device)[:, None] * frequencies for size in (height, width))
    of_rows = torch.cat([rows.sin(), rows.cos()], 1)[:, None].expand(height, width, -1)
    of_columns = torch.cat([columns.sin(), columns.cos()], 1)[None].expand(height, width, -1)
    return torch.cat([of_rows, of_columns], -1).reshape(height * width, channels)


class TransformerBlock(nn.Module):
    """Attention over patches and words, then a perceptron, both scaled, shifted and gated (Peebles and Xie 2023)."""

    def __init__(self, width: int, modulation: int) -> None:
        super().__init__()
        self.heads = width // HEAD
        self.norm_attention = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_perceptron = nn.LayerNorm(width, elementwise_affine=False)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.modulation = nn.Linear(modulation, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor, attention: Attention) -> Tensor:
        """x (batch, tokens, width) and condition (batch, modulation) to the shape of x."""
        scale, shift, gate, scale_2, shift_2, gate_2 = self.modulation(condition)[:, None].chunk(6, -1)
        qkv = self.qkv(self.norm_attention(x) * (1 + scale) + shift)
        q, k, v = qkv.unflatten(-1, (3, self.heads, HEAD)).permute(2, 0, 3, 1, 4)
        attended = attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate * self.out(attended)
        return x + gate_2 * self.perceptron(self.norm_perceptron(x) * (1 + scale_2) + shift_2)  # type: ignore[no-any-return]


class PicturesTransformer(nn.Module):
    """The velocity noise - x0 at x = (1 - sigma) x0 + sigma noise.

    `context` is (batch, tokens, width): the prompt's words as vectors, zeros for none.
    """

    frequencies: Tensor

    def __init__(self, config: PicturesConfig) -> None:
        super().__init__()
        width, modulation = config.width, config.modulation
        self.register_buffer("frequencies", torch.exp(-math.log(1e4) * torch.arange(64) / 64), persistent=False)
        self.patches = nn.Conv2d(CHANNELS, width, 2, stride=2)
        self.word_positions = nn.Parameter(0.02 * torch.randn(1, WORDS, width))
        self.noise_level = nn.Sequential(nn.Linear(128, width), nn.SiLU(), nn.Linear(width, modulation))
        self.prompt = nn.Linear(width, modulation)
        self.blocks = nn.ModuleList(TransformerBlock(width, modulation) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(modulation, 2 * width)
        self.head = nn.Linear(width, 4 * CHANNELS)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        context: Tensor,
        middle: Callable[[Tensor], Tensor] | None = None,
        attention: Attention = functional.scaled_dot_product_attention,
    ) -> Tensor:
        """Predict (batch, 8, h, w) from x of that shape, sigma (batch,) and context (batch, tokens, width).

        `middle` sees the patches (batch, width, h / 2, w / 2) halfway and may replace them.
        """
        height, width = x.shape[-2:]
        if height % 2 or width % 2:
            x = functional.pad(x, (0, width % 2, 0, height % 2), mode="replicate")
        grid = (x.shape[-2] // 2, x.shape[-1] // 2)
        patches = self.patches(x).flatten(2).transpose(1, 2)
        patches = patches + grid_positions(*grid, patches.shape[-1], x.device).to(x.dtype)
        count, tokens = patches.shape[1], context.shape[1]
        # Conditionings that were joined hold more than one prompt: each is counted from its first word.
        words = context + self.word_positions.repeat(1, -(-tokens // WORDS), 1)[:, :tokens]

        angles = 1000 * sigma.float()[:, None] * self.frequencies
        level = self.noise_level(torch.cat([angles.sin(), angles.cos()], 1).to(x.dtype))
        condition = functional.silu(level + self.prompt(context.sum(1)))

        y = torch.cat([patches, words], 1)
        for number, block in enumerate(self.blocks, start=1):
            y = block(y, condition, attention)
            if middle is not None and number == (len(self.blocks) + 1) // 2:
                image = middle(y[:, :count].transpose(1, 2).unflatten(2, grid))
                y = torch.cat([image.flatten(2).transpose(1, 2), y[:, count:]], 1)
        scale, shift = self.modulation(condition)[:, None].chunk(2, -1)
        y = self.head(self.norm(y[:, :count]) * (1 + scale) + shift)
        return functional.pixel_shuffle(y.transpose(1, 2).unflatten(2, grid), 2)[..., :height, :width]


class PicturesModel(nn.Module):
    """The three networks that a checkpoint holds: words, transformer and VAE."""

    def __init__(self, config: PicturesConfig) -> None:
        super().__init__()
        self.config = config
        self.words = Words(config.vocabulary, config.width)
        self.transformer = PicturesTransformer(config)
        self.vae = PicturesVae(config.vae)

    def context(self, prompts: Sequence[str]) -> Tensor:
        """What the transformer reads of each prompt, (prompts, 8, width)."""
        vectors = self.words.vectors
        numbers = torch.tensor([self.words.numbers(prompt) for prompt in prompts], device=vectors.weight.device)
        return self.words(numbers)  # type: ignore[no-any-return]


def load_pictures(path: Path = WEIGHTS) -> PicturesModel:
    """The bundled model in float32, not trainable. Raises FileNotFoundError where it was not installed."""
    if not path.exists():
        raise FileNotFoundError(f"The bundled model is missing: {path}. Reinstall this pack, or train it again.")
    with safe_open(path, framework="pt") as file:
        model = PicturesModel(config_of(file.metadata()))
        model.load_state_dict({name: file.get_tensor(name).float() for name in file.keys()})  # noqa: SIM118
    return model.requires_grad_(False).eval()


def metadata_of(config: PicturesConfig) -> dict[str, str]:
    """The sizes, words and names as the header of a weights file."""
    return {"model": "pictures", "config": json.dumps(asdict(config), separators=(",", ":"))}


def config_of(metadata: Mapping[str, str]) -> PicturesConfig:
    """The inverse of `metadata_of`."""
    values: dict[str, Any] = json.loads(metadata["config"])
    lists: dict[str, Any] = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return PicturesConfig(**(values | lists))


class PicturesDenoiser:
    """The bundled model as the core sees it: x (batch, 8, 16, 16) and sigma to (denoised, features).

    Row i of a run asks for a drawing by its name (`for_rows`), or for the prompt it was given
    (`for_prompts`); unbound, the model is unconditional. With cfg other than 1 each call is a guided
    one: uncond + cfg * (cond - uncond).
    """

    fingerprint = FINGERPRINT
    shape = SHAPE
    sigma_min, sigma_max = SIGMA_MIN, SIGMA_MAX
    flow = True
    sigmas = torch.arange(1, 1001) / 1000  # what ComfyUI counts its steps on

    def __init__(self, cfg: float = 1.0, model: PicturesModel | None = None) -> None:
        self.cfg = cfg
        self.model = model or load_pictures()
        self.prompts: tuple[str, ...] | None = None

    def for_rows(self, rows: Sequence[int]) -> "PicturesDenoiser":
        """The same model, asked for the drawings of samples number `rows`: neighbours are unlike each other."""
        names = self.model.config.names
        return self.for_prompts([names[(7919 * row + 13) % len(names)] for row in rows])

    def for_prompts(self, prompts: Sequence[str]) -> "PicturesDenoiser":
        """The same model, asked for one prompt per sample."""
        other = copy.copy(self)
        other.prompts = tuple(prompts)
        return other

    def __call__(self, x: Sample, sigma: Sigma) -> Answer:
        levels = sigma.to(x).reshape(-1).expand(len(x))
        context = self.model.context(self.prompts or [""] * len(x)).to(x)
        if self.cfg == 1 or self.prompts is None:
            return self._denoised(x, levels, context)
        both = (torch.cat([x, x]), torch.cat([levels, levels]), torch.cat([context, torch.zeros_like(context)]))
        denoised, features = self._denoised(*both)
        cond, uncond = denoised.chunk(2)
        guidance = cond - uncond
        # Features are of the positive rows, as in the paper.
        return uncond + self.cfg * guidance, features[: len(x)], guidance

    def conditional(self, x: Sample, sigma: Sigma) -> Answer:
        """The answer without guidance."""
        plain = copy.copy(self)
        plain.cfg = 1.0
        return plain(x, sigma)

    def images(self, samples: Sample) -> Tensor:
        """Latents (batch, 8, 16, 16) as pictures (batch, 3, 128, 128) in [-1, 1]."""
        return self.model.vae.decode(samples)

    def _denoised(self, x: Sample, levels: Tensor, context: Tensor) -> tuple[Sample, Tensor]:
        seen: list[Tensor] = []

        def look(h: Tensor) -> Tensor:
            seen.append(h.mean(1))
            return h

        velocity = self.model.transformer(x, levels, context, look)
        return x - levels[:, None, None, None] * velocity, seen[0]
