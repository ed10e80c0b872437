"""The bundled model: a small class-conditional U-Net that draws handwritten digits.

It is trained on the real scans of scikit-learn's `load_digits` (`scripts/train_digits.py`) and
preconditioned as in EDM (Karras et al. 2022, arXiv 2206.00364, Table 1), so that everything in
this package can be tried with no download and no GPU.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from .types import Answer, Features, Sample, Sigma

SHAPE = (1, 16, 16)
CLASSES = 10
NULL_CLASS = 10
SIGMA_MIN, SIGMA_MAX = 0.002, 80.0
SIGMA_DATA = 0.7  # about the standard deviation of the pixels, which lie in [-1, 1]
FINGERPRINT: dict[str, str | int | float] = {  # what a predictor file remembers of this model
    "family": "AMEDDigits",
    "prediction": "EDM",
    "latent_channels": 1,
    "sigma_min": SIGMA_MIN,
    "sigma_max": SIGMA_MAX,
}
WEIGHTS = Path(__file__).with_name("digits.safetensors")


class ResidualBlock(nn.Module):
    """Two convolutions, the second scaled and shifted by the noise level and the class."""

    def __init__(self, channels: int, channels_out: int, embedding: int) -> None:
        super().__init__()
        self.norm_in = nn.GroupNorm(8, channels)
        self.conv_in = nn.Conv2d(channels, channels_out, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * channels_out)
        self.norm_out = nn.GroupNorm(8, channels_out)
        self.conv_out = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        self.skip = nn.Conv2d(channels, channels_out, 1) if channels != channels_out else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x (batch, channels, h, w) and embedding (batch, embedding) to (batch, channels_out, h, w)."""
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv_in(functional.silu(self.norm_in(x)))
        h = self.conv_out(functional.silu(self.norm_out(h) * (1 + scale) + shift))
        return self.skip(x) + h  # type: ignore[no-any-return]


class SelfAttention(nn.Module):
    """Every position of the bottleneck looks at every other one."""

    def __init__(self, channels: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(8, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, channels, h, w) to the same shape."""
        batch, channels, height, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, 3, self.heads, channels // self.heads, height * width)
        q, k, v = qkv.transpose(-1, -2).unbind(1)
        # Written out, because PyTorch's fused kernel has no forward-mode derivative.
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        attended = (weights @ v).transpose(-1, -2).reshape(batch, channels, height, width)
        return x + self.out(attended)  # type: ignore[no-any-return]


class DigitsUNet(nn.Module):
    """The raw network F of EDM: (scaled x, ln(sigma) / 4, class) to a prediction of x's shape.

    Pixels are folded 2x2 into channels, so the two resolutions are 8x8 and 4x4.
    `context` is (batch, tokens, 11): a distribution over the ten digits and the null class,
    averaged over tokens, which is how a ComfyUI CONDITIONING carries a class.
    """

    frequencies: Tensor

    def __init__(self, channels: int = 48, bottleneck: int = 72, embedding: int = 96) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.linspace(-1.0, 3.0, 16).exp(), persistent=False)
        self.noise_embedding = nn.Linear(32, embedding)
        self.class_embedding = nn.Linear(CLASSES + 1, embedding, bias=False)
        self.embedding = nn.Linear(embedding, embedding)
        self.stem = nn.Conv2d(4, channels, 3, padding=1)
        self.down_1 = ResidualBlock(channels, channels, embedding)
        self.down_2 = ResidualBlock(channels, channels, embedding)
        self.shrink = nn.Conv2d(channels, bottleneck, 3, stride=2, padding=1)
        self.down_3 = ResidualBlock(bottleneck, bottleneck, embedding)
        self.middle_1 = ResidualBlock(bottleneck, bottleneck, embedding)
        self.middle_attention = SelfAttention(bottleneck)
        self.middle_2 = ResidualBlock(bottleneck, bottleneck, embedding)
        self.up_3 = ResidualBlock(2 * bottleneck, bottleneck, embedding)
        self.up_2 = ResidualBlock(bottleneck + channels, channels, embedding)
        self.up_1 = ResidualBlock(2 * channels, channels, embedding)
        self.norm = nn.GroupNorm(8, channels)
        self.head = nn.Conv2d(channels, 4, 3, padding=1)
        nn.init.zeros_(self.head.weight)

    def forward(
        self, x: Tensor, noise: Tensor, context: Tensor, bottleneck: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Predict (batch, 1, h, w) from x of that shape, noise (batch, ...) and context (batch, tokens, 11).

        `bottleneck` sees the middle activations (batch, 72, h / 4, w / 4) and may replace them.
        """
        angles = noise.reshape(-1, 1) * self.frequencies
        emb = self.noise_embedding(torch.cat([angles.cos(), angles.sin()], 1))
        emb = functional.silu(emb + self.class_embedding(context.mean(1)))
        emb = functional.silu(self.embedding(emb))

        skip_1 = self.down_1(self.stem(functional.pixel_unshuffle(x, 2)), emb)
        skip_2 = self.down_2(skip_1, emb)
        skip_3 = self.down_3(self.shrink(skip_2), emb)
        h = self.middle_2(self.middle_attention(self.middle_1(skip_3, emb)), emb)
        if bottleneck is not None:
            h = bottleneck(h)
        h = self.up_3(torch.cat([h, skip_3], 1), emb)
        h = functional.interpolate(h, scale_factor=2, mode="nearest")
        h = self.up_2(torch.cat([h, skip_2], 1), emb)
        h = self.up_1(torch.cat([h, skip_1], 1), emb)
        return functional.pixel_shuffle(self.head(functional.silu(self.norm(h))), 2)


def precondition(x: Sample, sigma: Sigma) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """c_in, c_noise, c_skip and c_out of EDM's Table 1, each (batch, 1, 1, 1)."""
    sigma = sigma.to(x).expand(x.shape[0], 1, 1, 1)
    total = sigma**2 + SIGMA_DATA**2
    return total**-0.5, sigma.log() / 4, SIGMA_DATA**2 / total, sigma * SIGMA_DATA * total**-0.5


def one_hot(labels: Sequence[int] | Tensor) -> Tensor:
    """Class labels (10 is the null class) as a context (batch, 1, 11)."""
    return functional.one_hot(torch.as_tensor(labels), CLASSES + 1).float()[:, None]


def load_images() -> tuple[Sample, Tensor]:
    """The 1,797 scans, enlarged smoothly from 8x8 to (n, 1, 16, 16) in [-1, 1], and their labels (n,).

    Raises ImportError without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits  # noqa: PLC0415 - not needed to draw digits
    except ImportError as error:
        raise ImportError("The real digits come with scikit-learn: pip install scikit-learn") from error
    scans = load_digits()
    images = torch.as_tensor(scans.images, dtype=torch.float32)[:, None] / 8 - 1
    images = functional.interpolate(images, size=SHAPE[1:], mode="bicubic", align_corners=False)
    return images.clamp(-1, 1), torch.as_tensor(scans.target)


class DigitsDenoiser:
    """The bundled model as the core sees it: x (batch, 1, 16, 16) and sigma to (denoised, features).

    Row i of a run asks for the digit i mod 10 (`for_rows`); unbound, the model is unconditional.
    With cfg other than 1 each call is a guided one: uncond + cfg * (cond - uncond).
    """

    fingerprint = FINGERPRINT
    shape = SHAPE
    sigma_min, sigma_max = SIGMA_MIN, SIGMA_MAX

    def __init__(
        self, cfg: float = 1.0, labels: Sequence[int] | None = None, network: DigitsUNet | None = None
    ) -> None:
        self.cfg = cfg
        self.labels = labels
        self.network = network or load_network()

    def for_rows(self, rows: Sequence[int]) -> "DigitsDenoiser":
        """The same model, asked for the digits of samples number `rows`."""
        return DigitsDenoiser(self.cfg, [row % CLASSES for row in rows], self.network)

    def __call__(self, x: Sample, sigma: Sigma) -> Answer:
        labels = [NULL_CLASS] * len(x) if self.labels is None else list(self.labels)
        context = one_hot(labels).to(x)
        if self.cfg == 1 or self.labels is None:
            return self._denoise(x, sigma, context)
        null = one_hot([NULL_CLASS] * len(x)).to(x)
        sigma = sigma.expand(len(x), 1, 1, 1)
        denoised, features = self._denoise(torch.cat([x, x]), torch.cat([sigma, sigma]), torch.cat([context, null]))
        cond, uncond = denoised.chunk(2)
        guidance = cond - uncond
        # Features are of the positive rows, as in the paper.
        return uncond + self.cfg * guidance, features[: len(x)], guidance

    def conditional(self, x: Sample, sigma: Sigma) -> Answer:
        """The answer without guidance."""
        return DigitsDenoiser(1.0, self.labels, self.network)(x, sigma)

    def _denoise(self, x: Sample, sigma: Sigma, context: Tensor) -> tuple[Sample, Features]:
        middle: list[Tensor] = []

        def look(h: Tensor) -> Tensor:
            middle.append(h.mean(1))
            return h

        c_in, c_noise, c_skip, c_out = precondition(x, sigma)
        denoised = c_skip * x + c_out * self.network((c_in * x).to(context), c_noise, context, look)
        return denoised, middle[0]

    def data(self, n: int) -> Sample:
        """Real samples (n, 1, 16, 16), repeated if there are fewer, for the Frechet distance."""
        images, _ = load_images()
        return images[torch.arange(n) % len(images)]


def load_network(path: Path = WEIGHTS) -> DigitsUNet:
    """The bundled network in float32, not trainable. Raises FileNotFoundError where it was not installed."""
    if not path.exists():
        raise FileNotFoundError(f"The bundled model is missing: {path}. Reinstall this pack, or train it again.")
    network = DigitsUNet()
    network.load_state_dict({name: weight.float() for name, weight in load_file(path).items()})
    network.requires_grad_(False).eval()
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]
