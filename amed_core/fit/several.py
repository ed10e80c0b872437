"""Fits of one model for several uses, with one set of teacher's paths."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any

from ..config import PredictorConfig, same_levels
from ..predictor import Predictor, PredictorSet, build, check_numbers
from .end_to_end import FOUND
from .protocol import Fit, FitEvent, FitSummary, ForOneUse, SetSummary, StateError
from .reading import of_count, of_errors, of_kind, of_number, of_text, reading_state
from .targets import Targets, as_before
from .trajectories import Metered

LEAST_CALLS, USUAL_CALLS, MOST_CALLS = 2, 5, 100
OF_SUMMARY: Mapping[str, Callable[[Any], Any]] = {  # and how each is read from a state
    **dict.fromkeys(("objective", "teacher", "baseline"), of_text),
    **dict.fromkeys(("error", "baseline_error"), partial(of_number, least=0.0)),
    "model_calls": of_count,
}


@dataclass(frozen=True, order=True)
class Use:
    """What a predictor is for: a number of calls, and the level where runs start, 0 for pure noise."""

    calls: int
    level: float = 0.0

    def __str__(self) -> str:
        return f"{self.calls} calls" + (f" from {self.level:.3g}" if self.level else "")


def numbers_of(text: str) -> tuple[int, ...]:
    """The numbers of calls that a text names, as 5, 3-10 or 4, 8-10; USUAL_CALLS first if it is among them.

    Raises ValueError for anything else.
    """
    found: set[int] = set()
    for part in text.replace(" ", "").split(","):
        numbers = re.fullmatch(r"(\d{1,3})(?:-(\d{1,3}))?", part)
        first, last = (int(numbers[1]), int(numbers[2] or numbers[1])) if numbers else (0, 0)
        if not LEAST_CALLS <= first <= last <= MOST_CALLS:
            raise ValueError(
                f"{text!r:.40} names no numbers of calls: give at least {LEAST_CALLS} and at most {MOST_CALLS}, as 5, "
                "or a range, as 3-10."
            )
        found |= set(range(first, last + 1))
    return tuple(sorted(found, key=lambda calls: (calls != USUAL_CALLS, calls)))


class Finished(ForOneUse):
    """What a finished fit leaves: it has nothing left to do, and needs no trajectories."""

    begun = True

    def __init__(self, predictor: Predictor, summary: FitSummary, losses: Sequence[float]) -> None:
        self.predictor = predictor
        self.losses = list(losses)
        self.model_calls = self.expected_calls = 0  # its set counts
        self._summary = replace(summary, settings={}, details={})  # those of its set say the rest

    def events(self) -> Iterator[FitEvent]:
        """None."""
        return iter(())

    def state_dict(self) -> dict[str, Any]:
        """All of it."""
        found = {name: getattr(self._summary, name) for name in OF_SUMMARY}
        table = [asdict(self.predictor.config), dict(self.predictor.state_dict())]
        return {"table": table, "summary": found, "losses": self.losses}

    @classmethod
    def of(cls, state: Mapping[str, Any], use: Use, like: PredictorConfig) -> "Finished":
        """That of a state, for a use, with settings like others of its set. Raises StateError if it is damaged."""
        with reading_state():
            header, learned = state["table"]
            config = PredictorConfig.from_header(header)
            found: dict[str, Any] = {name: of_kind(getattr(config, name), kind) for name, kind in FOUND.items()}
            starts = same_levels(config.sigmas[:1], (use.level,))  # a schedule's first level is rounded
            if config != replace(like, **found) or config.calls != use.calls or not starts:
                raise StateError("This training state holds a table of other settings.")
            predictor = build(config)
            predictor.load_state_dict(learned)
            check_numbers(predictor, predictor.state_dict())
            summary = FitSummary(**{name: read(state["summary"][name]) for name, read in OF_SUMMARY.items()})
            return cls(predictor, summary, of_errors(state["losses"]))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """It is read by `of`. Raises StateError."""
        raise StateError("A finished fit has no state to go on from.")

    def summary(self) -> FitSummary:
        """What came of it."""
        return self._summary


class FitSet:
    """Fits for several uses. At first each finds what it begins with, then each goes on; so all are usable early.

    `make` makes the fit of a use. All run on the trajectories of `sources`, and all but the first one that is made
    share its `targets`. `least` are the calls that a use takes at least, beside the teacher's. The first of the uses is
    meant where only one is asked for. Most calls are fitted first, for which the teacher must be best. Images come
    last, as they need its paths, level by level, and are each fitted at once.
    """

    def __init__(
        self,
        uses: Sequence[Use],
        make: Callable[[Use], Fit],
        sources: Sequence[Metered],
        targets: Sequence[Targets],
        least: Callable[[Use], int],
    ) -> None:
        self.uses = tuple(uses)
        self.make = make
        self.sources = tuple(sources)
        self.targets = tuple(targets)
        self.least = least
        self.fits: dict[Use, Fit] = {}
        self._order = sorted(self.uses, key=lambda use: (use.level > 0, -use.level, -use.calls))
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
        """The fewest of all uses, as far as that is known now."""
        begun = [use for use in self.fits if not use.level]
        others = [use for use in self.uses if use not in begun]
        return sum(self.fits[use].expected_calls for use in begun) + sum(map(self.least, others))

    def events(self) -> Iterator[FitEvent]:
        """Fit all uses; model calls are of all so far. Raises FloatingPointError for samples that are not finite."""
        for use in self._order:
            fit = self.fits.get(use) or self.make(use)
            if not use.level:
                self.fits[use] = fit
            for event in () if fit.begun else fit.events():
                if use.level and fit.begun:
                    self.fits[use] = Finished(fit.predictor, fit.summary(), fit.losses)
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
            if state["uses"] != [[use.calls, use.level] for use in self._order]:
                raise StateError("This training state was made for other uses.")
            saved, earlier = of_kind(state["fits"], list), of_count(state["model_calls"])
            if not 1 <= len(saved) <= len(self._order):
                raise StateError("This training state is damaged: it holds no fit, or too many.")
        fits: dict[Use, Fit] = {}
        with as_before(self.sources, self.targets), reading_state():
            for use, one in zip(self._order, saved, strict=False):
                if use.level:
                    finished = Finished.of(one, use, fits[self._order[0]].predictor.config)
                    fits |= {use: finished} if self._whole(use.level, len(saved)) else {}
                else:
                    fits[use] = self.make(use)
                    fits[use].load_state_dict(one)
        self.fits, self._earlier_calls = fits, earlier

    def _whole(self, level: float, count: int) -> bool:
        """Whether the first so many fits have all of a level's. Else these begin anew, for they share a teacher."""
        return all(use.level != level for use in self._order[count:])

    def summary(self) -> FitSummary:
        """What came of it."""
        found = {str(use): self.fits[use].summary() for use in self.uses if use in self.fits}
        first = next(iter(found.values()))
        about = {one.name: getattr(first, one.name) for one in fields(FitSummary)}
        counts = {"model_calls": self.model_calls, "not_finite": sum(source.not_finite for source in self.sources)}
        return SetSummary(**(about | counts), uses=found)
