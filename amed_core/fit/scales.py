"""A fit at several guidance scales: one after the other, on the same grid, to one table."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..config import PredictorConfig
from ..predictor import Predictor, stacked
from .protocol import Fit, FitEvent, FitSummary, ForOneUse, StateError
from .reading import reading_state

# Makes the fit of a scale by its number, on the grid of the first one's table if there is one.
MakeFit = Callable[[int, PredictorConfig | None], Fit]


class SeveralScales(ForOneUse):
    """Fits a table at every guidance scale. The largest, which is the hardest, comes first and chooses the grid."""

    def __init__(self, scales: Sequence[float], make: MakeFit) -> None:
        self.scales = tuple(scales)
        self.make = make
        self.order = [len(scales) - 1, *range(len(scales) - 1)]
        self.fits: dict[int, Fit] = {self.order[0]: make(self.order[0], None)}
        grid = self._first.predictor.config  # any will do: they do not search for one
        self._least = {n: make(n, grid).expected_calls for n in self.order[1:]}

    @property
    def _first(self) -> Fit:
        return self.fits[self.order[0]]

    @property
    def predictor(self) -> Predictor:
        """The best so far; a scale that was not begun has the table of the first."""
        tables = [self.fits.get(n, self._first).predictor for n in range(len(self.scales))]
        config = self._first.predictor.config
        same = [table if table.config.sigmas == config.sigmas else self._first.predictor for table in tables]
        return stacked(replace(config, guidance=self.scales[0], guidances=self.scales), same)

    @property
    def begun(self) -> bool:
        """Whether every scale has a start."""
        return len(self.fits) == len(self.scales) and all(fit.begun for fit in self.fits.values())

    @property
    def losses(self) -> list[float]:
        """Those of all scales, one after the other."""
        return [loss for n in self.order if n in self.fits for loss in self.fits[n].losses]

    @property
    def model_calls(self) -> int:
        """Single-sample model calls of all scales so far, of this process."""
        return sum(fit.model_calls for fit in self.fits.values())

    @property
    def expected_calls(self) -> int:
        """The fewest of all scales; of one that was not begun, as if it took the first one's grid."""
        return sum(self.fits[n].expected_calls if n in self.fits else self._least[n] for n in self.order)

    def events(self) -> Iterator[FitEvent]:
        """Fit one scale after the other; model calls are of all so far.

        Raises FloatingPointError for samples that are not finite.
        """
        for n in self.order:
            if n not in self.fits:
                self.fits[n] = self.make(n, self._first.predictor.config)
            before = sum(fit.model_calls for other, fit in self.fits.items() if other != n)
            for event in self.fits[n].events():
                yield replace(event, model_calls=before + event.model_calls)

    def state_dict(self) -> dict[str, Any]:
        """The states of the scales that were begun, by number."""
        return {"fits": {str(n): fit.state_dict() for n, fit in self.fits.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. Raises StateError, and changes nothing, if it is damaged or of other settings."""
        with reading_state():
            saved, fits = dict(state["fits"].items()), dict[int, Fit]()
            if not {str(self.order[0])} <= set(saved) <= set(map(str, self.order)):
                raise StateError("This training state was made with other guidance scales.")
            for n in self.order:
                if str(n) in saved:
                    fits[n] = self.make(n, fits[self.order[0]].predictor.config if fits else None)
                    fits[n].load_state_dict(saved[str(n)])
        self.fits = fits

    def summary(self) -> FitSummary:
        """What came of it: root mean squares of the scales' errors."""
        found = [self.fits[n].summary() for n in sorted(self.fits)]
        errors = [(s.error, s.baseline_error) for s in found if s.error is not None and s.baseline_error is not None]
        means = [(sum(e**2 for e in column) / len(column)) ** 0.5 for column in zip(*errors, strict=True)]
        error, base = means or (None, None)
        calls = sum(summary.model_calls for summary in found)
        details = {"scales": {str(self.scales[n]): one.error for n, one in zip(sorted(self.fits), found, strict=True)}}
        faults = sum(summary.not_finite for summary in found)
        own: dict[str, Any] = {"model_calls": calls, "not_finite": faults, "error": error, "baseline_error": base}
        return replace(found[0], baseline="the best baselines", details=details, **own)
