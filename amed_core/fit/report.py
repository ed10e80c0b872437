"""What a predictor does, interval by interval, on noise that it was not fitted on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

from ..driver import trajectory
from ..features import Look
from ..multistep import ToldLevels
from ..predictor import Predictor
from ..solvers import Multistep
from ..types import COLUMNS, Denoiser, Sample
from .teacher import Converged, Teacher

TEACHER_CALLS = 40  # of the teacher, where none is given


@dataclass(frozen=True)
class IntervalReport:
    """What a predictor does: one entry per interval."""

    name: str
    base: str
    levels: Sequence[float]  # the noise levels, one more than intervals
    errors: Sequence[float]  # RMSE to the truth at the end of every interval
    base_errors: Sequence[float]  # of the base solver, its midpoints at r = 0.5
    plans: Sequence[dict[str, Tensor]]  # r, scale_dir and scale_time (samples,), for planned intervals
    weights: Sequence[Sequence[float]] = ()  # of a multistep table, the oldest slope's first
    first: Sequence[float] = ()  # weight of its first denoised sample
    told: Sequence[float] = ()  # the noise level its model is told, relative to the true one
    guided: Sequence[Sequence[float]] = ()  # its weights of what guidance adds to those slopes
    first_sigma: float = 0.0  # where its first step leads to, without a model call
    parts: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # RMSE of each at the end; of the base, too

    def text(self) -> str:
        """A table to read."""
        columns = "".join(f"{name:>12}" for name in COLUMNS)
        if self.weights:
            columns = f"{'told':>8}   weights of the slopes, oldest first; of the first denoised sample"
            columns += "; of what guidance adds to the slopes" if self.guided else ""
        lines = [f"{'interval':18}{'error':>9}{'base':>9}{columns}"]
        if self.first_sigma:
            lines.insert(
                0, f"before its first model call a step without one: {self.levels[0]:.4g} to {self.first_sigma:.4g}"
            )
        for k, (start, end) in enumerate(pairwise(self.levels)):
            line = f"{f'{start:.4g} to {end:.4g}':18}{self.errors[k]:9.4f}{self.base_errors[k]:9.4f}"
            if k < len(self.plans):
                line += "".join(f"{float(self.plans[k][name].mean()):12.3f}" for name in COLUMNS)
            elif self.weights:
                line += f"{self.told[k]:8.3f}   " + " ".join(f"{w:.3f}" for w in self.weights[k])
                line += f"; {self.first[k]:.3f}"
                line += "; " + " ".join(f"{u:.3f}" for u in self.guided[k]) if self.guided else ""
            else:
                line += "   one plain call"
            lines.append(line)
        for name, (error, base) in self.parts.items():
            lines.append(f"{f'part {name}':36}{error:9.4f}{base:9.4f}, of the finished sample, each by itself")
        return "\n".join(lines)


@torch.no_grad()
def report(
    name: str,
    base_name: str,
    predictor: Predictor,
    denoiser: Denoiser,
    x: Sample,
    look: Look | None = None,
    guidance: float | None = None,
    teacher: Teacher | None = None,
    parts: Callable[[Sample], Mapping[str, Tensor]] = lambda _: {},
) -> IntervalReport:
    """Run a predictor, its base solver and a teacher, which is usually nearly the ODE itself, from the same noise.

    `x` (batch, ...) is at the grid's first level. `parts` takes finished samples apart, by name, for errors of their
    own.
    """
    config = predictor.config
    truth = (teacher or Converged.of(config, TEACHER_CALLS)).passed_at(denoiser, x, config.sigmas[1:])
    fitted = predictor.method(look=look, guidance=guidance)
    errors: list[list[float]] = []
    apart: list[dict[str, float]] = []
    ends = parts(truth[-1])
    plans: list[dict[str, Tensor]] = []
    for method in (config.base_method(), fitted):
        plans, distances = [], []
        for step in trajectory(denoiser, x, method):
            distances.append(float((step.x - truth[step.index]).square().mean().sqrt()))
            if step.plan is not None:
                values = {column: torch.as_tensor(getattr(step.plan, column)).flatten() for column in COLUMNS}
                plans.append({column: v.float().cpu().expand(len(x)) for column, v in values.items()})
        errors.append(distances)
        found = parts(step.x)
        apart.append({name: float((found[name] - end).square().mean().sqrt()) for name, end in ends.items()})
    both = {part: (apart[1][part], apart[0][part]) for part in ends}
    made = IntervalReport(name, base_name, config.sigmas, errors[1], errors[0], plans, parts=both)
    if isinstance(solver := fitted.solver, Multistep):
        made = replace(made, weights=solver.weights, first=solver.first, guided=solver.guided)
    if isinstance(fitted.planner, ToldLevels):
        made = replace(made, told=fitted.planner.scales, first_sigma=config.first_sigma)
    return made
