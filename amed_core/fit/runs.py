"""Sampling runs toward the targets of a fit, kept and resumed."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..config import PredictorConfig
from ..driver import Resume, trajectory
from ..types import Evaluation, Method, Step
from .protocol import FitConfig
from .targets import Target, Targets
from .teacher import Converged, Teacher
from .trajectories import HELD_OUT, Metered
from .workers import Workers

LEVELS_EACH = 3  # of a teacher for each call of its student, at least


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

    @classmethod
    def of(
        cls,
        config: PredictorConfig,
        settings: FitConfig,
        source: Metered,
        workers: Workers,
        teacher: Teacher | None = None,
        keep_paths: bool = False,
    ) -> "Runs":
        """Those of a source, with a teacher's samples as targets: usually nearly the ODE's own solution.

        With `keep_paths` its whole paths are kept, for `below`.
        """
        slow, kept = teacher or Converged.of(config, settings.teacher_calls), settings.keep_bytes if keep_paths else 0

        def targets(rows: range) -> Targets:
            return Targets(source, rows, settings.batch_size, slow, workers, kept)

        held_out = range(HELD_OUT, HELD_OUT + settings.held_out)
        return cls(config, settings, source, targets(range(settings.trajectories)), targets(held_out), workers)

    def for_calls(self, config: PredictorConfig, settings: FitConfig) -> "Runs":
        """The same trajectories and targets, for a student of another number of calls and settings of its own."""
        counts = {"trajectories": len(self.fitted.rows), "held_out": len(self.judged.rows)}
        counts["batch_size"] = self.fitted.batch_size
        return replace(self, config=config, settings=replace(settings, **counts), shared=True)

    def below(self, config: PredictorConfig, settings: FitConfig) -> "Runs":
        """The first of these trajectories from where the teacher passes a student's first level, as `settings` say."""
        level, kept, levels = config.sigmas[0], self.settings.keep_bytes, LEVELS_EACH * config.calls
        fitted = self.fitted.below(level, settings.trajectories, levels, kept)
        judged = self.judged.below(level, settings.held_out, levels, kept)
        made = Runs(config, settings, fitted.source, fitted, judged, self.workers)
        return replace(made.for_calls(config, settings), shared=False)

    def run(self, target: Target, method: Method, resume: Resume | None = None) -> list[Step]:
        """All steps of a method toward a target, or those from where it resumes."""
        return list(trajectory(target.denoiser, target.x, method, resume=resume))

    def fitted_distances(self, method: Method) -> tuple[Tensor, RunCache]:
        """How far every fitted sample ends from its target (rows,), and the runs that showed it."""
        cache = RunCache(self.settings.keep_bytes)

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
