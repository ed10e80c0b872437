"""A fit that runs where ComfyUI runs a sampler: the model is loaded and conditioned, and cleaned up afterwards."""

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.samplers
import comfy.utils
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..amed_core.config import PredictorConfig
from ..amed_core.features import Look
from ..amed_core.files import PredictorFileError, load_state, save_state
from ..amed_core.fit.make import Settings, make_fit
from ..amed_core.fit.protocol import Fit
from ..amed_core.fit.report import IntervalReport, report
from ..amed_core.fit.teacher import Converged
from ..amed_core.fit.trajectories import HELD_OUT, Metered, noise
from ..amed_core.types import Answer, Denoiser, Sample, Sigma, Source
from .bridge import ComfyDenoiser, OnCall, look
from .gradients import differentiable, marked_as_training
from .previews import Preview
from .streams import Balance, packed_shapes

SAVED_EVERY = 60.0  # seconds between states, against a crash
TOLD_EVERY = 1.0  # seconds between texts on the node
REPORTED = 8  # trajectories of the report


@dataclass(frozen=True)
class Job:
    """What to fit, on which prompts, and where it is kept while it is not finished."""

    config: PredictorConfig
    settings: Settings
    seed: int  # of the noise, and of a network's first weights
    fitted_prompts: tuple[int, ...]  # numbers of those that are trained on
    held_out_prompts: tuple[int, ...]  # and of those that judge
    state: Path  # the file of the unfinished fit
    spent: int = 0  # single-sample model calls before the fit, for its grid
    reverse: bool = False  # autograd is to run backwards through the model

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


@dataclass
class Progress:
    """Tells the browser and the console how far a fit is, at every model call.

    `total` may change on the way: a fit learns what it takes. At the end it is what was done.
    """

    total: int
    tell: Callable[[str], None]
    disabled: bool
    bar: Any = field(init=False)
    begun: float = field(init=False)
    done: int = 0
    at_begin: int | None = None  # model calls of a fit's first part, if it goes on
    told: float = 0.0
    text: str = ""

    def __post_init__(self) -> None:
        self.browser = comfy.utils.ProgressBar(self.total)
        self.bar = tqdm(total=self.total, desc="AMED training", unit="call", disable=self.disabled)
        self.begun = time.monotonic()

    def update(self, done: int, picture: Any = None) -> None:
        """`done` model calls of about `total`."""
        if self.at_begin is None:
            self.at_begin = done
        self.done, self.total = done, max(self.total, done)
        self.browser.update_absolute(done, self.total, None if picture is None else ("JPEG", picture, 512))
        self.bar.total = self.total
        self.bar.update(done - self.bar.n)
        now = time.monotonic()
        if now - self.told >= TOLD_EVERY and done > self.at_begin:
            self.told = now
            left = (now - self.begun) / (done - self.at_begin) * (self.total - done)
            self.tell(f"{done / self.total:.0%}, about {duration(left)} left{self.text}")

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
        self.resumed = False
        self.progress: Progress | None = None  # while the fit runs

    @property
    def model_calls(self) -> int:
        """Single-sample model calls so far, of the search for a grid and of the fit."""
        return self.job.spent + (0 if self.fit is None else self.fit.model_calls)

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
            del x, sigma, denoised
            if self.progress is not None:
                self.progress.update(self.model_calls)

        # The fit and the report share what was found out about memory.
        sources = [Metered(source) for source in self._sources(guider, extra_args, like, on_call, balance)]
        see = balance.look(look(job.config, guider))
        fit = self.fit = make_fit(
            job.config,
            job.settings,
            sources,
            model_sigmas=getattr(guider.inner_model.model_sampling, "sigmas", None),
            seed=job.seed,
            look=see,
            device=like.device,
        )
        if state := self._saved_state():
            fit.load_state_dict(state)
            self.resumed = True
        self._run(fit, Preview(guider, like, balance), quiet)
        self.report = self._reported(fit, sources[0], see, balance)
        job.state.unlink(missing_ok=True)

    def _run(self, fit: Fit, preview: Preview, quiet: bool) -> None:
        """Run the fit to its end, or until somebody stops it, which leaves its state."""
        spent, saved_at = self.job.spent, time.monotonic()
        progress = self.progress = Progress(spent + fit.expected_calls, self.tell, quiet)
        try:
            for event in fit.events():
                progress.total, progress.text = spent + fit.expected_calls, f"; {event}"
                finished = event.finished
                progress.update(self.model_calls, preview(event.teacher, event.student) if finished else None)
                if time.monotonic() - saved_at >= SAVED_EVERY:
                    save_state(self.job.state, fit.state_dict())
                    saved_at = time.monotonic()
            progress.finish()
        except BaseException:
            save_state(self.job.state, fit.state_dict())
            raise
        finally:
            progress.bar.close()
            self.progress = None

    def _reported(self, fit: Fit, source: Source, see: Look, balance: Balance) -> IntervalReport:
        """What the predictor does on noise that it was not fitted on."""
        settings, names = self.job.settings, (self.job.config.solver, "base solver")
        fit.predictor.requires_grad_(False)
        x, denoiser = source(range(HELD_OUT, HELD_OUT + min(REPORTED, settings.batch_size)))
        scale = self.job.scales[0]
        slow = Converged.of(fit.predictor.config, settings.teacher_calls)
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

    def _saved_state(self) -> dict[str, Any]:
        """The state of the same job that was stopped; empty if there is none that can be read."""
        if not self.job.state.exists():
            return {}
        try:
            return load_state(self.job.state)
        except PredictorFileError as error:
            logging.warning(f"AMED: {error} Training begins anew.")
            return {}


def prompt_names(count: int) -> list[str]:
    """Under which names a guider carries several positive prompts."""
    return ["positive", *(f"positive_{n}" for n in range(1, count))]
