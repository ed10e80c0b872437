"""Train the bundled digits model on scikit-learn's `load_digits` and save it in float16.

    python scripts/train_digits.py --minutes 35

EDM's training loss (Karras et al. 2022, section 5): a log-normal noise level per image, weighted
so that the network's target has unit variance at every level.
"""

import argparse
import copy
import math
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

sys.path.append(str(Path(__file__).parents[1]))
from amed_core import digits

P_MEAN, P_STD = -0.6, 1.4  # of ln(sigma); wider than EDM's, because the images are small
NULL_PROBABILITY = 0.1
BATCH = 128


def loss(network: digits.DigitsUNet, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """EDM's weighted denoising loss, averaged over pixels, with some labels dropped for guidance."""
    batch = len(images)
    sigma = torch.exp(P_MEAN + P_STD * torch.randn(batch, 1, 1, 1, generator=generator))
    x = images + sigma * torch.randn(images.shape, generator=generator)
    dropped = torch.rand(batch, generator=generator) < NULL_PROBABILITY
    context = digits.one_hot(labels.masked_fill(dropped, digits.NULL_CLASS))
    c_in, c_noise, c_skip, c_out = digits.precondition(x, sigma)
    predicted = network(c_in * x, c_noise, context)
    return (predicted - (images - c_skip * x) / c_out).square().mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=35.0, help="how long to train; the learning rate follows it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=digits.WEIGHTS)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)
    images, labels = digits.load_images()
    network = digits.DigitsUNet().to(memory_format=torch.channels_last)
    average = copy.deepcopy(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.01)

    begin, steps, smoothed = time.monotonic(), 0, math.nan
    bar = tqdm(total=100, unit="%", bar_format="{l_bar}{bar}| {elapsed}<{remaining} {postfix}")
    while (done := (time.monotonic() - begin) / (60 * arguments.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, steps / 200) * 0.5 * (1 + math.cos(math.pi * done))
        batch = torch.randint(len(images), (BATCH,), generator=generator)
        optimizer.zero_grad()
        value = loss(network, images[batch], labels[batch], generator)
        value.backward()
        optimizer.step()
        steps += 1
        decay = min(0.999, steps / (steps + 10))
        with torch.no_grad():
            for mean, parameter in zip(average.parameters(), network.parameters(), strict=True):
                mean.lerp_(parameter, 1 - decay)
        smoothed = value.item() if steps == 1 else 0.99 * smoothed + 0.01 * value.item()
        bar.set_postfix_str(f"{steps} steps, loss {smoothed:.4f}")
        bar.update(100 * done - bar.n)
        if steps % 1000 == 0:
            save(average, arguments.output)
    save(average, arguments.output)


def save(network: digits.DigitsUNet, path: Path) -> None:
    """Write the weights in half precision: the rounded network is the model from here on."""
    weights = {name: weight.detach().half().contiguous() for name, weight in network.state_dict().items()}
    save_file(weights, path, metadata={"model": "digits", "data": "scikit-learn load_digits, 8x8 enlarged to 16x16"})


if __name__ == "__main__":
    main()
