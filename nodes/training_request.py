"""What a training node was asked: its inputs, and the settings of predictors and of their fit that follow from them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NoReturn, cast

from ..amed_core.config import PredictorConfig
from ..amed_core.fit.efforts import Effort
from ..amed_core.fit.grid_search import SEARCH_CALLS, SEARCH_TRAJECTORIES
from ..amed_core.fit.make import Settings, usual_settings
from ..amed_core.fit.passes import LEAST_PASSES, MORE_CALLS
from ..amed_core.fit.protocol import FitConfig, TrainConfig
from ..amed_core.fit.several import Use, numbers_of
from ..amed_core.samplers import MULTISTEP_STUDENT, student_config
from ..amed_core.schedules import SEARCHED
from .bridge import leaves_out_negative, shows_guidance
from .pairing import fingerprint, model_facts
from .recipes import Recipe, recipe
from .training_inputs import (
    AUTO,
    CONVERGED,
    FROM_IMAGES,
    FROM_NOISE,
    NETWORK,
    PAPER,
    RECIPE,
    TABLE,
    defaults,
    paper_inputs,
    predictor_inputs,
)
from .training_subject import Subject, has_bottleneck, on_searched_grid

CFG_POINTS = 3  # guidance scales of a range
PROMPTS_AT_ONCE = 32  # trajectories among which every prompt has a batch of its own
NETWORK_TRAJECTORIES = 2000  # of a recommended network; the paper's has 10,000
NETWORK_BATCH, NETWORK_HELD_OUT = 16, 32
DENOISE = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # where images start that predictors are made for
# Inputs of "AMED Train Paper Predictor" that are for one type of predictor; all others are for both.
ONLY_FOR = {
    NETWORK: ("features", "teacher", "teacher_points", "learning_rate", "epochs", "gradient"),
    TABLE: ("cfg_max",),
}
WITHOUT_RHO = ("logsnr", SEARCHED)


@dataclass(frozen=True)
class Asked:
    """The inputs that both training nodes have, but the positive prompts."""

    model: Any
    negative: Any
    latent_image: Mapping[str, Any]
    seed: int
    cfg: float
    trajectories: int
    batch_size: int
    cfg_max: float
    clip: Any
    prompts: str
    held_out: int
    guider: Any
    teacher_calls: int
    save_as: str
    keep_state: str

    NODE: ClassVar[str]

    @classmethod
    def of(cls, inputs: Mapping[str, Any]) -> "Asked":
        """From the inputs that were given; the others are as in an untouched node."""
        return cls(**(cls.defaults() | dict(inputs)))

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The values of an untouched node."""
        raise NotImplementedError

    @property
    def uses(self) -> tuple[Use, ...]:
        """What predictors are for, pure noise first; the first one is meant where only one is asked for."""
        raise NotImplementedError

    def own_teacher(self, subject: Subject) -> Recipe | None:
        """The recipe whose pictures are the goal; None where that is what the model itself says."""
        del subject
        return None

    def tried(self, numbers: Sequence[int]) -> list[int]:
        """The numbers of calls that are fitted, rising."""
        return sorted(set(numbers))

    @property
    def minutes(self) -> float:
        """After which training stops; 0 for no limit."""
        return 0.0

    @property
    def of_network(self) -> int:
        """The passes of the network for which the number of calls is chosen; 0 where it is given."""
        return 0

    @property
    def scales(self) -> tuple[float, ...]:
        """The guidance scales to fit at."""
        if not self.cfg_max:
            return (self.cfg,)
        width = (self.cfg_max - self.cfg) / (CFG_POINTS - 1)
        return tuple(round(self.cfg + n * width, 4) for n in range(CFG_POINTS))

    @property
    def reverse(self) -> bool:
        """Whether autograd is to run backwards through the model."""
        return False

    def refuse_without_effect(self, positives: int) -> None:
        """Raise ValueError for an input that would change nothing, beside so many positive prompts."""
        if self.guider is None:
            if self.cfg_max and self.cfg_max <= self.cfg:
                self._refuse("cfg_max", f"it is not above cfg {self.cfg:g}", "Set it to 0, or above cfg")
            return
        brings = "A guider brings its own prompts and cfg"
        for name in ("prompts", "cfg_max"):
            if self.given(name):
                self._refuse(name, brings, f"{self._back(name)}, or disconnect guider")
        own = getattr(self.guider, "cfg", None)
        if self.given("cfg") and own is not None and self.cfg != own:
            self._refuse("cfg", f"{brings}, which is {own:g}", f"{self._back('cfg')}, or to {own:g}")
        if positives > 1:
            raise ValueError(
                f'{positives} prompts have no effect: {brings}. Connect one to positive of "{self.NODE}", or '
                "disconnect guider."
            )

    def given(self, name: str) -> bool:
        """Whether an input is not as in an untouched node."""
        value, usual = getattr(self, name), self.defaults()[name]
        return bool(value.strip() != usual if isinstance(value, str) else value != usual)

    def _back(self, name: str) -> str:
        usual = self.defaults()[name]
        return f"Clear {name}" if usual == "" else f"Set {name} to {usual!r}"

    def _refuse(self, name: str, why: str, remedy: str) -> NoReturn:
        value = getattr(self, name)
        raise ValueError(f'{name} {value!r:.40} has no effect: {why}. {remedy}, in "{self.NODE}".')

    def config(self, subject: Subject, calls: int) -> PredictorConfig:
        """The settings of the predictor for so many calls."""
        raise NotImplementedError

    def _at_scales(self) -> dict[str, Any]:
        return {"guidance": self.cfg, "guidances": self.scales if len(self.scales) > 1 else ()}

    def settings(self, config: PredictorConfig, fitted: int, held_out: int, rows: int) -> Settings:
        """How to fit a predictor of these settings on so many prompts, of which others judge."""
        raise NotImplementedError

    def _counted(self, usual: FitConfig, fitted: int, held_out: int, rows: int) -> FitConfig:
        """Usual settings with the trajectories, batches and teacher that were asked for.

        Every prompt has a batch of its own. Batches are of whole sets of a conditioning's `rows`, so that none of them
        counts more than the others.
        """
        count = self.trajectories or usual.trajectories
        batch = max(1, min(self.batch_size or usual.batch_size, count // fitted, PROMPTS_AT_ONCE // held_out))
        batch -= batch % rows if batch > rows else 0
        count = max(count, fitted * batch)
        judging = self.held_out or usual.held_out
        return replace(
            usual,
            trajectories=count,
            held_out=max(judging, held_out * batch if held_out > 1 else 0),
            batch_size=batch,
            few=count if usual.few >= usual.trajectories else usual.few,
            teacher_calls=self.teacher_calls or usual.teacher_calls,
            budget=usual.budget * -(-count // usual.trajectories),
        )

    def on_grid(self, config: PredictorConfig, subject: Subject, batch_size: int) -> tuple[PredictorConfig, int]:
        """The settings with the grid that was asked for, and the model calls that finding it took."""
        del subject, batch_size
        return config, 0


@dataclass(frozen=True)
class AskedPredictor(Asked):
    """The inputs of "AMED Train Predictor" but the positive prompts."""

    steps: str
    effort: Effort
    budget: float
    starts: str
    teacher: str
    teacher_sampler: str
    teacher_scheduler: str
    teacher_steps: int
    passes: int

    NODE: ClassVar[str] = "AMED Train Predictor"

    @classmethod
    def of(cls, inputs: Mapping[str, Any]) -> "AskedPredictor":
        """From the inputs that were given; the others are as in an untouched node."""
        given = cls.defaults() | dict(inputs)
        return cls(**{**given, "steps": str(given["steps"])})

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The values of an untouched node."""
        return _without_prompt(defaults(predictor_inputs()))

    @property
    def minutes(self) -> float:
        """After which training stops; 0 for no limit."""
        return self.budget

    @property
    def of_network(self) -> int:
        """The passes of the network for which the number of calls is chosen; 0 where it is given."""
        return self.passes

    @property
    def calls(self) -> tuple[int, ...]:
        """The numbers of steps, the usual one first if it is among them. Raises ValueError for what is no number.

        With `passes`, half of them: all of these steps ask the negative.
        """
        if self.passes:
            return (self.passes // 2,)
        try:
            return numbers_of(self.steps)
        except ValueError as error:
            raise ValueError(f'steps is {error} Set it in "{self.NODE}".') from error

    @property
    def uses(self) -> tuple[Use, ...]:
        """What predictors are for, pure noise first."""
        levels = image_levels(self.model) if self.starts == FROM_IMAGES else ()
        return tuple(Use(calls, level) for level in (0.0, *levels) for calls in self.calls)

    def refuse_without_effect(self, positives: int) -> None:
        """Raise ValueError for an input that would change nothing, beside so many positive prompts."""
        if self.passes:
            self._refuse_passes()
        if self.teacher != RECIPE:
            for name in ("teacher_sampler", "teacher_scheduler", "teacher_steps"):
                if self.given(name):
                    self._refuse(name, f'teacher is "{CONVERGED}"', f'{self._back(name)}, or teacher to "{RECIPE}"')
        elif self.given("teacher_calls"):
            self._refuse("teacher_calls", f'"{RECIPE}" has teacher_steps', f"{self._back('teacher_calls')}")
        super().refuse_without_effect(positives)

    def _refuse_passes(self) -> None:
        """Raise ValueError for passes that are too few, or do not go with other inputs."""
        if self.passes < LEAST_PASSES:
            raise ValueError(f'passes {self.passes} are too few: set {LEAST_PASSES} or more, or 0, in "{self.NODE}".')
        for name in ("steps", "cfg_max"):
            if self.given(name):
                why = "passes is set, for which one number of steps is chosen, at one cfg"
                self._refuse(name, why, f"{self._back(name)}, or passes to 0")
        if self.starts == FROM_IMAGES:
            self._refuse("passes", f'starts is "{FROM_IMAGES}"', f'Set it to 0, or starts to "{FROM_NOISE}"')
        if self.guider is None and abs(self.cfg - 1) < 1e-9:
            self._refuse("passes", "at cfg 1 the negative is never asked", "Set it to 0, or another cfg")

    def tried(self, numbers: Sequence[int]) -> list[int]:
        """The numbers of calls that are fitted, rising: those of the uses, or all that passes may lead to."""
        return [*range(self.calls[0], self.calls[0] + MORE_CALLS + 1)] if self.passes else sorted(set(numbers))

    def own_teacher(self, subject: Subject) -> Recipe | None:
        """The recipe whose pictures are the goal; None where that is what the model itself says."""
        if self.teacher != RECIPE:
            return None
        if getattr(subject.guider, "switch_sigma", 0.0) or subject.latent.is_nested:
            raise ValueError(
                f'"{RECIPE}" is for one model with one latent. Set teacher to "{CONVERGED}" in "{self.NODE}".'
            )
        sampling = subject.model.get_model_object("model_sampling")
        return recipe(sampling, self.teacher_sampler, self.teacher_scheduler, self.teacher_steps, self.NODE)

    def config(self, subject: Subject, calls: int) -> PredictorConfig:
        """The settings of the predictor for so many calls."""
        one_answer = any(abs(scale - 1) < 1e-9 for scale in self.scales)  # at cfg 1
        if self.passes and (one_answer or not leaves_out_negative(subject.guider, subject.guider.model_options)):
            why = "this guider, or a node that changes guidance, asks the negative at every call"
            self._refuse("passes", why, "Set it to 0, or use CFGGuider without such nodes")
        facts = model_facts(subject.model, subject.guider, guided=shows_guidance(subject.guider) and not one_answer)
        switch_sigma = getattr(subject.guider, "switch_sigma", 0.0)
        return student_config(MULTISTEP_STUDENT, calls, facts, **self._at_scales(), switch_sigma=switch_sigma)

    def settings(self, config: PredictorConfig, fitted: int, held_out: int, rows: int) -> Settings:
        """How to fit a predictor of these settings on so many prompts, of which others judge."""
        usual = cast(FitConfig, usual_settings(config, effort=self.effort, uses=len(self.calls)))
        return self._counted(usual, fitted, held_out, rows)


@dataclass(frozen=True)
class AskedPaper(Asked):
    """The inputs of "AMED Train Paper Predictor" but the positive prompts."""

    steps: int
    sampler_name: str
    predictor_type: str
    preset: str
    scheduler: str
    rho: float
    scale_dir: float
    scale_time: float
    features: str
    teacher: str
    teacher_points: int
    learning_rate: float
    epochs: int
    gradient: str

    NODE: ClassVar[str] = "AMED Train Paper Predictor"

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The values of an untouched node."""
        return _without_prompt(defaults(paper_inputs()))

    @property
    def uses(self) -> tuple[Use, ...]:
        """One."""
        return (Use(self.steps),)

    @property
    def table(self) -> bool:
        """Whether it has constants for every step."""
        return self.predictor_type == TABLE

    @property
    def published(self) -> bool:
        """Whether it is to be as in the paper."""
        return self.preset == PAPER

    @property
    def reverse(self) -> bool:
        """Whether autograd is to run backwards through the model."""
        return self.gradient == "reverse"

    def refuse_without_effect(self, positives: int) -> None:
        """Raise ValueError for an input that would change nothing, beside so many positive prompts."""
        other = NETWORK if self.table else TABLE
        for name in ONLY_FOR[other]:
            if self.given(name):
                why = f"predictor_type is {self.predictor_type!r}, and only a {other} uses it"
                self._refuse(name, why, f"{self._back(name)}, or predictor_type to {other!r}")
        if self.scheduler == SEARCHED and self.published:
            why = "the paper's grids end at sigma_min, searched ones at 0"
            self._refuse("scheduler", why, f'{self._back("scheduler")}, or preset to "recommended"')
        super().refuse_without_effect(positives)

    def config(self, subject: Subject, calls: int) -> PredictorConfig:
        """The settings of the predictor for so many calls, on its schedule's grid."""
        chosen = {
            "schedule": None if self.scheduler in (AUTO, SEARCHED) else self.scheduler,
            "rho": self.rho or None,
            "scale_dir": self.scale_dir if self.scale_dir >= 0 else None,
            "scale_time": self.scale_time if self.scale_time >= 0 else None,
            "features": None if self.table or self.features == AUTO else self.features,
        }
        config = student_config(
            self.sampler_name,
            calls,
            model_facts(subject.model, subject.guider, bottleneck=self._sees_bottleneck(subject)),
            published=self.published,
            kind="table" if self.table else "network",
            **self._at_scales(),
            **{name: value for name, value in chosen.items() if value is not None},
        )
        schedule = SEARCHED if self.scheduler == SEARCHED else config.schedule
        if self.rho and schedule in WITHOUT_RHO:
            self._refuse("rho", f"the schedule {schedule!r} has none", "Set it to 0, or choose another scheduler")
        return config

    def _sees_bottleneck(self, subject: Subject) -> bool:
        """Whether the model has a bottleneck to look at. Raises ValueError if that was asked for, and it has none."""
        if self.table or self.features not in (AUTO, "bottleneck"):
            return False
        found = has_bottleneck(subject, self.seed)
        if self.features == "bottleneck" and not found:
            raise ValueError(
                f"This model ({fingerprint(subject.model)['family']}) has no U-Net bottleneck to look at. Set features "
                f'to "auto" or "latent" in "{self.NODE}".'
            )
        return found

    def settings(self, config: PredictorConfig, fitted: int, held_out: int, rows: int) -> Settings:
        """How to fit a predictor of these settings on so many prompts, of which others judge."""
        if self.table:
            return self._counted(cast(FitConfig, usual_settings(config)), fitted, held_out, rows)
        usual = cast(TrainConfig, usual_settings(config))
        count = self.trajectories or (usual.trajectories if self.published else NETWORK_TRAJECTORIES)
        return TrainConfig(
            trajectories=max(count, fitted),
            epochs=self.epochs,
            batch_size=min(self.batch_size or NETWORK_BATCH, count),
            teacher="" if self.teacher == AUTO else self.teacher,
            teacher_points=self.teacher_points,
            learning_rate=self.learning_rate,
            gradient="reverse" if self.reverse else "finite difference",
            step=0.0,  # one that suits the model
            held_out=self.held_out or NETWORK_HELD_OUT,
            teacher_calls=self.teacher_calls or usual.teacher_calls,
        )

    def on_grid(self, config: PredictorConfig, subject: Subject, batch_size: int) -> tuple[PredictorConfig, int]:
        """The settings with the grid that was asked for, and the model calls that finding it took."""
        if self.scheduler != SEARCHED:
            return config, 0
        count = min(batch_size, SEARCH_TRAJECTORIES)
        return on_searched_grid(subject, self.seed, config, count), SEARCH_CALLS * count


def _without_prompt(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != "positive"}


def image_levels(model: Any) -> tuple[float, ...]:
    """The noise levels where images start at DENOISE, on a list that is even in a MODEL's timesteps."""
    table = model.get_model_object("model_sampling").sigmas
    return tuple(float(table[max(round(part * len(table)) - 1, 0)]) for part in DENOISE)
