"""Learning while sampling: weights of a multistep method from the first pictures that are drawn.

A picture teaches by its path: where a slow sampler took its noise, level by level. Along a candidate grid the student
runs from the same noise, and weights that lead it back to the path follow in closed form. What remains of a picture are
its normal equations, a few kilobytes. Each later picture is drawn before it is learned from, so that its error is
honest. Candidates that learn nothing run beside them, and win where learning does not pay.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..config import PredictorConfig
from ..driver import NoMidpoint, Resume, trajectory
from ..multistep import MultistepTable, multistep_config
from ..schedules import fine
from ..solvers import CautiousIpndm, Ipndm
from ..types import Denoiser, Evaluation, History, Method, Sample, Solver
from .baselines import baseline, grids, solvers
from .closed_form import Lessons, NormalEquations, Walk, equations_of, robust_weights, sum_of_parts, taught
from .grid_search import RULES, left_of_errors, searched
from .huber import squares
from .protocol import StateError, of_kind, of_shape, reading_state
from .teacher import TeacherPath, levels, path_of, products_of

PRIOR = Ipndm(2)  # weights are held at those of Adams and Bashforth, order 2
TEACHER = CautiousIpndm(3)
FAR = 9.0  # times the median: what an outlier's squared error counts at most where candidates are compared
LEARNED_FIRST, PLAIN_FIRST = 18, 12  # candidates that run on the first picture,
LEARNED_NEXT, PLAIN_NEXT = 6, 4  # and on each of the next ones,
WALKING = 4  # of which so many run once more, with the weights that they learn
TEACHER_TIMES = 3  # the student's calls: a teacher of fewer is hardly better than its student
LOWEST_FLOW = 0.02  # where the usual grids of a flow model may end, beside its smallest level
GOOD = 0.8  # of the best plain candidate's error:
GOOD_IN_A_ROW = 2  # so many pictures below it end the learning
MOST_PICTURES = 8
PLAIN_WINS = 0.8  # of the learned candidate's squared error: the best of many plain ones looks better than it is


@dataclass(eq=False)  # two are the same only if they are one
class Candidate:
    """A grid with weights: learned, or those of a plain solver."""

    name: str
    table: MultistepTable
    lessons: Lessons | None = None  # None of a plain solver
    seen: list[float] = field(default_factory=list)  # squared errors of pictures that it had learned from
    held_out: list[float] = field(default_factory=list)  # of pictures that it had not
    ends: list[float] = field(default_factory=list)  # squared errors at the very end, of what it had learned from

    @property
    def plain(self) -> bool:
        """Whether it learns nothing."""
        return self.lessons is None

    @property
    def new(self) -> bool:
        """Whether it is to learn, and knows nothing yet."""
        return self.lessons is not None and not len(self.lessons.products)

    @property
    def score(self) -> float:
        """The squared error by which candidates are compared, infinite without any picture.

        Of what was learned and of what was held out the geometric mean, by numbers of pictures: the first is low for
        all learned candidates alike, but the last has few pictures at first.
        """
        parts = [(len(errors), capped_mean(errors)) for errors in (self.seen, self.held_out) if errors]
        if not parts or any(not math.isfinite(mean) for _, mean in parts):
            return math.inf
        logs = sum(count * math.log(max(mean, 1e-30)) for count, mean in parts)
        return math.exp(logs / sum(count for count, _ in parts))


def capped_mean(errors: Sequence[float]) -> float:
    """The mean of squared errors, of which none counts more than some times the median."""
    squares = torch.tensor(errors, dtype=torch.float64)
    return float(squares.clamp(max=FAR * float(squares.median())).mean())


class Learner:
    """Learns the weights of one situation, picture by picture. Deterministic; it asks only what it is given.

    `config` is a multistep table's before any fit, for the model, the number of calls and the level that pictures start
    at. `levels` is a list that the user chose; without one the learner chooses the grid. `end` is the level where
    pictures end. `model_sigmas` are a discrete model's levels. The teacher takes `teacher_calls`, or TEACHER_TIMES the
    student's calls where that is more.
    """

    def __init__(
        self,
        config: PredictorConfig,
        levels: Sequence[float] = (),
        *,
        end: float = 0.0,
        model_sigmas: Tensor | None = None,
        teacher_calls: int = 24,
    ) -> None:
        self.config = replace(config, guided=False)
        self.levels = tuple(levels)
        self.end = self.levels[-1] if self.levels else end
        self.model_sigmas = model_sigmas
        self.teacher_calls = max(teacher_calls, TEACHER_TIMES * config.calls)
        self.candidates: list[Candidate] = []
        self.pictures = 0
        self.good_in_a_row = 0

    @property
    def teacher_levels(self) -> tuple[float, ...]:
        """The levels of the teacher, from where pictures start to where they end."""
        low, high, calls = self.config.sigma_min, self.config.sigmas[0], self.teacher_calls
        if self.end > 0:
            return tuple(fine(calls + 1, self.end, high, self.config.flow).tolist())
        return levels(min(low, high / 2), high, calls, self.config.flow)

    def taught(self, denoiser: Denoiser, x: Sample, *, half: bool = False) -> TeacherPath:
        """The slow sampler's path from noisy pictures x (batch, ...): teacher_calls calls of each."""
        return path_of(denoiser, x, Method(self.teacher_levels, TEACHER, NoMidpoint()), half=half)

    @property
    def done(self) -> bool:
        """Whether there is no need to learn from more pictures."""
        return self.good_in_a_row >= GOOD_IN_A_ROW or self.pictures >= MOST_PICTURES

    @property
    def chosen(self) -> Candidate:
        """The learned candidate whose error is least, or the plain one where that is better.

        Before the first picture it is the guess. Raises ValueError without one.
        """
        if not self.candidates:
            raise ValueError("Nothing was learned yet: give the learner a picture's path first.")
        if not self.pictures:
            return self.candidates[0]
        learned, plain = self._best(plain=False), self._best(plain=True)
        mine = learned.held_out or learned.ends
        theirs = plain.held_out[-len(mine) :]
        return plain if capped_mean(theirs) < PLAIN_WINS * capped_mean(mine) else learned

    def _best(self, *, plain: bool) -> Candidate:
        return min((c for c in self.candidates if c.plain is plain), key=lambda c: c.score)

    @property
    def held_out_ratio(self) -> float | None:
        """The learned candidate's held-out error over the best plain one's on the same pictures; None without any."""
        return self.ratio_of(self._best(plain=False))

    def ratio_of(self, one: Candidate) -> float | None:
        """The same of any candidate that learns."""
        return _over_plain(one, self.candidates, len(one.held_out)) if one.held_out else None

    def calls_for(self, pictures: int) -> int:
        """The sample calls that learning from so many more pictures takes at most, beside the teacher's."""
        if not self.pictures:
            own = 1 + len(solvers(self.config.flow))  # on the user's levels
            new = own if self.levels else LEARNED_FIRST + PLAIN_FIRST
            return (new + len(self.candidates) + _walking(self.candidates)) * self._each * pictures
        return (len(self.candidates) + _walking(self.candidates)) * self._each * pictures

    @property
    def _each(self) -> int:
        """The calls of a candidate's run: the first call is the teacher's."""
        return self.config.calls - 1

    def guess(self, near: "Learner", name: str, elements: int) -> None:
        """Begin with what was chosen in a situation near to this one; the first picture that is learned checks it.

        `elements` are those of one sample, which may have another size there.
        """
        chosen = near.chosen
        table = self._table(chosen.table.config.sigmas)
        table.load_state_dict(chosen.table.state_dict())
        lessons = None if chosen.lessons is None else chosen.lessons.of_size(elements)
        self.candidates = [Candidate(name, table, lessons)]

    @torch.no_grad()
    def learn(
        self, denoiser: Denoiser, x: Sample, passed: TeacherPath, planned: Callable[[int], None] | None = None
    ) -> None:
        """Learn from pictures that start as x (batch, ...), whose teacher passed `passed`.

        `planned` hears beforehand how many calls that takes. Nothing changes if it is stopped inside.
        """
        before = self.candidates if self.pictures else [*self._proposed(passed), *self.candidates]
        if planned is not None:
            planned((len(before) + _walking(before)) * self._each)
        level, good = passed.levels[0], False
        first = Evaluation(x, torch.tensor(level).to(x), x - level * passed.slopes[0].to(x))
        drawn = [(self._begun if one.new else _drawn)(one, denoiser, first, passed) for one in before]
        if self.pictures:  # on the newest pictures, what was chosen before
            best = before.index(self._best(plain=False))
            good = _over_plain(drawn[best][0], [one for one, _ in drawn], len(x)) <= GOOD
        after = self._taught(drawn, denoiser, first, passed)
        self.good_in_a_row = self.good_in_a_row + 1 if good else 0
        self.pictures += len(x)
        self.candidates = _kept(after)

    def _proposed(self, passed: TeacherPath) -> list[Candidate]:
        """The candidates that do best on paper: along the teacher's own path, at no model call."""
        learned: list[tuple[float, Candidate]] = []
        plain: dict[str, list[tuple[float, Candidate]]] = {}
        for name, grid in self._grids(passed).items():
            solved, equations = _along(self._table(grid), passed)
            learned.append(
                (self._cost(solved, equations, passed), Candidate(f"learned, {name}", solved, Lessons.none(grid)))
            )
            for solver_name, solver in solvers(self.config.flow).items():
                one = Candidate(f"{solver_name}, {name}", self._table(grid, solver))
                plain.setdefault(solver_name, []).append((self._cost(one.table, equations, passed), one))
        # A path shows nothing of overshooting: of every solver the best grid runs.
        firsts = [min(listed, key=_first) for listed in plain.values()]
        others = sorted((one for listed in plain.values() for one in listed if one not in firsts), key=_first)
        learned.sort(key=_first)
        return [one for _, one in [*learned[:LEARNED_FIRST], *[*firsts, *others][:PLAIN_FIRST]]]

    def _cost(self, table: MultistepTable, equations: Sequence[NormalEquations], passed: TeacherPath) -> float:
        """What a table's errors of all intervals leave at the end, squared, per value, if none met another."""
        grid, size = table.config.sigmas, float(passed.end.double().square().mean())
        left: list[float] = left_of_errors(grid[1:], size, self.config.flow).tolist()
        made = [float(one.residuals(table.row(k)).mean()) for k, one in enumerate(equations)]
        steps = [sigma - sigma_next for sigma, sigma_next in pairwise(grid)]
        return sum(part * step**2 * error for part, step, error in zip(left, steps, made, strict=True))

    def _grids(self, passed: TeacherPath) -> dict[str, tuple[float, ...]]:
        """Candidate grids by name: the user's, or the usual, the searched ones, and those of the teacher's shape."""
        config, n, high = self.config, self.config.calls, self.config.sigmas[0]
        if self.levels:
            return {"these levels": self.levels}
        if self.end > 0:
            shapes = {
                "teacher's": fine(n + 1, self.end, high, config.flow),
                "even": torch.linspace(high, self.end, n + 1),
            }
            shapes["log"] = torch.linspace(math.log(high), math.log(self.end), n + 1).exp()
            return {name: (high, *levels.tolist()[1:-1], self.end) for name, levels in shapes.items()}
        found: dict[str, tuple[float, ...]] = {}
        for low in sorted({config.sigma_min, max(config.sigma_min, LOWEST_FLOW if config.flow else 0.0)}):
            if low < high:
                found |= {f"{name}, {low:g}": grid for name, grid in grids(n, low, high, self.model_sigmas)}
                found[f"teacher's, {low:g}"] = (*fine(n, low, high, config.flow).tolist(), 0.0)
        total = products_of(passed)
        found |= {f"searched for {rule}": searched(total, n, rule, flow=config.flow) for rule in RULES}
        unique: dict[str, tuple[float, ...]] = {}
        for name, grid in found.items():
            if all(a > b for a, b in pairwise(grid)) and not any(_alike(grid, other) for other in unique.values()):
                unique[name] = grid
        return unique

    def _table(self, grid: Sequence[float], solver: Solver = PRIOR) -> MultistepTable:
        one = baseline("", solver, grid, 0.0, self.config.switch_sigma)
        table = MultistepTable(multistep_config(self.config, grid))
        table.weights.copy_(torch.tensor(one.weights, dtype=torch.float64))
        return table

    def _begun(
        self, candidate: Candidate, denoiser: Denoiser, first: Evaluation, passed: TeacherPath
    ) -> tuple[Candidate, History]:
        """A new candidate after the first pictures, which it cannot draw before it has learned; no history to learn."""
        assert candidate.lessons is not None
        walk = Walk(denoiser, first.x, passed, (first,))
        table, equations = taught(self._table(candidate.lessons.levels), candidate.lessons, walk)
        ends = squares(walk.x, passed.end.to(walk.x)).tolist()
        cost = self._cost(table, equations, passed)
        lessons = candidate.lessons.and_of(walk.history, passed)
        seen = [math.sqrt(end * cost) for end in ends]
        return replace(candidate, table=table, lessons=lessons, seen=seen, ends=ends), ()

    def _taught(
        self, drawn: Sequence[tuple[Candidate, History]], denoiser: Denoiser, first: Evaluation, passed: TeacherPath
    ) -> list[Candidate]:
        """The candidates after they learned from pictures that they have drawn.

        The best walk along them with the weights that they learn. Of the others it is taken for granted that slopes
        stay as they were when weights change.
        """
        learning = sorted((one for one, history in drawn if history and not one.plain), key=lambda one: one.score)
        after = []
        for one, history in drawn:
            if one.lessons is None or not history:
                after.append(one)
            elif one in learning[:WALKING]:
                walk = Walk(denoiser, first.x, passed, (first,))
                table, _ = taught(self._table(one.lessons.levels), one.lessons, walk)
                after.append(replace(one, table=table, lessons=one.lessons.and_of(walk.history, passed)))
            else:
                lessons = one.lessons.and_of(history, passed)
                table, _ = taught(self._table(lessons.levels), lessons)
                after.append(replace(one, table=table, lessons=lessons))
        return after

    def state_dict(self) -> dict[str, Any]:
        """All that it knows; `files.save_state` writes it."""
        return {
            "config": asdict(self.config),
            "levels": list(self.levels),
            "end": self.end,
            "teacher_calls": self.teacher_calls,
            "pictures": self.pictures,
            "good_in_a_row": self.good_in_a_row,
            "candidates": [
                {
                    "name": one.name,
                    "sigmas": list(one.table.config.sigmas),
                    "weights": one.table.weights,
                    "first": one.table.first,
                    "seen": list(one.seen),
                    "held_out": list(one.held_out),
                    "ends": list(one.ends),
                    "lessons": [] if one.lessons is None else [one.lessons.products],
                    "size": 0 if one.lessons is None else one.lessons.size,
                }
                for one in self.candidates
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. Raises StateError, a ValueError, if it is of another situation, or damaged."""
        with reading_state():
            config = PredictorConfig.from_header(state["config"])
            found = (config, tuple(state["levels"]), state["end"], state["teacher_calls"])
            if found != (self.config, self.levels, self.end, self.teacher_calls):
                raise StateError("This state of learning was made in another situation.")
            candidates = [self._loaded(saved) for saved in state["candidates"]]
            pictures, good = of_kind(state["pictures"], int), of_kind(state["good_in_a_row"], int)
        self.candidates, self.pictures, self.good_in_a_row = candidates, pictures, good

    def _loaded(self, saved: Mapping[str, Any]) -> Candidate:
        table = self._table(saved["sigmas"])
        for name, kept in (("weights", table.weights), ("first", table.first)):
            kept.copy_(of_shape(saved[name], kept.shape))
        lessons = None
        for products in saved["lessons"]:
            lessons = Lessons.none(table.config.sigmas)
            shaped = of_shape(products, (len(products), *lessons.products.shape[1:]))
            lessons = replace(lessons, products=shaped, size=of_kind(saved["size"], int))
        numbers = [table.weights, table.first, *([] if lessons is None else [lessons.products])]
        if not all(part.isfinite().all() for part in numbers):
            raise StateError("This state of learning is damaged: some of its weights are NaN or infinite.")
        errors = [[float(e) for e in saved[name]] for name in ("seen", "held_out", "ends")]
        return Candidate(of_kind(saved["name"], str), table, lessons, *errors)


def _kept(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that go on to the next picture: the best of each kind."""
    learned = sorted((c for c in candidates if not c.plain), key=lambda c: c.score)[:LEARNED_NEXT]
    return learned + sorted((c for c in candidates if c.plain), key=lambda c: c.score)[:PLAIN_NEXT]


def _walking(candidates: Sequence[Candidate]) -> int:
    """How many candidates run twice on the next picture."""
    return min(WALKING, sum(not (one.plain or one.new) for one in candidates))


def _over_plain(one: Candidate, candidates: Sequence[Candidate], count: int) -> float:
    """A candidate's error on the newest pictures over that of the best plain one."""
    plain = min(capped_mean(c.held_out[-count:]) for c in candidates if c.plain)
    return math.sqrt(capped_mean(one.held_out[-count:]) / max(plain, 1e-30))


def _drawn(
    candidate: Candidate, denoiser: Denoiser, first: Evaluation, passed: TeacherPath
) -> tuple[Candidate, History]:
    """The candidate after pictures that it drew as it is, and what it evaluated on the way."""
    steps = list(trajectory(denoiser, first.x, candidate.table.method(), resume=Resume(0, first, ())))
    errors = squares(steps[-1].x, passed.end.to(first.x)).tolist()
    return replace(candidate, held_out=candidate.held_out + errors), tuple(step.start for step in steps)


def _along(table: MultistepTable, passed: TeacherPath) -> tuple[MultistepTable, list[NormalEquations]]:
    """The table with weights from the teacher's own path, at no call, and the equations of every interval there."""
    every: list[list[NormalEquations]] = []
    for piece in passed.pieces():
        history: History = ()
        every.append([])
        for k, sigma in enumerate(table.config.sigmas[:-1]):
            x, slope = piece.at(sigma)
            history = (*history, Evaluation(x, torch.tensor(sigma, dtype=x.dtype), x - sigma * slope))
            every[-1].append(equations_of(history, piece, table, k))
    made = MultistepTable(table.config)
    listed = [sum_of_parts(of_pieces) for of_pieces in zip(*every, strict=True)]
    for k, one in enumerate(listed):
        made.set_row(k, robust_weights([one], table.row(k)))
    return made, listed


def _first(one: tuple[float, Candidate]) -> float:
    return one[0]


def _alike(grid: Sequence[float], other: Sequence[float]) -> bool:
    return all(abs(math.log(a / b)) < 0.02 for a, b in zip(grid[:-1], other[:-1], strict=True))
