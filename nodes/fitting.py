"""A fit that runs where ComfyUI runs a sampler: the model is loaded and conditioned, and cleaned up afterwards."""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import comfy.samplers
import comfy.utils
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..amed_core.config import PredictorConfig
from ..amed_core.driver import NoMidpoint, sample
from ..amed_core.features import Look
from ..amed_core.fit.equivalent import calls_for
from ..amed_core.fit.huber import squares
from ..amed_core.fit.make import Settings, make_fit, make_passes, make_set
from ..amed_core.fit.protocol import Fit
from ..amed_core.fit.report import IntervalReport, report
from ..amed_core.fit.several import Use
from ..amed_core.fit.teacher import Converged, Teacher
from ..amed_core.fit.trajectories import HELD_OUT, Metered, noise
from ..amed_core.solvers import DpmSolverPP, Ipndm
from ..amed_core.types import Answer, Denoiser, Method, Sample, Sigma, Source
from .bridge import ComfyDenoiser, OnCall, look
from .gradients import differentiable, marked_as_training
from .places import UNFINISHED
from .previews import Preview
from .states import Unfinished, harmless
from .streams import Balance, packed_shapes

SAVED_EVERY = 60.0  # seconds between states, against a crash
TOLD_EVERY = 1.0  # seconds between texts on the node
PRICED = 0.1  # the part of a fit from which its price is told, which is a guess before
REPORTED = 8  # trajectories of the report,
COMPARED = 4  # and of the comparison with a stock pair, which takes
LADDER = 13  # times its calls of each, about
USUAL_STEPS = 20  # of a picture without predictors
USUAL_PAIR, FLOW_PAIR = ("dpmpp_2m", "karras"), ("euler", "simple")  # what many people use


class TimeIsUpError(Exception):
    """The budget is spent."""


@dataclass(frozen=True)
class Job:
    """What to fit, on which prompts, and where it is kept while it is not finished."""

    uses: tuple[Use, ...]  # the first one is meant where only one is asked for
    configs: Mapping[int, PredictorConfig]  # by number of calls
    every_settings: Mapping[int, Settings]  # the same
    seed: int  # of the noise, and of a network's first weights
    fitted_prompts: tuple[int, ...]  # numbers of those that are trained on
    held_out_prompts: tuple[int, ...]  # and of those that judge
    unfinished: Unfinished  # what is kept while it is under way
    spent: int = 0  # single-sample model calls before the fit, for its grid
    reverse: bool = False  # autograd is to run backwards through the model
    teacher: Teacher | None = None  # None: what the model itself says
    minutes: float = 0.0  # after which what is there is handed over; 0: no limit
    passes: int = 0  # of the network, for which the fit chooses the number of calls; 0: as the use says

    @property
    def config(self) -> PredictorConfig:
        """Of the most calls."""
        return self.configs[max(self.configs)]

    @property
    def settings(self) -> Settings:
        """The same; of the others they are alike in trajectories, batches and the teacher."""
        return self.every_settings[max(self.every_settings)]

    @property
    def scales(self) -> tuple[float, ...]:
        """The guidance scales to fit at, rising."""
        return self.config.guidances or (self.config.guidance,)


def noisy(model_wrap: Any, rows: range, like: Tensor, sigma: float, seed: int) -> Sample:
    """The noise (rows, ...) of trajectories number `rows` at a noise level, each of the shape of those in `like`."""
    drawn = noise(rows, tuple(like.shape[1:]), seed).to(like)
    level = torch.tensor(sigma).to(like)
    made: Sample = model_wrap.inner_model.model_sampling.noise_scaling(level, drawn, torch.zeros_like(drawn), True)
    return made


@dataclass(frozen=True)
class Question:
    """One prompt at one guidance scale, put to the model."""

    guider: Any
    conds: dict[str, Any]
    scale: float
    denoiser: ComfyDenoiser

    def __call__(self, x: Sample, sigma: Sigma) -> Answer:
        self.guider.conds, self.guider.cfg = self.conds, self.scale
        return self.denoiser(x, sigma)

    def conditional(self, x: Sample, sigma: Sigma) -> Answer:
        """The answer without guidance."""
        self.guider.conds, self.guider.cfg = self.conds, self.scale
        return self.denoiser.conditional(x, sigma)


@dataclass
class Progress:
    """Tells the browser and the console how far a fit is, at every model call.

    `total` may change on the way: a fit learns what it takes. At the end it is what was done.
    """

    total: int
    tell: Callable[[str], None]
    disabled: bool
    told_of: set[str]  # what went wrong and was told
    bar: Any = field(init=False)
    begun: float = field(init=False)
    done: int = 0
    at_begin: int | None = None  # model calls of a fit's first part, if it goes on
    told: float = 0.0
    text: str = ""
    price: str = ""
    priced: bool = False  # whether enough is done to know the price
    saved_calls: int = 1  # of a picture, by which a fit pays itself back

    def __post_init__(self) -> None:
        self.browser = comfy.utils.ProgressBar(self.total)
        self.bar = tqdm(total=self.total, desc="AMED training", unit="call", disable=self.disabled)
        self.begun = time.monotonic()

    def update(self, done: int, picture: Any = None) -> None:
        """`done` model calls of about `total`."""
        now = time.monotonic()
        if self.at_begin is None:  # the first call also loads, and so tells little of the others
            self.at_begin, self.begun, self.told = done, now, now
        self.done, self.total = done, max(self.total, done)
        with harmless("progress is not shown", self.told_of):
            self.bar.total = self.total
            self.bar.update(done - self.bar.n)
            self.browser.update_absolute(done, self.total, None if picture is None else ("JPEG", picture, 512))
        if now - self.told >= TOLD_EVERY and done > self.at_begin:
            self.told = now
            with harmless("how far it is is not told", self.told_of):
                self._tell((now - self.begun) / (done - self.at_begin))

    def _tell(self, each: float) -> None:
        """Tell how far it is, and what all of it costs, from the seconds of a call."""
        if not self.priced:
            self.price, self.priced = self._price(each), self.done >= PRICED * self.total
            logging.log(logging.INFO if self.priced else logging.DEBUG, f"AMED: {self.price}")
        left = duration(each * (self.total - self.done))
        self.tell(f"{self.done / self.total:.0%}, about {left} left. {self.price}{self.text}")

    def _price(self, each: float) -> str:
        """What all of it costs, from the seconds of a call."""
        pictures = math.ceil(self.total / self.saved_calls)
        return (
            f"{self.total:,} sample calls in all, {duration(each * self.total)} here; against pictures of "
            f"{USUAL_STEPS} steps it pays after {pictures:,}"
        )

    def finish(self) -> None:
        """It is done, whatever it was expected to take."""
        self.total = self.done
        self.update(self.done)


def duration(seconds: float) -> str:
    """A time as people say it."""
    whole = max(round(seconds), 1)
    return f"{whole} s" if whole < 90 else f"{round(whole / 60)} min"


class TrainSampler(comfy.samplers.Sampler):
    """Does a job. Afterwards `fit`, `report`, `model_calls` and `resumed` tell what came of it.

    Stopped at any moment, it leaves a state in the job's file, and the same job goes on from there.
    """

    def __init__(self, job: Job, prompts: Sequence[str], tell: Callable[[str], None]) -> None:
        self.job = job
        self.prompts = prompts  # names under which the guider has the positive ones
        self.tell = tell
        self.fit: Fit | None = None
        self.report: IntervalReport | None = None
        self.equal: dict[int, int | None] = {}  # calls of a stock pair, by those of ours
        self.resumed = False
        self.stopped = False  # by its budget
        self.until = math.inf  # on the monotonic clock
        self.shown_from: tuple[Metered, int] | None = None  # what counts, and how many it had when the fit was finished
        self.progress: Progress | None = None  # while the fit runs
        self.early: tuple[Preview, float] | None = None  # until there is a student; and when it was last shown

    @property
    def finished(self) -> Fit:
        """The fit, once it was run."""
        assert self.fit is not None
        return self.fit

    @property
    def model_calls(self) -> int:
        """Single-sample model calls so far: of the search for a grid, of the fit, and of what shows its worth."""
        return self.job.spent + (0 if self.fit is None else self.fit.model_calls) + self.shown_calls

    @property
    def shown_calls(self) -> int:
        """Those that show what a finished fit is worth."""
        return 0 if self.shown_from is None else self.shown_from[0].calls - self.shown_from[1]

    def sample(
        self,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        """Do the job; the sample that comes back is of no meaning."""
        del sigmas, callback, latent_image, denoise_mask
        conds, scale = model_wrap.conds, model_wrap.cfg
        try:
            with contextlib.ExitStack() as stack:
                if self.job.reverse:
                    stack.enter_context(marked_as_training())
                    stack.enter_context(differentiable(model_wrap.inner_model))
                self._do(model_wrap, extra_args, noise, disable_pbar)
        finally:
            model_wrap.conds, model_wrap.cfg = conds, scale
        return noise

    def _do(self, guider: Any, extra_args: dict[str, Any], like: Tensor, quiet: bool) -> None:
        job, balance = self.job, Balance.of(packed_shapes(guider), like)

        def on_call(x: Sample, sigma: Sigma, denoised: Sample) -> None:
            del x, sigma
            if self.progress is not None:
                self.progress.update(self.model_calls, self._early(denoised))
                self._stop_in_time()

        # The fit and the report share what was found out about memory.
        sources = [Metered(source) for source in self._sources(guider, extra_args, like, on_call, balance)]
        see = balance.look(look(job.config, guider))
        about = {"model_sigmas": getattr(guider.inner_model.model_sampling, "sigmas", None), "teacher": job.teacher}

        def make() -> Fit:
            if len(job.uses) > 1:
                asked = (job.configs.__getitem__, job.every_settings.__getitem__)
                return make_set(job.uses, *asked, sources, **about)
            if job.passes:
                of_calls = (job.configs.__getitem__, job.every_settings.__getitem__)
                return make_passes(job.passes, *of_calls, sources[0], **about)
            more = {"seed": job.seed, "look": see, "device": like.device}
            return make_fit(job.config, job.settings, sources, **about, **more)

        fit, self.resumed = job.unfinished.resumed(make)
        self.fit = fit
        told = job.unfinished.told

        def shown() -> None:
            """What the fit is worth, on noise that it never saw."""
            with harmless("there is no report", told):
                self.report = self._reported(fit, sources[0], see, balance)
            with harmless("there is no comparison with a stock pair", told):
                self.equal = self._equal(fit, sources[0], guider.inner_model.model_sampling)

        self._run(fit, Preview(guider, like, balance, told), quiet, sources[0], shown)

    def _run(self, fit: Fit, preview: Preview, quiet: bool, source: Metered, shown: Callable[[], None]) -> None:
        """Run the fit to its end, and show what it is worth; or until somebody stops it, which leaves its state.

        `source` counts all calls of the first guidance scale, at which it is shown.
        """
        begun = time.monotonic()
        progress = self.progress = Progress(self._total(fit), self.tell, quiet, self.job.unfinished.told)
        progress.saved_calls = max(USUAL_STEPS - self.job.uses[0].calls, 1)
        self.early = preview, 0.0
        self.until = begun + 60 * self.job.minutes if self.job.minutes else math.inf
        if self.resumed:
            self._say(f"going on from {fit.model_calls / progress.total:.0%}, where it was stopped")
        else:
            self._say(f"about {progress.total:,} sample calls; the time follows from the first")
        try:
            try:
                self._fitted(fit, preview, progress)
            except TimeIsUpError:
                logging.info(f"AMED: the budget of {self.job.minutes:g} minutes is spent; this is the best so far.")
                self.stopped = True
            self.until, progress.text = math.inf, "; measuring what it is worth"
            self.shown_from = (source, source.calls)
            shown()
            progress.update(self.model_calls)
            progress.finish()
        except BaseException as error:
            self._leave(fit, progress, error)
            raise
        finally:
            progress.bar.close()
            self.progress = None

    def _fitted(self, fit: Fit, preview: Preview, progress: Progress) -> None:
        saved_at = time.monotonic()
        for event in fit.events():
            progress.total, progress.text = self._total(fit), f"; {event}"
            finished = event.finished
            self.early = None if finished else self.early
            progress.update(self.model_calls, preview(event.teacher, event.student) if finished else None)
            if time.monotonic() - saved_at >= SAVED_EVERY:
                self.job.unfinished.keep(fit)
                saved_at = time.monotonic()
            self._stop_in_time()

    def _early(self, denoised: Sample) -> Any:
        """Now and then, as long as there is no student, a picture of what the slow sampler is at."""
        if self.early is None or time.monotonic() - self.early[1] < TOLD_EVERY:
            return None
        self.early = self.early[0], time.monotonic()
        return self.early[0].before(denoised)

    def _stop_in_time(self) -> None:
        """Raise TimeIsUpError if the budget is spent, and there is something to hand over."""
        if self.until < time.monotonic() and self.fit is not None and self.fit.begun:
            raise TimeIsUpError

    def _total(self, fit: Fit) -> int:
        """Sample calls in all, as far as that is known: of the search for a grid, the fit, and what shows its worth."""
        settings, calls = self.job.settings, max(self.job.configs)
        reported = self._rows(REPORTED) * (settings.teacher_calls + 2 * calls)
        ladder = 0 if self.job.config.kind != "multistep" else settings.teacher_calls + LADDER * calls
        return self.job.spent + fit.expected_calls + reported + min(COMPARED, settings.held_out) * ladder

    def _rows(self, most: int) -> int:
        """How many held-out trajectories one batch shows, up to so many."""
        return min(most, self.job.settings.batch_size, self.job.settings.held_out)

    def _leave(self, fit: Fit, progress: Progress, error: BaseException) -> None:
        """Keep what there is of a fit that did not come to its end, and say what became of it.

        Where the model answered what is not finite, the last state that was written stays as it is.
        """
        unfinished, stopped = self.job.unfinished, f"stopped at {progress.done / progress.total:.0%}"
        if not unfinished.kept:
            self._say(f"{stopped}. Nothing of it was kept, as keep_state says")
            return
        there = unfinished.state.exists() if isinstance(error, FloatingPointError) else unfinished.keep(fit)
        text = f"{stopped}. Run it again to go on" if there else f"{stopped}. It has no state to go on from"
        if unfinished.keep_best(fit):
            text += f"; the best so far is {UNFINISHED}/{unfinished.best.name}, {fit.summary().headline()}"
        self._say(text)

    def _say(self, text: str) -> None:
        with harmless("how far it is is not told", self.job.unfinished.told):
            self.tell(text)

    @torch.no_grad()
    def _equal(self, fit: Fit, source: Source, sampling: Any) -> dict[int, int | None]:
        """For every number of calls from noise, in how many a usual stock pair comes as near to the teacher.

        None if MOST do not suffice. It is empty for fits of the paper's kinds.
        """
        config, settings = self.job.config, self.job.settings
        if config.kind != "multistep" or config.switch_sigma:
            return {}
        slow = self.job.teacher or Converged.of(config, settings.teacher_calls)
        count = HELD_OUT + min(COMPARED, settings.held_out)
        begins = range(HELD_OUT, count, settings.batch_size)
        drawn = [source(range(begin, min(begin + settings.batch_size, count))) for begin in begins]
        goals = [slow.samples(denoiser, x) for x, denoiser in drawn]

        def error(method: Method) -> float:
            ends = (sample(denoiser, x, method) for x, denoiser in drawn)
            squared = torch.cat([squares(end, goal).cpu() for end, goal in zip(ends, goals, strict=True)])
            return float(squared.mean().sqrt())

        solver, (_, scheduler) = (Ipndm(1), FLOW_PAIR) if config.flow else (DpmSolverPP(2), USUAL_PAIR)

        @cache
        def of_calls(calls: int) -> float:
            levels = comfy.samplers.calculate_sigmas(sampling, scheduler, calls).tolist()
            return error(Method(tuple(levels), solver, NoMidpoint()))

        of_noise = fit.predictors.from_noise
        scale = self.job.scales[0]
        return {
            one.config.calls: calls_for(error(one.method(guidance=scale)), of_calls, one.config.calls)
            for one in of_noise
        }

    def _reported(self, fit: Fit, source: Source, see: Look, balance: Balance) -> IntervalReport:
        """What the predictor does on noise that it was not fitted on."""
        settings, names = self.job.settings, (self.job.config.solver, "base solver")
        fit.predictor.requires_grad_(False)
        x, denoiser = source(range(HELD_OUT, HELD_OUT + self._rows(REPORTED)))
        scale = self.job.scales[0]
        slow = self.job.teacher or Converged.of(fit.predictor.config, settings.teacher_calls)
        return report(*names, fit.predictor, denoiser, x, see, scale, slow, balance.parts)

    def _sources(
        self, guider: Any, extra_args: dict[str, Any], like: Tensor, on_call: OnCall, balance: Balance
    ) -> list[Source]:
        """One per guidance scale. A batch of trajectories has one prompt, and its number says which."""
        job, prompts = self.job, self._processed(guider, like)
        config, batch_size = job.config, job.settings.batch_size

        def source(scale: float) -> Source:
            asked = []
            for conds in prompts:
                guider.conds = conds
                denoiser = ComfyDenoiser(
                    guider,
                    extra_args,
                    config.sigmas,
                    bottleneck=config.features == "bottleneck",
                    guidance=scale if config.guided else None,
                    on_call=on_call,
                )
                asked.append(balance.denoiser(Question(guider, conds, scale, denoiser)))

            def draw(rows: range) -> tuple[Sample, Denoiser]:
                turns = job.held_out_prompts if rows.start >= HELD_OUT else job.fitted_prompts
                turn = turns[rows.start % HELD_OUT // batch_size % len(turns)]
                return balance.scaled(noisy(guider, rows, like, config.sigmas[0], job.seed)), asked[turn]

            return draw

        return [source(scale) for scale in job.scales]

    def _processed(self, guider: Any, like: Tensor) -> list[dict[str, Any]]:
        """The prompts as the model takes them, each with the negative one and without the others' areas."""
        if len(self.prompts) == 1:
            return [guider.conds]
        originals, inner = guider.original_conds, guider.inner_model
        shapes = {"latent_shapes": inner.latent_shapes} if hasattr(inner, "latent_shapes") else {}  # newer ComfyUI
        kinds = [{"positive": name, "negative": "negative"} for name in self.prompts]
        return [
            comfy.samplers.process_conds(
                inner,
                like,
                {kind: [dict(cond) for cond in originals[name]] for kind, name in names.items()},
                like.device,
                seed=self.job.seed,
                **shapes,
            )
            for names in kinds
        ]


def prompt_names(count: int) -> list[str]:
    """Under which names a guider carries several positive prompts."""
    return ["positive", *(f"positive_{n}" for n in range(1, count))]
