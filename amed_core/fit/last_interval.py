"""What of a table's last interval follows in closed form, once all before it is known: the weights of its bands."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..multistep import MultistepTable
from ..predictor import Predictor
from ..types import Method, Sample, Step
from .closed_form import NormalEquations, from_begin, hold_of, joined, solved_apart, vectors_of, with_energy
from .huber import compared
from .runs import RUNS, RunCache, Runs
from .targets import Target


@dataclass(frozen=True)
class LastInterval:
    """Solves for the bands of last intervals anew, on the fitted trajectories of a fit."""

    runs: Runs

    def refined(self, table: Predictor, distances: Tensor, cache: RunCache) -> tuple[Predictor, Tensor, RunCache]:
        """The table with the bands of its last interval solved for again, from where that begins now, if it is better.

        `distances` (rows,) are the fitted samples' to their targets. It takes no model call, and is left out where
        memory was too short to keep all runs.
        """
        config = table.config
        missing = torch.tensor(sum(target.number not in cache.steps for target in self.runs.fitted))
        if not config.spectral or int(self.runs.workers.sum(missing)):
            return table, distances, cache
        made, last = _copy_of(table), config.intervals - 1
        each, sizes = self._products(made, lambda target: cache.get(target.number, target.x.device))
        made.set_row(last, made.row(last), solved_apart(from_begin(each), sizes, made.row(last), self.runs.workers))
        method, ends = made.method(), dict[int, Sample]()

        def draw(target: Target) -> Tensor:
            """The last update done again, from the evaluations that are kept."""
            x = self._ended(target, method, cache)[-1].x
            ends[target.number] = x.cpu()
            return x

        better = self.runs.fitted.distances(draw)
        return (made, better, cache.ended(ends)) if compared(better, distances) < 1 else (table, distances, cache)

    def finished(self, table: Predictor, cache: RunCache) -> tuple[Predictor, Tensor] | None:
        """The table with a last interval that leaves the bands of samples the teacher's energy, and the distances.

        Distances (rows,) are of fitted samples to their targets. None if it has no bands. `cache` has runs of the
        table, which are not run again.
        """
        if not table.config.spectral:
            return None
        made, last = _copy_of(table), table.config.intervals - 1
        method, kept = table.method(), RunCache(int(self.runs.settings.keep_bytes * RUNS))

        def run(target: Target) -> list[Step]:
            steps = cache.get(target.number, target.x.device) or self.runs.run(target, method)
            kept.put(target.number, steps)
            return steps

        (each, sizes), row, workers = self._products(made, run), made.row(last), self.runs.workers
        hold = hold_of(from_begin(each), sizes, row, workers)
        made.set_row(last, row, with_energy(workers.sum(each.sum(0)), sizes, row, hold))
        changed = made.method()
        return made, self.runs.fitted.distances(lambda target: self._ended(target, changed, kept)[-1].x)

    def _products(self, table: MultistepTable, run: Callable[[Target], list[Step]]) -> tuple[Tensor, Tensor]:
        """Products (trajectories, BANDS, vectors + 2, vectors + 2) of this worker's runs, and sizes (BANDS,) of all.

        They are of what the interval adds to a sample for each weight, of the sample, and of its target.
        """
        last, every = table.config.intervals - 1, []
        for target in self.runs.fitted:
            steps = run(target)
            start = steps[-1].start
            added = [-start.sigma * vector for vector in vectors_of(table, tuple(s.start for s in steps), last)]
            every.append(NormalEquations.of((*added, start.x), target.end, spectral=True))
        each, sizes = joined(every, True, len(table.row(last)) + 2)
        return each, self.runs.workers.sum(sizes)

    def _ended(self, target: Target, method: Method, cache: RunCache) -> list[Step]:
        """A run whose last update alone is another than in a kept run, or all of it where none was kept."""
        steps = cache.get(target.number, target.x.device)
        if not steps:
            return self.runs.run(target, method)
        *before, step = steps
        history = (*(s.start for s in before), step.start)
        x = method.solver.to_next(history, torch.zeros_like(step.start.sigma), None, method.stages[-1])
        return [*before, replace(step, x=x)]


def _copy_of(table: Predictor) -> MultistepTable:
    """A multistep table whose numbers may be changed."""
    made = MultistepTable(table.config)
    made.load_state_dict(table.state_dict())
    return made
