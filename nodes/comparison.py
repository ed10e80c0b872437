"""AMED beside stock pairs of sampler and scheduler, from the same noises, in equally many model calls."""

import difflib
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor
from tqdm.auto import tqdm

from ..amed_core.fit.equivalent import calls_on
from ..amed_core.fit.several import numbers_of
from ..amed_core.fit.teacher import levels, teacher
from ..amed_core.samplers import NAMES, sampler_name
from .drawing import draw
from .learning import ATTACHED, AUTOMATICALLY, FROM_PICTURES, NEVER, Learning, learning_of
from .recipes import Recipe, adds_noise
from .sampler import AMEDApplyPredictor
from .sampling import sampler_functions, scheduler
from .training_subject import prepared, sized_for
from .values import ATTACHMENT, SCHEDULER, NotedPredictor

NODE = "AMED Compare"
COUNTER = "amed_compared"  # the key of the wrapper that counts model calls
TEACHER_CALLS, TEACHER_TIMES = 60, 6  # of the teacher, and at least so many times the steps
LEAST_TIMES = 3
TAUGHT, TAUGHT_FROM = 2, 2**32  # pictures that teach where there is no predictor, and how far off their seeds are
LADDER = (1.5, 2.0, 3.0, 4.0)  # times the calls, in which the best stock pair is measured until it is as near
FREE_CALLS = ("dpm_adaptive",)  # samplers that take as many calls as they like
SEEDS = 2**64


class StockSampling(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.EPS):
    """What samplers are tried on before there is a model."""


@dataclass(frozen=True)
class Pair:
    """A stock sampler on the levels of a scheduler."""

    sampler: str
    scheduler: str

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.sampler} {self.scheduler}"


def steps_of(text: str) -> tuple[int, ...]:
    """The numbers of calls that "3 5 8" or "3-5" names, rising. Raises ValueError for anything else."""
    listed = re.sub(r"[\s,]+", ",", re.sub(r"\s*-\s*", "-", text.strip()))
    try:
        return tuple(sorted(numbers_of(listed)))
    except ValueError as error:
        raise ValueError(f'steps of "{NODE}": {error}') from error


def pairs_of(text: str) -> tuple[Pair, ...]:
    """The pairs that "dpmpp_2m karras, euler simple" names, each once.

    Raises ValueError for what is not in ComfyUI's lists, and for samplers that no number of calls can compare.
    """
    found: dict[Pair, None] = {}
    for part in filter(None, (part.strip() for part in re.split(r"[,;\n]", text))):
        names = part.split()
        if len(names) != 2:
            raise ValueError(
                f'against of "{NODE}": {part!r:.60} is no sampler with a scheduler. Write both, as "dpmpp_2m karras", '
                "and a comma between two pairs."
            )
        pair = Pair(*names)
        if pair not in found:
            _refuse_unknown("sampler", pair.sampler, comfy.samplers.SAMPLER_NAMES, NAMES)
            _refuse_unknown("scheduler", pair.scheduler, comfy.samplers.SCHEDULER_NAMES, (SCHEDULER,))
            _refuse_incomparable(pair)
            found[pair] = None
    if not found:
        raise ValueError(f'against of "{NODE}" is empty. Name at least one pair, as "dpmpp_2m karras".')
    return tuple(found)


def _refuse_unknown(kind: str, name: str, listed: Sequence[str], ours: Sequence[str]) -> None:
    names = [one for one in listed if one not in ours]
    if name in names:
        return
    why = f"{name} is AMED's own {kind}, which has a row anyway" if name in ours else f"there is no {kind} {name!r:.60}"
    near = difflib.get_close_matches(name, names, 1)
    meant = f" Did you mean {near[0]}?" if near and name not in ours else ""
    raise ValueError(f'against of "{NODE}": {why}.{meant} The {kind}s are: {", ".join(names)}.')


def _refuse_incomparable(pair: Pair) -> None:
    """Raise ValueError for a sampler whose pictures, or calls, are not decided by noise and steps."""
    name, why = pair.sampler, ""
    if name in FREE_CALLS:
        why = "takes as many model calls as it likes, so that it cannot be compared in equally many"
    elif "cfg_pp" in name:
        why = "solves another equation (CFG++), so that its distance to this teacher says nothing"
    else:
        sampling = StockSampling()
        tried = comfy.samplers.calculate_sigmas(sampling, "normal", 4)
        try:
            if adds_noise(Recipe(name, pair.scheduler, tuple(tried.tolist()), sampling)):
                why = "adds noise of its own, so that its pictures are others than the teacher's however good it is"
        except Exception as error:  # whatever a sampler of another pack asks for
            why = f"asks for more than a model's answers ({type(error).__name__}: {error})"
    if why:
        raise ValueError(f'against of "{NODE}": {name} {why}. Remove it.')


@dataclass(frozen=True)
class Ours:
    """How AMED samples here."""

    model: Any
    sampler: str
    predictor: NotedPredictor | None

    @classmethod
    def of(cls, model: Any, predictor: NotedPredictor | None) -> "Ours":
        """With the given predictor, or the MODEL's own, or with what the sampler "amed" learns.

        Raises ValueError for a predictor of another model, or of two.
        """
        if predictor is not None:
            model = AMEDApplyPredictor.execute(model, predictor).args[0]
        predictor = model.get_attachment(ATTACHMENT)
        if predictor is not None and predictor.config.switch:
            raise ValueError(
                f'This predictor is for two models in one run, and "{NODE}" samples with one. Connect another to '
                "predictor."
            )
        learning = learning_of(model)
        if learning.mode == AUTOMATICALLY:  # or else every other compared picture would teach
            model = model.clone()
            model.set_attachments(ATTACHED, Learning(FROM_PICTURES, TAUGHT, learning.teacher_calls))
        return cls(model, "amed" if predictor is None else sampler_name(predictor.config), predictor)

    @property
    def learning(self) -> Learning | None:
        """How it is taught, if it may learn."""
        found = learning_of(self.model)
        learns = self.predictor is None or self.predictor.config.kind == "multistep"
        return found if learns and found.mode != NEVER else None

    @property
    def name(self) -> str:
        """For people."""
        return f"AMED ({self.sampler})"


@dataclass(frozen=True)
class Way:
    """All that decides a picture but its noise."""

    name: str
    model: Any
    sampler: Any
    sigmas: Tensor
    calls: int  # that it should take


@dataclass(frozen=True)
class Result:
    """What a way made of every seed."""

    name: str
    calls: int  # that it took
    latents: tuple[Any, ...]
    squares: tuple[float, ...]  # mean squared distance to the teacher's, of every picture
    seconds: float  # of a picture

    @property
    def error(self) -> float:
        """The RMSE of all pictures, infinite where one is none."""
        mean = sum(self.squares) / len(self.squares)
        return math.sqrt(mean) if math.isfinite(mean) else math.inf


class Counted(comfy.samplers.Sampler):
    """A sampler that tells of every model call: counted are calls of the guider, whatever they take of the network.

    The counter is in the run's options and not on the MODEL, which is known by its wrappers.
    """

    def __init__(self, inner: Any, on_call: Callable[[], None]) -> None:
        self.inner = inner
        self.on_call = on_call

    def sample(
        self, model_wrap: Any, sigmas: Tensor, extra_args: dict[str, Any], callback: Any, noise: Any, *more: Any
    ) -> Any:
        """As the sampler itself does."""
        options = comfy.model_patcher.create_model_options_clone(extra_args.get("model_options", {}))
        wrappers = options.setdefault("transformer_options", {})
        add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, COUNTER, self._count, wrappers)
        told = {**extra_args, "model_options": options}
        return self.inner.sample(model_wrap, sigmas, told, callback, noise, *more)

    def _count(self, executor: Any, model: Any, conds: Any, *more: Any, **options: Any) -> Any:
        if len(conds) > 1:  # what guidance nodes ask beside the prompts is one
            self.on_call()
        return executor(model, conds, *more, **options)


@dataclass
class Meter:
    """Shows how many model calls are done, and stops at Cancel before the next one."""

    total: int
    done: int = 0
    shown: bool = True  # while learning it is the sampler that shows them

    def __post_init__(self) -> None:
        self.browser = comfy.utils.ProgressBar(self.total)
        self.bar = tqdm(total=self.total, desc=NODE, unit="call", disable=not comfy.utils.PROGRESS_BAR_ENABLED)

    def call(self) -> None:
        """One more."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.done += 1
        self.bar.total = self.total = max(self.total, self.done)
        self.bar.update()
        if self.shown:
            self.browser.update_absolute(self.done, self.total)

    def preview(self, picture: Any) -> None:
        """What the run that goes on looks like."""
        if self.shown:
            self.browser.update_absolute(self.done, self.total, picture)

    def finish(self) -> None:
        """There were no more calls than these, whatever was expected."""
        self.browser.update_absolute(self.done, self.done)
        self.bar.total = self.done
        self.bar.close()


@dataclass
class Comparison:
    """Runs all ways from the same noises, and keeps how far each is from the teacher.

    Every picture is a run of its own, as KSampler makes it of a seed: with the memory of one, and the same to the bit.
    """

    model: Any
    positive: Any
    negative: Any
    latent_image: Mapping[str, Any]
    seeds: tuple[int, ...]
    cfg: float
    steps: tuple[int, ...]
    pairs: tuple[Pair, ...]
    ours: Ours
    teacher_calls: int
    tell: Callable[[str], None]
    results: dict[tuple[str, int], Result] = field(default_factory=dict)  # by name and calls
    slow: Result = field(init=False)  # the teacher
    ladders: dict[int, list[tuple[int, float]]] = field(default_factory=dict)  # of the best stock pair, by our calls
    taught: dict[int, tuple[int, int]] = field(default_factory=dict)  # pictures that taught and all calls, by ours
    lacking: list[str] = field(default_factory=list)  # pairs that cannot take some number of calls
    unit: float = 1.0  # counted calls of one model call: context windows are counted each

    def __post_init__(self) -> None:
        self.latent = self._one()
        self.counts: dict[tuple[str, int], int] = {}
        self.ways = {calls: self._ways(calls) for calls in self.steps}
        planned = [way.calls for ways in self.ways.values() for way in ways]
        expected = self.teacher_calls + sum(planned) + sum(self.steps) + round(sum(LADDER[:2]) * sum(self.steps))
        self.meter = Meter(expected * len(self.seeds))
        self.previewer = latent_preview.get_previewer(self.model.load_device, self.model.model.latent_format)

    def _one(self) -> Any:
        """An empty latent of one picture; where a batch is one video's frames, of them all."""
        given = self.latent_image["samples"]
        zeros = given * 0 if not given.is_nested else type(given)([part * 0 for part in given.unbind()])
        sized = sized_for(self.model, {**self.latent_image, "samples": zeros})
        if sized.is_nested:
            return type(sized)([part[:1] for part in sized.unbind()])
        return sized if frames_are_batch(self.model) else sized[:1]

    def run(self) -> None:
        """Measure all."""
        try:
            self.slow = self._teacher()
            for calls in self.steps:
                for way in self.ways[calls]:
                    self._measure(way)
                self._measure(self._taught(calls))
                self._climb(calls)
        finally:
            self.meter.finish()

    def of(self, calls: int) -> list[Result]:
        """The stock pairs in so many calls."""
        return [self.results[way.name, calls] for way in self.ways[calls]]

    def best(self, calls: int) -> Result:
        """The one of them that is nearest to the teacher."""
        return min(self.of(calls), key=lambda one: one.error)

    def mine(self, calls: int) -> Result:
        """AMED's."""
        return self.results[self.ours.name, calls]

    def equal(self, calls: int) -> float:
        """The calls of the best stock pair for our error; 0 if it takes fewer, infinity if the ladder ends before."""
        return calls_on(self.ladders[calls], self.mine(calls).error)

    def _ways(self, calls: int) -> list[Way]:
        found = []
        for pair in self.pairs:
            if (way := self._way(pair, calls)) is not None:
                found.append(way)
            else:
                self.lacking.append(f"{pair.name} cannot take {calls} calls")
        if not found:
            raise ValueError(
                f'None of the pairs in against of "{NODE}" can take {calls} model calls. Add one with one call a step, '
                'as "euler simple", or set another number in steps.'
            )
        return found

    def _way(self, pair: Pair, calls: int) -> Way | None:
        """A pair with the number of steps that take so many model calls; None if there is none."""
        for steps in sorted(range(1, calls + 2), key=lambda n: min(abs(n - calls), abs(2 * n - calls))):
            try:
                about = (pair.sampler, pair.scheduler, 1.0, self.model.model_options)
                sigmas = comfy.samplers.KSampler(self.model, steps, self.model.load_device, *about).sigmas
            except (ArithmeticError, IndexError, ValueError):  # some schedulers need more steps
                continue
            if bool((sigmas.diff() < 0).all()) and self._calls(pair, sigmas) == calls:
                return Way(pair.name, self.model, comfy.samplers.sampler_object(pair.sampler), sigmas, calls)
        return None

    def _calls(self, pair: Pair, sigmas: Tensor) -> int:
        """The model calls of a sampler on levels, found out on a model of nothing."""
        known = (pair.sampler, len(sigmas))
        if known not in self.counts:
            sampling = self.model.get_model_object("model_sampling")
            tried = Recipe(pair.sampler, pair.scheduler, tuple(sigmas.tolist()), sampling)
            try:
                self.counts[known] = tried.model_calls
            except Exception:  # some need more levels than these
                self.counts[known] = 0
        return self.counts[known]

    def _teacher(self) -> Result:
        """Where the model itself leads, asked between its timesteps."""
        model = prepared(self.model)
        sampling = model.get_model_object("model_sampling")
        high, low = float(sampling.sigma_max), float(sampling.sigma_min)
        flow = isinstance(sampling, comfy.model_sampling.CONST)
        grid = levels(min(low, high / 2), high, self.teacher_calls, flow)

        def slowly(model: Any, x: Tensor, sigmas: Tensor, extra_args: Any, callback: Any, disable: Any) -> Tensor:
            del sigmas
            return draw(model, x, grid, teacher(grid), extra_args, callback, disable)

        sampler = comfy.samplers.KSAMPLER(slowly)
        way = Way("teacher", model, sampler, torch.tensor(grid), self.teacher_calls)
        drawn, counted, seconds = self._draw(way, self.seeds)
        self.unit = counted / self.teacher_calls / len(self.seeds)
        return Result(way.name, self.teacher_calls, drawn, (0.0,) * len(drawn), seconds)

    def _measure(self, way: Way) -> Result:
        if (way.name, way.calls) not in self.results:
            drawn, counted, seconds = self._drawn(way)
            calls = round(counted / self.unit / len(drawn)) if self.unit else way.calls
            if calls != way.calls:
                raise ValueError(
                    f"{way.name} takes {calls} model calls here where {way.calls} are compared. Remove it from against "
                    f'of "{NODE}", or disconnect the node that makes a model call several.'
                )
            squares = tuple(map(self._square, drawn, self.slow.latents))
            kept = drawn if calls in self.steps else ()  # of a ladder only errors are shown
            self.results[way.name, way.calls] = Result(way.name, calls, kept, squares, seconds)
        return self.results[way.name, way.calls]

    def _drawn(self, way: Way) -> tuple[tuple[Any, ...], int, float]:
        """As `_draw`, of all seeds. Raises ValueError, naming the pair, where a stock sampler fails on this model."""
        try:
            return self._draw(way, self.seeds)
        except comfy.model_management.InterruptProcessingException:
            raise
        except Exception as error:
            if way.name == self.ours.name or isinstance(error, comfy.model_management.OOM_EXCEPTION):
                raise
            raise ValueError(
                f'{way.name} fails on this model ({type(error).__name__}: {error}). Remove it from against of "{NODE}".'
            ) from error

    def _taught(self, calls: int) -> Way:
        """AMED's way, once it has learned what it learns from pictures of other seeds."""
        sampling = self.ours.model.get_model_object("model_sampling")
        sampler = comfy.samplers.KSAMPLER(sampler_functions()[self.ours.sampler])
        way = Way(self.ours.name, self.ours.model, sampler, scheduler(sampling, calls), calls)
        if (learning := self.ours.learning) is not None:
            begun, slow, quick = self.meter.done, 0, 0
            self.meter.shown = False
            while slow < learning.pictures and quick < 2:  # two in a row that do not teach: it knows enough
                seed = (self.seeds[0] + TAUGHT_FROM + slow + quick) % SEEDS
                _, counted, _ = self._draw(replace(way, name=f"{way.name} learns"), (seed,))
                learned = counted > 1.5 * calls * self.unit
                slow, quick = slow + learned, 0 if learned else quick + 1
            self.meter.shown = True
            self.taught[calls] = (slow, round((self.meter.done - begun) / (self.unit or 1)))
        return way

    def _climb(self, calls: int) -> None:
        """Measure the best stock pair in more calls until it is as near as AMED is in so many."""
        best, goal = self.best(calls), self.mine(calls).error
        pair = next(pair for pair in self.pairs if pair.name == best.name)
        for times in LADDER:
            if best.error <= goal:
                break
            more = math.ceil(times * calls)
            ways = (self._way(pair, number) for number in range(more, more + 3))
            if (way := next(filter(None, ways), None)) is not None:
                best = self._measure(way)
        points = [(one.calls, one.error) for one in self.results.values() if one.name == best.name]
        self.ladders[calls] = [point for point in sorted(points) if point[0] >= calls]

    def _draw(self, way: Way, seeds: Sequence[int]) -> tuple[tuple[Any, ...], int, float]:
        """What a way makes of some seeds, the calls that were counted, and the seconds of a picture."""
        drawn, begun, seconds = [], self.meter.done, 0.0
        sampler = Counted(way.sampler, self.meter.call)
        for n, seed in enumerate(seeds, start=1):
            comfy.model_management.throw_exception_if_processing_interrupted()
            self.tell(f"{n} of {len(seeds)}, {way.name}, {way.calls} calls")
            noise, begin = comfy.sample.prepare_noise(self.latent, seed), time.perf_counter()
            sigmas = way.sigmas.clone()  # some samplers write to them
            about = (sampler, sigmas, self.positive, self.negative, self.latent)
            more = {"callback": self._preview, "disable_pbar": True, "seed": seed}
            drawn.append(comfy.sample.sample_custom(way.model, noise, self.cfg, *about, **more))
            seconds += time.perf_counter() - begin
        return tuple(drawn), self.meter.done - begun, seconds / len(seeds)

    def _preview(self, step: int, x0: Any, x: Any, total: int) -> None:
        del step, x, total
        if self.previewer is not None:
            first = x0.unbind()[0] if x0.is_nested else x0
            self.meter.preview(self.previewer.decode_latent_to_preview_image("JPEG", first))

    def _square(self, drawn: Any, goal: Any) -> float:
        """The mean squared distance of two latents, in which every stream counts alike."""
        parts = [
            float((a.double() - b.double()).square().mean())
            for a, b in zip(streams_of(self.model, drawn), streams_of(self.model, goal), strict=True)
        ]
        return sum(parts) / len(parts)


def frames_are_batch(model: Any) -> bool:
    """Whether the batch of a MODEL's latent is one video."""
    handler = model.model_options.get("context_handler")
    if handler is not None and getattr(handler, "dim", None) == 0:
        return True
    return isinstance(model.model, comfy.model_base.SVD_img2vid)


def streams_of(model: Any, latent: Any) -> list[Tensor]:
    """The streams of a latent as the model sees them, of about unit variance."""
    if latent.is_nested:
        return [part.float().cpu() for part in latent.unbind()]
    return [model.model.process_latent_in(latent.float().cpu())]


def usual_teacher_calls(steps: Sequence[int]) -> int:
    """Those of a teacher that is nearer to the truth than any method that it judges."""
    return max(TEACHER_CALLS, TEACHER_TIMES * max(steps))
