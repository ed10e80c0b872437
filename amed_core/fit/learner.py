"""Learning while sampling: weights of a multistep method from the first pictures that are drawn.

A picture teaches by its path: where a slow sampler took its noise, level by level. Along a candidate grid the student
runs from the same noise, and weights that lead it back to the path follow in closed form. What remains of a picture are
its normal equations, some ten kilobytes. Each later picture is drawn before it is learned from, so that its error is
honest. Candidates that learn nothing run beside them, and win where learning does not pay.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from ..config import LARGEST_NUMBER, PredictorConfig, same_levels
from ..driver import Resume, evaluate, trajectory
from ..predictor import check_numbers
from ..schedules import fine
from ..spectrum import BANDS, shows_frequencies
from ..types import Denoiser, Evaluation, Sample
from .baselines import solvers
from .candidates import Candidate, Grid, Span, best_of, best_of_kinds, capped_mean, moments_of, over_plain
from .closed_form import Walk, along, cost_on_paper
from .huber import squares
from .lessons import Learns, Lessons, taught
from .protocol import StateError
from .reading import of_count, of_errors, of_finite, of_kind, of_number, of_shape, of_text, reading_state
from .teacher import MOST_CALLS, TeacherPath, levels, own_errors, path_of, refined_calls, teacher

LEARNED_FIRST, PLAIN_FIRST = 16, 11  # candidates that run on the first picture, at most, in
MOST_FIRST = 480  # calls: fewer run where one takes many
LEARNED_LISTED = 4  # of candidates on the user's levels, which differ in where their first call asks
LEARNED_NEXT, PLAIN_NEXT = 5, 3  # those that run on each of the next pictures,
WALKING = 3  # of which so many run once more, with the weights that they learn
TEACHER_TIMES = 3  # the student's calls: a teacher of fewer is hardly better than its student
GOOD = 0.8  # of the best plain candidate's error:
GOOD_IN_A_ROW = 2  # so many pictures below it end the learning
MOST_PICTURES = 8
MOST_APART = 16  # calls, up to which weights of guidance and of bands are learned: what pictures leave grows with them
LEARNED = ("weights", "first", "guided", "spectral")  # numbers of a table that pictures teach, but for its first gains
# Of one picture the errors of intervals may happen to cancel at its end. What they cost on paper counts so much more,
# by exponents.
ON_PAPER = 0.75
PLAIN_WINS = 0.8  # of the learned candidate's squared error: the best of many plain ones looks better than it is


class Learner:
    """Learns the weights of one situation, picture by picture. Deterministic; it asks only what it is given.

    `config` is a multistep table's before any fit, for the model, the number of calls and the level that pictures start
    at. `levels` is a list that the user chose; without one the learner chooses the grid. `end` is the level where
    pictures end. `model_sigmas` are a discrete model's levels. The teacher takes `teacher_calls`, or TEACHER_TIMES the
    student's calls where that is more. `first_steps` is False where samples are not (batch, channels, ...): from pure
    noise a first step takes no call, with gains by channel and frequency.
    """

    def __init__(
        self,
        config: PredictorConfig,
        levels: Sequence[float] = (),
        *,
        end: float = 0.0,
        model_sigmas: Tensor | None = None,
        teacher_calls: int = 24,
        first_steps: bool = True,
    ) -> None:
        self.config = config
        self.levels = tuple(levels)
        self.end = self.levels[-1] if self.levels else end
        self.span = Span(self.config, self.levels, self.end, model_sigmas, first_steps)
        self.usual_calls = max(teacher_calls, TEACHER_TIMES * config.calls)  # of the first picture's teacher,
        self.teacher_calls = self.usual_calls  # and of the next one's
        self.candidates: list[Candidate] = []
        self.teacher_errors: list[float] = []  # squared, of every picture since it takes so many calls
        self.pictures = 0
        self.good_in_a_row = 0

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "Learner":
        """One of any situation, from its state. Raises StateError, a ValueError, if that is damaged."""
        with reading_state():
            config, calls = PredictorConfig.from_header(state["config"]), of_count(state["usual_calls"])
            levels = [of_number(level, 0.0, LARGEST_NUMBER) for level in of_kind(state["levels"], list)]
            made = cls(config, levels, end=of_number(state["end"], 0.0, config.sigmas[0]), teacher_calls=calls)
        made.load_state_dict(state)
        return made

    @property
    def teacher_levels(self) -> tuple[float, ...]:
        """The levels of the teacher, from where pictures start to where they end."""
        low, high, calls = self.config.sigma_min, self.config.sigmas[0], self.teacher_calls
        if self.end > 0:
            return tuple(fine(calls + 1, self.end, high, self.config.flow).tolist())
        return levels(min(low, high / 2), high, calls, self.config.flow)

    def taught(self, denoiser: Denoiser, x: Sample, *, half: bool = False) -> TeacherPath:
        """The slow sampler's path from noisy pictures x (batch, ...): teacher_calls calls of each."""
        return path_of(denoiser, x, teacher(self.teacher_levels), half=half)

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
        return self.ratio_of(self._best(plain=False)) if self.pictures else None  # a guess may be a plain one

    def ratio_of(self, one: Candidate) -> float | None:
        """The same of any candidate that learns."""
        return over_plain(one, self.candidates, len(one.held_out)) if one.held_out else None

    def calls_for(self, pictures: int) -> int:
        """The sample calls that learning from so many more pictures takes at most, beside the teacher's."""
        calls, known = self.config.calls, self._guided + sum(one.calls for one in self.candidates)
        if self.pictures:
            return (known + _walking(self.candidates) * calls) * pictures
        learned, plain = self._most_first
        return (known + learned * calls + plain * (calls - 1) + _walking(self.candidates) * calls) * pictures

    @property
    def _most_first(self) -> tuple[int, int]:
        """How many candidates run on the first picture: those that learn, and plain ones."""
        if self.levels:
            return (LEARNED_LISTED if self.config.from_noise else 1), len(solvers(self.config.flow))
        runs = MOST_FIRST // self.config.calls
        share = min(1.0, runs / (LEARNED_FIRST + PLAIN_FIRST))
        return max(round(LEARNED_FIRST * share), 1), max(round(PLAIN_FIRST * share), 1)

    def guess(self, near: "Learner", name: str, elements: int) -> None:
        """Begin with what was chosen in a situation near to this one; the first picture that is learned checks it.

        `elements` are those of one sample, which may have another size there.
        """
        chosen = near.chosen
        table = self.span.table(chosen.grid, shown=chosen.moments, learns=chosen.learns)
        table.load_state_dict(chosen.table.state_dict())
        lessons = None if chosen.lessons is None else chosen.lessons.of_size(elements)
        self.candidates = [Candidate(name, table, lessons, chosen.moments)]

    @torch.no_grad()
    def learn(
        self, denoiser: Denoiser, x: Sample, passed: TeacherPath, planned: Callable[[int], None] | None = None
    ) -> None:
        """Learn from pictures that start as x (batch, ...), whose teacher passed `passed`.

        `planned` hears beforehand how many calls that takes. Nothing changes if it is stopped inside.
        """
        before = self.candidates if self.pictures else [*self._proposed(passed), *self.candidates]
        if planned is not None:
            planned(self._guided + sum(one.calls for one in before) + _walking(before) * self.config.calls)
        level, good = passed.levels[0], False
        first = Evaluation(x, torch.tensor(level).to(x), x - level * passed.slopes[0].to(x))
        if self._guided:  # the path does not show what guidance added
            first = evaluate(denoiser, x, first.sigma)
        drawn = [(self._begun if one.new else _drawn)(one, denoiser, first, passed) for one in before]
        walking = best_of([one for one, lessons in drawn if lessons is not None], WALKING)
        if planned is not None:
            planned(self._guided + sum(one.calls for one in [*before, *walking]))
        if self.pictures:  # on the newest pictures, what was chosen before
            best = before.index(self._best(plain=False))
            good = over_plain(drawn[best][0], [one for one, _ in drawn], len(x)) <= GOOD
        after = [self._taught(one, lessons, denoiser, first, passed, one in walking) for one, lessons in drawn]
        self.good_in_a_row = self.good_in_a_row + 1 if good else 0
        self.pictures += len(x)
        learned, plain = ([one for one in after if one.plain is kind] for kind in (False, True))
        self.candidates = best_of_kinds(learned, LEARNED_NEXT) + best_of(plain, PLAIN_NEXT)
        self._judge_teacher(passed)

    def _judge_teacher(self, passed: TeacherPath) -> None:
        """A teacher that errs by half as much as its student, or more, takes more calls from the next picture on.

        The student's errors are those of pictures that it had not learned from, of which one alone says little.
        """
        self.teacher_errors += own_errors(passed, self.config.flow).tolist()
        theirs = self._best(plain=False).held_out
        count = min(len(theirs), len(self.teacher_errors))
        if count > 1:
            errors = capped_mean(self.teacher_errors[-count:]), capped_mean(theirs[-count:])
            if (calls := refined_calls(self.teacher_calls, *errors)) > self.teacher_calls:
                self.teacher_calls, self.teacher_errors = calls, []

    def _proposed(self, passed: TeacherPath) -> list[Candidate]:
        """The candidates that do best on paper: along the teacher's own path, at no model call."""
        cost: dict[Candidate, float] = {}
        learned: list[Candidate] = []
        plain: dict[str, list[Candidate]] = {}
        learns = self._learns(passed.end)
        for name, grid in self.span.grids(passed).items():
            shown = moments_of(grid, passed)
            solved, equations = along(self.span.table(grid, shown=shown), passed)
            begun = Lessons.none(self.span.table(grid, shown=shown, learns=learns))
            learned.append(Candidate(f"learned, {name}", solved, begun, shown))
            cost[learned[-1]] = cost_on_paper(solved, equations, passed)
            for solver_name, solver in {} if grid.first else solvers(self.config.flow).items():
                one = Candidate(f"{solver_name}, {name}", self.span.table(grid, solver))
                cost[one] = cost_on_paper(one.table, equations, passed)
                plain.setdefault(solver_name, []).append(one)
        # A path shows nothing of overshooting: of every solver the best grid runs.
        firsts = [min(listed, key=cost.__getitem__) for listed in plain.values()]
        others = [one for listed in plain.values() for one in listed if one not in firsts]
        most, most_plain = self._most_first
        plain_ones = [*firsts, *best_of(others, most_plain, cost.__getitem__)][:most_plain]
        return [*best_of_kinds(learned, most, cost.__getitem__), *plain_ones]

    def _learns(self, x: Sample) -> Learns:
        """What candidates learn from pictures like x (batch, ...)."""
        spectral = self.span.first_steps and self.config.calls <= MOST_APART and shows_frequencies(x.shape[1:])
        return Learns(self._guided, spectral)

    @property
    def _guided(self) -> bool:
        """Whether candidates learn weights of what guidance adds."""
        return self.config.guided and self.config.calls <= MOST_APART

    def _begun(
        self, candidate: Candidate, denoiser: Denoiser, first: Evaluation, passed: TeacherPath
    ) -> tuple[Candidate, None]:
        """A new candidate after the first pictures, which it cannot draw before it has learned, and no more lessons."""
        assert candidate.lessons is not None
        walk, learns = _walk(candidate, denoiser, first, passed), candidate.lessons.learns
        plain = self.span.table(candidate.grid, shown=candidate.moments, learns=learns)
        table, equations = taught(plain, candidate.lessons, walk)
        ends = squares(walk.x, passed.end.to(walk.x)).tolist()
        cost = cost_on_paper(table, equations, passed)
        lessons = candidate.lessons.and_of(walk.history, passed)
        seen = [end ** (1 - ON_PAPER) * cost**ON_PAPER for end in ends]
        return replace(candidate, table=table, lessons=lessons, seen=seen, ends=ends), None

    def _taught(
        self,
        one: Candidate,
        lessons: Lessons | None,
        denoiser: Denoiser,
        first: Evaluation,
        passed: TeacherPath,
        walking: bool,
    ) -> Candidate:
        """A candidate after it learned from pictures that it has drawn.

        The best walk along them with the weights that they learn. Of the others it is taken for granted that slopes
        stay as they were when weights change.
        """
        if one.lessons is None or lessons is None:
            return one
        more = moments_of(one.grid, passed)
        shown = more if more is None or one.moments is None else one.moments + more
        plain = self.span.table(one.grid, shown=shown, learns=lessons.learns)
        if walking:
            walk = _walk(one, denoiser, first, passed)
            table, _ = taught(plain, one.lessons, walk)
            return replace(one, table=table, lessons=one.lessons.and_of(walk.history, passed), moments=shown)
        table, _ = taught(plain, lessons)
        return replace(one, table=table, lessons=lessons, moments=shown)

    def state_dict(self) -> dict[str, Any]:
        """All that it knows; `files.save_state` writes it."""
        return {
            "config": asdict(self.config),
            "levels": list(self.levels),
            "end": self.end,
            "usual_calls": self.usual_calls,
            "teacher_calls": self.teacher_calls,
            "teacher_errors": list(self.teacher_errors),
            "pictures": self.pictures,
            "good_in_a_row": self.good_in_a_row,
            "candidates": [
                {
                    "name": one.name,
                    "sigmas": list(one.table.config.sigmas),
                    "first_sigma": one.table.config.first_sigma,
                    "moments": [] if one.moments is None else [one.moments],
                    "learned": {name: one.table.learned[name] for name in one.table.learned if name in LEARNED},
                    "seen": list(one.seen),
                    "held_out": list(one.held_out),
                    "ends": list(one.ends),
                    "lessons": [] if one.lessons is None else [one.lessons.products],
                    "sizes": [] if one.lessons is None else [one.lessons.sizes],
                    "learns": asdict(one.learns),
                }
                for one in self.candidates
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. Raises StateError, a ValueError, if it is of another situation, or damaged."""
        with reading_state():
            config = PredictorConfig.from_header(state["config"])
            found = (config, tuple(state["levels"]), state["end"], state["usual_calls"])
            if found != (self.config, self.levels, self.end, self.usual_calls):
                raise StateError("This state of learning was made in another situation.")
            pictures, good = of_count(state["pictures"]), of_count(state["good_in_a_row"], GOOD_IN_A_ROW)
            calls = of_count(state["teacher_calls"], max(self.usual_calls, MOST_CALLS))
            errors = of_errors(state["teacher_errors"])
            if calls < self.usual_calls:
                raise StateError(f"This state of learning is damaged: its teacher takes {calls} calls.")
            most = LEARNED_NEXT + PLAIN_NEXT if pictures else 1
            if len(of_kind(state["candidates"], list)) > most:
                raise StateError("This state of learning is damaged: it holds too many candidates.")
            candidates = [self._loaded(saved) for saved in state["candidates"]]
            kinds = {one.plain for one in candidates if _judged(one)}
            if pictures and not (kinds == {True, False} and all(map(_judged, candidates))):
                raise StateError("This state of learning is damaged: there is nothing that it could choose among.")
        self.candidates, self.pictures, self.good_in_a_row = candidates, pictures, good
        self.teacher_calls, self.teacher_errors = calls, errors

    def _loaded(self, saved: Mapping[str, Any]) -> Candidate:
        """A candidate of a state. Raises StateError if it is not of this situation; `reading_state` tells the rest."""
        sigmas = tuple(of_number(level, 0.0, LARGEST_NUMBER) for level in saved["sigmas"])
        ends = (sigmas[0], sigmas[-1]), (self.config.sigmas[0], self.end)
        if len(sigmas) != self.config.calls + 1 or not same_levels(*ends):
            raise StateError("This state of learning is damaged: it holds levels of another run.")
        shown = None if (kept := _one(saved["moments"])) is None else of_finite(kept, (2, kept.shape[1], BANDS))
        learns = Learns(*(of_kind(saved["learns"][name], bool) for name in ("guided", "spectral")))
        if learns.guided and not self._guided:
            raise StateError("This state of learning is damaged: it holds weights of guidance that nobody shows.")
        table = self.span.table(Grid(sigmas, of_kind(saved["first_sigma"], float)), shown=shown, learns=learns)
        for name, own in table.learned.items():
            if name in LEARNED:
                own.copy_(of_shape(saved["learned"][name], own.shape))
        check_numbers(table, table.learned)
        products, sizes = _one(saved["lessons"]), _one(saved["sizes"])
        lessons = None if products is None else Lessons.of(table, products, sizes)
        errors = [of_errors(saved[name]) for name in ("seen", "held_out", "ends")]
        return Candidate(of_text(saved["name"]), table, lessons, shown, *errors)


def _one(kept: Any) -> Any:
    """What is in a list of a state that holds one thing or none; None of none."""
    if len(of_kind(kept, list)) > 1:
        raise StateError("This state of learning is damaged: it holds one thing twice.")
    return kept[0] if kept else None


def _judged(one: Candidate) -> bool:
    """Whether a candidate's errors are known: of a plain one with pictures that it had not learned from."""
    return bool(one.held_out or (one.seen and one.ends and not one.plain))


def _walking(candidates: Sequence[Candidate]) -> int:
    """How many candidates run twice on the next picture."""
    return min(WALKING, sum(not (one.plain or one.new) for one in candidates))


def _drawn(
    candidate: Candidate, denoiser: Denoiser, first: Evaluation, passed: TeacherPath
) -> tuple[Candidate, Lessons | None]:
    """The candidate after pictures that it drew as it is, and its lessons with them; None of one that learns nothing.

    What it evaluated on the way does not outlive this function: on a GPU the runs of all candidates would be much.
    """
    begin = None if candidate.grid.first else Resume(0, first, ())
    steps = list(trajectory(denoiser, first.x, candidate.table.method(), resume=begin))
    errors = squares(steps[-1].x, passed.end.to(first.x)).tolist()
    lessons = candidate.lessons and candidate.lessons.and_of(tuple(step.start for step in steps), passed)
    return replace(candidate, held_out=candidate.held_out + errors), lessons


def _walk(candidate: Candidate, denoiser: Denoiser, first: Evaluation, passed: TeacherPath) -> Walk:
    """A candidate's walk along a path. Its first call is the teacher's, unless it asks lower."""
    return Walk(denoiser, first.x, passed, () if candidate.grid.first else (first,))
