"""Distilling a predictor from the loaded model, inside the UI, with no more memory than sampling needs."""

import copy
import hashlib
import itertools
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import comfy.model_sampling
import comfy.sample
import comfy.samplers
import folder_paths
import torch
from comfy_api.latest import io
from torch import Tensor

from ..amed_core import PredictorConfig, TrainConfig
from ..amed_core.features import LOOKS
from ..amed_core.files import provenance
from ..amed_core.fit.call_derivative import GRADIENTS
from ..amed_core.fit.grid_search import TEACHER_CALLS, TRAJECTORIES, search
from ..amed_core.fit.make import multistep_fit
from ..amed_core.fit.protocol import FitConfig, outcome, verdict
from ..amed_core.fit.teacher import TEACHERS
from ..amed_core.fit.trajectories import Metered
from ..amed_core.midpoints import centred_config, table_config
from ..amed_core.samplers import MULTISTEP_STUDENT, multistep_student, predictor_config
from ..amed_core.schedules import SCHEDULES, SEARCHED
from .bridge import ComfyDenoiser, shows_guidance
from .fitting import Job, TrainSampler, duration, noisy, prompt_names
from .gradients import without_inference_tensors
from .pairing import (
    checkpoint,
    fingerprint,
    guidance,
    models_beside,
    of_guider,
    on_several_gpus,
    refuse_unfit,
)
from .previews import plot
from .streams import Balance, packed_shapes
from .timesteps import with_interpolated_timesteps
from .two_models import TwoModelsGuider
from .values import CATEGORY, SAMPLERS, LossMap, Predictor, PredictorSocket, describe, fold, say, settings, tell

AUTO = "auto"  # the preset's choice for the sampler
PER_INTERVAL, END_TO_END = "per interval", "end to end"
FINITE = "finite difference"
FOLDER = "amed_training"  # in the user's folder: states of fits that were stopped
CFG_POINTS = 3  # guidance scales of a range
CACHES = ("easycache", "lazycache")  # wrappers that answer for the model
ADVANCED = (
    *("batch_size", "learning_rate", "scheduler", "rho", "scale_dir", "scale_time", "teacher", "teacher_points"),
    *("features", "objective", "gradient", "held_out", "epochs", "teacher_calls"),
)
RECOMMENDED, PAPER = "recommended", "paper"
WINNER = {RECOMMENDED: MULTISTEP_STUDENT, PAPER: "amed"}  # of each preset, if the sampler is left to it
NETWORK, TABLE = "network", "table"
TABLE_TRAJECTORIES, NETWORK_TRAJECTORIES = 32, 256


def empty(like: Any, batch: int) -> Any:
    """Zeros of the shape of a latent; newer ComfyUI has nested ones, of several shapes."""
    if like.is_nested:
        return type(like)([torch.zeros(batch, *part.shape[1:]) for part in like.unbind()])
    return torch.zeros(batch, *like.shape[1:])


def sized_for(model: Any, latent: Mapping[str, Any]) -> Any:
    """The latent as the samplers of this ComfyUI will see it: of the MODEL's channels, and where empty latents say for
    which ratio they were made, of the size of the MODEL's own.
    """
    ratios = ("downscale_ratio_spacial", "downscale_ratio_temporal")  # newer ComfyUI; so it spells them
    said = {name: latent[name] for name in ratios if latent.get(name) is not None}
    return comfy.sample.fix_empty_latent_channels(model, latent["samples"], **said)


def prepared(model: Any) -> Any:
    """A MODEL as it is trained on: asked at every call, and between its timesteps."""
    return without_caches(with_interpolated_timesteps(model))


def without_caches(model: Any) -> Any:
    """A clone of a MODEL that is asked at every call; itself if no cache answers for it.

    EasyCache and LazyCache expect one run from high noise to low, and training makes many.
    """
    keys = [key for key in CACHES if any(key in kinds for kinds in model.wrappers.values())]
    if not keys:
        return model
    clone = model.clone()
    clone.model_options["transformer_options"].pop("easycache", None)
    for kind, key in itertools.product(list(clone.wrappers), keys):
        clone.remove_wrappers_with_key(kind, key)
    logging.info(f"AMED: training asks the model itself, without {' and '.join(keys)}.")
    return clone


def student_config(model: Any, name: str, calls: int, *, published: bool = False, **overrides: Any) -> PredictorConfig:
    """The settings of a predictor for this MODEL; `overrides` are those of `recipes.predictor_config`."""
    sampling = model.get_model_object("model_sampling")
    flow = isinstance(sampling, comfy.model_sampling.CONST)
    if flow:  # the published grids are for noise levels that reach far beyond 1; this one follows the shift
        overrides.setdefault("schedule", "discrete")
    return predictor_config(
        name,
        calls,
        float(sampling.sigma_min),
        float(sampling.sigma_max),
        published=published,
        analytic=not flow or published,
        flow=flow,
        table=getattr(sampling, "sigmas", None),
        model=fingerprint(model),
        **overrides,
    )


def inside(guider: comfy.samplers.CFGGuider, latent: Any, seed: int, sigmas: Sequence[float], work: Any) -> Any:
    """The result of `work(model_wrap, like, extra_args)`, run where ComfyUI runs a sampler, on zeros like `latent`."""
    found = []

    class Work(comfy.samplers.Sampler):
        def sample(
            self, model_wrap: Any, sigmas: Tensor, extra_args: Any, callback: Any, noise: Tensor, *_: Any
        ) -> Tensor:
            found.append(work(model_wrap, noise, extra_args))
            return noise

    guider.sample(latent, latent, Work(), torch.tensor(sigmas), disable_pbar=True, seed=seed)
    return found[0]


def has_bottleneck(guider: comfy.samplers.CFGGuider, latent: Any, seed: int) -> bool:
    """Whether the model shows its bottleneck, found out by one model call."""
    sampling = guider.model_patcher.get_model_object("model_sampling")
    ends = [float(sampling.sigma_max), float(sampling.sigma_min)]

    def work(model_wrap: Any, like: Tensor, extra_args: Any) -> bool:
        denoiser = ComfyDenoiser(model_wrap, extra_args, ends, bottleneck=True)
        return denoiser(like, torch.tensor(ends[0]).to(like))[1] is not None

    return bool(inside(guider, empty(latent, 1), seed, ends, work))


def on_searched_grid(
    guider: comfy.samplers.CFGGuider, latent: Any, seed: int, config: PredictorConfig, count: int
) -> PredictorConfig:
    """The settings on the grid that is found by a slow run of so many noises."""

    def work(model_wrap: Any, like: Tensor, extra_args: Any) -> PredictorConfig:
        balance = Balance.of(packed_shapes(model_wrap), like)
        denoiser = balance.denoiser(ComfyDenoiser(model_wrap, extra_args, config.sigmas, bottleneck=False))

        def draw(rows: range) -> tuple[Tensor, Any]:
            return balance.scaled(noisy(model_wrap, rows, like, config.sigmas[0], seed)), denoiser

        x, metered = Metered(draw)(range(count))  # which knows what to do if memory is short
        return search(metered, x, config)

    found: PredictorConfig = inside(guider, empty(latent, count), seed, config.sigmas, work)
    return found


@dataclass(frozen=True)
class Asked:
    """The node's inputs but the positive prompts."""

    model: Any
    negative: Any
    latent_image: Mapping[str, Any]
    seed: int
    cfg: float
    steps: int
    sampler_name: str
    preset: str
    trajectories: int
    batch_size: int
    learning_rate: float
    scheduler: str
    rho: float
    scale_dir: float
    scale_time: float
    teacher: str
    teacher_points: int
    features: str = AUTO
    predictor_type: str = NETWORK
    cfg_max: float = 0.0
    clip: Any = None
    prompts: str = ""
    objective: str = AUTO
    gradient: str = FINITE
    held_out: int = 32
    epochs: int = 1
    teacher_calls: int = 0
    guider: Any = None

    def through_guider(self) -> "tuple[Asked, Any]":
        """These inputs with the guider's model and cfg, and a copy of the guider to train through; None without one.

        Raises ValueError for inputs that a guider leaves no room for.
        """
        if self.guider is None:
            return self, None
        if self.prompts.strip() or self.cfg_max:
            raise ValueError(
                "A guider brings its own prompts and cfg. Clear prompts and set cfg_max to 0, or disconnect guider, in "
                '"AMED Train Predictor".'
            )
        guider = self.guider
        if isinstance(guider, TwoModelsGuider):
            made: Any = guider.replaced(prepared(guider.model_patcher), prepared(guider.low))
        else:
            made = copy.copy(guider)
            made.model_patcher = prepared(guider.model_patcher)
            made.model_options = made.model_patcher.model_options
        if made.cfg is None or "positive" not in made.original_conds:
            raise ValueError(
                f"{type(guider).__name__} is no guider with a positive prompt. Connect one such as CFGGuider or "
                '"AMED Two Models Guider" to guider of "AMED Train Predictor".'
            )
        return replace(self, model=made.model_patcher, cfg=float(made.cfg), guider=None), made

    @property
    def student(self) -> str:
        """The entry of the sampler list to make a predictor for."""
        return WINNER[self.preset] if self.sampler_name == AUTO else self.sampler_name

    @property
    def multistep(self) -> bool:
        """Whether the predictor is a learned multistep method, which has no use for much of what shapes the others."""
        if self.student == MULTISTEP_STUDENT and self.preset == PAPER:
            raise ValueError(
                'amed_multistep is not of the paper. Set sampler_name to "auto" or "amed", or preset to "recommended", '
                'in "AMED Train Predictor".'
            )
        if self.student == MULTISTEP_STUDENT and (self.objective == PER_INTERVAL or self.gradient == "reverse"):
            raise ValueError(
                'amed_multistep is fitted end to end and without autograd. Set objective to "auto" and gradient to '
                '"finite difference" in "AMED Train Predictor", or choose another sampler_name.'
            )
        return self.student == MULTISTEP_STUDENT

    @property
    def overrides(self) -> dict[str, Any]:
        """The settings that are not at auto."""
        chosen = {
            "schedule": None if self.scheduler in (AUTO, SEARCHED) else self.scheduler,
            "rho": self.rho or None,
            "scale_dir": self.scale_dir if self.scale_dir >= 0 else None,
            "scale_time": self.scale_time if self.scale_time >= 0 else None,
        }
        return {name: value for name, value in chosen.items() if value is not None}

    @property
    def scales(self) -> tuple[float, ...]:
        """The guidance scales to fit at."""
        if self.cfg_max <= self.cfg:
            return (self.cfg,)
        width = (self.cfg_max - self.cfg) / (CFG_POINTS - 1)
        return tuple(round(self.cfg + n * width, 4) for n in range(CFG_POINTS))

    @property
    def end_to_end(self) -> bool:
        """Whether the finished picture is what counts."""
        if self.multistep:
            return True
        if self.predictor_type == TABLE:
            if self.objective == PER_INTERVAL:
                raise ValueError(
                    'A table is fitted end to end. Set objective to "auto", or predictor_type to "network", in "AMED '
                    'Train Predictor".'
                )
            return True
        if len(self.scales) > 1 and self.objective != END_TO_END:
            raise ValueError(
                "The paper's network knows one cfg, but cfg_max asks for a range. Set cfg_max to 0, predictor_type to "
                '"table", sampler_name to "amed_multistep", or objective to "end to end", in "AMED Train Predictor".'
            )
        return self.objective == END_TO_END


def inputs() -> list[Any]:
    """What the node asks for; beyond the first rows, sensible defaults."""
    return [
        io.Model.Input("model", tooltip="The model to sample faster, with its LoRAs and shift."),
        io.Conditioning.Input("positive", tooltip="A prompt that is typical of what you will ask for."),
        io.Conditioning.Input("negative", tooltip="The negative prompt that you will use."),
        io.Latent.Input(
            "latent_image", tooltip="An empty latent of the size you will sample; its content is not used."
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            control_after_generate=False,
            tooltip="Of the training noise and the first weights. The same seed gives the same predictor.",
        ),
        io.Float.Input(
            "cfg",
            default=1.0,
            min=0.0,
            max=100.0,
            step=0.1,
            round=0.01,
            tooltip="The cfg you will sample with. A predictor is good near the cfg it was trained at.",
        ),
        io.Int.Input(
            "steps",
            default=5,
            min=2,
            max=100,
            tooltip="Model calls per picture, 2 to 10 being useful; odd numbers suit every model. Choose the "
            "same number in the sampler.",
        ),
        io.Combo.Input(
            "sampler_name",
            options=[AUTO, *SAMPLERS],
            default=AUTO,
            tooltip='The sampler to make. "auto" is the preset\'s: for "recommended" it is amed_multistep, which '
            "learns noise levels and how to combine all earlier model calls, and measured best by far; for "
            '"paper" it is "amed", AMED-Solver. The others are the paper\'s plugins.',
        ),
        io.Combo.Input(
            "preset",
            options=[RECOMMENDED, PAPER],
            default=RECOMMENDED,
            tooltip='"recommended" is what measured best; "paper" is AMED as published. Both are changed by every '
            "option below that is not at auto; amed_multistep finds its own noise levels, and uses of these "
            "options only trajectories, batch_size, cfg_max, prompts, held_out and teacher_calls.",
        ),
        io.Int.Input(
            "trajectories",
            default=2000,
            min=1,
            max=1_000_000,
            tooltip="How many noises to learn from; the paper uses 10000. More is better and slower.",
        ),
        io.Int.Input(
            "batch_size",
            default=16,
            min=1,
            max=4096,
            tooltip="Noises per model call. Lower it if memory runs out; 4 to 32 work.",
        ),
        io.Float.Input(
            "learning_rate",
            default=0.005,
            min=0.00001,
            max=1.0,
            step=0.00001,
            round=False,
            tooltip="Of Adam; the paper's 0.005 suits most models. Lower it if the loss jumps.",
        ),
        io.Combo.Input(
            "scheduler",
            options=[AUTO, *SCHEDULES, SEARCHED],
            default=AUTO,
            tooltip='The grid between whose points the predictor plans. "auto" is the preset\'s; '
            '"polynomial" with rho 7 is Karras, "logsnr" is exponential, "discrete" is uniform in timesteps '
            'and the choice for flow models, "searched" is found on this model, by dynamic programming along a '
            "slow run. amed_multistep always searches.",
        ),
        io.Float.Input(
            "rho",
            default=0.0,
            min=0.0,
            max=20.0,
            step=0.1,
            tooltip="Bends the grid toward small noise levels. 0 is auto: the usual one of the schedule.",
        ),
        io.Float.Input(
            "scale_dir",
            default=-1.0,
            min=-1.0,
            max=0.5,
            step=0.01,
            tooltip="How far from 1 a step may be stretched; the paper uses 0.01. 0 turns it off, below 0 is auto.",
        ),
        io.Float.Input(
            "scale_time",
            default=-1.0,
            min=-1.0,
            max=0.5,
            step=0.01,
            tooltip="How far from 1 the noise level told to the model may be scaled at midpoints; the paper "
            "uses 0 or 0.2. 0 turns it off, below 0 is auto.",
        ),
        io.Combo.Input(
            "teacher",
            options=[AUTO, *TEACHERS],
            default=AUTO,
            tooltip='The slow sampler to imitate. "auto" takes the sampler\'s own family, which is best.',
        ),
        io.Int.Input(
            "teacher_points",
            default=0,
            min=0,
            max=100,
            tooltip="Grid points that the teacher adds in every interval: more is more exact and slower. 0 is "
            "the paper's choice (1 or 2).",
        ),
        io.Combo.Input(
            "features",
            options=[AUTO, *LOOKS],
            default=AUTO,
            optional=True,
            tooltip='What the predictor looks at before each step. "bottleneck" is the paper\'s: the middle of '
            'a U-Net (SD1.5, SD2, SDXL). "latent" is the picture so far, and works with every model. "none" '
            'gives all pictures the same plan. "auto" takes the bottleneck where there is one.',
        ),
        io.Combo.Input(
            "predictor_type",
            options=[NETWORK, TABLE],
            default=NETWORK,
            optional=True,
            tooltip='Of the other samplers than amed_multistep. "network" is the paper\'s. "table" has constants for '
            f"every step, fitted to the finished picture: {TABLE_TRAJECTORIES} trajectories and a tenth of the time "
            "suffice, and it measured better. A table does not use features, learning_rate, epochs and the teacher "
            "options.",
        ),
        io.Float.Input(
            "cfg_max",
            default=0.0,
            min=0.0,
            max=100.0,
            step=0.1,
            round=0.01,
            optional=True,
            tooltip="Above cfg, the predictor is made for the whole range from cfg to this, by a fit at both "
            "ends and one between: three times the work. Not for networks that are fitted per interval. "
            "0: cfg alone.",
        ),
        io.Clip.Input(
            "clip",
            optional=True,
            tooltip="Encodes the prompts below, to train on many. Without it, positive is all.",
        ),
        io.String.Input(
            "prompts",
            default="",
            multiline=True,
            optional=True,
            tooltip="More positive prompts, one per line, or a .txt file of the input folder by its name. "
            "From 4 prompts on, every fourth is kept to judge by. Needs clip.",
        ),
        io.Combo.Input(
            "objective",
            options=[AUTO, PER_INTERVAL, END_TO_END],
            default=AUTO,
            optional=True,
            tooltip='What comes near the teacher: the end of every step, as in the paper ("per interval"), or '
            'only the finished picture ("end to end"; a network then starts from a table and corrects it). '
            '"auto" is per interval for the paper preset and networks, end to end for tables.',
        ),
        io.Combo.Input(
            "gradient",
            options=list(GRADIENTS),
            default=FINITE,
            optional=True,
            tooltip='How the model is differentiated. "finite difference" works with every model in the memory '
            'of sampling. "forward" checks itself against it and falls back where the model does not allow it. '
            '"reverse" is autograd, which keeps all activations: several times the memory, and no quantised '
            "models.",
        ),
        io.Int.Input(
            "held_out",
            default=32,
            min=1,
            max=100_000,
            optional=True,
            tooltip="Noises that are never trained on. They choose the best predictor, and tell what it gains.",
        ),
        io.Int.Input(
            "epochs",
            default=1,
            min=1,
            max=10_000,
            optional=True,
            tooltip="How often a network per interval sees the same noises; the teacher sees them once.",
        ),
        io.Guider.Input(
            "guider",
            optional=True,
            tooltip="The guider that you will sample with, if it is another than CFGGuider: for two models "
            '("AMED Two Models Guider", DualModelGuider), or more than two prompts. It takes the place of model, '
            "positive, negative and cfg.",
        ),
        io.Int.Input(
            "teacher_calls",
            default=0,
            min=0,
            max=1000,
            optional=True,
            tooltip="Model calls of the slow sampler whose finished pictures are the goal of end to end fits, and that "
            "all predictors are judged by. 0 is auto: 24 of iPNDM for amed_multistep, 40 of Heun for the others.",
        ),
    ]


class AMEDTrainPredictor(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AMEDTrainPredictor",
            display_name="AMED Train Predictor",
            category=CATEGORY,
            description="Distils a predictor from the model: it learns, on random noise, to come as close in a few "
            "model calls as a slow sampler does in many. The model itself is not changed, and no more memory is used "
            "than for sampling a batch. Train once per model, prompt style, cfg and number of steps.",
            inputs=fold(inputs(), ADVANCED),
            outputs=[
                PredictorSocket.Output(
                    display_name="predictor", tooltip='Save it with "AMED Save Predictor", or use it at once.'
                ),
                LossMap.Output(
                    display_name="loss",
                    tooltip="For Plot Loss Graph: per batch the squared distance to the teacher, or per iteration the "
                    "error of the finished picture.",
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="What was gained, what it cost, and error and plan of every step. For Preview Any.",
                ),
                io.Image.Output(display_name="plot", tooltip="The same as a picture, for Preview Image."),
            ],
            hidden=[io.Hidden.unique_id],
            is_input_list=True,
        )

    @classmethod
    def execute(cls, positive: list[Any], **inputs: Any) -> io.NodeOutput:
        # A list of CONDITIONINGs is several prompts; of everything else there is one.
        one = {name: values[0] for name, values in inputs.items()}
        asked = Asked(**one)
        prompts = [*positive, *encoded(one.get("clip"), one.get("prompts") or "")]
        return train(asked, prompts, cls)


def encoded(clip: Any, text: str) -> list[Any]:
    """The prompts of a text, one per line, or of a .txt file in ComfyUI's input folder that it names."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) == 1 and lines[0].lower().endswith(".txt"):
        folder = Path(folder_paths.get_input_directory()).resolve()
        path = (folder / lines[0]).resolve()
        if not path.is_relative_to(folder) or not path.is_file():
            raise ValueError(
                f'There is no file {lines[0]} in {folder} (prompts of "AMED Train Predictor"). Put it there, or write '
                "the prompts themselves, one per line."
            )
        lines = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
        if not lines:
            raise ValueError(f'{path} holds no prompt (prompts of "AMED Train Predictor").')
    if lines and clip is None:
        raise ValueError('prompts need a text encoder: connect clip of "AMED Train Predictor", or clear prompts.')
    return [clip.encode_from_tokens_scheduled(clip.tokenize(line)) for line in lines]


def train(asked: Asked, positives: Sequence[Any], node: type[io.ComfyNode]) -> io.NodeOutput:
    """Do what the node was asked."""
    begin = time.monotonic()
    asked, given = asked.through_guider()
    refuse_unfit(asked.model)
    model = prepared(asked.model) if given is None else given.model_patcher
    if asked.gradient == "reverse" and on_several_gpus(model):
        raise ValueError(
            "Autograd does not reach the copies of a model that MultiGPU CFG Split asks. Set gradient to "
            '"finite difference" in "AMED Train Predictor", or connect the model before the MultiGPU node.'
        )
    latent = sized_for(model, asked.latent_image)
    # ComfyUI runs nodes in inference mode, where nothing can be trained.
    with torch.inference_mode(False), torch.no_grad():
        if given is None:
            guider = comfy.samplers.CFGGuider(model)
            named = dict(zip(prompt_names(len(positives)), positives, strict=True))
            prompts = {name: without_inference_tensors(prompt) for name, prompt in named.items()}
            guider.inner_set_conds({**prompts, "negative": without_inference_tensors(asked.negative)})
            guider.set_cfg(asked.cfg)
            rows = max(len(cond[0]) for prompt in prompts.values() for cond in prompt)
            about = digest([*prompts.values(), asked.negative])
        else:
            guider, prompts, positives = given, {"positive": None}, positives[:1]
            guider.original_conds = without_inference_tensors(guider.original_conds)
            about = digest([guider.original_conds, type(guider).__qualname__, guidance(guider)])
            tensors = [c.get("cross_attn") for c in guider.original_conds["positive"]]
            rows = max((len(t) for t in tensors if t is not None), default=1)
        job = job_of(asked, model, guider, latent, about, len(positives), rows)
        sampler = TrainSampler(job, list(prompts), partial(tell, node))
        with torch.enable_grad():
            noise, image = (empty(latent, job.batch_size) for _ in range(2))
            guider.sample(noise, image, sampler, torch.tensor(job.config.sigmas), seed=asked.seed)
    assert sampler.fit is not None
    assert sampler.predictor is not None
    assert sampler.report is not None
    summary = sampler.fit.summary() | {"prompts": len(positives)}
    summary["model_calls"] = sampler.model_calls
    predictor = Predictor(sampler.predictor.cpu(), provenance(summary))
    usage, gained = describe(predictor), verdict(summary)
    # The node shows few lines: first of all, whether it is any good.
    say(node, ". ".join(filter(None, [outcome(summary), f"Choose {settings(predictor)}"])))
    cost = f"{sampler.model_calls:,} model calls of training (on paper at least {sampler.floor:,})"
    cost += f" in {duration(time.monotonic() - begin)}"
    if sampler.resumed:
        cost += ", of which some before it was stopped"
    report = "\n".join([usage, gained, cost, "", sampler.report.text()])
    return io.NodeOutput(predictor, {"loss": sampler.losses}, report, plot(sampler.report, f"{usage}; {gained}"))


def job_of(asked: Asked, model: Any, guider: Any, latent: Any, prompts: str, count: int, rows: int = 1) -> Job:
    """What to fit, for these inputs; `prompts` is the digest of all `count` of them.

    A conditioning may have several `rows`, one for each picture of a batch: then batches are of whole sets of them, so
    that none of them counts more than the others.
    """
    end_to_end, table, multistep = asked.end_to_end, asked.predictor_type == TABLE, asked.multistep
    usual = multistep_fit(asked.steps) if multistep else FitConfig()
    fitted, held_out = split(count)
    batch = min(asked.batch_size, asked.trajectories)
    trajectories = max(asked.trajectories, len(fitted))
    if end_to_end:  # a few say it all; every prompt should be among them
        most = TABLE_TRAJECTORIES if table else NETWORK_TRAJECTORIES
        most = usual.trajectories if multistep else most
        batch = max(1, min(batch, min(most, TABLE_TRAJECTORIES) // max(len(fitted), len(held_out))))
        batch -= batch % rows if batch > rows else 0
        trajectories = max(len(fitted) * batch, min(trajectories, most))
    scales = asked.scales
    if multistep:
        config = multistep_config_of(model, asked, guider)
    else:
        features = "none" if table else chosen_features(asked, model, guider, latent)
        config = student_config(
            model,
            asked.student,
            asked.steps,
            published=asked.preset == PAPER,
            features=features,
            guidance=asked.cfg,
            **asked.overrides,
        )
        config = replace(config, model={**config.model, **of_guider(guider)})
    spent = 0
    if asked.scheduler == SEARCHED and not multistep:
        if asked.preset == PAPER:
            raise ValueError(
                'The paper\'s grids end at sigma_min, searched ones at 0. Set scheduler to "auto" or preset to '
                '"recommended" in "AMED Train Predictor".'
            )
        config = on_searched_grid(guider, latent, asked.seed, config, min(batch, TRAJECTORIES))
        spent = TEACHER_CALLS * min(batch, TRAJECTORIES)
    start = None
    if end_to_end and not multistep:
        widths = {name: asked.overrides[name] for name in ("scale_dir", "scale_time") if name in asked.overrides}
        start = replace(table_config(config, **widths), guidances=scales if len(scales) > 1 else ())
        config = start if table else centred_config(start, features)
    shared = {
        "teacher_calls": asked.teacher_calls or usual.teacher_calls,
        "held_out": max(asked.held_out, len(held_out) * batch if end_to_end else 0),
        "batch_size": batch,
    }
    fitting = FitConfig(
        trajectories=trajectories,
        gradient="reverse" if asked.gradient == "reverse" else FINITE,
        learning_rate=asked.learning_rate,
        seed=asked.seed,
        iterations=usual.iterations,
        budget=usual.budget * len(scales) * -(-trajectories // usual.trajectories),
        **shared,
    )
    training = TrainConfig(
        trajectories=trajectories,
        epochs=asked.epochs,
        teacher="" if asked.teacher == AUTO else asked.teacher,
        teacher_points=asked.teacher_points,
        learning_rate=asked.learning_rate,
        seed=asked.seed,
        gradient=asked.gradient,
        step=0.0,
        **shared,
    )
    objective = fitting if end_to_end else training
    starts = end_to_end and not table and not multistep
    few = replace(
        fitting, trajectories=max(min(trajectories, TABLE_TRAJECTORIES), len(fitted) * batch), gradient=FINITE
    )
    shapes = [list(part.shape) for part in (latent.unbind() if latent.is_nested else [latent])]
    about = [asdict(config), asdict(objective), asdict(few) if starts else None, scales, shapes, prompts]
    # Prompts and settings are alike for all fine-tunes of a family.
    about += [checkpoint(one) for one in (model, *models_beside(guider))]
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    state = Path(folder_paths.get_user_directory()) / FOLDER / f"{name}.safetensors"
    return Job(
        config=config,
        objective=objective,
        table=start if starts else None,
        table_objective=few if starts else None,
        scales=scales,
        seed=asked.seed,
        batch_size=batch,
        fitted_prompts=fitted,
        held_out_prompts=held_out,
        state=state,
        spent=spent,
    )


def multistep_config_of(model: Any, asked: Asked, guider: Any) -> PredictorConfig:
    """The settings of a multistep predictor for this MODEL under a guider."""
    sampling, scales = model.get_model_object("model_sampling"), asked.scales
    one_answer = any(math.isclose(scale, 1.0) for scale in scales)  # at cfg 1
    return multistep_student(
        asked.steps,
        float(sampling.sigma_min),
        float(sampling.sigma_max),
        flow=isinstance(sampling, comfy.model_sampling.CONST),
        guidance=asked.cfg,
        guidances=scales if len(scales) > 1 else (),
        guided=shows_guidance(guider) and not one_answer,
        switch_sigma=getattr(guider, "switch_sigma", 0.0),
        model=fingerprint(model) | of_guider(guider),
    )


def chosen_features(asked: Asked, model: Any, guider: Any, latent: Any) -> str:
    """What a network is to look at. Raises ValueError if that is a bottleneck and the model has none."""
    if asked.features not in (AUTO, "bottleneck"):
        return asked.features
    found = has_bottleneck(guider, latent, asked.seed)
    if asked.features == "bottleneck" and not found:
        raise ValueError(
            f"This model ({fingerprint(model)['family']}) has no U-Net bottleneck to look at. Set features "
            'to "auto" or "latent" in "AMED Train Predictor".'
        )
    return "bottleneck" if found else "latent"


def split(count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Which of so many prompts to fit on, and which to judge by: from 4 on, every fourth."""
    if count < 4:
        return tuple(range(count)), tuple(range(count))
    return tuple(n for n in range(count) if n % 4 != 3), tuple(n for n in range(count) if n % 4 == 3)


def digest(value: Any) -> str:
    """A name for anything that conditionings are made of."""
    content = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, Tensor):
            content.update(repr((tuple(part.shape), str(part.dtype))).encode())
            content.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(part, Mapping):
            for key in sorted(part, key=str):
                content.update(str(key).encode())
                add(part[key])
        elif isinstance(part, (list, tuple)):
            content.update(f"{len(part)} ".encode())
            for one in part:
                add(one)
        elif isinstance(part, (str, int, float, bool, type(None))):
            content.update(repr(part).encode())
        else:  # a ControlNet or a hook: its kind must do
            content.update(type(part).__qualname__.encode())

    add(value)
    return content.hexdigest()
