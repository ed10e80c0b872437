"""Train the benchmarks' colour model and save it in float16.

    python scripts/train_colours.py --minutes 25

Flow matching: a uniform noise level per image, and the squared error of the velocity. Every image is a new one.
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
from amed_core.digits import NULL_CLASS, one_hot
from benchmarks import colours

NULL_PROBABILITY = 0.12
BATCH = 64


def loss(network: colours.ColoursUNet, generator: torch.Generator) -> Tensor:
    """The velocity's squared error on new images, with some labels dropped for guidance."""
    labels = torch.randint(len(colours.SHAPES), (BATCH,), generator=generator)
    images = colours.draw(labels, generator)
    sigma = torch.rand(BATCH, 1, 1, 1, generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    dropped = torch.rand(BATCH, generator=generator) < NULL_PROBABILITY
    context = one_hot(labels.masked_fill(dropped, NULL_CLASS))
    predicted = network(*colours.scaled(torch.lerp(images, noise, sigma), sigma), context)
    return (predicted - (noise - images)).square().mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=25.0, help="how long to train; the learning rate follows it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=colours.WEIGHTS)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)
    network = colours.ColoursUNet().to(memory_format=torch.channels_last)
    average = copy.deepcopy(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=0.01)
    begin, steps, smoothed = time.monotonic(), 0, math.nan
    bar = tqdm(total=100, unit="%", bar_format="{l_bar}{bar}| {elapsed}<{remaining} {postfix}")
    while (done := (time.monotonic() - begin) / (60 * arguments.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (steps + 1) / 200) * 0.5 * (1 + math.cos(math.pi * done))
        optimizer.zero_grad()
        value = loss(network, generator)
        value.backward()
        optimizer.step()
        steps += 1
        decay = min(0.999, steps / (steps + 10))
        with torch.no_grad():
            for mean, parameter in zip(average.parameters(), network.parameters(), strict=True):
                mean.lerp_(parameter, 1 - decay)
        smoothed = value.item() if steps == 1 else 0.99 * smoothed + 0.01 * value.item()
        bar.set_postfix_str(f"{steps} steps, loss {smoothed:.4f}", refresh=False)
        bar.update(100 * done - bar.n)
        if steps % 500 == 0:
            save(average, arguments.output)
    save(average, arguments.output)


def save(network: colours.ColoursUNet, path: Path) -> None:
    """Write the weights in half precision: the rounded network is the model from here on."""
    weights = {name: weight.detach().half().contiguous() for name, weight in network.state_dict().items()}
    save_file(weights, path, metadata={"model": "colours", "data": "drawn by benchmarks/colours.py"})


if __name__ == "__main__":
    main()
