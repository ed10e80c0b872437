"""What decides the best weights, and where what was learned of it is kept."""

import contextlib
import datetime
import hashlib
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import folder_paths

from ..amed_core.config import plain_text
from ..amed_core.files import load_state, save_state
from ..amed_core.fit.reading import of_count, of_kind
from . import pairing
from .states import written
from .streams import packed_shapes

FOLDER = "amed_learned"  # in the user folder
MOST_FILES = 200
LISTED = "learned/"  # how names of learned sets begin where predictors are listed
ALIKE = 1.5  # sizes within this factor are one situation
NEAR = 1.5  # guidance scales within this factor are near
OF_WEIGHTS = ("family", "prediction", "loras")  # of a model's fingerprint, what "the same model" means to people
# Of what ComfyUI hands a model with a prompt, what belongs to every prompt.
OF_PROMPTS = ("c_crossattn", "y", "attention_mask", "guidance", "t5xxl_ids", "t5xxl_weights", "c_crossattn_mask")

# Where learning failed, and why, until ComfyUI restarts: to try again costs a slow run each time.
_failed: dict[Path, str] = {}


@dataclass(frozen=True)
class Situation:
    """Facts that decide the best weights; prompts and seeds are none.

    `weights` are those of the model itself, `facts` all others, but the size: the `elements` of one sample.
    """

    weights: Mapping[str, Any]
    facts: Mapping[str, Any]
    elements: int

    @property
    def key(self) -> str:
        """The same for all sizes, and for nothing else."""
        return f"{_of_weights(self.weights)}-{_digest(self.facts)[:20]}"


def situation(
    model: Any, guider: Any, levels: Sequence[float], own_grid: bool, like: Any, masked: bool, teacher_calls: int
) -> Situation:
    """The situation of a run of `model`, through `guider`, of samples like `like` (batch, ...).

    Of levels on the sampler's own grid only the ends and their number count.
    """
    facts = {
        "model": pairing.fingerprint(model),
        "beside": [pairing.checkpoint(other) for other in pairing.models_beside(guider)],
        "switch_sigma": getattr(guider, "switch_sigma", 0.0),
        "guider": {"guider": type(guider).__name__, "guidance": pairing.guidance(guider)} | pairing.of_guider(guider),
        "guides": guides(guider),
        "masked": masked,
        "calls": len(levels) - 1,
        "levels": [levels[0], levels[-1]] if own_grid else list(levels),
        "own_grid": own_grid,
        "dimensions": like.ndim,
        "streams": len(packed_shapes(guider)),
        "teacher_calls": teacher_calls,
    }
    return Situation(weights_of(model), facts, like[0].numel())


def weights_of(model: Any) -> dict[str, Any]:
    """What the weights of a MODEL are known by."""
    found = pairing.fingerprint(model)
    return {"checkpoint": pairing.checkpoint(model)} | {name: found[name] for name in OF_WEIGHTS}


def guides(guider: Any) -> list[str]:
    """What guides a run beside prompts, by name: ControlNets, pictures, GLIGEN, LoRAs of prompts."""
    found = set()
    for kind, conds in guider.conds.items():
        for cond in conds:
            found |= {f"{kind} {name}" for name in cond.get("model_conds", {}) if name not in OF_PROMPTS}
            found |= {f"{kind} {name}" for name in ("gligen", "hooks") if cond.get(name) is not None}
            control = cond.get("control")
            while control is not None:
                found.add(f"{kind} {type(control).__name__} {getattr(control, 'strength', 1.0):g}")
                control = getattr(control, "previous_controlnet", None)
    return sorted(found)


def folder() -> Path:
    """Where learned sets are kept."""
    return Path(folder_paths.get_user_directory()) / FOLDER


def file_of(one: Situation) -> Path:
    """The file of a situation: one of nearly its size that is there, else its own."""
    near = []
    for path in folder().glob(f"{one.key}-*.safetensors"):
        size = path.stem.rpartition("-")[2]
        if size.isdecimal() and 1 / ALIKE <= int(size) / one.elements <= ALIKE:
            near.append((abs(math.log(int(size) / one.elements)), path))
    return min(near)[1] if near else folder() / f"{one.key}-{one.elements}.safetensors"


def near(one: Situation) -> tuple[str, Mapping[str, Any]] | None:
    """What was kept of the situation that is nearest to one of which nothing was: what it differs in, and its state.

    All but the size and the guidance scale is the same there. Guidance and none are not near.
    """
    found = []
    for kept in _kept(_of_weights(one.weights)):
        sizes, scales = math.log(kept.elements / one.elements), _apart(one.facts, kept.facts)
        if scales is not None and _digest(_unguided(kept.facts)) == _digest(_unguided(one.facts)):
            found.append((scales, abs(sizes), kept))
    if not found:
        return None
    scales, _, nearest = min(found, key=lambda each: each[:2])
    return nearest.facts["guider"]["guidance"] if scales else "another size", nearest.state


def _apart(facts: Mapping[str, Any], others: Mapping[str, Any]) -> float | None:
    """The logarithm of how many times the guidance of one is that of the other; None if they are not near."""
    ours, theirs = facts["guider"]["guidance"], others["guider"]["guidance"]
    if ours == theirs:
        return 0.0
    here, there = pairing.scale_in(ours), pairing.scale_in(theirs)
    if here is None or there is None or min(here, there) <= 1 or max(here, there) > NEAR * min(here, there):
        return None
    return abs(math.log(here / there))


def _unguided(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {**facts, "guider": {name: value for name, value in facts["guider"].items() if name != "guidance"}}


def why_failed(path: Path) -> str | None:
    """Why learning what is kept there failed before, if it did."""
    return _failed.get(path)


def fail(path: Path, why: str) -> None:
    """Remember that learning what is kept there failed."""
    _failed[path] = why


def read(path: Path) -> dict[str, Any]:
    """What was kept there; empty if nothing was, or if it is damaged, which the log tells."""
    if not path.exists():
        return {}
    try:
        return load_state(path)
    except Exception as error:  # whatever a file may hold
        damaged(path, error)
        return {}


def damaged(path: Path, error: Exception) -> None:
    """Tell of a file that cannot be used."""
    logging.warning(f"AMED: {path.name} cannot be used, and learning begins anew: {error}")


def keep(path: Path, one: Situation, state: Mapping[str, Any]) -> None:
    """Write what was learned, whole or not at all; of too many files the one whose use is longest ago goes.

    The date is that of the first lesson, so that the name of the set stays.
    """
    about = {"weights": dict(one.weights), "facts": dict(one.facts), "elements": one.elements}
    save_state(path, {"situation": about, "date": datetime.date.today().isoformat(), **state})
    files = sorted(folder().glob("*.safetensors"), key=written)
    for old in [file for file in files if file != path][: max(0, len(files) - MOST_FILES)]:
        old.unlink(missing_ok=True)


def named() -> dict[str, Path]:
    """The files of all learned sets that can be read, by names for people."""
    return {kept.name: kept.path for kept in _kept()}


@dataclass(frozen=True)
class Kept:
    """What was learned in a situation, from one picture or more. Raises an Exception if that is not what it holds."""

    path: Path
    state: Mapping[str, Any]

    def __post_init__(self) -> None:
        of_kind(self.facts["guider"]["guidance"], str)
        _digest(self.facts)  # which others are compared with
        if of_count(self.state["learner"]["pictures"]) < 1 or not self.name or self.elements < 1:
            raise ValueError(f"{self.path.name} has no picture.")

    @property
    def facts(self) -> Mapping[str, Any]:
        """Those of its situation."""
        return dict(self.state["situation"]["facts"])

    @property
    def elements(self) -> int:
        """Those of one sample."""
        return of_count(self.state["situation"]["elements"])

    @property
    def name(self) -> str:
        """For people."""
        facts = self.facts
        levels = f"{facts['levels'][0]:.3g} to {facts['levels'][-1]:.3g}"
        about = (facts["model"]["family"], f"{facts['calls']} calls", facts["guider"]["guidance"], levels)
        return LISTED + plain_text(f"{', '.join(about)}, {self.state['date']} {self.path.stem[13:19]}-{self.elements}")


def _kept(weights: str = "") -> Iterator[Kept]:
    """All that can be read, of all weights or of one digest."""
    for path in sorted(folder().glob(f"{weights}*.safetensors")):
        kept = None
        with contextlib.suppress(Exception):  # whatever a file may hold
            kept = Kept(path, load_state(path))
        if kept is not None:
            yield kept


def forget(model: Any) -> int:
    """Remove all that was learned of a MODEL's weights; how many situations that were."""
    weights = _of_weights(weights_of(model))
    for path in [path for path in _failed if path.name.startswith(weights)]:
        del _failed[path]
    files = list(folder().glob(f"{weights}-*.safetensors"))
    for file in files:
        file.unlink(missing_ok=True)
    return len(files)


def _of_weights(weights: Mapping[str, Any]) -> str:
    return _digest(weights)[:12]


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
