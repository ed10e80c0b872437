"""What sampling with a predictor costs beside the model, and what this pack costs at ComfyUI's start.

    python benchmarks/cost.py                                 # toy models on one core of the CPU
    python benchmarks/cost.py --families pictures             # the bundled text-to-picture model

On a GPU, and at the sizes of SDXL and Flux: gpu.py.

"ours" is amed_ipndm with an untrained predictor, "stock" ComfyUI's ipndm, both with 5 model calls at cfg 3, run in
turns; "ratio" is the median of ours / stock over pairs, with its 95 % interval (bootstrap), and "overhead" the
difference of the medians per run.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path += [str(Path(__file__).parents[1] / "tests" / "nodes"), str(Path(__file__).parents[1])]
from comfyui import COMFYUI, load_pack
from families import make
from toys import apply, k_sample, predictor

CHANNELS = {"sdxl": 4, "flux": 16}
BUNDLED = "pictures"  # has the size that it has
WIDTHS = (10, 10, 10, 13, 8, 17)

IMPORT = """
import sys, time, asyncio
sys.path.insert(0, {comfyui!r})
import comfy.cli_args
comfy.cli_args.args.cpu = True
import utils.install_util, execution, server, nodes
from importlib.util import spec_from_file_location, module_from_spec
begin = time.perf_counter()
spec = spec_from_file_location("amed_pack", {pack!r})
module = module_from_spec(spec)
sys.modules["amed_pack"] = module
spec.loader.exec_module(module)
extension = asyncio.run(module.comfy_entrypoint())
for node in asyncio.run(extension.get_node_list()):
    node.GET_SCHEMA()
print((time.perf_counter() - begin) * 1000)
"""


def import_milliseconds(repeats: int = 5) -> list[float]:
    """From import to every node's schema, in a fresh process where ComfyUI's own modules are loaded."""
    code = IMPORT.format(comfyui=str(COMFYUI), pack=str(Path(__file__).parents[1] / "__init__.py"))
    command = [sys.executable, "-c", code]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(repeats)]
    return sorted(float(run.stdout.strip().splitlines()[-1]) for run in runs)


def seconds(work: Callable[[], Any]) -> float:
    """How long it takes, on a GPU, too."""
    finish()
    begin = time.perf_counter()
    work()
    finish()
    return time.perf_counter() - begin


def finish() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interval(ratios: np.ndarray) -> tuple[float, float, float]:
    """The median, and its 95 % interval."""
    drawn = np.random.default_rng(0).integers(len(ratios), size=(2000, len(ratios)))
    low, high = np.percentile(np.median(ratios[drawn], axis=1), [2.5, 97.5])
    return float(np.median(ratios)), float(low), float(high)


def compare(ours: Callable[[], Any], stock: Callable[[], Any], pairs: int) -> tuple[float, float, float, float, float]:
    """Medians of both in seconds, and the median ratio with its 95 % interval."""
    ours(), stock()
    a, b = [], []
    for pair in range(pairs):
        for work, times in ((ours, a), (stock, b)) if pair % 2 else ((stock, b), (ours, a)):
            times.append(seconds(work))
    return statistics.median(a), statistics.median(b), *interval(np.array(a) / np.array(b))


def family_of(pack: Any, name: str, latent: int) -> Any:
    """A toy, or the bundled text-to-picture model."""
    if name == BUNDLED:
        from benchmarks.comfyui_models import checkpoint  # noqa: PLC0415 - needs ComfyUI

        return checkpoint(pack, side=latent)
    return make(name, batch=1, shape=(CHANNELS[name], latent, latent))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=["sdxl", "flux"], choices=[*CHANNELS, BUNDLED])
    parser.add_argument("--latents", type=int, nargs="+", default=[], help="side lengths (default: 16 32)")
    parser.add_argument("--pairs", type=int, default=40, help="runs of each")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pack = load_pack()
    if not os.environ.get("AMED_GPU"):
        times = import_milliseconds()
        print(f"at ComfyUI's start: {statistics.median(times):.0f} ms ({times[0]:.0f} to {times[-1]:.0f})")
    columns = ("latent", "ours ms", "stock ms", "overhead ms", "ratio", "95 %")
    print(f"{'family':8}" + "".join(f"{column:>{width}}" for column, width in zip(columns, WIDTHS, strict=True)))
    for name in arguments.families:
        for latent in arguments.latents or [16, 32]:
            family = family_of(pack, name, latent)
            applied = apply(pack, family, predictor(pack, family, "amed_ipndm", guidance=3.0))

            def ours() -> Any:
                return k_sample(family, applied, 5, 3.0, "amed_ipndm", "amed")  # noqa: B023

            def stock() -> Any:
                return k_sample(family, family.model, 5, 3.0, "ipndm", "simple")  # noqa: B023

            a, b, ratio, low, high = compare(ours, stock, arguments.pairs)
            cells = (f"{latent}x{latent}", f"{a * 1e3:.1f}", f"{b * 1e3:.1f}", f"{(a - b) * 1e3:.1f}", f"{ratio:.3f}")
            cells += (f"{low:.3f} to {high:.3f}",)
            print(f"{name:8}" + "".join(f"{c:>{width}}" for c, width in zip(cells, WIDTHS, strict=True)), flush=True)


if __name__ == "__main__":
    main()
