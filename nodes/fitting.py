"""A fit that runs where ComfyUI runs a sampler: the model is loaded and conditioned, and cleaned up afterwards."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import comfy.samplers
import comfy.utils
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..amed_core import PredictorConfig, TrainConfig, Trainer
from ..amed_core.files import PredictorFileError, load_state, save_state
from ..amed_core.fit.baselines import starts
from ..amed_core.fit.end_to_end import EndToEnd
from ..amed_core.fit.multistep_fit import MultistepFit
from ..amed_core.fit.protocol import FitConfig
from ..amed_core.fit.report import Learned, learned
from ..amed_core.fit.trajectories import HELD_OUT, noise
from ..amed_core.midpoints import TablePredictor
from ..amed_core.multistep import MultistepTable
from ..amed_core.network import AMEDPredictor, centred_on
from ..amed_core.predictor import AnyPredictor
from ..amed_core.types import Answer, Denoiser, Sample, Sigma, Source
from .bridge import ComfyDenoiser, OnCall, look
from .gradients import differentiable, marked_as_training
from .previews import Preview
from .streams import Balance, packed_shapes

SAVED_EVERY = 60.0  # seconds between states, against a crash
TOLD_EVERY = 1.0  # seconds between texts on the node
REPORTED = 8  # trajectories of the report

Fit = Trainer | EndToEnd | MultistepFit


@dataclass(frozen=True)
class Job:
    """What to fit. A network that is fitted end to end starts from a table."""

    config: PredictorConfig
    objective: TrainConfig | FitConfig
    table: PredictorConfig | None  # to start from, with `table_objective`
    table_objective: FitConfig | None
    scales: tuple[float, ...]  # of guidance
    seed: int
    batch_size: int
    fitted_prompts: tuple[int, ...]
    held_out_prompts: tuple[int, ...]
    state: Path  # where an unfinished fit is kept
    spent: int  # model calls so far, for its grid

    @property
    def reverse(self) -> bool:
        """Whether autograd runs backwards through the model."""
        return self.objective.gradient == "reverse"

    @property
    def autograd(self) -> bool:
        """Whether autograd runs through the model at all; finite differences are ordinary calls."""
        return self.objective.gradient in ("forward", "reverse")


def noisy(model_wrap: Any, rows: range, like: Tensor, sigma: float, seed: int) -> Sample:
    """The noise of trajectories number `rows` at a noise level, each of the shape of those in `like`."""
    drawn = noise(rows, tuple(like.shape[1:]), seed).to(like)
    level = torch.tensor(sigma).to(like)
    return model_wrap.inner_model.model_sampling.noise_scaling(level, drawn, torch.zeros_like(drawn), True)  # type: ignore[no-any-return]


class Question:
    """One prompt at one guidance scale, put to the model."""

    def __init__(self, guider: Any, conds: dict[str, Any], scale: float, denoiser: ComfyDenoiser) -> None:
        self.guider = guider
        self.conds = conds
        self.scale = scale
        self.denoiser = denoiser

    def __call__(self, x: Sample, sigma: Sigma) -> Answer:
        self.guider.conds, self.guider.cfg = self.conds, self.scale
        return self.denoiser(x, sigma)

    def jvp(self, x: Sample, sigma: Sigma, dx: Sample, dsigma: Sigma) -> tuple[Sample, Sample]:
        """The answer and its derivative."""
        self.guider.conds, self.guider.cfg = self.conds, self.scale
        return self.denoiser.jvp(x, sigma, dx, dsigma)


@dataclass
class Progress:
    """Tells the browser and the console how far a fit is, at every model call."""

    total: int
    tell: Callable[[str], None]
    disabled: bool
    bar: Any = field(init=False)
    begun: float = field(init=False)
    at_begin: int | None = None
    told: float = 0.0
    text: str = ""

    def __post_init__(self) -> None:
        self.browser = comfy.utils.ProgressBar(self.total)
        self.bar = tqdm(total=self.total, desc="AMED training", unit="call", disable=self.disabled)
        self.begun = time.monotonic()

    def update(self, done: int, picture: Any = None) -> None:
        """`done` model calls of about `total`."""
        if self.at_begin is None:  # a fit that goes on has calls of its first part
            self.at_begin = done
        self.total = max(self.total, done)
        self.browser.update_absolute(done, self.total, None if picture is None else ("JPEG", picture, 512))
        self.bar.total = self.total
        self.bar.update(done - self.bar.n)
        now = time.monotonic()
        if now - self.told >= TOLD_EVERY and done > self.at_begin:
            self.told = now
            left = (now - self.begun) / (done - self.at_begin) * (self.total - done)
            self.tell(f"{done / self.total:.0%}, about {duration(left)} left{self.text}")


def duration(seconds: float) -> str:
    """A time as people say it."""
    whole = max(round(seconds), 1)
    return f"{whole} s" if whole < 90 else f"{round(whole / 60)} min"


class TrainSampler(comfy.samplers.Sampler):
    """Does a job. Afterwards `predictor`, `fit`, `losses`, `report` and `seconds` tell what came of it.

    Stopped at any moment, it leaves a state in the job's file, and the same job goes on from there.
    `losses` has one loss per batch, summed over its intervals, or one error per iteration.
    """

    def __init__(self, job: Job, prompts: Sequence[Any], tell: Callable[[str], None]) -> None:
        self.job = job
        self.prompts = prompts  # positive conditionings
        self.tell = tell
        self.losses: list[float] = []
        self.fit: Fit | None = None
        self.predictor: AnyPredictor | None = None
        self.report: Learned | None = None
        self.model_calls = job.spent
        self.floor = job.spent  # the fewest that this takes on paper
        self.resumed = False

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
        del callback, latent_image, denoise_mask
        conds, scale = model_wrap.conds, model_wrap.cfg
        reverse = differentiable(model_wrap.inner_model) if self.job.reverse else contextlib.nullcontext()
        try:
            with marked_as_training() if self.job.autograd else contextlib.nullcontext(), reverse:
                self._fit(model_wrap, sigmas, extra_args, noise, disable_pbar)
        finally:
            model_wrap.conds, model_wrap.cfg = conds, scale
        return noise

    def _fit(self, guider: Any, sigmas: Tensor, extra_args: dict[str, Any], like: Tensor, quiet: bool) -> None:
        job = self.job
        progress: Progress | None = None

        def on_call(x: Sample, sigma: Sigma, denoised: Sample) -> None:
            del x, sigma, denoised
            if progress is not None and self.fit is not None:
                progress.update(self.model_calls + self.fit.model_calls)

        balance = Balance.of(packed_shapes(guider), like)
        sources = self._sources(guider, sigmas, extra_args, like, on_call, balance)
        see = balance.look(look(job.config, guider))
        saved = self._saved_state()
        stage = int(saved["stage"]) if saved else 0
        preview = Preview(guider, like, balance)
        table = getattr(guider.inner_model.model_sampling, "sigmas", None)
        for number, make in enumerate([self._table_fit, self._last_fit][job.table is None :]):
            fit = make(sources, see, like) if job.config.kind != "multistep" else self._multistep_fit(sources, table)
            if number < stage:  # finished before it was stopped: only its predictor is needed
                fit.predictor.load_state_dict(saved["finished"])
                self.predictor = fit.predictor
                continue
            if saved and number == stage:
                fit.load_state_dict(saved["fit"])
                self.resumed = True
            self.fit, self.losses = fit, []
            total = fit.floor if isinstance(fit, Trainer) else fit.calls_of(fit.config.iterations)
            progress = Progress(self.model_calls + total, self.tell, quiet)
            try:
                for picture in self._steps(fit, number, preview, progress):
                    progress.update(self.model_calls + fit.model_calls, picture)
            except BaseException:
                self._save(fit, number)
                raise
            finally:
                progress.bar.close()
            self.model_calls += fit.model_calls
            self.floor += fit.floor
            self.predictor = fit.predictor
            progress = None
        assert self.predictor is not None
        self.predictor.requires_grad_(False)
        assert self.fit is not None
        metered = self.fit.metered if isinstance(self.fit, Trainer) else self.fit.metered[0]  # knows what fits
        x, denoiser = metered(range(HELD_OUT, HELD_OUT + min(REPORTED, job.batch_size)))
        names, calls = (job.config.solver, "base solver"), job.objective.teacher_calls
        self.report = learned(*names, self.predictor, denoiser, x, see, job.scales[0], calls, balance.parts)
        job.state.unlink(missing_ok=True)

    def _steps(self, fit: Fit, stage: int, preview: Preview, progress: Progress) -> Iterator[Any]:
        """Run a fit; after every step there may be a picture to show."""
        saved_at = time.monotonic()
        if isinstance(fit, Trainer):
            last = fit.predictor.config.planned - 1
            self.losses = [sum(batch) for batch in zip_longest(*fit.losses, fillvalue=0.0)]  # before it was stopped
            for event in fit.events():
                if event.interval == 0:
                    self.losses.append(0.0)
                self.losses[-1] += event.loss
                held_out = f", error {fit.errors[-1]:.4g}" if fit.errors else ""
                progress.text = f"; loss {self.losses[-1]:.4g}{held_out}"
                yield preview(event.teacher, event.student) if event.interval == last else None
                saved_at = self._save_in_time(fit, stage, saved_at)
            return
        for iteration in fit.events():
            self.losses = [error for error, _ in fit.history]
            progress.text = f"; error {iteration.held_out:.4g}"
            yield preview(iteration.teacher, iteration.student)
            saved_at = self._save_in_time(fit, stage, saved_at)

    def _table_fit(self, sources: Sequence[Source], see: Any, like: Tensor) -> Fit:
        assert self.job.table is not None
        assert self.job.table_objective is not None
        return EndToEnd(TablePredictor(self.job.table).to(like.device), sources, self.job.table_objective)

    def _multistep_fit(self, sources: Sequence[Source], table: Tensor | None) -> Fit:
        config = self.job.config
        assert isinstance(self.job.objective, FitConfig)
        begin = starts(config.calls, config.sigma_min, config.sigmas[0], flow=config.flow, table=table)
        return MultistepFit(MultistepTable(config), sources, self.job.objective, begin)

    def _last_fit(self, sources: Sequence[Source], see: Any, like: Tensor) -> Fit:
        job, generator = self.job, torch.Generator().manual_seed(self.job.seed)
        if isinstance(self.predictor, TablePredictor):
            network = centred_on(self.predictor.cpu(), job.config, generator).to(like.device)
            assert isinstance(job.objective, FitConfig)
            return EndToEnd(network, sources, job.objective, see)
        if isinstance(job.objective, TrainConfig):
            predictor = AMEDPredictor(job.config, generator).to(like.device)
            return Trainer(predictor, sources[0], job.objective, see)
        return EndToEnd(TablePredictor(job.config).to(like.device), sources, job.objective, see)

    def _sources(
        self, guider: Any, sigmas: Tensor, extra_args: dict[str, Any], like: Tensor, on_call: OnCall, balance: Balance
    ) -> list[Source]:
        """One per guidance scale. A batch of trajectories has one prompt, and its number says which."""
        job, prompts = self.job, self._processed(guider, like)

        def denoiser_of(conds: dict[str, Any], scale: float) -> ComfyDenoiser:
            guider.conds = conds
            sees = {"bottleneck": job.config.features == "bottleneck", "guidance": scale if job.config.guided else None}
            return ComfyDenoiser(guider, extra_args, job.config.sigmas, **sees, on_call=on_call)

        def source(scale: float) -> Source:
            asked = [(conds, denoiser_of(conds, scale)) for conds in prompts]

            def draw(rows: range) -> tuple[Sample, Denoiser]:
                turns = job.held_out_prompts if rows.start >= HELD_OUT else job.fitted_prompts
                conds, denoiser = asked[turns[rows.start % HELD_OUT // job.batch_size % len(turns)]]
                x = noisy(guider, rows, like, float(sigmas[0]), job.seed)
                return balance.scaled(x), balance.denoiser(Question(guider, conds, scale, denoiser))

            return draw

        return [source(scale) for scale in job.scales]

    def _processed(self, guider: Any, like: Tensor) -> list[dict[str, Any]]:
        """The prompts as the model takes them, each with the negative one and without the others' areas."""
        if len(self.prompts) == 1:
            return [guider.conds]
        originals, inner = guider.original_conds, guider.inner_model
        shapes = {"latent_shapes": inner.latent_shapes} if hasattr(inner, "latent_shapes") else {}  # newer ComfyUI
        return [
            comfy.samplers.process_conds(
                inner,
                like,
                {
                    kind: [dict(c) for c in originals[key]]
                    for kind, key in (("positive", name), ("negative", "negative"))
                },
                like.device,
                seed=self.job.seed,
                **shapes,
            )
            for name in prompt_names(len(self.prompts))
        ]

    def _saved_state(self) -> dict[str, Any]:
        if not self.job.state.exists():
            return {}
        try:
            return load_state(self.job.state)
        except PredictorFileError as error:
            logging.warning(f"AMED: {error} Training begins anew.")
            return {}

    def _save_in_time(self, fit: Fit, stage: int, saved_at: float) -> float:
        if time.monotonic() - saved_at < SAVED_EVERY:
            return saved_at
        self._save(fit, stage)
        return time.monotonic()

    def _save(self, fit: Fit, stage: int) -> None:
        finished = {} if self.predictor is None else dict(self.predictor.state_dict())
        save_state(self.job.state, {"stage": stage, "finished": finished, "fit": fit.state_dict()})


def prompt_names(count: int) -> list[str]:
    """Under which names a guider carries several positive prompts."""
    return ["positive", *(f"positive_{n}" for n in range(1, count))]
