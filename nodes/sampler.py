"""Using a predictor: on a MODEL for the KSampler family, as a SAMPLER and as SIGMAS for custom sampling."""

import copy
from typing import Any

import comfy.samplers
import torch
from comfy.samplers import KSAMPLER
from comfy_api.latest import io

from .pairing import fingerprint, refuse_other_model, refuse_unfit
from .sampling import ANY, sample_amed
from .timesteps import interpolated
from .values import ATTACHMENT, CATEGORY, SCHEDULER, ListOutput, NotedPredictor, PredictorSocket, schema


class AMEDApplyPredictor(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AMEDApplyPredictor",
            display_name="AMED Apply Predictor",
            category=CATEGORY,
            description="Gives a model its predictor, for KSampler and every other node that has a sampler list: "
            'choose the sampler "amed", the scheduler "amed", and as steps the number of model calls; or connect the '
            "other outputs to KSampler's widgets, which then need no setting. With other schedulers, or denoise below "
            "1, it plans what resembles the steps it learned, and the rest are plain calls; a text on the sampling "
            "node says so. Models with 1,000 timesteps are asked between them, too, instead of at the nearest. The "
            "model's weights are not changed.",
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model the predictor was made for. Connect LoRA and shift nodes before."
                ),
                PredictorSocket.Input("predictor", tooltip='From "AMED Load Predictor" or "AMED Train Predictor".'),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model with its predictor; connect it to KSampler."),
                io.Sampler.Output(display_name="sampler", tooltip="For SamplerCustom and SamplerCustomAdvanced."),
                io.Sigmas.Output(display_name="sigmas", tooltip="The predictor's noise levels, for the same nodes."),
                ListOutput(
                    display_name="sampler_name",
                    options=comfy.samplers.KSampler.SAMPLERS,
                    tooltip="For the widget of KSampler.",
                ),
                ListOutput(
                    display_name="scheduler",
                    options=comfy.samplers.KSampler.SCHEDULERS,
                    tooltip="For the widget of KSampler.",
                ),
                io.Int.Output(
                    display_name="steps", tooltip="The predictor's number of model calls, for the widget of KSampler."
                ),
                io.Float.Output(display_name="cfg", tooltip="What the predictor was made for, for KSampler's widget."),
            ],
        )

    @classmethod
    def execute(cls, model: Any, predictor: NotedPredictor) -> io.NodeOutput:
        refuse_unfit(model)
        refuse_other_model(predictor.config, fingerprint(model))
        applied = model.clone()
        applied.set_attachments(ATTACHMENT, predictor)
        # ComfyUI's schedulers see only the model sampling: a copy of it carries the predictor's grid to "amed".
        sampling = copy.copy(interpolated(model.get_model_object("model_sampling")))
        setattr(sampling, ATTACHMENT, predictor)
        applied.add_object_patch("model_sampling", sampling)
        config = predictor.config
        levels = torch.tensor(predictor.every.sigmas(config.calls), dtype=torch.float32)
        sampler = KSAMPLER(sample_amed, {"predictor": predictor})
        return io.NodeOutput(applied, sampler, levels, ANY, SCHEDULER, config.calls, config.guidance)


class AMEDSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AMEDSampler",
            display_name="AMED Sampler",
            category=CATEGORY,
            description="Samples in very few model calls, at noise levels a trained predictor chooses. It also takes "
            "other sigmas than its own: inside the range it was trained on it plans two calls at a time, where they "
            "span no more than it learned (amed, amed_euler, amed_dpm_2), and the rest are plain calls of the base "
            "solver; a text on the sampling node says so. Sigmas that start above that range are an error.",
            inputs=[
                PredictorSocket.Input(
                    "predictor",
                    tooltip='Fixes the solver. Connect the same predictor to "AMED Scheduler" for the noise levels.',
                )
            ],
            outputs=[
                io.Sampler.Output(display_name="sampler", tooltip="Connect to SamplerCustom or SamplerCustomAdvanced.")
            ],
        )

    @classmethod
    def execute(cls, predictor: NotedPredictor) -> io.NodeOutput:
        return io.NodeOutput(KSAMPLER(sample_amed, {"predictor": predictor}))


class AMEDScheduler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AMEDScheduler",
            display_name="AMED Scheduler",
            category=CATEGORY,
            description="The noise levels a predictor was made for, one per model call and one for the end. Levels "
            "between two grid points are nominal: there the predictor decides.",
            inputs=[
                PredictorSocket.Input("predictor", tooltip="Fixes the number of model calls and the grid."),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="1 starts from pure noise. Below 1 an input image is kept in part: the same number of "
                    "model calls is spread over the last part of the grid. 0 does nothing.",
                ),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=100,
                    optional=True,
                    tooltip="Model calls, if the predictor was made for several numbers of them. 0: its first.",
                ),
            ],
            outputs=[
                io.Sigmas.Output(
                    display_name="sigmas",
                    tooltip='Connect to SamplerCustom or SamplerCustomAdvanced, together with "AMED Sampler".',
                )
            ],
        )

    @classmethod
    def execute(cls, predictor: NotedPredictor, denoise: float, steps: int = 0) -> io.NodeOutput:
        if denoise <= 0:
            return io.NodeOutput(torch.empty(0))
        calls = steps or predictor.config.calls
        total = calls if denoise >= 1 else int(calls / denoise)
        return io.NodeOutput(torch.tensor(predictor.every.sigmas(total)[-(calls + 1) :], dtype=torch.float32))
