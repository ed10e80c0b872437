"""A second model to measure on: a small U-Net that draws coloured shapes, trained as a flow model.

Its data are drawn by a procedure (`draw`), so there is as much of them as one likes, and its noise levels
end at 1: x = (1 - sigma) x0 + sigma noise (rectified flow; Liu et al. 2022, Lipman et al. 2022).
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1]))
from amed_core.digits import NULL_CLASS, DigitsUNet, one_hot
from amed_core.types import Answer, Features, Sample, Sigma

SHAPE = (3, 16, 16)
SHAPES = ("disc", "ring", "square", "triangle", "cross")
SIGMA_MIN, SIGMA_MAX = 0.001, 1.0
DATA_STD = 0.45  # about that of the pixels, which lie in [-1, 1]
WEIGHTS = Path(__file__).with_name("colours.safetensors")


def draw(labels: Tensor, generator: torch.Generator) -> Sample:
    """Images (n, 3, 16, 16) in [-1, 1] of the shapes `labels` (n,), with smooth edges, on two-coloured grounds."""
    n, size = len(labels), SHAPE[-1]

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    pixels = (torch.arange(size) + 0.5) / size * 2 - 1
    y, x = (grid[None] for grid in torch.meshgrid(pixels, pixels, indexing="ij"))
    angle = uniform(0, 2 * math.pi, 1, 1)
    x, y = x - uniform(-0.35, 0.35, 1, 1), y - uniform(-0.35, 0.35, 1, 1)
    x, y = (angle.cos() * x + angle.sin() * y, angle.cos() * y - angle.sin() * x)
    radius, far = uniform(0.35, 0.6, 1, 1), (x**2 + y**2).sqrt()
    # Signed distances: negative inside.
    thirds = [math.cos(a) * x + math.sin(a) * y for a in (math.pi / 2, math.pi * 7 / 6, math.pi * 11 / 6)]
    distances = torch.stack(
        [
            far - radius,
            (far - 0.8 * radius).abs() - 0.3 * radius,
            torch.maximum(x.abs(), y.abs()) - 0.85 * radius,
            torch.stack(thirds).amax(0) - 0.6 * radius,
            torch.minimum(
                torch.maximum(x.abs() - radius, y.abs() - 0.33 * radius),
                torch.maximum(y.abs() - radius, x.abs() - 0.33 * radius),
            ),
        ]
    )
    distance = distances[labels, torch.arange(n)]
    inside = (0.5 - distance * size / 2).clamp(0, 1)[:, None]
    direction = uniform(0, 2 * math.pi, 1, 1)
    ramp = ((direction.cos() * pixels + direction.sin() * pixels[:, None]) / 2.8 + 0.5)[:, None]
    shape, near, opposite = (uniform(-1, 1, 3, 1, 1) for _ in range(3))
    return torch.lerp(torch.lerp(near, opposite, ramp), shape, inside)


class ColoursUNet(DigitsUNet):
    """The digits' network for three channels; its output is the velocity, noise - x0."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4 * SHAPE[0], self.stem.out_channels, 3, padding=1)
        self.head = nn.Conv2d(self.head.in_channels, 4 * SHAPE[0], 3, padding=1)
        nn.init.zeros_(self.head.weight)


def scaled(x: Sample, sigma: Sigma) -> tuple[Sample, Tensor]:
    """What the network takes: x at unit scale, and its noise level stretched over the embedding's range."""
    sigma = sigma.to(x).expand(len(x), 1, 1, 1)
    return x / ((1 - sigma) ** 2 * DATA_STD**2 + sigma**2).sqrt(), 4 * sigma


class ColoursDenoiser:
    """The model as the core sees it: x (batch, 3, 16, 16) and sigma in (0, 1] to (denoised, features).

    Row i of a run asks for the shape i mod 5 (`for_rows`); with cfg other than 1 each call is a guided one.
    """

    shape = SHAPE
    sigma_min, sigma_max = SIGMA_MIN, SIGMA_MAX
    sigmas = torch.arange(1, 1001) / 1000  # what ComfyUI counts its steps on
    flow = True
    fingerprint = {  # noqa: RUF012
        "family": "AMEDColours",
        "prediction": "CONST",
        "latent_channels": SHAPE[0],
        "sigma_min": SIGMA_MIN,
        "sigma_max": SIGMA_MAX,
    }

    def __init__(
        self, cfg: float = 1.0, labels: Sequence[int] | None = None, network: ColoursUNet | None = None
    ) -> None:
        self.cfg = cfg
        self.labels = labels
        self.network = network or load_network()

    def for_rows(self, rows: Sequence[int]) -> "ColoursDenoiser":
        """The same model, asked for the shapes of samples number `rows`."""
        return ColoursDenoiser(self.cfg, [row % len(SHAPES) for row in rows], self.network)

    def __call__(self, x: Sample, sigma: Sigma) -> Answer:
        labels = [NULL_CLASS] * len(x) if self.labels is None else list(self.labels)
        context, sigma = one_hot(labels).to(x), sigma.to(x).expand(len(x), 1, 1, 1)
        if self.cfg == 1 or self.labels is None:
            return self._denoise(x, sigma, context)
        null = one_hot([NULL_CLASS] * len(x)).to(x)
        denoised, features = self._denoise(torch.cat([x, x]), torch.cat([sigma, sigma]), torch.cat([context, null]))
        cond, uncond = denoised.chunk(2)
        return uncond + self.cfg * (cond - uncond), features[: len(x)], cond - uncond

    def conditional(self, x: Sample, sigma: Sigma) -> Answer:
        """The answer without guidance."""
        return ColoursDenoiser(1.0, self.labels, self.network)(x, sigma)

    def _denoise(self, x: Sample, sigma: Sigma, context: Tensor) -> tuple[Sample, Features]:
        middle: list[Tensor] = []

        def look(h: Tensor) -> Tensor:
            middle.append(h.mean(1))
            return h

        return x - sigma * self.network(*scaled(x, sigma), context, look), middle[0]

    def data(self, n: int) -> Sample:
        """n images of the data set, for the Frechet distance; not among those that were trained on."""
        return draw(torch.arange(n) % len(SHAPES), torch.Generator().manual_seed(2**40))


def load_network(path: Path = WEIGHTS) -> ColoursUNet:
    """The trained network in float32."""
    network = ColoursUNet()
    network.load_state_dict({name: weight.float() for name, weight in load_file(path).items()})
    return network.requires_grad_(False).eval().to(memory_format=torch.channels_last)
