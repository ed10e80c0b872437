"""Fits of one model for several uses, with one set of teacher's paths."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ..predictor import Predictor, PredictorSet
from .protocol import Fit, FitEvent, FitSummary, SetSummary, StateError, of_kind, reading_state
from .trajectories import Metered


@dataclass(frozen=True, order=True)
class Use:
    """What a predictor is for: a number of calls, and the level where runs start, 0 for pure noise."""

    calls: int
    level: float = 0.0

    def __str__(self) -> str:
        return f"{self.calls} calls" + (f" from {self.level:.3g}" if self.level else "")


class FitSet:
    """Fits for several uses. At first each finds what it begins with, then each goes on; so all are usable early.

    `make` makes the fit of a use. All run on the trajectories of `sources`, and all but the first one that is made
    share its targets. The first of the uses is meant where only one is asked for. Most calls are fitted first, for
    which the teacher must be best, and images last, as they need its paths.
    """

    def __init__(self, uses: Sequence[Use], make: Callable[[Use], Fit], sources: Sequence[Metered]) -> None:
        self.uses = tuple(uses)
        self.make = make
        self.sources = tuple(sources)
        self.fits: dict[Use, Fit] = {}
        self._order = sorted(self.uses, key=lambda use: (use.level > 0, -use.calls, -use.level))
        self._earlier_calls = 0
        self.fits[self._order[0]] = make(self._order[0])

    @property
    def predictor(self) -> Predictor:
        """That of the first use, or of the one that was begun first."""
        return self.predictors.main

    @property
    def predictors(self) -> PredictorSet:
        """The best so far, of all uses that were begun."""
        usable = [self.fits[use].predictor for use in self.uses if use in self.fits and self.fits[use].begun]
        return PredictorSet(tuple(usable or [self._first.predictor]))

    @property
    def _first(self) -> Fit:
        return self.fits[self._order[0]]

    @property
    def begun(self) -> bool:
        """Whether all are usable."""
        return len(self.fits) == len(self.uses) and all(fit.begun for fit in self.fits.values())

    @property
    def losses(self) -> list[float]:
        """Those of all uses, one after the other."""
        return [loss for use in self._order if use in self.fits for loss in self.fits[use].losses]

    @property
    def model_calls(self) -> int:
        """Single-sample model calls so far, of this process."""
        return self._earlier_calls + sum(source.calls for source in self.sources)

    @property
    def expected_calls(self) -> int:
        """The fewest of all uses; of one that was not begun, as many as of the nearest, call for call."""
        known = {use: fit.expected_calls for use, fit in self.fits.items()}
        total = float(sum(known.values()))
        for use in self.uses:
            if use not in known:
                kind = [other for other in known if bool(other.level) is bool(use.level)]
                total += sum(known[other] * use.calls / other.calls for other in kind) / max(len(kind), 1)
        return int(total)

    def events(self) -> Iterator[FitEvent]:
        """Fit all uses; model calls are of all so far. Raises FloatingPointError for samples that are not finite."""
        for use in self._order:
            if use not in self.fits:
                self.fits[use] = self.make(use)
            fit = self.fits[use]
            for event in () if fit.begun else fit.events():
                yield self._told(use, event)
                if fit.begun:
                    break
        for use in self._order:
            for event in self.fits[use].events():
                yield self._told(use, event)

    def _told(self, use: Use, event: FitEvent) -> FitEvent:
        return replace(event, use=str(use), model_calls=self.model_calls)

    def state_dict(self) -> dict[str, Any]:
        """The states of the fits that were begun, in the order of the uses' fits."""
        fits = [self.fits[use].state_dict() for use in self._order if use in self.fits]
        return {"uses": [[use.calls, use.level] for use in self._order], "fits": fits, "model_calls": self.model_calls}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. Raises StateError, and changes nothing, if it is damaged or of other settings."""
        with reading_state():
            if [Use(int(calls), float(level)) for calls, level in state["uses"]] != self._order:
                raise StateError("This training state was made for other uses.")
            saved, earlier = list(state["fits"]), of_kind(state["model_calls"], int)
            if not 1 <= len(saved) <= len(self._order):
                raise StateError("This training state is damaged: it holds no fit, or too many.")
        fits: dict[Use, Fit] = {}
        for use, one in zip(self._order, saved, strict=False):
            fits[use] = self._first if not fits else self.make(use)
            fits[use].load_state_dict(one)
        self.fits, self._earlier_calls = fits, earlier

    def summary(self) -> FitSummary:
        """What came of it."""
        found = {str(use): self.fits[use].summary() for use in self.uses if use in self.fits}
        first = next(iter(found.values()))
        about = {one.name: getattr(first, one.name) for one in fields(FitSummary)}
        return SetSummary(**{**about, "model_calls": self.model_calls}, uses=found)
