"""What only a GPU shows of this pack in ComfyUI. One command, without network; about 5 minutes on one H100.

    python benchmarks/gpu.py --json gpu.json                        # COMFYUI_PATH says where ComfyUI is
    python benchmarks/gpu.py --json gpu.json --parts waits cost     # some parts
    python benchmarks/gpu.py --json gpu.json --small                # toy size, as always without a GPU

tests      the node tests that need no server, on the GPU
waits      operations of a run, after its first model call, that made the host wait: in this pack and in ComfyUI, and
           whether this pack's own loop waits at all. "learned" is the sampler amed after its lesson.
cost       seconds for a picture of 5 calls at the sizes of SDXL and Flux with random weights, in turns; "ratio" is the
           median over pairs of amed_multistep over ipndm, with its 95 % interval (bootstrap); at most 1.02
memory     MiB above the weights; a fit takes at most 1.15 times what sampling its batch takes
precision  how far half precision is from float32, relative to the largest number; ours at most twice ipndm's
gradients  how far reverse mode is from finite differences, where weights are loaded and where they are not: along one
           answer's derivative at the best of five steps, which is what a fit checks and gives reverse mode up by
           ("used"), and of a whole loss at one step; and from reverse mode with loaded weights

amed_multistep has a made-up table with all that a fit may find. A part has a process of its own, and runs beside the
others; only cost runs alone. A row is in the JSON file as soon as it is measured. "dynamic" is a part with ComfyUI's
dynamic VRAM, as users have it since 0.16, "plain" is one without. Where that does not work, the part runs plain.
"""
# ruff: noqa: E402 - as ComfyUI does, dynamic VRAM is begun before torch is imported

import os
import sys

if os.environ.get("AMED_DYNAMIC"):
    import comfy_aimdo.control

    try:  # as ComfyUI's main.py does
        comfy_aimdo.control.init(nvml_pressure=True)
    except TypeError:
        comfy_aimdo.control.init()

import argparse
import contextlib
import gc
import importlib.util
import io
import json
import math
import re
import signal
import statistics
import subprocess
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

PACK = Path(__file__).parents[1]
sys.path += [str(PACK / "tests" / "nodes"), str(PACK)]
from comfyui import COMFYUI, WHY_NOT, load_pack, version_of
from families import SPECS, Family, _known, make, prompt
from toys import apply, heard, k_sample, predictor, train

from benchmarks.cost import CHANNELS, interval, seconds

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if GPU else torch.device("cpu")
CFG = {"sdxl": 5.0, "flux": 1.0}
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
STOCK = ("ipndm", "euler", "dpmpp_2m")
OURS, CALLS = "amed_multistep", 5
MOST_COST, MOST_MEMORY, MOST_ERROR = 1.02, 1.15, 2.0  # the goals
FIT_CALLS = {"sdxl": 300, "flux": 150}  # single-sample model calls after which a fit is cut short
PARTS = ("tests", "waits", "precision", "gradients", "memory", "cost")
MODES = {  # whether with dynamic VRAM, where there is any
    "waits": (False, True),
    "precision": (False,),
    "gradients": (False, True),
    "memory": (True,),
    "cost": (True, False),
}
SMALL = ("waits", "precision", "gradients")  # toys, so that others may run beside them
LIMITS = {"tests": 150, "waits": 60, "precision": 60, "gradients": 60, "memory": 210, "cost": 150}  # seconds
MINUTES = 7.5  # of all parts together
LEAST = 15.0  # seconds that a part needs to show anything
TESTED = (  # files of tests, the most telling first
    *("cost", "learning", "multistep", "training", "paper_training", "parity", "latents", "modes"),
    *("guidance", "two_models", "pictures", "features", "pairing", "nodes"),
)
TESTS_AT_ONCE = 8
ROW = "#row "
Row = dict[str, Any]


# What every part needs


def tell(**row: Any) -> None:
    """Hand a row to the process that keeps them."""
    print(ROW + json.dumps(row), flush=True)


def goal(value: float, most: float) -> bool:
    """Whether a figure is one and no more than the goal."""
    return math.isfinite(value) and value <= most


@contextlib.contextmanager
def tried(**about: Any) -> Iterator[None]:
    """What goes wrong here is told, and the next one is measured."""
    try:
        yield
    except Exception as error:
        where = "".join(traceback.format_exception(error)[-4:])
        tell(**about, error=f"{type(error).__name__}: {error}", where=where)


def begin(dynamic: bool) -> Any:
    """This pack in ComfyUI, with a user folder of its own. Raises RuntimeError where there is no dynamic VRAM."""
    pack = load_pack()
    import folder_paths  # noqa: PLC0415 - ComfyUI's

    folder = tempfile.mkdtemp(prefix="amed")
    folder_paths.get_user_directory = lambda: folder
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if dynamic:
        _begin_dynamic_vram()
    return pack


def _begin_dynamic_vram() -> None:
    import comfy.memory_management  # noqa: PLC0415
    import comfy.model_management as mm  # noqa: PLC0415
    import comfy.model_patcher  # noqa: PLC0415

    if not comfy_aimdo.control.init_devices([device.index for device in mm.get_all_torch_devices()]):
        raise RuntimeError("comfy_aimdo does not work here")
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy.memory_management.aimdo_enabled = True


@contextlib.contextmanager
def whole_weights() -> Iterator[None]:
    """With dynamic VRAM new layers have no weights before a file is loaded; here they have."""
    memory_management = sys.modules.get("comfy.memory_management")  # of newer ComfyUI
    before = getattr(memory_management, "aimdo_enabled", False)
    if before:
        memory_management.aimdo_enabled = False
    try:
        yield
    finally:
        if before:
            memory_management.aimdo_enabled = True


def patched(model: Any) -> Any:
    """The MODEL of a network, as ComfyUI's loaders make it."""
    import comfy.model_management as mm  # noqa: PLC0415
    import comfy.model_patcher as patcher  # noqa: PLC0415

    kind = getattr(patcher, "CoreModelPatcher", patcher.ModelPatcher)
    return kind(model, mm.get_torch_device(), mm.unet_offload_device())


def toy(name: str, **changes: Any) -> Family:
    """A family at toy size."""
    with whole_weights():
        family = make(name, **{"batch": 1, **changes})
    return replace(family, model=patched(family.model.model))


def real(name: str, dynamic: bool) -> Family:
    """A family at real size, its random weights drawn on the GPU."""
    import comfy.supported_models  # noqa: PLC0415

    spec = SPECS[name]
    config = getattr(comfy.supported_models, spec.kind)(_known(spec.config | REAL[name]))
    config.set_inference_dtype(torch.bfloat16 if name == "flux" else torch.float16, None)
    with whole_weights():
        model = config.get_model({}, "", device=torch.device("cpu") if dynamic else DEVICE)
    fill(model.diffusion_model.eval())
    latent = torch.zeros(1, CHANNELS[name], 128, 128)
    return Family(patched(model), prompt(name, 1), prompt(name, 2), {"samples": latent})


@torch.no_grad()
def fill(network: torch.nn.Module) -> None:
    """As the toys' weights, but drawn where that is fast."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    for name, weight in network.named_parameters():
        if weight.ndim < 2 and name.endswith(("weight", "scale", "gamma")):
            weight.fill_(1.0)
            continue
        width = weight[0].numel() ** -0.5 if weight.ndim >= 2 else 0.02
        weight.copy_(torch.randn(weight.shape, generator=generator, device=DEVICE, dtype=weight.dtype) * width)


def family_of(name: str, small: bool, dynamic: bool) -> Family:
    """A family at real size, or at toy size."""
    return toy(name) if small else real(name, dynamic)


def table(pack: Any, family: Family, cfg: float) -> Any:
    """A predictor for amed_multistep with all that a fit may find, and numbers near iPNDM's."""
    core = pack.amed_core
    plain = core.student_config(OURS, CALLS, pack.nodes.pairing.model_facts(family.model), guidance=cfg)
    high, second, *_ = plain.sigmas
    more = {"spectral": True, "guided": cfg != 1, "channels": family.latent["samples"].shape[1]}
    made = core.predictor.build(replace(plain, first_sigma=high**0.9 * second**0.1, **more))
    generator = torch.Generator().manual_seed(0)
    for name, values in made.named_parameters():
        if name in ("guided", "spectral"):
            values.add_(torch.randn(values.shape, generator=generator), alpha=0.01)
    return pack.nodes.values.NotedPredictor(made)


def samplers(pack: Any, family: Family, cfg: float) -> dict[str, Callable[..., Tensor]]:
    """How each of them draws a picture."""
    applied = apply(pack, family, table(pack, family, cfg))
    ours = {OURS: partial(k_sample, family, applied, CALLS, cfg, OURS, "amed")}
    return ours | {name: partial(k_sample, family, family.model, CALLS, cfg, name, "simple") for name in STOCK}


def learns(pack: Any, model: Any) -> Any:
    """The MODEL, which learns from its first picture and never again."""
    return pack.nodes.AMEDLearn.execute(model, "from N pictures", 1, 24, False).args[0]


def free() -> None:
    """Forget the models that were used."""
    import comfy.model_management as mm  # noqa: PLC0415

    gc.collect()  # what nobody uses is not first moved to the CPU
    mm.unload_all_models()
    getattr(mm, "reset_cast_buffers", int)()  # newer ComfyUI does so after every node
    mm.soft_empty_cache()


# Waits


class Loop:
    """Hears of operations that make the host wait, between a run's first model call and its last."""

    def __init__(self) -> None:
        self.strict = False
        self.places: Counter[str] = Counter()

    def listens(self, model: Any) -> Any:
        """The MODEL, whose own answer may wait where the loop may not."""
        import comfy.patcher_extension  # noqa: PLC0415

        def answer(executor: Any, *args: Any, **kwargs: Any) -> Any:
            if not self.strict:
                return executor(*args, **kwargs)
            before = torch.cuda.get_sync_debug_mode() if GPU else 0
            _debug("default")
            try:
                return executor(*args, **kwargs)
            finally:
                _debug(before)

        clone = model.clone()
        clone.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.PREDICT_NOISE, "gpu", answer)
        return clone

    def _run(self, draw: Callable[..., Tensor], mode: str) -> None:
        def step(index: int, *_: Any) -> None:
            _debug(mode if index < CALLS - 1 else "default")

        try:
            draw(callback=step)
        finally:
            _debug("default")

    def count(self, draw: Callable[..., Tensor]) -> Row:
        """How often the host waited, and for whom."""
        self.strict, self.places = False, Counter()
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = self._hear
            self._run(draw, "warn")
        whose = {name: sum(n for place, n in self.places.items() if place.startswith(name)) for name in FOLDERS}
        often = [f"{n} {place}" for place, n in self.places.most_common() if place.startswith("ours")]
        return {**whose, "all": sum(self.places.values()), "places": often[:5]}

    def _hear(self, message: Any, *_: Any) -> None:
        if WAITED in str(message):
            self.places[culprit(traceback.extract_stack())] += 1

    def refuses(self, draw: Callable[..., Tensor]) -> str:
        """What the loop itself does that waits; empty if nothing."""
        self.strict = True
        try:
            self._run(draw, "error")
        except RuntimeError as error:
            if WAITED not in str(error):
                raise
            return culprit(traceback.extract_tb(error.__traceback__))
        return ""


WAITED = "called a synchronizing"  # in PyTorch's words
FOLDERS = {"ours": (PACK / "nodes", PACK / "amed_core"), "comfyui": (COMFYUI or PACK / "none",)}


def culprit(stack: Any) -> str:
    """Whose innermost line of a stack it is: "ours" or "comfyui", with its place, or "other"."""
    for frame in reversed(stack):
        for name, folders in FOLDERS.items():
            if any(Path(frame.filename).is_relative_to(folder) for folder in folders):
                return f"{name} {Path(frame.filename).name}:{frame.lineno} {frame.line}"
    return "other"


def _debug(mode: str | int) -> None:
    if GPU:
        torch.cuda.set_sync_debug_mode(mode)


def waits(pack: Any, small: bool, dynamic: bool) -> None:
    del small  # the size of a model changes nothing
    for name, cfg in CFG.items():
        family, loop = toy(name), Loop()
        family = replace(family, model=loop.listens(family.model))
        draws = {key: samplers(pack, family, cfg)[key] for key in (OURS, "ipndm")}
        draws["learned"] = partial(k_sample, family, learns(pack, family.model), CALLS, cfg, "amed", "amed")
        for sampler, draw in draws.items():
            about = {"part": "waits", "family": name, "sampler": sampler, "dynamic": dynamic}
            with tried(**about):
                draw()  # which also teaches
                draw()
                found, refused = loop.count(draw), loop.refuses(draw)
                verdict = {} if sampler == "ipndm" else {"ok": not refused}
                tell(**about, **found, loop_waits=refused or "no", **verdict)


# Cost


def cost(pack: Any, small: bool, dynamic: bool) -> None:
    for name, cfg in CFG.items():
        about = {"part": "cost", "family": name, "dynamic": dynamic}
        with tried(**about):
            times, first = timed(samplers(pack, family_of(name, small, dynamic), cfg), 3 if small else 9)
            for key, found in times.items():
                figures = {"median": statistics.median(found), "least": min(found), "first": first[key]}
                tell(**about, sampler=key, **figures, pictures=len(found))
            ratio, low, high = interval(np.array(times[OURS]) / np.array(times["ipndm"]))
            verdict = {} if small else {"ok": goal(ratio, MOST_COST)}
            tell(**about, ratio=ratio, low=low, high=high, **verdict)
        free()


def timed(draws: dict[str, Callable[[], Any]], pairs: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of pictures in turns, every third of which has all samplers, and of the first pictures."""
    first = {key: seconds(draw) for key, draw in draws.items()}
    times: dict[str, list[float]] = {key: [] for key in draws}
    for turn in range(pairs):
        order = list(draws) if turn % 3 == 0 else [OURS, "ipndm"]
        for key in order[::-1] if turn % 2 else order:
            times[key].append(seconds(draws[key]))
    return times, first


# Memory


def peak(work: Callable[[], Any]) -> tuple[float | None, float]:
    """The most MiB above what there was before, and the seconds; None on a CPU, where it is not measured."""
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if GPU else 0
    took = seconds(work)
    return (torch.cuda.max_memory_allocated() - before) / 2**20 if GPU else None, took


def rows_of(family: Family, rows: int) -> Family:
    """The same model, asked for so many at once."""
    return replace(family, latent={"samples": family.latent["samples"].expand(rows, -1, -1, -1).contiguous()})


def short_fit(pack: Any, family: Family, cfg: float, calls: int) -> int:
    """A fit of the training node on batches of two, stopped after so many sample calls; says how many they were."""
    import comfy.model_management as mm  # noqa: PLC0415

    made: list[int] = []

    def hear(parameters: Any) -> None:
        made.append(len(parameters["input"]) // len(parameters["cond_or_uncond"]))
        if sum(made) >= calls:
            raise mm.InterruptProcessingException

    how = {"trajectories": 8, "batch_size": 2, "held_out": 4, "teacher_calls": 16, "steps": CALLS, "cfg": cfg}
    quiet = contextlib.redirect_stderr(io.StringIO())
    with quiet, contextlib.suppress(mm.InterruptProcessingException):
        train(pack, family, heard(family.model, hear), **how)
    return sum(made)


def memory(pack: Any, small: bool, dynamic: bool) -> None:
    for name in CFG:
        about = {"part": "memory", "family": name, "dynamic": dynamic}
        with tried(**about):
            _memory(pack, name, small, dynamic, about)
        free()


def _memory(pack: Any, name: str, small: bool, dynamic: bool, about: Row) -> None:
    begun, cfg, calls = time.perf_counter(), CFG[name], 40 if small else FIT_CALLS[name]
    family = family_of(name, small, dynamic)
    k_sample(family, family.model, 1, cfg, "euler", "simple")
    loaded = torch.cuda.memory_allocated() / 2**20 if GPU else None
    size, took = family.model.model_size() / 2**20, time.perf_counter() - begun
    tell(**about, what="loaded", mib=loaded, weights=size, seconds=took)
    sampling: dict[int, float | None] = {}
    for rows in (1, 2):
        draws = samplers(pack, rows_of(family, rows), cfg)
        for key in ("ipndm", OURS):
            draws[key]()
            mib, took = peak(draws[key])
            stock = sampling.setdefault(rows, mib)
            tell(**about, what=f"{key}, {rows} at once", mib=mib, seconds=took, **of(mib, stock))
    asked: list[Any] = []
    model = learns(pack, heard(family.model, asked.append))
    mib, took = peak(partial(k_sample, family, model, CALLS, cfg, "amed", "amed"))
    tell(**about, what="learning, 1 at once", mib=mib, seconds=took, calls=len(asked), **of(mib, sampling[1]))
    made: list[int] = []
    mib, took = peak(lambda: made.append(short_fit(pack, rows_of(family, 2), cfg, calls)))
    found = of(mib, sampling[2])
    verdict = {"ok": goal(found["of_sampling"], MOST_MEMORY)} if found else {}
    tell(**about, what="fit, 2 at once", mib=mib, seconds=took, sample_calls=made[0], **found, **verdict)


def of(mib: float | None, sampling: float | None) -> Row:
    """How many times the memory of stock's sampling that is, where both were measured."""
    return {} if mib is None or not sampling else {"of_sampling": mib / sampling}


# Precision


def precision(pack: Any, small: bool, dynamic: bool) -> None:
    for name, cfg in CFG.items():
        exact: dict[str, Tensor] = {}
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            about = {"part": "precision", "family": name, "dtype": str(dtype)[6:], "dynamic": dynamic}
            with tried(**about):
                drawn = pictures(pack, toy(name, batch=1 if small else 8, dtype=dtype), cfg)
                exact = exact or drawn
                off = {key: float((x - exact[key]).abs().max() / exact[key].abs().max()) for key, x in drawn.items()}
                if drawn is not exact:
                    worse = max(off[OURS], off["amed_ipndm"]) / off["ipndm"]
                    tell(**about, **off, of_ipndm=worse, ok=goal(worse, MOST_ERROR))


def pictures(pack: Any, family: Family, cfg: float) -> dict[str, Tensor]:
    """What samplers draw from the same noise."""
    applied = apply(pack, family, predictor(pack, family, "amed_ipndm", guidance=cfg))
    draws = samplers(pack, family, cfg)
    draws["amed_ipndm"] = partial(k_sample, family, applied, CALLS, cfg, "amed_ipndm", "amed")
    return {key: draws[key]().double() for key in (OURS, "amed_ipndm", "ipndm")}


# Gradients


DEEP = {  # of several blocks, whose weights take turns in ComfyUI's buffers
    "sdxl": {},
    "flux": {"hidden_size": 512, "num_heads": 16, "depth": 3, "depth_single_blocks": 4},
}


@contextlib.contextmanager
def offloaded(dynamic: bool) -> Iterator[None]:
    """No weight of a model that is loaded in here stays on the GPU."""
    import comfy.model_management as mm  # noqa: PLC0415

    if dynamic:
        import comfy_aimdo.model_vbar as vbar  # noqa: PLC0415

        owner, name, none = vbar, "vbar_fault", lambda alloc: None  # as if its memory were full
    else:
        owner, name, none = mm, "vram_state", mm.VRAMState.NO_VRAM
    before = getattr(owner, name)
    setattr(owner, name, none)
    try:
        yield
    finally:
        setattr(owner, name, before)


def gradients(pack: Any, small: bool, dynamic: bool) -> None:
    del small
    for name, changes in DEEP.items():
        loaded: list[Tensor] = []
        for where in ("loaded", "offloaded"):
            about = {"part": "gradients", "family": name, "weights": where, "dynamic": dynamic}
            free()
            with tried(**about), offloaded(dynamic) if where == "offloaded" else contextlib.nullcontext():
                _gradients(pack, toy(name, **changes), loaded, about)


def _gradients(pack: Any, family: Family, loaded: list[Tensor], about: Row) -> None:
    """`loaded` is the derivative with loaded weights, or empty, and then has this one afterwards."""
    from test_paper_training import gradient_of  # noqa: PLC0415 - brings pytest

    fits = pack.amed_core.fit.per_interval
    found, why, original = [], [], fits.reverse_disagreement

    def recorded(*asked: Any) -> float:
        try:
            found.append(original(*asked))
        except RuntimeError as error:
            why.append(str(error)[:300])
            raise
        return found[-1]

    fits.reverse_disagreement = recorded
    try:
        reverse, used = gradient_of(pack, family, "reverse")
        differences, _ = gradient_of(pack, family, "finite difference")
    finally:
        fits.reverse_disagreement = original
    loaded.append(reverse)
    steps = zip(found[::2], found[1::2], strict=False)  # of two unknowns each
    figures = {
        "check": min(map(max, steps), default=math.nan),
        "from_differences": fits.disagreement(reverse, differences),
    }
    figures["from_loaded"] = fits.disagreement(reverse, loaded[0])
    size = {"on_gpu_mib": family.model.loaded_size() / 2**20, "of_mib": family.model.model_size() / 2**20}
    ok = used != "reverse" or goal(figures["from_loaded"], fits.AGREES)  # it may give way, but not be wrong
    tell(**about, **figures, used=used, **size, why=why[:1], ok=ok)


MEASURED = {"waits": waits, "precision": precision, "gradients": gradients, "memory": memory, "cost": cost}


def measure(part: str, small: bool, dynamic: bool) -> None:
    """One part, in this process."""
    torch.set_num_threads(1 if not GPU else 4)
    with tried(part=part, dynamic=dynamic):
        MEASURED[part](begin(dynamic), small, dynamic)


# The process that keeps the rows


@dataclass
class Book:
    """All rows so far, in a file."""

    path: Path
    about: Row
    rows: list[Row] = field(default_factory=list)
    lock: Any = field(default_factory=threading.Lock)

    def add(self, row: Row) -> None:
        """Keep a row, and print it."""
        with self.lock:
            self.rows.append(row)
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps({**self.about, "rows": self.rows}, indent=1))
            part.replace(self.path)
            print(line_of(row), flush=True)

    def failed(self, part: str) -> bool:
        """Whether anything of a part went wrong with dynamic VRAM."""
        return any("error" in row and row.get("dynamic") and row["part"] == part for row in self.rows)


def line_of(row: Row) -> str:
    """A row as it is printed."""
    shown = {key: value for key, value in row.items() if key not in ("where", "failures") and value != []}
    cells = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in shown.items()}
    cells = {key: "not measured" if value is None else value for key, value in cells.items()}
    cells["dynamic"] = "dynamic" if cells.pop("dynamic", False) else "plain"
    named = [str(cells.pop(key)) for key in ("part", "dynamic", "family", "sampler", "what") if key in cells]
    return f"{'  '.join(named):46}  " + "  ".join(f"{key} {value}" for key, value in cells.items())


def ended(process: "subprocess.Popen[str]", limit: float) -> threading.Timer:
    """End a process and its children after so many seconds, if the timer is not cancelled."""

    def kill() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(limit, kill)
    timer.start()
    return timer


def run(book: Book, part: str, small: bool, dynamic: bool, limit: float) -> None:
    """One part in a process of its own, which may take so many seconds."""
    begun = time.monotonic()
    command = [sys.executable, __file__, "--one", part, *["--small"] * small, *["--dynamic"] * dynamic]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **({"AMED_GPU": "1"} if GPU else {})}
    if dynamic:  # ComfyUI's own allocator on CUDA 13
        environment |= {"AMED_DYNAMIC": "1", "PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    timer = ended(process, limit)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(ROW):
            book.add(json.loads(line.removeprefix(ROW)))
        else:
            print(line, end="")
    code = process.wait()
    timer.cancel()
    took = time.monotonic() - begun
    if code:
        why = f"stopped after {took:.0f} s" if took >= limit else f"exit status {code}"
        book.add({"part": part, "dynamic": dynamic, "error": why})
    book.add({"part": part, "dynamic": dynamic, "seconds": round(took, 1)})


COUNTED = {"PASSED": "passed", "FAILED": "failed", "SKIPPED": "skipped", "ERROR": "failed", "XFAIL": "skipped"}


def tests(book: Book, small: bool, at_once: int, limit: float) -> None:
    """The node tests, as far as they come in so many seconds."""
    begun = time.monotonic()
    files = [str(PACK / "tests" / "nodes" / f"test_{name}.py") for name in TESTED]
    how = ["-vv", "--color=no", "--tb=short", "-p", "no:cacheprovider", "-n", str(at_once), "--dist=load"]
    how += ["-k", "never_waits or copy_between or damaged_file"] if small else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **({"AMED_GPU": "1"} if GPU else {})}
    log = book.path.with_suffix(".tests.log")
    with log.open("w") as file:
        command = [sys.executable, "-m", "pytest", *how, *files]
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env=environment, cwd=PACK, start_new_session=True, text=True
        )
        timer = ended(process, limit)
        process.wait()
    timer.cancel()
    said = log.read_text()
    outcomes = re.findall(r"^\[gw\d+\].*?(PASSED|FAILED|SKIPPED|ERROR|XFAIL) (\S.*?)\s*$", said, re.MULTILINE)
    count = Counter(COUNTED[outcome] for outcome, _ in outcomes)
    found = re.search(r"\[(\d+) items?\]", said)
    failures = sorted({name for outcome, name in outcomes if outcome in ("FAILED", "ERROR")})
    row = {"part": "tests", **count, "of": int(found[1]) if found else None, "seconds": time.monotonic() - begun}
    wrong = {} if outcomes else {"error": said[-1500:]}
    book.add({**row, "failures": failures, **wrong, "ok": bool(outcomes) and not failures})


def limit_of(part: str) -> float:
    """The seconds that a part may take."""
    return LIMITS[part] * (1 if GPU else 3)


def has_dynamic_vram() -> bool:
    """Whether this ComfyUI has dynamic VRAM and its library is there; whether it works is found out in use."""
    file = (COMFYUI or PACK) / "comfy" / "memory_management.py"
    here = file.exists() and "aimdo_enabled" in file.read_text()
    return GPU and here and importlib.util.find_spec("comfy_aimdo") is not None


def in_turn(book: Book, parts: Iterable[str], small: bool, until: float) -> None:
    """Parts one after the other, and plain where dynamic VRAM does not work."""
    modes = MODES if has_dynamic_vram() else dict.fromkeys(MODES, (False,))
    todo = [(part, dynamic) for part in parts for dynamic in modes[part]]
    while todo:
        part, dynamic = todo.pop(0)
        left = until - time.monotonic()
        if left < LEAST:
            book.add({"part": part, "dynamic": dynamic, "error": "no time left"})
            continue
        run(book, part, small, dynamic, min(limit_of(part), left))
        if dynamic and book.failed(part) and False not in modes[part]:
            todo.insert(0, (part, False))


def everything(book: Book, arguments: argparse.Namespace, small: bool) -> None:
    """All parts that were asked for: those whose seconds count alone, the others beside each other."""
    until = time.monotonic() + 60 * arguments.minutes
    asked = [part for part in MEASURED if part in arguments.parts]
    beside = [
        threading.Thread(target=in_turn, args=(book, [part for part in asked if part in SMALL], small, until)),
        threading.Thread(target=in_turn, args=(book, [part for part in asked if part == "memory"], small, until)),
    ]
    if "tests" in arguments.parts:
        limit = min(limit_of("tests"), 60 * arguments.minutes)
        beside.append(threading.Thread(target=tests, args=(book, small, arguments.tests_at_once, limit)))
    for thread in beside:
        thread.start()
    for thread in beside:
        thread.join()
    in_turn(book, [part for part in asked if part == "cost"], small, until)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), help="where the rows go")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--small", action="store_true", help="toy size; always without a GPU")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all parts together")
    parser.add_argument("--tests-at-once", type=int, default=TESTS_AT_ONCE if GPU else 1)
    parser.add_argument("--one", choices=MEASURED, help=argparse.SUPPRESS)
    parser.add_argument("--dynamic", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    small = arguments.small or not GPU
    if arguments.one:
        measure(arguments.one, small, arguments.dynamic)
        return
    assert COMFYUI is not None, WHY_NOT
    about = {"device": torch.cuda.get_device_name() if GPU else "cpu", "torch": torch.__version__, "small": small}
    about |= {"comfyui": version_of(COMFYUI), "dynamic_vram": has_dynamic_vram(), "cores": os.cpu_count()}
    print(*(f"{key} {value}" for key, value in about.items()), sep="  ", flush=True)
    book, begun = Book(arguments.json.resolve(), about), time.monotonic()
    everything(book, arguments, small)
    missed = [row for row in book.rows if "error" in row or row.get("ok") is False]
    print(f"\n{time.monotonic() - begun:.0f} s; {len(missed)} failed or missed a goal", flush=True)
    for row in missed:
        print("\n  ".join([line_of(row), *row.get("failures", [])]))


if __name__ == "__main__":
    main()
