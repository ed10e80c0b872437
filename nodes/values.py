"""What travels between our nodes."""

import html
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from comfy_api.latest import io
from comfy_execution.utils import get_executing_context

from ..amed_core.config import PredictorConfig
from ..amed_core.predictor import Predictor, PredictorSet
from ..amed_core.samplers import sampler_name

CATEGORY = "AMED"
# What people look for who do not know our names.
ALIASES = (
    *("AMED", "few steps", "4 steps", "5 steps", "8 steps", "fast sampler", "speed up", "faster", "acceleration"),
    *("distill", "distillation", "turbo", "lightning", "hyper", "LCM", "AYS", "align your steps", "GITS"),
    *("DPM-Solver", "iPNDM", "UniPC", "NFE", "ODE solver"),
)
WARNING = "\u26a0"  # how texts begin that tell of something wrong
NAME_SHOWN = 40  # characters of a file's name on a node
SCHEDULER = "amed"  # our entry of the scheduler list
ATTACHMENT = "amed_predictor"  # under this name a MODEL carries its applied predictor


@dataclass(frozen=True)
class NotedPredictor:
    """Predictors of one model and the notes on how they were made: the value of an AMED_PREDICTOR socket."""

    predictor: Predictor  # that is meant where only one is asked for
    notes: Mapping[str, Any] = field(default_factory=dict)
    others: tuple[Predictor, ...] = ()  # for other uses
    unfinished: str = ""  # what is kept of them, until they are saved, has this name; none is kept if it is empty

    @classmethod
    def of(cls, every: PredictorSet, notes: Mapping[str, Any], unfinished: str = "") -> "NotedPredictor":
        """A set of them."""
        return cls(every.main, notes, every.predictors[1:], unfinished)

    @property
    def every(self) -> PredictorSet:
        """All of them."""
        return PredictorSet((self.predictor, *self.others))

    @property
    def config(self) -> PredictorConfig:
        """Its settings."""
        return self.predictor.config


PredictorSocket = io.Custom("AMED_PREDICTOR")


class ListOutput(io.Combo.Output):
    """An output for the widget of an older kind of node, whose type is the very list of its choices.

    ComfyUI compares the two, and not all versions of it know that a COMBO fits.
    """

    @property
    def io_type(self) -> list[str]:
        """The list itself."""
        return self.options


LossMap = io.Custom("LOSS_MAP")  # ComfyUI's own, from its LoRA training: the stock loss plot takes it


def schema(**about: Any) -> io.Schema:
    """A node's schema, which the node menu finds by ALIASES in versions of ComfyUI that know them."""
    known = {field.name for field in fields(io.Schema)}
    return io.Schema(**about, **({"search_aliases": list(ALIASES)} if "search_aliases" in known else {}))


def describe(predictor: NotedPredictor) -> str:
    """How to use a predictor, for the people who look at its node."""
    return f"{predictor.config.model.get('family', 'unknown model')}: choose {settings(predictor)}"


def briefly(predictor: NotedPredictor) -> str:
    """What a predictor is for, in as few words as a widget shows."""
    images = ", images" if len(predictor.every.from_noise) < len(predictor.every.predictors) else ""
    return f"{spans(predictor.every.calls)} steps, cfg {_scales(predictor.every)}{images}"


def at_a_glance(predictor: NotedPredictor) -> str:
    """What to set for a predictor, first of all and in few words: the text on the node that has it."""
    every = predictor.every
    return f"Set steps {spans(every.calls)}, cfg {_scales(every)}. {describe(predictor)}"


def shortened(name: str) -> str:
    """A file's name with its middle left out if it is too long for a node."""
    if len(name) <= NAME_SHOWN:
        return name
    end = NAME_SHOWN // 2
    return f"{name[: NAME_SHOWN - end - 1]}\u2026{name[-end:]}"


def settings(predictor: NotedPredictor) -> str:
    """What to set on KSampler for a predictor."""
    config, every = predictor.config, predictor.every
    calls = spans(every.calls)
    chosen = f"sampler {sampler_name(config)}, scheduler amed, steps {calls}, cfg {_scales(every)}"
    if config.switch:
        return f"{chosen}, second model from step {config.switch}"
    return f"{chosen}, also with denoise below 1" if len(every.from_noise) < len(every.predictors) else chosen


def spans(numbers: Sequence[int]) -> str:
    """Rising numbers as people write them: 3 to 10, or 4, 6."""
    if len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))


def _scales(every: PredictorSet) -> str:
    configs = [one.config for one in every.predictors]
    ends = {scale for config in configs for scale in (config.guidances or (config.guidance,))}
    return " to ".join(f"{scale:g}" for scale in sorted({min(ends), max(ends)}))


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
        _show(f"{WARNING} {text}" if level >= logging.WARNING else text, running.node_id)


def _show(text: str, node_id: str) -> None:
    """The one place through which texts reach a browser, which takes them for HTML: the one whose graph it is.

    Another one may have a node of the same number. What no browser queued is told to all.
    """
    if (server := _server()) is not None:
        server.send_progress_text(html.escape(text, quote=False), node_id, server.client_id)


def input_of_running(name: str) -> Any:
    """The value of an input of the node that is running; None without such a value, as where it is a link."""
    running, server = get_executing_context(), _server()
    if running is None or server is None:
        return None
    for _, prompt_id, graph, *_ in list(server.prompt_queue.currently_running.values()):
        if prompt_id == running.prompt_id:
            value = graph.get(running.node_id, {}).get("inputs", {}).get(name)
            return None if isinstance(value, list) else value
    return None


def _server() -> Any:
    """ComfyUI's; None where ComfyUI is only a library."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
