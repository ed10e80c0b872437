"""Where the negative is asked: a guided call is two passes of the network, and a conditional one is one.

With n + m passes a student takes n calls of which m ask the negative; what guidance adds in between is carried by its
weights (`solvers.Multistep`). That pays where guidance changes slowly along the way and slopes do not. Which calls ask
is found in three steps, each of which tries fewer patterns: on paper, in runs of a few trajectories, and by a fit.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import combinations
from math import comb, sqrt
from typing import Any

import torch
from torch import Tensor

from ..driver import evaluate
from ..multistep import MultistepTable
from ..predictor import Predictor
from .baselines import Baseline
from .closed_form import Walk, inner_products, solved
from .end_to_end import EndToEnd
from .huber import compared, huber, linear_from
from .multistep_start import MultistepStart
from .protocol import FitEvent, FitSummary, ForOneUse, PassesSummary, StateError
from .reading import of_count, of_kind, reading_state
from .targets import as_before, beginning
from .teacher import TeacherPath
from .workers import ALONE, Workers

LEAST_PASSES = 4  # two guided calls
MORE_CALLS = 3  # than guided ones for the same passes, at most: beyond, too few negatives are left
TRIED = 3  # patterns of each number of calls that run, the best on paper
LEAST_GAIN = 0.03  # of the error, for which a student that asks fewer negatives is kept
LEAST_HELD_OUT = 8  # trajectories that say so

Pattern = tuple[int, ...]  # the intervals whose calls ask the negative


@dataclass(frozen=True)
class Shown:
    """Both answers of a guided model along a teacher's path, at the levels of a grid, as inner products.

    From them follows where a student would end that asks the negative at any of its calls, as if it met the slopes of
    the path wherever it stands: no further call is needed. Points are written as shares (3 n + 1,) of the sample at the
    first level, n slopes, n guidance slopes, and the path at n levels.
    """

    table: MultistepTable  # which asks it at every call
    products: Tensor  # (trajectories, 3 n + 1, 3 n + 1), in float64 on the CPU
    total: Tensor  # (3 n + 1, 3 n + 1), their sum over all workers

    @classmethod
    def of(cls, table: MultistepTable, walks: Sequence[Walk], workers: Workers = ALONE) -> "Shown":
        """Of the levels at which a table asks the model, by a guided call of every walk's trajectories at each."""
        count = 3 * table.config.intervals + 1
        products = [torch.zeros(0, count, count, dtype=torch.float64)]
        for walk in walks:
            points = [walk.path.at(sigma)[0].to(walk.x) for sigma in table.asked]
            pairs = zip(points[:-1], table.asked, strict=False)
            asked = [evaluate(walk.denoiser, x, torch.tensor(sigma).to(x)) for x, sigma in pairs]
            slopes, guidance = [e.slope for e in asked], [e.guidance_slope for e in asked]
            products.append(inner_products([points[0], *slopes, *guidance, *points[1:]]))
        every = torch.cat(products)
        return cls(table, every, workers.sum(every.sum(0)))

    def distances(self, negatives: Pattern) -> Tensor:
        """How far from the teacher's samples a student would end that asks the negative only there (trajectories,).

        Distances are norms. Weights are those of least squares, as in `closed_form.least_squares`.
        """
        levels, n = self.table.asked, self.table.config.intervals
        table = MultistepTable(replace(self.table.config, negatives=negatives))
        lacking = table.config.guidance - 1
        slopes = [self._share(1 + j) - (0 if j in negatives else lacking) * self._share(1 + n + j) for j in range(n)]
        stood = self._share(0)
        for k in range(n):
            step, first = levels[k + 1] - levels[k], table.known(k).start
            denoised = (self._share(0) if first == 0 else self._share(2 * n + first)) - levels[first] * slopes[first]
            added = [slopes[j] for j in table.known(k)] + [denoised]
            added += [self._share(1 + n + j) for j in table.asking(k)]
            rows = torch.stack([*added, (self._share(2 * n + 1 + k) - stood) / step])
            row = solved((rows @ self.total @ rows.T)[None], table.row(k))
            stood = stood + step * (row @ torch.stack(added))
        missed = stood - self._share(3 * n)
        left = torch.einsum("i,tij,j->t", missed, self.products, missed)
        return left.clamp(min=torch.finfo(torch.float64).tiny).sqrt()

    def _share(self, number: int) -> Tensor:
        return torch.eye(self.products.shape[1], dtype=torch.float64)[number]


class UnderPasses(ForOneUse):
    """A fit for so many passes of the network: a guided one of half as many calls, or one that asks fewer negatives.

    The guided one, `plain`, is fitted first. Of students with more calls, up to MORE_CALLS, and the negatives that are
    left for them, a few are tried, and `make` makes the fit of the best. That is given up where its start is no better
    than the plain one's was, and kept where it errs by LEAST_GAIN less on what is held out,
    and on all trajectories. Both share `plain`'s targets.
    """

    def __init__(self, passes: int, plain: EndToEnd, make: Callable[[int, Pattern], EndToEnd]) -> None:
        self.passes = passes
        self.plain = plain
        self.make = make
        self.saving: EndToEnd | None = None  # once it is chosen
        self._least_saving = min(self._start(n).model_calls for n in self.numbers)

    @property
    def numbers(self) -> range:
        """The numbers of calls that are tried."""
        half = self.passes // 2
        return range(half + 1, min(half + MORE_CALLS, self.passes - 1) + 1)

    @property
    def kept(self) -> bool:
        """Whether fewer negatives are so much better, as far as that is known.

        That holds on what is held out, and on all trajectories: of few that are held out, one odd one may decide.
        """
        if self.saving is None or not self.saving.begun:
            return False
        ours, plain = self.saving.at.best_distances, self.plain.at.best_distances
        pairs = ((self._held_out(ours), self._held_out(plain)), (ours, plain))
        return all(sqrt(compared(*pair)) < 1 - LEAST_GAIN for pair in pairs)

    @property
    def _given_up(self) -> bool:
        """Whether the start with fewer negatives is no better than the plain one."""
        if self.saving is None or not self.saving.begun:
            return False
        return self._error(self.saving) >= self.plain.at.begun_error

    @property
    def predictor(self) -> Predictor:
        """The better one so far."""
        return self.saving.predictor if self.saving is not None and self.kept else self.plain.predictor

    @property
    def begun(self) -> bool:
        """Whether the plain one's start was found."""
        return self.plain.begun

    @property
    def losses(self) -> list[float]:
        """Those of the plain fit, and of the one with fewer negatives."""
        return [*self.plain.losses, *([] if self.saving is None else self.saving.losses)]

    @property
    def model_calls(self) -> int:
        """Single-sample model calls so far, of this process."""
        return self.plain.model_calls  # of the source that all share

    @property
    def expected_calls(self) -> int:
        """The fewest, as far as that is known now."""
        tried = sum(self._trial_calls(n) for n in self.numbers)
        least = self._least_saving
        if self.saving is not None:
            going_on = self.saving.begun and not self._given_up
            least = self.saving.expected_calls if going_on else self.saving.start.model_calls
        return self.plain.expected_calls + tried + least

    def events(self) -> Iterator[FitEvent]:
        """Fit the plain one, choose where to ask the negative, and fit that; model calls are of all so far.

        Raises FloatingPointError for samples that are not finite.
        """
        for event in self.plain.events():
            yield self._told(self.plain, event)
        if self.saving is None:
            self.saving = self.make(*self._chosen())
        for event in () if self._given_up else self.saving.events():
            yield self._told(self.saving, event)
            if self._given_up:
                return

    def _told(self, fit: EndToEnd, event: FitEvent) -> FitEvent:
        config = fit.runs.config
        asked = f", {len(config.negatives)} negatives" if config.negatives else ""
        earlier = self.model_calls - fit.model_calls  # of a fit that went on from a state the other one counts them
        return replace(event, use=f"{config.calls} calls{asked}", model_calls=earlier + event.model_calls)

    @torch.no_grad()
    def _chosen(self) -> tuple[int, Pattern]:
        """The number of calls and the pattern that do best in runs of a few trajectories, of the best on paper."""
        runs, few = self.plain.runs, self.plain.settings.few
        paths = runs.fitted.taught()
        numbers = [n for n in paths if runs.fitted.batches()[n].start - runs.fitted.rows.start < few]
        found: dict[tuple[int, Pattern], float] = {}
        for calls in self.numbers:
            start = self._start(calls)
            grid = start.best_on_paper(paths)
            for pattern in self._best_on_paper(start, grid, numbers, paths):
                one = start.asking(pattern)
                table, _ = one.solved(grid, numbers, paths)
                found[calls, pattern] = float(one.runs.judged_distances(table.method(), few).log().mean())
        return min(found, key=found.__getitem__)

    def _best_on_paper(
        self, start: MultistepStart, grid: Baseline, numbers: Sequence[int], paths: Mapping[int, TeacherPath]
    ) -> list[Pattern]:
        """The patterns that promise most along the teacher's path, on a grid; it takes a guided call at each level."""
        runs, calls = start.runs, start.runs.config.calls
        walks = []
        for number in numbers:
            x, denoiser = runs.source(runs.fitted.batches()[number])
            walks.append(Walk(denoiser, x, paths[number]))
        shown = Shown.of(start.written(grid), walks, runs.workers)
        listed = list(combinations(range(calls), self.passes - calls))
        costs = runs.workers.sum(torch.stack([shown.distances(pattern).log().sum() for pattern in listed]))
        return [listed[n] for n in costs.argsort(stable=True)[:TRIED].tolist()]

    def _start(self, calls: int) -> MultistepStart:
        """That of a student of so many calls which asks the negative at all of them."""
        start = self.make(calls, ()).start
        assert isinstance(start, MultistepStart)
        return start

    def _trial_calls(self, calls: int) -> int:
        """What trying a number of calls takes: a run along the path, and a fitted and a judged one of every pattern."""
        settings = self.plain.settings
        fitted, judged = (
            beginning(settings.few, count, settings.batch_size) for count in (settings.trajectories, settings.held_out)
        )
        return calls * (fitted + min(TRIED, comb(calls, self.passes - calls)) * (fitted + judged))

    def _held_out(self, distances: Tensor) -> Tensor:
        return distances[self.plain.settings.trajectories :]

    def _error(self, fit: EndToEnd) -> float:
        """Of a fit on what is held out, as the plain one's are measured."""
        limit = linear_from(self._held_out(self.plain.at.base_distances))
        return float(huber(self._held_out(fit.at.best_distances), limit).sqrt())

    def state_dict(self) -> dict[str, Any]:
        """The states of both fits, and which negatives the second one asks, if it was chosen."""
        state: dict[str, Any] = {"passes": self.passes, "plain": self.plain.state_dict(), "saving": []}
        if self.saving is not None:
            config = self.saving.runs.config
            state["saving"] = [config.calls, list(config.negatives), self.saving.state_dict()]
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. Raises StateError, and changes nothing, if it is damaged or of other settings."""
        saving, runs = None, self.plain.runs
        with as_before([runs.source], [runs.fitted, runs.judged]), reading_state():
            if state["passes"] != self.passes:
                raise StateError("This training state was made for another number of passes.")
            if of_kind(state["saving"], list):
                calls, negatives, own = state["saving"]
                pattern = tuple(map(of_count, negatives))
                if calls not in self.numbers or len(pattern) != self.passes - calls:
                    raise StateError("This training state holds a table of other settings.")
                saving = self.make(calls, pattern)
                saving.load_state_dict(own)
            self.plain.load_state_dict(state["plain"])
        self.saving = saving

    def summary(self) -> PassesSummary:
        """What came of it."""
        found = self.plain.summary()
        about: dict[str, Any] = {one.name: getattr(found, one.name) for one in fields(FitSummary)}
        guided = found.error
        if self.saving is not None and self.kept:
            about["error"] = self._error(self.saving)
        config = self.predictor.config
        about |= {"model_calls": self.model_calls, "passes": config.passes, "calls": config.calls}
        return PassesSummary(**about, negatives=len(config.asking), guided_error=guided)
