"""What of a table's last interval follows in closed form, once all before it is known: the weights of its bands."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..multistep import MultistepTable
from ..predictor import Predictor
from ..spectrum import BANDS
from ..types import Method, Sample, Step
from .closed_form import NormalEquations, solved_apart, vectors_of, with_energy
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
        config, targets = table.config, list(self.runs.fitted)
        missing = torch.tensor(sum(target.number not in cache.steps for target in targets))
        if not config.spectral or int(self.runs.workers.sum(missing)):
            return table, distances, cache
        made, last = MultistepTable(config), config.intervals - 1
        made.load_state_dict(table.state_dict())
        row = made.row(last)
        products = torch.zeros(BANDS, len(row) + 1, len(row) + 1, dtype=torch.float64)
        sizes = torch.zeros(BANDS, dtype=torch.float64)
        for target in targets:
            steps = cache.get(target.number, target.x.device)
            start = steps[-1].start
            added = vectors_of(made, tuple(s.start for s in steps), last)
            more, counted = NormalEquations.of(added, (target.end - start.x) / -start.sigma, spectral=True).total()
            products, sizes = products + more, sizes + counted
        products, sizes = self.runs.workers.sum(products), self.runs.workers.sum(sizes)
        made.set_row(last, row, solved_apart(products, sizes, row))
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

        Distances (rows,) are of fitted samples to their targets. None if it has no bands.
        `cache` has runs of the table, which are not run again.
        """
        config, last = table.config, table.config.intervals - 1
        if not config.spectral:
            return None
        made = MultistepTable(config)
        made.load_state_dict(table.state_dict())
        row, method = made.row(last), table.method()
        products = torch.zeros(BANDS, len(row) + 2, len(row) + 2, dtype=torch.float64)
        sizes, kept = torch.zeros(BANDS, dtype=torch.float64), RunCache(int(self.runs.settings.keep_bytes * RUNS))
        for target in self.runs.fitted:
            steps = cache.get(target.number, target.x.device) or self.runs.run(target, method)
            kept.put(target.number, steps)
            start = steps[-1].start
            added = vectors_of(made, tuple(s.start for s in steps), last)
            moved = [-start.sigma * vector for vector in added]
            more, counted = NormalEquations.of((*moved, start.x), target.end, spectral=True).total()
            products, sizes = products + more, sizes + counted
        products, sizes = self.runs.workers.sum(products), self.runs.workers.sum(sizes)
        apart = made.spectral[last, made.vectors(last)].detach().double()
        made.set_row(last, row, with_energy(products, sizes, row, apart))
        changed = made.method()
        return made, self.runs.fitted.distances(lambda target: self._ended(target, changed, kept)[-1].x)

    def _ended(self, target: Target, method: Method, cache: RunCache) -> list[Step]:
        """A run whose last update alone is another than in a kept run, or all of it where none was kept."""
        steps = cache.get(target.number, target.x.device)
        if not steps:
            return self.runs.run(target, method)
        *before, step = steps
        history = (*(s.start for s in before), step.start)
        x = method.solver.to_next(history, torch.zeros_like(step.start.sigma), None, method.stages[-1])
        return [*before, replace(step, x=x)]
