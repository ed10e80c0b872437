"""The table a fit of midpoints begins with: the base solver, its midpoints at r = 0.5."""

from collections.abc import Iterator

from torch import Tensor

from ..call_list import call_sigmas
from ..predictor import Predictor
from ..types import Method
from .end_to_end import Found
from .huber import compared
from .runs import RunCache, Runs


class MidpointStart:
    """Begins with a table that was not trained; the baseline is that, or plain calls where they are better."""

    def __init__(self, runs: Runs, initial: Predictor) -> None:
        self.runs = runs
        self.initial = initial

    @property
    def names(self) -> list[str]:
        """Both baselines."""
        return ["midpoints", "plain calls"]

    @property
    def model_calls(self) -> int:
        """Sample calls: of the targets, of both baselines where it fits, and of one on what is held out."""
        settings, calls = self.runs.settings, self.runs.config.calls
        once = 2 * settings.trajectories + settings.held_out
        taught = 0 if self.runs.shared else self.runs.fitted.model_calls + self.runs.judged.model_calls
        return taught + calls * once

    def found(self) -> Iterator[Found]:
        """Plain calls at the levels a user would sample with, if they are the better baseline, and the table.

        Raises FloatingPointError if the teacher's samples are not finite.
        """
        config = self.runs.config
        plain = self._found(f"plain {config.solver}", config.plain_method(call_sigmas(config, config.calls)))
        table = self._found(f"{config.solver}, midpoints at r = 0.5", self.initial.method(), self.initial)
        if compared(plain.distances, table.distances) < 1:
            yield plain
        yield table

    def refined(self, table: Predictor, distances: Tensor, cache: RunCache) -> tuple[Predictor, Tensor, RunCache]:
        """The same: nothing of it can be had in closed form."""
        return table, distances, cache

    finishing_calls = refused = 0

    def finished(self, table: Predictor, cache: RunCache) -> None:
        """None: there is nothing to do."""
        del table, cache

    def _found(self, name: str, method: Method, table: Predictor | None = None) -> Found:
        return Found(name, method, *self.runs.fitted_distances(method), table)
