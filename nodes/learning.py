"""Learning while sampling: the first pictures of a situation are drawn slowly, and teach the ones after them."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import comfy.model_management
import torch
from comfy_api.latest import io
from torch import Tensor
from tqdm.auto import tqdm

from ..amed_core.call_list import run_of
from ..amed_core.config import PredictorConfig, plain_facts
from ..amed_core.contents import LONGEST_ERROR, in_short
from ..amed_core.driver import in_full, raise_if_not_finite
from ..amed_core.files import load_state, provenance
from ..amed_core.fit.learner import GOOD, GOOD_IN_A_ROW, MOST_PICTURES, Learner
from ..amed_core.fit.teacher import TeacherPath, path_bytes
from ..amed_core.predictor import PredictorSet
from ..amed_core.samplers import MULTISTEP_STUDENT, student_config
from ..amed_core.types import Answer, Denoiser, Sample, Sigma
from . import situations
from .bridge import ComfyDenoiser, foreign_code, frames_are_batch, guider_of, shows_guidance
from .drawing import Callback, LearningReport, draw
from .own_grid import is_own
from .pairing import fingerprint, model_facts, scale
from .situations import Situation, situation
from .streams import Balance, packed_shapes
from .values import CATEGORY, NotedPredictor, note, say, schema, warn

ATTACHED = "amed_learning"  # under this name a MODEL carries how it is to be learned
AUTOMATICALLY, FROM_PICTURES, NEVER = "automatically", "from N pictures", "never"
MOST_BYTES = 2 * 1024**3  # of a teacher's path
DIGITS = 6  # of levels: float32 has 7


@dataclass(frozen=True)
class Learning:
    """How a MODEL is to be learned, from "AMED Learn"."""

    mode: str = AUTOMATICALLY
    pictures: int = 4  # to learn from, in the mode that counts them
    teacher_calls: int = 24

    def enough(self, learner: Learner) -> bool:
        """Whether nothing more is to be learned."""
        return learner.pictures >= self.pictures if self.mode == FROM_PICTURES else learner.done


def learning_of(model: Any) -> Learning:
    """What "AMED Learn" set on a MODEL, or what is usual."""
    return model.get_attachment(ATTACHED) or Learning()


@torch.no_grad()
def sample_learning(
    model: Any,
    x: Sample,
    sigmas: Tensor,
    extra_args: dict[str, Any],
    callback: Callback | None,
    disable: bool | None,
    made_for: PredictorSet | None = None,
) -> Sample:
    """Sample with what was learned of the situation, or slowly, and learn from it.

    `made_for` are predictors on the model that do not cover the situation.
    Raises ValueError for levels that no sampler could follow, FloatingPointError for NaN or infinity.
    """
    guider = guider_of(model)
    levels = tuple(float(f"{sigma:.{DIGITS}g}") for sigma in sigmas.tolist())
    config = _config(guider, levels)
    settings = learning_of(guider.model_patcher)
    run = _Run(model, x, levels, extra_args, callback, disable, config)
    if (why := _why_plain(guider, levels, settings)) is not None:
        (note if settings.mode == NEVER else warn)([why])
        return run.plain()
    own = is_own(levels, guider.inner_model.model_sampling, made_for)
    masked, make = extra_args.get("denoise_mask") is not None, partial(_learner, config, levels, own, guider, settings)
    here = situation(guider.model_patcher, guider, levels, own, x, masked, make().usual_calls)
    learned = Learned.read(here, make, settings)
    why = _why_not_taught(x, learned) if learned.due else None
    if learned.due and why is None:
        return _teach(run, learned, guider)
    if not learned.learner.candidates:
        warn([f"{len(levels) - 1} plain calls, nothing learned.", _as_sentence(str(why))])
        return run.plain()
    (note if why is None else warn)([learned.text(why)])
    table = learned.learner.chosen.table
    drawn = run.draw(table.method(), shown_at(table.config))
    learned.used()
    return drawn


def _config(guider: Any, levels: Sequence[float]) -> PredictorConfig:
    """A multistep table's settings before any fit, for this run. Raises ValueError for levels that do not fall."""
    at = scale(guider) or 1.0
    facts = model_facts(guider.model_patcher, guider, guided=at != 1 and shows_guidance(guider))
    facts = replace(facts, fingerprint=plain_facts(dict(facts.fingerprint)))
    config = student_config(MULTISTEP_STUDENT, max(len(levels) - 1, 2), facts, guidance=at)
    begun = tuple(levels[0] * 0.5**k for k in range(len(levels) - 1))
    config = replace(config, sigmas=(*begun, 0.0))
    run_of(levels, config)
    switch = float(getattr(guider, "switch_sigma", 0.0))
    return replace(config, switch_sigma=switch) if switch < levels[0] else config


def _why_plain(guider: Any, levels: Sequence[float], settings: Learning) -> str | None:
    """Why nothing is to be learned in this run, as a sentence; None if something is."""
    if settings.mode == NEVER:
        return f"{len(levels) - 1} plain calls: AMED Learn says never."
    if (file := foreign_code(guider)) is not None:
        return (
            f"nothing is learned, for another pack's code answers here. It stands in place of ComfyUI's own guider "
            f"({type(guider).__name__} of {file}) and may do more than answer, so that all calls are plain ones."
        )
    if len(levels) < 3:
        return "1 plain call: learning needs at least 2 steps."
    return None


def _why_not_taught(x: Sample, learned: "Learned") -> str | None:
    """Why a run that is to teach cannot, as a sentence; None if it can."""
    if (failed := situations.why_failed(learned.path)) is not None:
        return f"that failed before ({failed}). AMED Learn with forget, or a restart, tries again."
    if path_bytes(x, learned.learner.teacher_calls, half=True) > MOST_BYTES:
        return f"the slow run of {len(x)} at this size would take over 2 GB. Fewer at once would teach."
    return None


def _learner(
    config: PredictorConfig, levels: Sequence[float], own_grid: bool, guider: Any, settings: Learning
) -> Learner:
    """One that knows nothing yet.

    Of two models it learns weights across the change, too. On digits they were better than weights that begin anew
    there in nine of twelve trials, and better than the best plain solver in all.
    """
    return Learner(
        replace(config, switch_sigma=0.0),
        () if own_grid else levels,
        end=levels[-1],
        model_sigmas=getattr(guider.inner_model.model_sampling, "sigmas", None),
        teacher_calls=settings.teacher_calls,
        first_steps=not frames_are_batch(guider),  # frames take the channels' place in a video that teaches as one
    )


def predictor_of(path: Path) -> NotedPredictor:
    """What was learned, as a predictor. Raises ValueError if the file is damaged."""
    try:
        state = load_state(path)
        learner, date = Learner.of(state["learner"]), str(state["date"])
        chosen, learned_from = learner.chosen, {"pictures": learner.pictures, "held_out_ratio": learner.held_out_ratio}
    except Exception as error:  # whatever a file may hold
        told = f"{path.name} is damaged. Let the sampler learn again. ({error})"
        raise ValueError(in_short(told, LONGEST_ERROR)) from error
    about = {"method": f"learned while sampling: {chosen.name}", "teacher_calls": learner.teacher_calls}
    return NotedPredictor(chosen.table, {**provenance(about | learned_from), "date": date})


@dataclass(frozen=True)
class _Run:
    """What ComfyUI asked a sampler for."""

    model: Any
    x: Sample
    levels: tuple[float, ...]
    extra_args: dict[str, Any]
    callback: Callback | None
    disable: bool | None
    config: PredictorConfig

    def draw(self, method: Any, guidance: float | None = None) -> Sample:
        """With a method of one call per step, to which calls may have to show what guidance adds at a scale."""
        told = (self.model, self.x, self.levels, method, self.extra_args, self.callback, self.disable)
        return draw(*told, guidance=guidance)

    def plain(self) -> Sample:
        """With iPNDM."""
        return self.draw(replace(self.config, sigmas=self.levels).base_method())


@dataclass
class Learned:
    """What is known of a situation, and whether the next run teaches it."""

    here: Situation
    path: Path
    learner: Learner
    settings: Learning
    teach_next: bool = True  # every other run teaches
    date: Mapping[str, str] = field(default_factory=dict)  # of the first lesson, if that is past

    @classmethod
    def read(cls, here: Situation, make: Callable[[], Learner], settings: Learning) -> "Learned":
        """From its file, if there is one that can be used; else a guess from the situation that is nearest.

        `make` makes a learner that knows nothing yet.
        """
        path = situations.file_of(here)
        try:
            if state := situations.read(path):
                learner = make()
                learner.load_state_dict(state["learner"])
                return cls(here, path, learner, settings, bool(state["teach_next"]), {"date": str(state["date"])})
            if (near := situations.near(here)) is not None:
                learner, (where, known) = make(), near
                learner.guess(Learner.of(known["learner"]), f"first guess from {where}", here.elements)
                return cls(here, path, learner, settings, teach_next=False)
        except Exception as error:  # whatever a file may hold
            situations.damaged(path, error)
        return cls(here, path, make(), settings)

    @property
    def due(self) -> bool:
        """Whether this run teaches."""
        return not self.learner.candidates or (self.teach_next and not self.settings.enough(self.learner))

    def keep(self, *, teach_next: bool) -> None:
        """Write it."""
        self.teach_next = teach_next
        state = {"teach_next": teach_next, "learner": self.learner.state_dict(), **self.date}
        situations.keep(self.path, self.here, state)

    def used(self) -> None:
        """A picture was drawn with it."""
        try:
            if self.settings.enough(self.learner):
                os.utime(self.path)
            else:
                self.keep(teach_next=True)
        except Exception as error:  # the picture is finished
            logging.warning(f"AMED: what was learned could not be kept: {error}")

    def finished(self) -> str:
        """Why nothing more is to be learned, as a sentence."""
        count = self.learner.pictures
        if self.settings.mode == FROM_PICTURES:
            return f"Finished after {count} picture{'s' * (count > 1)}, as AMED Learn says."
        if self.learner.good_in_a_row >= GOOD_IN_A_ROW:
            return f"Finished: {GOOD_IN_A_ROW} in a row were at least {1 - GOOD:.0%} better than any plain sampler."
        return f"Finished after {count} pictures, more than which teach little."

    def begins(self, pictures: int) -> str:
        """What a run that teaches with so many pictures takes, at most 60 characters."""
        learner, calls = self.learner, self.learner.config.calls
        first, last = learner.pictures + 1, learner.pictures + pictures
        most = self.settings.pictures if self.settings.mode == FROM_PICTURES else MOST_PICTURES
        which = f"{first} to {last}" if pictures > 1 else f"{first} of {most}"
        return f"learning {which}: {learner.teacher_calls} + up to {learner.calls_for(1)} calls once, then {calls}."

    def text(self, why_not: str | None = None) -> str:
        """How good it is, at most 60 characters first, and why it cannot be taught now, if it should.

        It does not name the number of calls in which a plain sampler would be as near: none was run in other numbers of
        calls, and how fast errors fall differs from model to model.
        """
        learner, calls = self.learner, self.learner.config.calls
        if why_not is not None:
            rest = f" Nothing more is learned: {why_not}"
        elif self.settings.enough(learner):
            rest = f" {self.finished()}"
        else:
            rest = " Still learning: the next run teaches it again."
        if not learner.pictures:
            guess, _, where = learner.chosen.name.partition(" from ")
            return f"{calls} calls, a {guess}. It is from {where}.{rest}"
        ratio, count = learner.held_out_ratio, learner.pictures
        if learner.chosen.plain:
            solver = learner.chosen.name.split(",")[0]
            return f"{calls} calls of plain {solver}: better than what was learned.{rest}"
        if ratio is None:
            return f"{calls} calls, learned from {count} picture{'s' * (count > 1)}.{rest}"
        return f"{calls} calls, {ratio:.2f} of the best plain sampler's error (held out).{rest}"


def _teach(run: _Run, learned: Learned, guider: Any) -> Sample:
    """Draw slowly, and learn from it. The picture is the slow one, whatever becomes of the learning."""
    learner, x = learned.learner, run.x
    calls, before = len(run.levels) - 1, fingerprint(guider.model_patcher)
    balance, video = Balance.of(packed_shapes(guider), x), frames_are_batch(guider)
    note([learned.begins(1 if video else len(x))])
    with tqdm(total=learner.teacher_calls + learner.calls_for(1), disable=run.disable) as bar:
        report = LearningReport(run.callback, bar, calls, learner.teacher_calls, to_zero=run.levels[-1] == 0)
        every = sorted({*run.levels, *learner.teacher_levels}, reverse=True)
        denoiser = ComfyDenoiser(
            run.model, run.extra_args, every, bottleneck=False, guidance=shown_at(run.config), on_call=report
        )
        asked: Denoiser = balance.denoiser(denoiser)
        start = balance.scaled(x)
        if video:
            asked, start = OneVideo(asked), start[None]
        path = _slow(learned, asked, start)
        if isinstance(path, TeacherPath):
            end = path.end[0] if video else path.end
            picture = _picture(balance.unscaled(end.to(x)), report, run)
            report.show(picture)
            _learn(learned, asked, start, path, report, lambda: fingerprint(guider.model_patcher) == before)
            report.finish()
            return picture
    comfy.model_management.soft_empty_cache()
    warn([f"{calls} plain calls, nothing learned.", f"{path}."])
    drawn = run.plain()
    situations.fail(learned.path, path)  # only now: what fails here, too, is not for learning to remember
    return drawn


def _slow(learned: Learned, asked: Denoiser, start: Sample) -> TeacherPath | str:
    """The teacher's path, in half precision if it is long; or why there is none."""
    try:
        long = path_bytes(start, learned.learner.teacher_calls, half=False) > MOST_BYTES
        path = learned.learner.taught(asked, start, half=long)
        return path if path.end.isfinite().all() else "NaN in the slow run"
    except comfy.model_management.InterruptProcessingException:
        raise
    except Exception as error:  # the plain run needs less, and tells what is wrong if it fails, too
        return _short(error)


def _learn(
    learned: Learned,
    asked: Denoiser,
    start: Sample,
    path: TeacherPath,
    report: LearningReport,
    unchanged: Callable[[], bool],
) -> None:
    """Learn from a path and keep it. Whatever fails, what was kept before stays, and the log tells."""
    learner, slow_calls = learned.learner, learned.learner.teacher_calls
    guess = None if learner.pictures else next(iter(learner.candidates), None)
    try:
        learner.learn(asked, start, path, report.expect)
        raise_if_not_finite(report.answers)
        if not unchanged():
            raise RuntimeError("The model was changed meanwhile.")
        learned.keep(teach_next=False)
    except comfy.model_management.InterruptProcessingException:
        raise
    except Exception as error:  # the picture is finished, and is worth more than the lesson
        situations.fail(learned.path, _short(error))
        warn(["the slow picture, nothing learned.", f"{_short(error)}."])
    else:
        told = [f"learned from {learner.pictures}; the next picture takes {learner.config.calls} calls."]
        told += [] if guess is None else _checked(learner, guess.name)
        if learner.teacher_calls > slow_calls:
            told.append(
                "The slow run itself errs by half as much as its student, or more: the next one that teaches takes "
                f"{learner.teacher_calls} calls."
            )
        note(told + [learned.finished()] * learned.settings.enough(learner))


def _checked(learner: Learner, guess: str) -> list[str]:
    """How good a first guess was, if it is still among the best."""
    ratios = [learner.ratio_of(one) for one in learner.candidates if one.name == guess and not one.plain]
    return [f"The {guess} had {ratio:.2f} of the best plain sampler's error." for ratio in ratios if ratio is not None]


def _picture(end: Sample, report: LearningReport, run: _Run) -> Sample:
    """The teacher's samples, of whose masked pixels the last answer is exact."""
    mask = run.extra_args.get("denoise_mask")
    if mask is None or run.levels[-1] > 0:
        return end
    return torch.where(mask > 0, end, report.last["denoised"])


@dataclass(frozen=True)
class OneVideo:
    """A model whose batch is the frames of one video, as a model of a batch of one."""

    inner: Any

    def __call__(self, x: Sample, sigma: Sigma) -> Answer:
        denoised, _, guidance = in_full(self.inner(x[0], sigma))
        return denoised[None], None, None if guidance is None else guidance[None]


def shown_at(config: PredictorConfig) -> float | None:
    """The guidance scale at which model calls are to show what guidance adds; None where they need not."""
    return config.guidance if config.guided else None


def _as_sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _short(error: Exception) -> str:
    return f"{type(error).__name__}. {error}"


class AMEDLearn(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AMEDLearn",
            display_name="AMED Learn",
            category=CATEGORY,
            description='How the samplers "amed" and "amed_multistep" learn a model that has no predictor. They learn '
            "without this node, too: the first picture of a model at a number of steps, cfg and size is drawn slowly, "
            "and from then on every picture takes as many calls as steps says. While that is still being learned, the "
            'same seed may change from run to run; once it is finished it never does. "never" gives plain iPNDM, '
            "which is the same bit by bit at every run.",
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model to sample with. Connect LoRA and shift nodes before, KSampler after."
                ),
                io.Combo.Input(
                    "mode",
                    options=[AUTOMATICALLY, FROM_PICTURES, NEVER],
                    default=AUTOMATICALLY,
                    tooltip="automatically: every other run teaches, until it is good enough or 8 pictures taught. "
                    "from N pictures: until so many taught. never: nothing is learned or read; plain iPNDM.",
                ),
                io.Int.Input(
                    "pictures",
                    default=4,
                    min=1,
                    max=64,
                    tooltip='For "from N pictures": how many teach. 1 is fastest to finish; 8 is nearly as good as it '
                    "gets. Every picture of a batch counts.",
                ),
                io.Int.Input(
                    "teacher_calls",
                    default=24,
                    min=12,
                    max=100,
                    tooltip="Model calls of a slow picture, which teaches; never fewer than three times the steps. 24 "
                    "suits most models; more where cfg is high. What was learned with another number is kept apart.",
                ),
                io.Boolean.Input(
                    "forget",
                    default=False,
                    tooltip="On: when this node runs, all that was learned of this model with its LoRAs is removed, at "
                    "every number of steps, cfg and size. Turn it off again afterwards.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The same model, with these settings; for KSampler.")
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: Any, mode: str, pictures: int, teacher_calls: int, forget: bool) -> io.NodeOutput:
        if forget:
            count = situations.forget(model)
            say(cls, f"AMED: forgot {count} learned set{'s' * (count != 1)} of this model.")
        made = model.clone()
        made.set_attachments(ATTACHED, Learning(mode, pictures, teacher_calls))
        return io.NodeOutput(made)
