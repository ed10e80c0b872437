"""What a predictor does, interval by interval, on noise that it was not fitted on."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .driver import FixedMidpoint, NoMidpoint, sample, trajectory
from .predictor import Look
from .schedules import logsnr
from .solvers import Dpm2
from .table import COLUMNS, AnyPredictor
from .types import Denoiser, Planner, Sample


@dataclass(frozen=True)
class Learned:
    """What a predictor does: one entry per interval."""

    name: str
    base: str
    levels: Sequence[float]  # the noise levels, one more than intervals
    errors: Sequence[float]  # RMSE to the truth at the end of every interval
    base_errors: Sequence[float]  # of the base solver, its midpoints at r = 0.5
    plans: Sequence[dict[str, Tensor]]  # r, scale_dir and scale_time (samples,), for planned intervals

    def text(self) -> str:
        """A table to read."""
        lines = [f"{'interval':18}{'error':>9}{'base':>9}{'r':>8}{'scale_dir':>11}{'scale_time':>12}"]
        for k, (start, end) in enumerate(pairwise(self.levels)):
            line = f"{f'{start:.4g} to {end:.4g}':18}{self.errors[k]:9.4f}{self.base_errors[k]:9.4f}"
            if k < len(self.plans):
                r, scale_dir, scale_time = (float(self.plans[k][name].mean()) for name in COLUMNS)
                line += f"{r:8.3f}{scale_dir:11.3f}{scale_time:12.3f}"
            lines.append(line + ("" if k < len(self.plans) else "   one plain call"))
        return "\n".join(lines)


@torch.no_grad()
def learned(
    name: str,
    base: str,
    predictor: AnyPredictor,
    denoiser: Denoiser,
    x: Sample,
    look: Look | None = None,
    guidance: float | None = None,
    teacher_calls: int = 40,
) -> Learned:
    """Run a predictor, its base solver and Heun's method in about `teacher_calls` calls from the same noise `x`.

    `x` is at the grid's first level.
    """
    config = predictor.config
    steps = max(1, teacher_calls // (2 * config.intervals))  # of Heun's method, per interval
    truth, here = [], x
    for start, end in pairwise(config.sigmas):
        fine = logsnr(steps + 1, max(end, config.sigma_min), start)
        here = sample(denoiser, here, fine, Dpm2(), FixedMidpoint(1.0))
        if end == 0:
            here = sample(denoiser, here, torch.tensor([float(fine[-1]), 0.0]), Dpm2(), NoMidpoint())
        truth.append(here)
    plain = frozenset(range(config.planned, config.intervals))
    halves: Planner = FixedMidpoint(0.5, config.sigma_min, plain)
    errors: list[list[float]] = []
    plans: list[dict[str, Tensor]] = []
    for planner in (halves, predictor.planner(look=look, guidance=guidance)):
        grid = torch.tensor(config.sigmas, dtype=torch.float64)
        plans, distances = [], []
        for step in trajectory(denoiser, x, grid, config.build_solver(), planner, first=config.first):
            distances.append(float((step.x - truth[step.index]).square().mean().sqrt()))
            if step.plan is not None:
                values = {column: torch.as_tensor(getattr(step.plan, column)).flatten() for column in COLUMNS}
                plans.append({column: v.float().cpu().expand(len(x)) for column, v in values.items()})
        errors.append(distances)
    return Learned(name, base, config.sigmas, errors[1], errors[0], plans)
