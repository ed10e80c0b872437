"""What a fit of a video model takes of memory: the most of its process, and the state it leaves at every event.

    python benchmarks/video.py                                   # 16 trajectories of 16 x 21 x 60 x 104, in 5 calls
    python benchmarks/video.py --shape 16 21 30 52               # a quarter of it
    python benchmarks/video.py --device cuda                     # the model on a GPU, whose memory is printed, too
    python benchmarks/video.py --precision                       # what paths in half precision, and fewer of them, cost

The model is a Gaussian in closed form, which itself takes no memory to speak of: what is measured is the fit's own.
Each line is a process of its own. "sample" is one latent; "above" is the most memory above that of the loaded program.
"""

import argparse
import math
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))
from amed_core.config import PredictorConfig
from amed_core.files import save_state
from amed_core.fit.efforts import EFFORTS, settings_of
from amed_core.fit.learner import Learner
from amed_core.fit.make import facts_of, make_fit, make_set
from amed_core.fit.protocol import Fit, FitConfig
from amed_core.fit.runs import PATHS
from amed_core.fit.several import Use
from amed_core.fit.targets import rmse
from amed_core.fit.teacher import path_bytes
from amed_core.fit.trajectories import Metered, gaussian
from amed_core.samplers import MULTISTEP_STUDENT, ModelFacts, student_config
from amed_core.types import Answer, Sample, Sigma, Source
from benchmarks.colours import ColoursDenoiser
from benchmarks.fields import FieldsDenoiser
from benchmarks.sizes import JUDGED_FROM, Held

SIGMA_MIN, SIGMA_MAX = 0.001, 1.0
SHAPE = (16, 21, 60, 104)  # Wan 2.1 at 832x480, 81 frames
IMAGES = (0.75, 0.5, 0.3)
LEAST_FREE = 3 * 2**30  # bytes: with less left on the machine a run is given up


class Model:
    """Data N(0, std^2), a std for each of four stripes along the width; in place where it can be, to be cheap."""

    def __init__(self, shape: Sequence[int], guided: bool, device: str) -> None:
        stripes = torch.tensor([0.05, 0.3, 1.0, 0.1], device=device)
        self.variance = stripes.repeat_interleave(-(-shape[-1] // 4))[: shape[-1]]
        self.guided = guided

    def __call__(self, x: Sample, sigma: Sigma) -> Answer:
        if available() < LEAST_FREE:
            raise MemoryError("Less than 3 GB of memory are left on this machine.")
        signal = 1 - sigma
        denoised = x * (signal * self.variance / (signal**2 * self.variance + sigma**2))
        # No Gaussian is hard: a bend that depends on where a sample lies makes the ODE one that solvers err on.
        denoised += 0.1 * signal * (2 * denoised).tanh_()
        return (denoised, None, 0.1 * denoised) if self.guided else denoised


def available() -> int:
    """Bytes of memory that the machine has left."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def most() -> float:
    """The most memory that this process ever had, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def gpu_most() -> float:
    """The most memory that tensors ever had on a GPU, in GB; 0 without one."""
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0


def config_of(calls: int, guided: bool) -> PredictorConfig:
    """Of a flow model's student."""
    facts = ModelFacts(SIGMA_MIN, SIGMA_MAX, flow=True, guided=guided)
    return student_config(MULTISTEP_STUDENT, calls, facts, guidance=3.0 if guided else 1.0)


def source_of(shape: Sequence[int], guided: bool, device: str) -> Source:
    """The model and its noise on a device."""
    return gaussian(Model(shape, guided, device), tuple(shape), SIGMA_MAX, device=device)


def fit_of(kind: str, shape: Sequence[int], changes: dict[str, int], device: str) -> Fit:
    """A fit by its kind: an effort, "guided" for a standard one of a guided model, or a set."""
    guided = "guided" in kind
    source = source_of(shape, guided, device)

    def settings(calls: int, uses: int = 1) -> FitConfig:
        effort = next((one for one in EFFORTS if one in kind), "standard")
        return replace(settings_of(effort, calls, uses), **changes)

    if "set" not in kind:
        calls = 10 if "10" in kind else 5
        return make_fit(config_of(calls, guided), settings(calls), source, device=device)
    numbers = (5, 10)
    uses = [Use(calls, level) for level in (0.0, *IMAGES) for calls in numbers]
    return make_set(uses, lambda calls: config_of(calls, guided), lambda calls: settings(calls, len(numbers)), source)


def fitted(
    kind: str, shape: Sequence[int], changes: dict[str, int], device: str
) -> tuple[float, float, float, list[int], int, float]:
    """Memory before and at most, in GB, a GPU's, the states' sizes at all events, sample calls, the error's part."""
    torch.set_num_threads(1)
    torch.zeros(1, device=device)  # so that what CUDA takes is the program's own
    loaded, states = most(), []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        if kind == "learner":
            learner, model = Learner(config_of(5, False)), Metered(source_of(shape, False, device))
            for number in range(2):
                x, denoiser = model(range(number, number + 1))
                learner.learn(denoiser, x, learner.taught(denoiser, x, half=True))
                save_state(path, learner.state_dict())
                states.append(path.stat().st_size)
            return loaded, most(), gpu_most(), states, model.calls, learner.held_out_ratio or 0.0
        fit = fit_of(kind, shape, changes, device)
        for _ in fit.events():
            save_state(path, fit.state_dict())
            states.append(path.stat().st_size)
        found = fit.summary()
        return loaded, most(), gpu_most(), states, fit.model_calls, 1 - (found.gain or 0.0)


@torch.no_grad()
def precision(samples: int, seeds: Sequence[int]) -> None:
    """Errors of fits in 5 calls from paths in full precision, in half, and of a quarter of all trajectories."""
    for model in (FieldsDenoiser(), ColoursDenoiser()):
        held = Held(model, JUDGED_FROM, samples, 16)
        config = student_config(MULTISTEP_STUDENT, 5, facts_of(model))
        usual = settings_of("standard", 5)
        each = path_bytes(torch.zeros(1, *model.shape), usual.teacher_calls, half=True)
        for seed in seeds:
            found = []
            for paths in (0, usual.trajectories, usual.trajectories // 4):  # that there is room for in half precision
                kept = {"keep_bytes": math.ceil(paths * each / PATHS)} if paths else {}
                source = gaussian(model, tuple(model.shape), SIGMA_MAX, seed)
                fit = make_fit(config, replace(usual, **kept), source, model_sigmas=model.sigmas)
                for _ in fit.events():
                    pass
                found.append(f"{rmse(held.distances(fit.predictor.method())):.4f}")
            print(
                f"{type(model).__name__} seed {seed}: full, half, a quarter of them in half: {', '.join(found)}",
                flush=True,
            )


KINDS = ("standard", "standard guided", "standard 10", "thorough", "set", "learner")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", type=int, default=list(SHAPE))
    parser.add_argument("--kinds", nargs="+", default=["standard", "set", "learner"], choices=KINDS)
    parser.add_argument("--trajectories", type=int, default=16)
    parser.add_argument("--held-out", type=int)
    parser.add_argument("--baselines", type=int, help="that run, to save time")
    parser.add_argument("--grids", type=int, help="that are solved for, to save time")
    parser.add_argument("--keep-bytes", type=int, help="what a fit keeps")
    parser.add_argument("--device", default="cpu", help="where the model is, and what is not kept")
    parser.add_argument("--precision", action="store_true")
    asked = parser.parse_args()
    if asked.precision:
        precision(samples=48, seeds=range(3))
        return
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**22)  # so that what PyTorch frees leaves the process
    names = ("trajectories", "held_out", "baselines", "grids", "keep_bytes")
    changes = {name: value for name in names if (value := getattr(asked, name))}
    sample = 4 * torch.Size(asked.shape).numel()
    print(f"shape {asked.shape}, a sample {sample / 1e6:.1f} MB, {changes}")
    for kind in asked.kinds:
        begin = time.monotonic()
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            asked_for = (kind, asked.shape, changes, asked.device)
            loaded, peak, gpu, states, calls, part = pool.submit(fitted, *asked_for).result()
        above = 1e9 * (peak - loaded) / sample
        print(
            f"{kind:16} peak {peak:.2f} GB, {above:.0f} samples above the program's {loaded:.2f} GB"
            f"{f', {gpu:.2f} GB on the GPU' if gpu else ''}; states of up to "
            f"{max(states) / 1e6:.0f} MB at {len(states)} events; {calls:,} sample calls, "
            f"{part:.2f} of the baseline's error, {time.monotonic() - begin:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
