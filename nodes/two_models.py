"""Two models in one run: one for high noise, another for low noise, as Wan 2.2 has them."""

from typing import Any

import comfy.model_patcher
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP, merge_nested_dicts
from comfy_api.latest import io

from .bridge import COUNTER
from .values import CATEGORY, schema

SECOND = "amed_low_noise"  # under this name a MODEL has the other one loaded with it
ROUNDING = 1e-6  # relative, of levels in float32


class TwoModelsGuider(comfy.samplers.CFGGuider):
    """Asks one model at noise levels from `switch_sigma` on up, and another one below."""

    def __init__(self, high: Any, low: Any, switch_sigma: float) -> None:
        both = high.clone()
        both.set_additional_models(SECOND, [low])  # so that ComfyUI loads them together
        super().__init__(both)
        self.low = low
        self.switch_sigma = switch_sigma
        self.low_conds: dict[str, Any] = {}

    def replaced(self, high: Any, low: Any) -> "TwoModelsGuider":
        """The same guider of other models."""
        made = TwoModelsGuider(high, low, self.switch_sigma)
        made.original_conds, made.cfg = self.original_conds, self.cfg
        return made

    def inner_sample(self, noise: Any, latent_image: Any, device: Any, *run: Any, **more: Any) -> Any:
        """As ComfyUI's own, with the prompts processed for the second model, too."""
        image, mask, seed = latent_image, run[2], run[-1]
        if image is not None and torch.count_nonzero(image) > 0:
            image = self.low.model.process_latent_in(image)
        if more:  # newer ComfyUI tells a model of which shapes its latents are
            self.low.model.latent_shapes = more.get("latent_shapes")
        conds = {kind: [dict(c) for c in listed] for kind, listed in self.conds.items()}
        self.low_conds = comfy.samplers.process_conds(self.low.model, noise, conds, device, image, mask, seed, **more)
        self.low.pre_run()
        try:
            return super().inner_sample(noise, latent_image, device, *run, **more)
        finally:
            self.low.cleanup()
            self.low_conds = {}

    def predict_noise(self, x: Any, timestep: Any, model_options: Any = None, seed: Any = None) -> Any:
        """The guided answer of the model that these levels belong to."""
        options = {} if model_options is None else model_options
        if float(timestep.flatten()[0]) >= self.switch_sigma * (1 - ROUNDING):
            return super().predict_noise(x, timestep, options, seed)
        negative, positive = (self.low_conds.get(kind) for kind in ("negative", "positive"))
        return comfy.samplers.sampling_function(
            self.low.model, x, timestep, negative, positive, self.cfg, model_options=self._of_low(options), seed=seed
        )

    def _of_low(self, options: Any) -> Any:
        """The second model's own options, with what the sampler has added to those of the first."""
        made = comfy.model_patcher.create_model_options_clone(self.low.model_options)
        transformer = made.setdefault("transformer_options", {})
        transformer["sample_sigmas"] = options.get("transformer_options", {}).get("sample_sigmas")
        for kind in ("wrappers", "callbacks"):  # which ComfyUI hands on for the first model alone
            transformer[kind] = merge_nested_dicts(transformer.get(kind, {}), getattr(self.low, kind))
        counters = options.get("transformer_options", {}).get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {})
        if COUNTER in counters:
            transformer["wrappers"].setdefault(WrappersMP.APPLY_MODEL, {})[COUNTER] = counters[COUNTER]
        name = "sampler_post_cfg_function"
        own = self.model_options.get(name, [])
        made[name] = [*made.get(name, []), *(f for f in options.get(name, []) if f not in own)]
        return made


class AMEDTwoModelsGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AMEDTwoModelsGuider",
            display_name="AMED Two Models Guider",
            category=CATEGORY,
            description="Two models in one run, one for high noise and one for low noise, such as Wan 2.2. Connect it "
            'to SamplerCustomAdvanced; or to "AMED Train Predictor", whose predictor then serves both this guider and '
            "two KSamplerAdvanced in a row, each with its model.",
            inputs=[
                io.Model.Input("model_high_noise", tooltip="The model that begins, with its LoRAs and shift."),
                io.Model.Input("model_low_noise", tooltip="The model that finishes, with its LoRAs and shift."),
                io.Conditioning.Input("positive", tooltip="What the picture or video is to show."),
                io.Conditioning.Input("negative", tooltip="What it is not to show."),
                io.Float.Input(
                    "cfg",
                    default=3.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="How strongly the prompt guides both models. At 1 the negative prompt is not asked.",
                ),
                io.Float.Input(
                    "switch_sigma",
                    default=0.875,
                    min=0.001,
                    max=1000.0,
                    step=0.005,
                    round=0.001,
                    tooltip="The noise level below which the second model answers. Wan 2.2: 0.875 for text to video, "
                    "0.9 for image to video.",
                ),
            ],
            outputs=[
                io.Guider.Output(
                    display_name="guider", tooltip='For SamplerCustomAdvanced, and for "AMED Train Predictor".'
                )
            ],
        )

    @classmethod
    def execute(
        cls, model_high_noise: Any, model_low_noise: Any, positive: Any, negative: Any, cfg: float, switch_sigma: float
    ) -> io.NodeOutput:
        guider = TwoModelsGuider(model_high_noise, model_low_noise, switch_sigma)
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        return io.NodeOutput(guider)
