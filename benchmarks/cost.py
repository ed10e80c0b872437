"""What sampling with a predictor costs beside the model, and what this pack costs at ComfyUI's start.

    python benchmarks/cost.py                                 # toy models on one core of the CPU
    python benchmarks/cost.py --families pictures             # the bundled text-to-picture model
    AMED_GPU=1 python benchmarks/cost.py --real               # real shapes of SDXL and Flux, random weights, on a GPU

"ours" is amed_ipndm with an untrained predictor, "stock" ComfyUI's ipndm, both with 5 model calls at cfg 3, run in
turns; "ratio" is the median of ours / stock over pairs, with its 95 % interval (bootstrap), and "overhead" the
difference of the medians per run. On a GPU "waits" counts the operations of one run, after its first model call, that
made the host wait (torch.cuda.set_sync_debug_mode).
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path += [str(Path(__file__).parents[1] / "tests" / "nodes"), str(Path(__file__).parents[1])]
from comfyui import COMFYUI, load_pack
from families import Family, make
from toys import apply, k_sample, predictor

REAL: dict[str, dict[str, Any]] = {  # what ComfyUI detects in the released files
    "sdxl": {
        "model_channels": 320,
        "num_res_blocks": [2, 2, 2],
        "channel_mult": [1, 2, 4],
        "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
        "transformer_depth_middle": 10,
        "context_dim": 32,
    },
    "flux": {
        "hidden_size": 3072,
        "mlp_ratio": 4.0,
        "num_heads": 24,
        "depth": 19,
        "depth_single_blocks": 38,
        "axes_dim": [16, 56, 56],
    },
}
CHANNELS = {"sdxl": 4, "flux": 16}
BUNDLED = "pictures"  # has the size that it has
WIDTHS = (10, 10, 10, 13, 8, 17, 7)

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


def finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(work: Callable[[], Any]) -> float:
    finish()
    begin = time.perf_counter()
    work()
    finish()
    return time.perf_counter() - begin


def compare(ours: Callable[[], Any], stock: Callable[[], Any], pairs: int) -> tuple[float, float, float, float, float]:
    """Medians of both in seconds, and the median ratio with its 95 % interval."""
    ours(), stock()
    a, b = [], []
    for pair in range(pairs):
        for work, times in ((ours, a), (stock, b)) if pair % 2 else ((stock, b), (ours, a)):
            times.append(seconds(work))
    ratios = np.array(a) / np.array(b)
    drawn = np.random.default_rng(0).integers(pairs, size=(2000, pairs))
    low, high = np.percentile(np.median(ratios[drawn], axis=1), [2.5, 97.5])
    return statistics.median(a), statistics.median(b), float(np.median(ratios)), float(low), float(high)


def waits(work: Callable[..., Any]) -> int:
    """How often the host waited for the GPU after the first model call."""

    def listen(step: int, *heard: Any) -> None:
        del heard
        torch.cuda.set_sync_debug_mode("warn" if step < 4 else "default")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        work(callback=listen)
    return sum("synchroniz" in str(warning.message) for warning in caught)


def real(name: str, latent: int) -> Family:
    """A model of the released shape with random weights in half precision."""
    import comfy.model_management as mm  # noqa: PLC0415

    dtype = torch.bfloat16 if name == "flux" or mm.cpu_mode() else torch.float16
    return make(name, batch=1, shape=(CHANNELS[name], latent, latent), dtype=dtype, **REAL[name])


def family_of(pack: Any, name: str, latent: int, at_real_size: bool) -> Any:
    """A toy, a model of the released shape, or the bundled text-to-picture model."""
    if name == BUNDLED:
        from benchmarks.comfyui_models import checkpoint  # noqa: PLC0415 - needs ComfyUI

        return checkpoint(pack, side=latent)
    return real(name, latent) if at_real_size else make(name, batch=1, shape=(CHANNELS[name], latent, latent))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=["sdxl", "flux"], choices=[*sorted(REAL), BUNDLED])
    parser.add_argument("--latents", type=int, nargs="+", default=[], help="side lengths (default: 16 32, real: 128)")
    parser.add_argument("--real", action="store_true", help="real shapes; needs about 30 GB of memory for Flux")
    parser.add_argument("--pairs", type=int, default=40, help="runs of each")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pack = load_pack()
    if not os.environ.get("AMED_GPU"):
        times = import_milliseconds()
        print(f"at ComfyUI's start: {statistics.median(times):.0f} ms ({times[0]:.0f} to {times[-1]:.0f})")
    columns = ("latent", "ours ms", "stock ms", "overhead ms", "ratio", "95 %", "waits")
    print(f"{'family':8}" + "".join(f"{column:>{width}}" for column, width in zip(columns, WIDTHS, strict=True)))
    for name in arguments.families:
        for latent in arguments.latents or ([128] if arguments.real else [16, 32]):
            family = family_of(pack, name, latent, arguments.real)
            applied = apply(pack, family, predictor(pack, family, "amed_ipndm", guidance=3.0))

            def ours(**more: Any) -> Any:
                return k_sample(family, applied, 5, 3.0, "amed_ipndm", "amed", **more)  # noqa: B023

            def stock() -> Any:
                return k_sample(family, family.model, 5, 3.0, "ipndm", "simple")  # noqa: B023

            a, b, ratio, low, high = compare(ours, stock, arguments.pairs)
            waited = str(waits(ours)) if torch.cuda.is_available() else "-"
            cells = (f"{latent}x{latent}", f"{a * 1e3:.1f}", f"{b * 1e3:.1f}", f"{(a - b) * 1e3:.1f}", f"{ratio:.3f}")
            cells += (f"{low:.3f} to {high:.3f}", waited)
            print(f"{name:8}" + "".join(f"{c:>{width}}" for c, width in zip(cells, WIDTHS, strict=True)), flush=True)


if __name__ == "__main__":
    main()
