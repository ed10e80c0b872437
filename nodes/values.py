"""What travels between our nodes."""

import html
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from comfy_api.latest import io
from comfy_execution.utils import get_executing_context

from ..amed_core.config import PredictorConfig
from ..amed_core.predictor import Predictor
from ..amed_core.samplers import sampler_name

CATEGORY = "sampling/amed"
ATTACHMENT = "amed_predictor"  # under this name a MODEL carries its applied predictor


@dataclass(frozen=True)
class NotedPredictor:
    """A predictor and the notes on how it was made: the value of an AMED_PREDICTOR socket."""

    predictor: Predictor
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> PredictorConfig:
        """Its settings."""
        return self.predictor.config


PredictorSocket = io.Custom("AMED_PREDICTOR")
LossMap = io.Custom("LOSS_MAP")  # ComfyUI's own, from its LoRA training: the stock loss plot takes it


def describe(config: PredictorConfig) -> str:
    """How to use a predictor of these settings, for the people who look at its node."""
    return f"{config.model.get('family', 'unknown model')}: choose {settings(config)}"


def settings(config: PredictorConfig) -> str:
    """What to set on KSampler for a predictor."""
    chosen = f"sampler {sampler_name(config)}, scheduler amed, steps {config.calls}, cfg {_scales(config)}"
    return f"{chosen}, second model from step {config.switch}" if config.switch else chosen


def _scales(config: PredictorConfig) -> str:
    ends = (config.guidances[0], config.guidances[-1]) if config.guidances else (config.guidance,)
    return " to ".join(f"{scale:g}" for scale in ends)


def say(node: type[io.ComfyNode], text: str) -> None:
    """Show a text on the node in the browser."""
    hidden = getattr(node, "hidden", None)
    if hidden is not None and hidden.unique_id is not None:
        _show(text, hidden.unique_id)


def tell(node: type[io.ComfyNode], text: str) -> None:
    """Show how far the node is, in the browser."""
    say(node, f"AMED: {text}")


def fold(inputs: Sequence[Any], names: Sequence[str]) -> list[Any]:
    """The inputs, of which those named are folded away as advanced ones where the browser can."""
    for one in inputs:
        if one.id in names:
            one.extra_dict["advanced"] = True
    return list(inputs)


def note(sentences: Sequence[str]) -> None:
    """As `warn`, of what is as it should be."""
    _tell(sentences, logging.INFO)


def warn(sentences: Sequence[str]) -> None:
    """Tell the log, and the browser on the node that is running, whichever it is."""
    _tell(sentences, logging.WARNING)


def _tell(sentences: Sequence[str], level: int) -> None:
    if not sentences:
        return
    text = "AMED: " + " ".join(sentences)
    logging.log(level, text)
    if (running := get_executing_context()) is not None:
        _show(text, running.node_id)


def _show(text: str, node_id: str) -> None:
    """The one place through which texts reach a browser, which takes them for HTML."""
    running = sys.modules.get("server")  # absent where ComfyUI is only a library
    server = getattr(getattr(running, "PromptServer", None), "instance", None)
    if server is not None:
        server.send_progress_text(html.escape(text, quote=False), node_id)
