"""Sampling runs toward the targets of a fit, kept and resumed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

import torch
from torch import Tensor

from ..config import PredictorConfig
from ..driver import Resume, trajectory
from ..types import Evaluation, Method, Sample, Step
from .protocol import FitConfig
from .targets import STATE_BYTES, Target, Targets
from .teacher import Converged, Teacher
from .trajectories import HELD_OUT, Metered
from .workers import Workers

LEVELS_EACH = 3  # of a teacher for each call of its student, at least
# Parts of what a fit keeps: the teacher's paths, the runs of each of two tables that are compared, and those of tables
# that wait while other fits go on.
PATHS, RUNS, WAITING = Fraction(3, 8), Fraction(1, 4), Fraction(1, 8)
# Of paths that others need, too, those of fitted and of held-out trajectories, and as much again below a level.
FITTED_PATHS, JUDGED_PATHS = Fraction(3, 8), Fraction(1, 8)


@dataclass
class RunCache:
    """Runs kept on the CPU for their derivatives, up to `keep_bytes`; the others are run again."""

    keep_bytes: int
    steps: dict[int, list[Step]] = field(default_factory=dict)  # by the batch's number
    bytes: int = 0

    def put(self, number: int, steps: Sequence[Step]) -> None:
        """Keep a run, if there is room."""
        size = bytes_of(steps)
        if self.bytes + size <= self.keep_bytes:
            self.bytes += size
            self.steps[number] = moved_to(steps, "cpu")

    def get(self, number: int, device: torch.device) -> list[Step]:
        """A run that was kept; empty if it was not."""
        return moved_to(self.steps.get(number, []), device)

    def ended(self, ends: Mapping[int, Sample]) -> "RunCache":
        """The same runs with other ends, by the batch's number; beside these it takes no memory."""
        steps = {n: [*steps[:-1], replace(steps[-1], x=ends[n].cpu())] for n, steps in self.steps.items()}
        return RunCache(self.keep_bytes, steps, self.bytes)

    def within(self, keep_bytes: int) -> "RunCache":
        """Its first runs, as far as there is room."""
        if self.bytes <= keep_bytes:
            return self
        made = RunCache(keep_bytes)
        for number, steps in self.steps.items():
            made.put(number, steps)
        return made


@dataclass(frozen=True)
class Runs:
    """The trajectories of a fit, those it is fitted on and those held out, and how methods run on them."""

    config: PredictorConfig
    settings: FitConfig
    source: Metered
    fitted: Targets
    judged: Targets
    workers: Workers
    shared: bool = False  # another fit has the targets made, at its cost, and keeps them
    for_others: bool = False  # other fits need the teacher's paths, too
    waiting_bytes: int = 0  # of a table's runs, between the fit's events

    @classmethod
    def of(
        cls,
        config: PredictorConfig,
        settings: FitConfig,
        source: Metered,
        workers: Workers,
        teacher: Teacher | None = None,
        *,
        scales: int = 1,
        others: int = 0,
        below: bool = False,
    ) -> "Runs":
        """Those of a source, with a teacher's samples as targets: usually nearly the ODE's own solution.

        It is one of so many guidance scales, with which it shares a state. `others` are the fits that share its paths,
        if it is not alone; then those of all scales are kept. With `below` they are all kept that memory has room for.
        """
        slow, every = teacher or Converged.of(config, settings.teacher_calls), settings.trajectories + settings.held_out
        room = int(settings.keep_bytes * PATHS) // (scales if others else 1)

        def targets(rows: range, part: Fraction) -> Targets:
            own = STATE_BYTES * len(rows) // every // scales
            return Targets(source, rows, settings.batch_size, slow, workers, int(room * part), below, own)

        fitted = targets(range(settings.trajectories), FITTED_PATHS if below else Fraction(1))
        judged = targets(range(HELD_OUT, HELD_OUT + settings.held_out), JUDGED_PATHS)
        waiting = int(settings.keep_bytes * (WAITING if others else RUNS)) // max(others, 1)
        return cls(config, settings, source, fitted, judged, workers, False, others > 0, waiting)

    def for_calls(self, config: PredictorConfig, settings: FitConfig) -> "Runs":
        """The same trajectories and targets, for a student of another number of calls and settings of its own."""
        fitted, held_out = len(self.fitted.rows), len(self.judged.rows)
        own = replace(settings, trajectories=fitted, held_out=held_out, batch_size=self.fitted.batch_size)
        return replace(self, config=config, settings=own, shared=True)

    def below(self, config: PredictorConfig, settings: FitConfig) -> "Runs":
        """The first of these trajectories from where the teacher passes a student's first level, as `settings` say."""
        level, levels = config.sigmas[0], LEVELS_EACH * config.calls
        fitted = self.fitted.below(level, settings.trajectories, levels)
        judged = self.judged.below(level, settings.held_out, levels)
        made = Runs(config, settings, fitted.source, fitted, judged, self.workers, for_others=True)
        return replace(made.for_calls(config, settings), shared=False)

    @property
    def own(self) -> tuple[Targets, ...]:
        """The targets that no other fit has made."""
        return () if self.shared else (self.fitted, self.judged)

    def begun(self) -> None:
        """The fit has found its start: it needs the teacher's paths no more."""
        if not (self.shared or self.for_others):
            self.fitted.paths = {}

    def run(self, target: Target, method: Method, resume: Resume | None = None) -> list[Step]:
        """All steps of a method toward a target, or those from where it resumes."""
        return list(trajectory(target.denoiser, target.x, method, resume=resume))

    def fitted_distances(self, method: Method) -> tuple[Tensor, RunCache]:
        """How far every fitted sample ends from its target (rows,), and the runs that showed it."""
        cache = RunCache(int(self.settings.keep_bytes * RUNS))

        def draw(target: Target) -> Tensor:
            steps = self.run(target, method)
            cache.put(target.number, steps)
            return steps[-1].x

        return self.fitted.distances(draw), cache

    def judged_distances(self, method: Method, count: int | None = None) -> Tensor:
        """How far every held-out sample ends from its target (rows,)."""
        return self.judged.distances(lambda target: self.run(target, method)[-1].x, count)


def moved_to(steps: Sequence[Step], device: torch.device | str) -> list[Step]:
    """The same run on another device; evaluations that steps share stay shared."""
    known: dict[int, Evaluation] = {}  # by the identity of the originals, which `steps` keeps alive

    def moved(evaluation: Evaluation) -> Evaluation:
        if id(evaluation) not in known:
            known[id(evaluation)] = evaluation.to(device)
        return known[id(evaluation)]

    return [
        replace(
            step,
            x=step.x.to(device),
            start=moved(step.start),
            mid=None if step.mid is None else moved(step.mid),
            history=tuple(moved(e) for e in step.history),
        )
        for step in steps
    ]


def bytes_of(steps: Sequence[Step]) -> int:
    """The memory that a run takes, in bytes; tensors that steps share count once."""
    evaluations = [e for step in steps for e in (step.start, step.mid) if e is not None]
    held = [t for e in evaluations for t in (e.x, e.denoised, e.features, e.guidance) if t is not None]
    tensors = {id(t): t for t in [*held, *(step.x for step in steps)]}
    return sum(t.numel() * t.element_size() for t in tensors.values())
