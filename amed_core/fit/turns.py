"""Which trajectories an iteration of Levenberg and Marquardt's method linearises anew, and what that costs."""

from collections.abc import Callable
from dataclasses import dataclass

from ..config import PredictorConfig
from .runs import Runs


@dataclass(frozen=True)
class Turns:
    """Of every iteration, from 1, the batches whose turn it is: some of all workers', and of each a part, if need be.

    `derivatives` are the model calls of one trajectory's derivatives in a table of some settings: where a second model
    takes over decides on them, too.
    """

    runs: Runs
    derivatives: Callable[[PredictorConfig], int]

    def rows(self, iteration: int) -> dict[int, range]:
        """The trajectories of this worker's batches, by number, that are linearised anew in an iteration."""
        due, size = self._due(iteration), self.runs.settings.batch_size
        found = {}
        for number, rows in enumerate(self.runs.fitted.batches()):
            place, within = divmod(rows.start, size)
            few = range(rows.start, min(rows.stop, rows.start - within + self._rows_each))
            if place in due and few:
                found[number] = few
        return found

    def covered(self, iteration: int) -> bool:
        """Whether every batch was linearised in the iterations up to this one."""
        return len({place for n in range(1, iteration + 1) for place in self._due(n)}) == self._batches

    def calls(self, iteration: int, config: PredictorConfig) -> int:
        """The fewest calls of an iteration that begins with a table of these settings.

        They are those of derivatives, of one attempt, and of what is held out.
        """
        settings, calls = self.runs.settings, self.runs.config.calls
        rows = [min(self._rows_each, settings.trajectories - n * settings.batch_size) for n in self._due(iteration)]
        again = calls if self._rows_each < settings.batch_size else 0  # parts of batches are run once more
        return sum(rows) * (self.derivatives(config) + again) + calls * (settings.trajectories + settings.held_out)

    @property
    def _batches(self) -> int:
        """How many there are, of all workers."""
        return -(-self.runs.settings.trajectories // self.runs.settings.batch_size)

    @property
    def _rows_each(self) -> int:
        """How many of a batch's trajectories are linearised: with many calls, a part of it."""
        affordable = self.runs.settings.per_iteration // self.derivatives(self.runs.config)
        return min(self.runs.settings.batch_size, max(1, affordable))

    def _due(self, iteration: int) -> set[int]:
        """Which of all workers' batches. The first iteration, which knows none of earlier ones, takes twice as many."""
        count = max(1, self.runs.settings.per_iteration // (self.derivatives(self.runs.config) * self._rows_each))
        begin = count * iteration if iteration > 1 else 0
        return {place % self._batches for place in range(begin, count * (iteration + 1))}
