"""Weights of a multistep method in closed form, interval by interval, from a teacher's path."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .driver import evaluate
from .goals import Goal
from .multistep import MultistepTable
from .parallel import ALONE, Workers
from .paths import Path
from .solvers import Multistep
from .types import History, Sample, Stage

RIDGE = 1e-5  # how strongly weights are held at those they start from, relative to what their slopes explain


@dataclass
class Run:
    """A batch on its way."""

    goal: Goal
    path: Path
    x: Sample
    history: History = ()


@torch.no_grad()
def least_squares(
    table: MultistepTable, batches: Sequence[tuple[Goal, Path]], workers: Workers = ALONE, ridge: float = RIDGE
) -> tuple[MultistepTable, list[Sample]]:
    """The table with the weights that lead nearest to the teacher at every level, from where they led before.

    Minimises |x + (sigma_next - sigma) (sum_j w_j slope_j + v denoised_0) - teacher(sigma_next)|^2 + ridge |w - w_0|^2,
    with w_0 the weights of `table`, which is of one guidance scale. Also returns where the batches end then: it takes
    one run.
    """
    levels = table.config.sigmas
    made = MultistepTable(table.config)
    made.scale_time.copy_(table.scale_time)
    planner, runs = table.planner(), [Run(goal, path, goal.x) for goal, path in batches]
    for k in range(len(levels) - 1):
        normal, right = torch.zeros(k + 2, k + 2, dtype=torch.float64), torch.zeros(k + 2, dtype=torch.float64)
        for run in runs:
            sigma = torch.tensor(levels[k]).to(run.x)
            run.history = (*run.history, evaluate(run.goal.denoiser, run.x, sigma, planner.told(k, sigma)))
            vectors = [*(e.slope for e in run.history), run.history[0].denoised]
            slopes = torch.stack(vectors).flatten(1).double()
            moved = (run.path.at(levels[k + 1])[0].to(run.x) - run.x).flatten().double() / (levels[k + 1] - levels[k])
            normal += (slopes @ slopes.T).cpu()
            right += (slopes @ moved).cpu()
        normal, right = workers.sum(normal), workers.sum(right)
        start = torch.cat([table.weights[k, : k + 1], table.first[k : k + 1]]).double().cpu()
        held = ridge * normal.diagonal().mean() * torch.eye(k + 2, dtype=torch.float64)
        row = torch.linalg.solve(normal + held, right + held @ start)
        made.weights[k, : k + 1], made.first[k] = row[:-1].to(made.weights), row[-1]
        *weights, first = row.tolist()
        solver = Multistep(((),) * k + (tuple(weights),), (0.0,) * k + (first,))
        for run in runs:
            run.x = solver.to_next(run.history, torch.tensor(levels[k + 1]).to(run.x), None, Stage(k + 1, k + 1))
    return made, [run.x for run in runs]
