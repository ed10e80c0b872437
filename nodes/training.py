"""Distilling a predictor from the loaded model, inside the UI, with no more memory than sampling needs."""

from collections.abc import Iterator
from typing import Any

import comfy.model_management
import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from comfy_api.latest import io
from torch import Tensor
from tqdm.auto import tqdm

from ..amed_core import PredictorConfig, TrainConfig, Trainer
from ..amed_core.files import provenance
from ..amed_core.predictor import LOOKS
from ..amed_core.recipes import predictor_config
from ..amed_core.schedules import SCHEDULES
from ..amed_core.table import AnyPredictor, FitConfig, TableFit, TablePredictor, build, table_config
from ..amed_core.training import TEACHERS
from ..amed_core.types import Denoiser, Sample
from .bridge import ComfyDenoiser, look
from .pairing import fingerprint
from .timesteps import with_interpolated_timesteps
from .values import CATEGORY, SAMPLERS, LossMap, Predictor, PredictorSocket, describe, say

AUTO = "auto"  # the preset's choice for the sampler
RECOMMENDED, PAPER = "recommended", "paper"
NETWORK, TABLE = "network", "table"
TABLE_TRAJECTORIES = 32


class TrainSampler(comfy.samplers.Sampler):
    """Runs a fit where ComfyUI runs a sampler: the model is loaded and conditioned, and cleaned up afterwards.

    Afterwards `fit` and `losses` are filled: for a network one loss per batch, summed over its intervals,
    for a table one error per iteration.
    """

    def __init__(self, predictor: AnyPredictor, network: TrainConfig, table: FitConfig) -> None:
        self.predictor = predictor
        self.network = network
        self.table = table
        self.losses: list[float] = []
        self.fit: Trainer | TableFit | None = None

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
        settings = self.predictor.config
        denoiser = ComfyDenoiser(model_wrap, extra_args, settings.sigmas, bottleneck=settings.features == "bottleneck")
        sampling = model_wrap.inner_model.model_sampling

        def source(rows: range, generator: torch.Generator) -> tuple[Sample, Denoiser]:
            drawn = torch.randn(len(rows), *noise.shape[1:], generator=generator).to(noise)
            return sampling.noise_scaling(sigmas[0], drawn, torch.zeros_like(drawn), True), denoiser

        predictor = self.predictor.to(noise.device)
        if isinstance(predictor, TablePredictor):
            self.fit = TableFit(predictor, source, self.table)
            total, steps = self.table.iterations + 1, self._table_steps(self.fit)
        else:
            self.fit = Trainer(predictor, source, self.network, look(settings, model_wrap))
            total = -(-self.network.trajectories // self.network.batch_size) * settings.planned
            steps = self._network_steps(self.fit)
        progress = comfy.utils.ProgressBar(total)
        with tqdm(total=total, desc="AMED training", disable=disable_pbar) as bar:
            for done, text in enumerate(steps, start=1):
                bar.set_postfix_str(text, refresh=False)
                bar.update()
                progress.update_absolute(done, total)
        return noise

    def _network_steps(self, fit: Trainer) -> Iterator[str]:
        for event in fit.events():
            if event.interval == 0:
                self.losses.append(0.0)
            self.losses[-1] += event.loss
            yield f"loss {self.losses[-1]:.4g}"

    def _table_steps(self, fit: TableFit) -> Iterator[str]:
        for event in fit.events():
            self.losses.append(event.error)
            yield f"error {event.held_out:.4g}"


def gained(fit: Trainer | TableFit) -> str:
    """What a table gained on noise that it was not fitted on, in plain words; a network does not measure that."""
    if isinstance(fit, Trainer):
        return ""
    summary = fit.summary()
    error, base = summary["error"], summary["base_solver_error"]
    if error >= base:
        return f"It is NOT better than its base solver: error {base:.4g} either way. Try another sampler_name or steps."
    return f"error {error:.4g}, {1 - error / base:.0%} less than its base solver's"


def empty(like: Any, batch: int) -> Any:
    """Zeros of the shape of a latent; newer ComfyUI has nested ones, of several shapes."""
    if like.is_nested:
        return type(like)([torch.zeros(batch, *part.shape[1:]) for part in like.unbind()])
    return torch.zeros(batch, *like.shape[1:])


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


def has_bottleneck(guider: comfy.samplers.CFGGuider, latent: Any, seed: int) -> bool:
    """Whether the model shows its bottleneck, found out by one model call."""
    sampling = guider.model_patcher.get_model_object("model_sampling")
    ends = torch.tensor([float(sampling.sigma_max), float(sampling.sigma_min)])

    class Probe(comfy.samplers.Sampler):
        found = False

        def sample(
            self, model_wrap: Any, sigmas: Tensor, extra_args: Any, callback: Any, noise: Tensor, *_: Any
        ) -> Tensor:
            x = model_wrap.inner_model.model_sampling.noise_scaling(sigmas[0], noise, torch.zeros_like(noise), True)
            denoiser = ComfyDenoiser(model_wrap, extra_args, sigmas.tolist(), bottleneck=True)
            self.found = denoiser(x, sigmas[0])[1] is not None
            return x

    probe = Probe()
    guider.sample(empty(latent, 1), empty(latent, 1), probe, ends, disable_pbar=True, seed=seed)
    return probe.found


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
            inputs=[
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
                    options=list(SAMPLERS),
                    default="amed",
                    tooltip='The sampler to improve. "amed" is AMED-Solver; the others are the paper\'s plugins.',
                ),
                io.Combo.Input(
                    "preset",
                    options=[RECOMMENDED, PAPER],
                    default=RECOMMENDED,
                    tooltip='"recommended" is what measured best, with a plain model call at the end; "paper" is '
                    "AMED as published. Both are changed by every option below that is not at auto.",
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
                    options=[AUTO, *SCHEDULES],
                    default=AUTO,
                    tooltip='The grid between whose points the predictor plans. "auto" is the preset\'s; '
                    '"polynomial" with rho 7 is Karras, "logsnr" is exponential, "discrete" is uniform in timesteps '
                    "and the choice for flow models.",
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
                    tooltip="How far from 1 a step may be stretched; the paper uses 0.01. 0 turns it off, below 0 is "
                    "auto.",
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
                    tooltip='"network" is the paper\'s. "table" has constants for every step, fitted to the finished '
                    f"picture: {TABLE_TRAJECTORIES} trajectories and a tenth of the time suffice, and it measured "
                    "better. A table does not use features, learning_rate and the teacher options.",
                ),
            ],
            outputs=[
                PredictorSocket.Output(
                    display_name="predictor", tooltip='Save it with "AMED Save Predictor", or use it at once.'
                ),
                LossMap.Output(
                    display_name="loss",
                    tooltip="The squared distance to the teacher, one value per batch, for Plot Loss Graph.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        negative: Any,
        latent_image: dict[str, Any],
        seed: int,
        cfg: float,
        steps: int,
        sampler_name: str,
        preset: str,
        trajectories: int,
        batch_size: int,
        learning_rate: float,
        scheduler: str,
        rho: float,
        scale_dir: float,
        scale_time: float,
        teacher: str,
        teacher_points: int,
        features: str = AUTO,
        predictor_type: str = NETWORK,
    ) -> io.NodeOutput:
        model = with_interpolated_timesteps(model)
        chosen = {
            "schedule": None if scheduler == AUTO else scheduler,
            "rho": rho or None,
            "scale_dir": scale_dir if scale_dir >= 0 else None,
            "scale_time": scale_time if scale_time >= 0 else None,
        }
        overrides = {name: value for name, value in chosen.items() if value is not None}
        training = TrainConfig(
            trajectories=trajectories,
            batch_size=min(batch_size, trajectories),
            teacher="" if teacher == AUTO else teacher,
            teacher_points=teacher_points,
            learning_rate=learning_rate,
            seed=seed,
            gradient="finite difference",
        )
        latent = comfy.sample.fix_empty_latent_channels(model, latent_image["samples"])
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)

        # ComfyUI runs nodes in inference mode, where nothing can be trained.
        with torch.inference_mode(False), torch.no_grad():
            if predictor_type == NETWORK and features in (AUTO, "bottleneck"):
                found = has_bottleneck(guider, latent, seed)
                if features == "bottleneck" and not found:
                    raise ValueError(
                        f"This model ({fingerprint(model)['family']}) has no U-Net bottleneck to look at. Set features "
                        'to "auto" or "latent" in "AMED Train Predictor".'
                    )
                features = "bottleneck" if found else "latent"
            if predictor_type == TABLE:
                features = "none"
            config = student_config(
                model, sampler_name, steps, published=preset == PAPER, features=features, guidance=cfg, **overrides
            )
            if predictor_type == TABLE:
                widths = {name: overrides[name] for name in ("scale_dir", "scale_time") if name in overrides}
                config = table_config(config, **widths)
            network = build(config, torch.Generator().manual_seed(seed))
            count = min(trajectories, TABLE_TRAJECTORIES)
            fitting = FitConfig(trajectories=count, held_out=count, batch_size=training.batch_size, seed=seed)
            sampler = TrainSampler(network, training, fitting)
            with torch.enable_grad():
                noise, image = (empty(latent, training.batch_size) for _ in range(2))
                guider.sample(noise, image, sampler, torch.tensor(config.sigmas), seed=seed)
        assert sampler.fit is not None
        notes = provenance(sampler.fit.summary())
        predictor = Predictor(network.requires_grad_(False).cpu(), notes)
        say(cls, " ".join([describe(predictor), gained(sampler.fit)]))
        return io.NodeOutput(predictor, {"loss": sampler.losses})
