"""What an unfinished fit leaves: its state, from which it goes on, and the best predictor so far."""

import contextlib
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
from torch import Tensor

from ..amed_core.contents import PredictorFileError
from ..amed_core.files import load_state, provenance, read_notes, save_predictor, save_state
from ..amed_core.fit.protocol import Fit
from ..amed_core.predictor import PredictorSet
from .places import UNFINISHED, folders

STATES = "amed_training"  # in the user's folder
OURS = re.compile(r"[0-9a-f]{16}\.safetensors")  # names of states
MOST_BYTES = 500_000_000  # of a state's tensors
MOST_STATES, MOST_DAYS = 10, 30
DAY = 86_400.0  # seconds
WHILE_UNFINISHED, NEVER = "while unfinished", "never"  # how long states are kept


@contextlib.contextmanager
def harmless(failure: str, told: set[str]) -> Iterator[None]:
    """Whatever goes wrong inside ends there; that is logged once for each `failure`, if it is not among those `told`.

    But for Cancel, which newer ComfyUI raises in the middle of any operation.
    """
    try:
        yield
    except comfy.model_management.InterruptProcessingException:
        raise
    except Exception as error:
        if failure not in told:
            logging.warning(f"AMED: {failure}, which does not harm what is trained ({type(error).__name__}: {error}).")
        told.add(failure)


@dataclass
class Unfinished:
    """Where a fit keeps what there is of it. Nothing that goes wrong here costs the fit."""

    name: str  # the same for the same fit of the same model, and for nothing else
    kept: bool = True  # whether anything may be written
    told: set[str] = field(default_factory=set)  # of what went wrong

    @property
    def state(self) -> Path:
        """The file from which the fit goes on."""
        return Path(folder_paths.get_user_directory()) / STATES / f"{self.name}.safetensors"

    @property
    def best(self) -> Path:
        """The file of the best predictor so far, among those that can be loaded."""
        return folders()[0] / UNFINISHED / self.state.name

    def resumed(self, make: Callable[[], Fit]) -> tuple[Fit, bool]:
        """A fit that `make` makes, and whether it goes on from a state; one that cannot be used leaves no trace in it.

        A state of a fit that may keep nothing is of an earlier time, and is removed.
        """
        if not self.kept:
            self.remove()
        fit = make()
        if not self.state.exists():
            return fit, False
        try:
            fit.load_state_dict(load_state(self.state))
        except comfy.model_management.InterruptProcessingException:
            raise
        except Exception as error:  # whatever a file may hold
            logging.warning(f"AMED: the state of this training cannot be used, so it begins anew ({error}).")
            return make(), False
        return fit, True

    def keep(self, fit: Fit) -> bool:
        """Write a fit's state; whether there is one now. Older ones that are too many make room for it."""
        if not self.kept:
            return False
        with harmless("the state of this training is not kept", self.told):
            state = fit.state_dict()
            if (size := bytes_of(state)) > MOST_BYTES:
                raise ValueError(f"it takes {size / 1e6:,.1f} MB, and at most {MOST_BYTES / 1e6:,.1f} MB are kept")
            save_state(self.state, state)
            tidy(self.state)
        return self.state.exists()

    def keep_best(self, fit: Fit) -> bool:
        """Write the best predictor so far; whether it is there. A finished one that was kept is better, and stays."""
        if not self.kept or not fit.begun or self._has_result:
            return False
        with harmless("the best so far is not kept", self.told):
            about = provenance(fit.summary().header() | {"unfinished": True})
            save_predictor(fit.predictors, self.best, about)
            tidy(self.best)
            return True
        return False

    def keep_result(self, predictors: PredictorSet, notes: Mapping[str, Any]) -> bool:
        """Write what a finished fit made, in place of its state, until it is saved; whether it is there.

        It takes a few kilobytes, and shows no picture, as a state does.
        """
        if not self.kept:
            return False
        with harmless("the finished predictor is not kept", self.told):
            save_predictor(predictors, self.best, notes)
            tidy(self.best)
            self.state.unlink(missing_ok=True)
            return True
        return False

    @property
    def _has_result(self) -> bool:
        """Whether what is kept was made by a finished fit."""
        with contextlib.suppress(PredictorFileError):
            return "unfinished" not in read_notes(self.best).get("training", {})
        return False

    def remove(self) -> None:
        """Leave nothing."""
        with harmless("the state of this training is not removed", self.told):
            self.state.unlink(missing_ok=True)
            self.best.unlink(missing_ok=True)


def bytes_of(state: Any) -> int:
    """The memory that the tensors of a state take."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, Mapping):
        return sum(map(bytes_of, state.values()))
    return sum(map(bytes_of, state)) if isinstance(state, (list, tuple)) else 0


def tidy(newest: Path) -> None:
    """Remove states, or the best so far of as many fits, beside the newest one that are too many or too old."""
    found = {path: written(path) for path in newest.parent.iterdir() if OURS.fullmatch(path.name) and path != newest}
    states = sorted(found, key=found.__getitem__, reverse=True)
    for number, path in enumerate(states, start=1):
        if number >= MOST_STATES or time.time() - found[path] > MOST_DAYS * DAY:
            path.unlink(missing_ok=True)


def written(path: Path) -> float:
    """When a file was written, in seconds; now, if another process has just removed it."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return time.time()
