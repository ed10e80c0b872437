"""Which predictor file a MODEL that carries none is sampled with: the newest in the models folder that fits."""

import contextlib
import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..amed_core.call_list import call_sigmas
from ..amed_core.contents import PredictorFileError
from ..amed_core.files import load_with_notes, read_configs
from ..amed_core.predictor import Predictor, PredictorSet
from ..amed_core.samplers import sampler_name
from . import pairing
from .own_grid import is_own
from .places import SHIPPED, UNFINISHED, folders
from .values import NotedPredictor


@dataclass(frozen=True)
class Found:
    """A file, its predictors, the one that a run takes, and the levels that this one passes."""

    name: str
    predictor: NotedPredictor
    one: Predictor
    levels: tuple[float, ...]


def found(guider: Any, levels: Sequence[float], sampler: str | None = None) -> Found | None:
    """The newest file that fits a run, of a predictor for this sampler if one is named; None without one.

    It fits if it was made for this checkpoint with these LoRAs and patches at this guidance, and for runs from this
    level in so many calls. Files that a cancelled fit left, and those that come with this pack, are left alone: the
    former are not finished, and the latter are for the bundled models.
    """
    files, model = _newest_first(), guider.model_patcher
    if not files:  # and weights need not be looked into
        return None
    facts = pairing.fingerprint(model) | {"checkpoint": pairing.checkpoint(model)}
    own = is_own(levels, guider.inner_model.model_sampling)
    for name, path in files:
        try:
            if not any(pairing.fits(config, facts, guider) for config in _configs(path, path.stat().st_mtime_ns)):
                continue
            every, notes = load_with_notes(path)
        except (OSError, PredictorFileError) as error:
            logging.warning(f"AMED: {name} is left alone: {error}")
            continue
        fitting = [
            one
            for one in every.predictors
            if pairing.fits(one.config, facts, guider) and sampler in (None, sampler_name(one.config))
        ]
        if fitting and (one := _for(PredictorSet(tuple(fitting)), levels, pairing.scale(guider), own=own)) is not None:
            passed = call_sigmas(one.config, len(levels) - 1) if own else levels
            return Found(name, NotedPredictor.of(every, notes), one, tuple(passed))
    return None


def _for(every: PredictorSet, levels: Sequence[float], guidance: float | None, *, own: bool) -> Predictor | None:
    """What knows these levels: its own, or, of a list that only says where a run begins, those that begin there."""
    if own and levels[-1] == 0:
        return every.from_level(levels[0], len(levels) - 1, guidance)
    return every.made_for(levels, guidance)


def _newest_first() -> list[tuple[str, Path]]:
    """The user's own files, by their names in the list."""
    known = []
    for root in folders():
        if root == SHIPPED or not root.is_dir():
            continue
        for path in root.rglob("*.safetensors"):
            name = path.relative_to(root)
            if name.parts[0] != UNFINISHED and not path.name.startswith("."):
                with contextlib.suppress(OSError):  # a link that leads nowhere
                    known.append((path.stat().st_mtime_ns, name.as_posix(), path))
    return [(name, path) for _, name, path in sorted(known, reverse=True)]


@functools.lru_cache(maxsize=1000)
def _configs(path: Path, changed: int) -> tuple[Any, ...]:
    """The settings of a file's predictors; `changed` says which version of the file."""
    del changed
    return read_configs(path)
