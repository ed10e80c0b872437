"""Ours against every stock deterministic sampler and scheduler, at equal true model calls, in a real ComfyUI.

    python benchmarks/comfyui_quality.py --output benchmarks/comfyui_quality.json   # hours; goes on where it stopped
    python benchmarks/tables.py --cells benchmarks/comfyui_quality.json             # prints its tables

Four models: the bundled digits (EDM), coloured shapes (rectified flow) and a closed-form mixture (5-D latent, discrete
eps), each at cfg 1 and 3; and the bundled text-to-picture model (rectified flow), which takes more time and therefore
has a command of its own in benchmarks/README.md. All samplers start from the same noise; errors are RMSEs to where the
model's ODE takes it, by 200 calls of Heun's method, with 95 % intervals (bootstrap over samples). A stock sampler is
deterministic if two seeds give the same picture from the same noise, and its calls are counted. All stock pairs are
screened on few samples, the best of them measured on all; --glance looks at all of them on fewer still before that.
SA-Solver takes part as the ODE solver that it is without noise. The samplers of CFG++ follow another equation: the best
of them has a row apart, and its error is the distance to where that equation leads. Ours are made by the training node
with its default settings and used by KSampler.
"""
# ruff: noqa: E402 - ComfyUI can be imported only once load_pack has found it

import argparse
import contextlib
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path += [str(Path(__file__).parents[1] / "tests" / "nodes"), str(Path(__file__).parents[1])]
from comfyui import load_pack

PACK = load_pack()

import comfy.sample
import comfy.samplers
import comfyui_version
from comfy_extras.nodes_align_your_steps import AlignYourStepsScheduler
from comfy_extras.nodes_gits import GITSScheduler
from comfy_extras.nodes_optimalsteps import OptimalStepsScheduler

from amed_core.fit.teacher import heun_calls, heun_samples
from amed_core.tools import measures
from benchmarks.comfyui_models import Subject, subject
from benchmarks.quality_rows import Row, cells

MODELS, SCALES, CALLS = ("digits", "colours", "mixture", "pictures"), (1.0, 3.0), (3, 4, 5, 6, 7, 8, 10)
USUAL_MODELS = MODELS[:3]
NOISE_SEED, BATCH = 2**33, 100  # a fit draws its noise in another way
SCREENED, GLANCED_AT, KEPT = 50, 24, 5  # pairs that are left after a glance, and after screening
TEACHER_CALLS = 200
PUBLISHED_CALLS = (5,)
TRAJECTORIES_PUBLISHED = 10_000
ODES = {"sa_solver, eta 0": "sa_solver", "sa_solver_pece, eta 0": "sa_solver_pece"}
CFG_PP, CFG_PP_STEPS = "euler_cfg_pp", 1.5  # for every call of the teacher
CFG_PP_SAMPLES = 200  # of which it is measured: so many steps are dear


class Counter:
    """Counts model calls, however many conditionings are in one."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return executor(*args, **kwargs)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Samplers that come to grief print warnings; the rows say so."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
        yield


@dataclass
class Setting:
    """A model at a guidance scale, with its noise and its teacher."""

    name: str
    cfg: float
    samples: int
    teacher_calls: int
    about: Subject = field(init=False)
    noise: Tensor = field(init=False)
    teacher: Tensor = field(init=False)
    real: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        self.about = subject(PACK, self.name)
        generator = torch.Generator().manual_seed(NOISE_SEED)
        self.noise = torch.randn(self.samples, *self.about.latent.shape[1:], generator=generator)
        self.real = self.about.data(self.samples) if self.about.data else None
        self.teacher = self.converged(self.teacher_calls)

    def batches(self, count: int) -> Iterator[slice]:
        size = BATCH - BATCH % self.about.classes
        return (slice(begin, min(begin + size, count)) for begin in range(0, count, size))

    def converged(self, calls: int) -> Tensor:
        """Heun's method, with timesteps that are not rounded."""
        model = PACK.nodes.timesteps.with_interpolated_timesteps(self.about.model)
        sampling = model.get_model_object("model_sampling")
        low, high = float(sampling.sigma_min), float(sampling.sigma_max)
        flow = isinstance(sampling, comfy.model_sampling.CONST)

        def run(model: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None, **_: Any) -> Tensor:
            denoiser = PACK.nodes.bridge.ComfyDenoiser(model, extra_args, [high, low, 0.0], bottleneck=False)
            return heun_samples(denoiser, x, low, high, calls, flow=flow)

        return self.sampled(comfy.samplers.KSAMPLER(run), torch.tensor([high, 0.0]), self.samples, model)

    def sampled(self, sampler: Any, sigmas: Tensor, count: int, model: Any = None, seed: int = 0) -> Tensor:
        """What a SAMPLER makes of the first noises."""
        drawn = []
        for rows in self.batches(count):
            noise = self.noise[:count][rows]
            drawn.append(
                comfy.sample.sample_custom(
                    model or self.about.model, noise, self.cfg, sampler, sigmas, self.about.positive,
                    self.about.negative, torch.zeros_like(noise), disable_pbar=True, seed=seed,
                )
            )  # fmt: skip
        return torch.cat(drawn)

    def row(
        self,
        drawn: Tensor,
        calls: int,
        sampler: str,
        scheduler: str,
        seconds: float,
        truth: Tensor | None = None,
        **more: Any,
    ) -> Row:
        """Measured against the teacher, or another truth, and, by the Frechet distance, against the data."""
        count, finite = len(drawn), bool(drawn.isfinite().all())
        goal = self.teacher if truth is None else truth
        e = measures.error(drawn, goal[:count]) if finite else measures.Error(*[math.inf] * 5)
        distance = None
        if self.real is not None:
            distance = measures.frechet(drawn, self.real[:count]) if finite else math.inf
        errors = (e.rmse, e.low, e.high, e.median, e.p90)
        return Row(self.name, self.cfg, calls, sampler, scheduler, *errors, distance, count, seconds, **more)


def sampler_of(name: str) -> Any:
    """A stock SAMPLER by its name in the list; the stochastic ones in ODES as their nodes make them without noise."""
    if name in ODES:
        return comfy.samplers.ksampler(ODES[name], {"tau_func": lambda sigma: 0.0})
    return comfy.samplers.sampler_object(name)


def other_equation(name: str) -> bool:
    """Whether a sampler follows CFG++ (Chung et al. 2024), whose pictures are others however many steps it takes."""
    return "cfg_pp" in name or "cfgpp" in name


def deterministic(setting: Setting) -> list[str]:
    """The stock samplers whose picture does not depend on the seed, the starting noise being the same."""
    sigmas = comfy.samplers.calculate_sigmas(setting.about.model.get_model_object("model_sampling"), "normal", 4)
    found = []
    for name in (*comfy.samplers.SAMPLER_NAMES, *ODES):
        if name in PACK.amed_core.samplers.NAMES or name == "dpm_adaptive":  # which takes as many calls as it likes
            continue
        sampler = sampler_of(name)
        try:
            with quiet():
                one, other = (setting.sampled(sampler, sigmas, 1, seed=seed) for seed in (1, 2))
        except Exception as error:
            print(f"{name} does not run: {error}", file=sys.stderr)
            continue
        if bool((one == other).all()):
            found.append(name)
    return found


def grids(setting: Setting, sampler: str) -> Iterator[tuple[str, Callable[[int], Tensor]]]:
    """Every scheduler, as a function from steps to sigmas, as KSampler or the scheduler's node gives them."""
    model = setting.about.model

    def listed(scheduler: str) -> Callable[[int], Tensor]:
        return lambda steps: (
            comfy.samplers.KSampler(
                model, steps, torch.device("cpu"), sampler, scheduler, 1.0, model.model_options
            ).sigmas
        )

    for scheduler in comfy.samplers.SCHEDULER_NAMES:
        if scheduler != PACK.nodes.values.SCHEDULER:
            yield scheduler, listed(scheduler)
    # The others are lists of noise levels for models of their own kind.
    if setting.name == "mixture":
        for coefficient in (0.8, 1.0, 1.2, 1.5):
            yield f"GITS {coefficient}", lambda steps, c=coefficient: GITSScheduler.execute(c, steps, 1.0).args[0]
        for kind in ("SD1", "SDXL"):
            yield f"AlignYourSteps {kind}", lambda steps, k=kind: AlignYourStepsScheduler.execute(k, steps, 1.0).args[0]
    if setting.name in ("colours", "pictures"):
        for kind in ("FLUX", "Wan", "Chroma"):
            yield f"OptimalSteps {kind}", lambda steps, k=kind: OptimalStepsScheduler.execute(k, steps, 1.0).args[0]


@dataclass(frozen=True)
class Pair:
    """A stock sampler with the noise levels of a scheduler."""

    sampler: str
    scheduler: str
    sigmas: Tensor


Names = frozenset[tuple[str, str]]  # of samplers with their schedulers
PAIRS: dict[tuple[str, tuple[int, ...], Names | None], dict[int, list[Pair]]] = {}  # so far: the same at every cfg


def pairs(setting: Setting, wanted: tuple[int, ...], only: Names | None = None) -> dict[int, list[Pair]]:
    """All stock pairs, or only some, at every number of calls: it depends on the length of a sampler's list."""
    if (setting.name, wanted, only) in PAIRS:
        return PAIRS[setting.name, wanted, only]
    counter = Counter()
    counted = setting.about.model.clone()
    counted.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, "count", counter)
    found: dict[int, list[Pair]] = {calls: [] for calls in wanted}
    known: dict[tuple[str, int, bool], int] = {}
    for name in deterministic(setting) if only is None else sorted({sampler for sampler, _ in only}):
        for scheduler, levels in grids(setting, name):
            if only is not None and (name, scheduler) not in only:
                continue
            seen = set()
            for steps in range(1, max(wanted) + 2):
                try:
                    with quiet():
                        sigmas = levels(steps)
                        key = (name, len(sigmas), bool(sigmas[-1] == 0))
                        if key not in known:
                            counter.calls = 0
                            setting.sampled(sampler_of(name), sigmas, 1, counted)
                            known[key] = counter.calls
                except Exception as error:
                    print(f"{setting.name}: {name} {scheduler} with {steps} steps: {error}", file=sys.stderr)
                    continue
                if known[key] in wanted and known[key] not in seen:
                    seen.add(known[key])
                    found[known[key]].append(Pair(name, scheduler, sigmas))
    PAIRS[setting.name, wanted, only] = found
    return found


def best(setting: Setting, listed: list[Pair], count: int, kept: int, truth: Tensor) -> list[Pair]:
    """The pairs that come nearest to their truth on the first noises."""

    def error(pair: Pair) -> float:
        try:
            with quiet():
                drawn = setting.sampled(sampler_of(pair.sampler), pair.sigmas, count)
        except Exception as problem:
            print(f"{setting.name}: {pair.sampler} {pair.scheduler}: {problem}", file=sys.stderr)
            return math.inf
        found = measures.error(drawn, truth[:count]).rmse
        return found if math.isfinite(found) else math.inf

    return sorted(listed, key=error)[:kept]


def stock(setting: Setting, wanted: tuple[int, ...], screened: int, glance: int) -> Iterator[Row]:
    """The best stock pairs at every number of calls: screened on a few samples, then measured on all.

    Those that solve another equation come apart, and are measured by how near they are to where that one leads.
    """
    counter = Counter()
    counted = setting.about.model.clone()
    counted.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, "count", counter)
    with quiet():
        converged = setting.sampled(sampler_of(CFG_PP), fine_levels(setting), min(setting.samples, CFG_PP_SAMPLES))
    for (calls, listed), other in itertools.product(pairs(setting, wanted).items(), (False, True)):
        every = [pair for pair in listed if other_equation(pair.sampler) == other]
        truth = converged if other else setting.teacher
        left = best(setting, every, glance, GLANCED_AT, truth) if glance else every
        for pair in best(setting, left, screened, 1 if other else KEPT, truth):
            sampler = sampler_of(pair.sampler)
            with quiet():
                counter.calls = 0
                setting.sampled(sampler, pair.sigmas, 1, counted)
                begin = time.perf_counter()
                drawn = setting.sampled(sampler, pair.sigmas, len(truth))
            seconds = time.perf_counter() - begin
            if counter.calls != calls:
                raise RuntimeError(f"{pair.sampler} took {counter.calls} calls instead of {calls}")
            notes = {"pairs": len(every), "other equation": other}
            yield setting.row(drawn, calls, pair.sampler, pair.scheduler, seconds, truth, notes=notes)


def fine_levels(setting: Setting) -> Tensor:
    """Levels on which CFG++ is taken to its end."""
    model = setting.about.model
    steps = round(CFG_PP_STEPS * setting.teacher_calls)
    found: Tensor = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", steps)
    return found


def fitted(setting: Setting, calls: int, seed: int, **settings: Any) -> tuple[Any, float]:
    """A predictor from a training node, and the seconds of its fit. The paper's students have a node of their own."""
    asked: dict[str, Any] = {"seed": seed, "cfg": setting.cfg, "steps": calls, "model": setting.about.model}
    asked |= {"negative": setting.about.negative, "latent_image": {"samples": setting.about.latent}, "save_as": ""}
    asked |= settings
    papers = "sampler_name" in settings
    asked = asked if papers else {"effort": "thorough"} | asked
    node = PACK.nodes.AMEDTrainPaperPredictor if papers else PACK.nodes.AMEDTrainPredictor
    defaults = {i.id: i.default for i in node.GET_SCHEMA().inputs if hasattr(i, "default")}
    listed = {name: [value] for name, value in (defaults | asked).items() if value is not None}
    begin = time.perf_counter()
    with quiet(), torch.inference_mode():
        made = node.execute(positive=setting.about.fitted, **listed).args[0]
    return made, time.perf_counter() - begin


def applied(setting: Setting, made: Any, calls: int) -> tuple[Any, str, Tensor]:
    """The MODEL with its predictor, and the sampler's name and sigmas with which KSampler uses it."""
    model, *_ = PACK.nodes.AMEDApplyPredictor.execute(setting.about.model, made).args
    name = PACK.amed_core.samplers.sampler_name(made.config)
    ks = comfy.samplers.KSampler(model, calls, torch.device("cpu"), name, "amed", 1.0, model.model_options)
    return model, name, ks.sigmas


def trained(setting: Setting, calls: int, seed: int, **settings: Any) -> Row:
    """A predictor from a training node, used as KSampler uses it."""
    made, fit_seconds = fitted(setting, calls, seed, **settings)
    model, name, sigmas = applied(setting, made, calls)
    counter = Counter()
    counted = model.clone()
    counted.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, "count", counter)
    with quiet():
        setting.sampled(comfy.samplers.sampler_object(name), sigmas, 1, counted)
        begin = time.perf_counter()
        drawn = setting.sampled(comfy.samplers.sampler_object(name), sigmas, setting.samples, model)
    seconds = time.perf_counter() - begin
    if counter.calls != calls:
        raise RuntimeError(f"{name} took {counter.calls} calls instead of {calls}")
    training = made.notes.get("training", {})
    label = f"{name}{' published' if settings.get('preset') == 'paper' else ''}"
    if settings.get("predictor_type") == "table":
        label += " table"
    notes = {key: training.get(key) for key in ("baseline", "error", "baseline_error")}
    return setting.row(
        drawn, calls, label, "amed", seconds, seed=seed, fit_calls=training.get("model_calls"),
        fit_seconds=fit_seconds, notes=notes,
    )  # fmt: skip


def rows_of(arguments: argparse.Namespace, done: set[tuple[Any, ...]]) -> Iterator[tuple[tuple[Any, ...], list[Row]]]:
    """All rows, in pieces that are not measured again when the command is."""
    screened, glance = arguments.screened, arguments.glance
    for name, cfg in itertools.product(arguments.models, arguments.cfg):
        pieces: list[tuple[tuple[Any, ...], Callable[[Setting], list[Row]]]] = []
        wanted = tuple(arguments.calls)
        pieces.append(
            ((name, cfg, "stock", *wanted), lambda s, w=wanted: [*teacher_rows(s), *stock(s, w, screened, glance)])
        )
        for calls, seed in itertools.product(wanted, range(arguments.seeds)):
            pieces.append(((name, cfg, "amed_multistep", calls, seed), lambda s, c=calls, n=seed: [trained(s, c, n)]))
        for calls in set(wanted) & set(PUBLISHED_CALLS) if arguments.published else ():
            table = {"sampler_name": "amed_ipndm", "predictor_type": "table", "trajectories": 32}
            pieces.append(((name, cfg, "amed_ipndm table", calls), lambda s, c=calls, t=table: [trained(s, c, 0, **t)]))
            paper = {"sampler_name": "amed", "preset": "paper", "trajectories": arguments.published}
            pieces.append(((name, cfg, "published", calls), lambda s, c=calls, p=paper: [trained(s, c, 0, **p)]))
        pieces = [(key, work) for key, work in pieces if key not in done]
        if not pieces:
            continue
        setting = Setting(name, cfg, arguments.samples, arguments.teacher_calls)
        for key, work in pieces:
            yield key, work(setting)


def teacher_rows(setting: Setting) -> list[Row]:
    """The teacher's own Frechet distance, and how far half as many calls are from it."""
    calls, less = (heun_calls(n) for n in (setting.teacher_calls, setting.teacher_calls // 2))
    own = setting.row(setting.teacher, calls, "teacher", "", 0.0)
    half = setting.row(setting.converged(setting.teacher_calls // 2), less, "teacher, half", "", 0.0)
    return [own, half]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=USUAL_MODELS, choices=MODELS)
    parser.add_argument("--cfg", type=float, nargs="+", default=SCALES)
    parser.add_argument("--calls", type=int, nargs="+", default=CALLS)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--teacher-calls", type=int, default=TEACHER_CALLS)
    parser.add_argument("--screened", type=int, default=SCREENED, help="noises that every stock pair is tried on")
    parser.add_argument(
        "--glance", type=int, default=0, help=f"noises on which the best {GLANCED_AT} pairs are chosen before that"
    )
    parser.add_argument("--seeds", type=int, default=3, help="fits of amed_multistep for every cell")
    parser.add_argument(
        "--published",
        type=int,
        default=TRAJECTORIES_PUBLISHED,
        help="trajectories of AMED's own recipe; 0 leaves it and a table out",
    )
    parser.add_argument("--output", type=Path, help="the JSON file, which is also where to go on")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # on a GPU, with AMED_GPU=1, in float32 like on a CPU
    output = arguments.output
    kept = json.loads(output.read_text()) if output and output.exists() else {"done": [], "rows": []}
    version = comfyui_version.__version__
    if kept.setdefault("comfyui", version) != version:
        raise SystemExit(f"{output} was measured in ComfyUI {kept['comfyui']}, and this is {version}.")
    for key, rows in rows_of(arguments, {tuple(key) for key in kept["done"]}):
        kept["done"].append(list(key))
        kept["rows"] += [asdict(row) for row in rows]
        for row in rows:
            print(row, flush=True)
        if output:
            part = output.with_suffix(".part")
            part.write_text(json.dumps(kept, indent=1))
            part.replace(output)
    print(cells([Row(**row) for row in kept["rows"]]))


if __name__ == "__main__":
    main()
