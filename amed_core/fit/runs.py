"""Sampling runs of multistep tables toward the goals of a fit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..config import PredictorConfig
from ..driver import Resume
from ..multistep import MultistepTable
from ..types import Evaluation, Sample, Step
from .protocol import FitConfig
from .targets import Goal, Goals, ends
from .trajectories import Metered
from .workers import Workers


@dataclass(frozen=True)
class TableRuns:
    """The trajectories of a fit, those it is fitted on and those held out, and how tables run on them.

    There is a group of goals for every guidance scale of `settings`.
    """

    settings: PredictorConfig
    config: FitConfig
    metered: list[Metered]  # the sources of every group
    fitted: Goals
    judged: Goals
    workers: Workers

    def guidance(self, goal: Goal) -> float | None:
        """The guidance scale of a goal, if a table has several."""
        return self.settings.guidances[goal.group] if self.settings.guidances else None

    def run(self, goal: Goal, table: MultistepTable, resume: Resume | None = None) -> list[Step]:
        """All steps of a table toward a goal, or those from where it resumes."""
        grid = torch.tensor(table.config.sigmas, dtype=torch.float64)
        guidance = self.guidance(goal)
        return ends(goal, grid, table.solver(guidance=guidance), table.planner(guidance=guidance), None, resume)

    def ends_of(self, table: MultistepTable) -> Callable[[Goal], Sample]:
        """Where a table ends, for the distances of goals."""
        return lambda goal: self.run(goal, table)[-1].x

    def distances(self, table: MultistepTable, runs: dict[int, list[Step]]) -> Tensor:
        """How far every sample ends from its goal; `runs` keeps the runs that showed it, as many as memory allows."""
        kept = 0

        def draw(goal: Goal) -> Sample:
            nonlocal kept
            steps = self.run(goal, table)
            kept += 2 * len(steps) * goal.x.numel() * goal.x.element_size()
            if kept <= self.config.keep_bytes:
                runs[goal.number] = moved_to(steps, "cpu")
            return steps[-1].x

        return self.fitted.distances(draw)

    def few(self, goal: Goal, rows: range) -> Goal:
        """The first trajectories of a batch."""
        x, denoiser = self.metered[goal.group](rows)
        return replace(goal, x=x, denoiser=denoiser, target=goal.target[: len(rows)])


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
