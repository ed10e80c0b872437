"""The sampler types: one row for each, with its settings as published and as they measured best here.

A new plugin solver is a class in `solvers.py` and a row here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from .config import PredictorConfig
from .multistep import multistep_config
from .schedules import USUAL_RHO, on_levels, schedule
from .solvers import solver

End = Literal["plain", "zero", "sigma_min"]
Kind = Literal["network", "table"]
TABLE_WIDTH = 0.5  # half-width of a table's ranges around 1: wider than the paper's


@dataclass(frozen=True)
class Recipe:
    """The settings of a sampler type, whatever the number of model calls.

    `end` is how the grid ends: "sigma_min" as published; "zero", its last midpoint then placed from
    sigma_min; or "plain", at 0 with one plain call whose answer is the sample.
    """

    schedule: str
    rho: float = 1.0
    scale_dir: float = 0.01
    scale_time: float = 0.0
    end: End = "sigma_min"


@dataclass(frozen=True)
class SamplerType:
    """A solver that takes learned midpoints, and how its predictors are made."""

    solver: str  # a name in `solvers.SOLVERS`
    published: Recipe  # the launch scripts of Zhou et al. (2024); where they have none, their closest
    teacher: str  # a name in `fit.teacher.TEACHERS`: of the student's own family, the best one (their table 4)
    teacher_points: int  # that it adds inside every interval, as published
    grid_rule: str  # of `fit.grid_search.RULES`: for which its grid is searched
    max_order: int = 3

    @property
    def default(self) -> Recipe:
        """The recipe that measured best.

        A plain last call beats both other endings at equal calls (benchmarks/last_interval.py), and leaves odd numbers
        of calls without the analytic first step, which not every model allows. With it, the grid that is even in time
        suits every student but DPM-Solver++.
        """
        if self.solver == "dpmpp":
            return replace(self.published, end="plain")
        return replace(self.published, end="plain", schedule="time_uniform", rho=1.0)


LOGSNR = Recipe("logsnr")  # of their table 5, the best schedule of DPM-Solver++
TYPES: Mapping[str, SamplerType] = {
    "amed": SamplerType("amed", Recipe("time_uniform"), "heun", 1, "ipndm"),
    "amed_euler": SamplerType("euler", Recipe("polynomial", 7.0), "euler", 2, "euler"),
    "amed_dpm_2": SamplerType("dpm_2", Recipe("polynomial", 7.0), "dpm_2", 1, "weights"),
    "amed_ipndm": SamplerType("ipndm", Recipe("polynomial", 7.0, scale_time=0.2), "ipndm", 2, "ipndm", max_order=4),
    "amed_dpmpp_2m": SamplerType("dpmpp", LOGSNR, "dpmpp", 2, "euler", max_order=2),
    "amed_dpmpp_3m": SamplerType("dpmpp", LOGSNR, "dpmpp", 2, "euler", max_order=3),
}
MULTISTEP_STUDENT = "amed_multistep"  # the default: it learns all weights, and has no midpoints
NAMES = (*TYPES, MULTISTEP_STUDENT)


def sampler_name(config: PredictorConfig) -> str:
    """The sampler type that a predictor was made for."""
    if config.kind == "multistep":
        return MULTISTEP_STUDENT
    same = [name for name, kind in TYPES.items() if kind.solver == config.solver]
    return next((name for name in same if TYPES[name].max_order == config.max_order), same[0])


@dataclass(frozen=True)
class ModelFacts:
    """What recipes must know of a model."""

    sigma_min: float
    sigma_max: float
    sigmas: Tensor | None = None  # of a discrete model: its levels, rising
    flow: bool = False  # its x is (1 - sigma) x0 + sigma noise
    bottleneck: bool = False  # it shows its bottleneck
    guided: bool = False  # it shows what guidance adds
    fingerprint: Mapping[str, str | int | float] = field(default_factory=dict)


def student_config(
    name: str, calls: int, facts: ModelFacts, *, published: bool = False, kind: Kind = "network", **overrides: Any
) -> PredictorConfig:
    """The settings of sampler type `name` for a model at `calls` model calls.

    `overrides` are fields of Recipe and PredictorConfig; a schedule without a rho gets its usual one. A multistep
    table finds its grid while it is fitted. As published, odd numbers of calls take the analytic first step and even
    ones do not. With a plain last call it is the other way round; for flow models, and for multistep solvers, even
    numbers end at 0 without either. Raises ValueError for an unknown name, listing the valid ones, for fewer than 2
    calls, and for a number of calls that would need an analytic first step of a flow model.
    """
    if calls < 2:
        raise ValueError(f"{calls} model calls cannot be planned here: at least 2 are needed.")
    if name == MULTISTEP_STUDENT:
        grid = (*schedule("polynomial")(calls, facts.sigma_min, facts.sigma_max, 7.0).tolist(), 0.0)
        base = PredictorConfig("ipndm", grid, facts.sigma_min, facts.sigma_max, flow=facts.flow)
        about: dict[str, Any] = {"guided": facts.guided, "model": dict(facts.fingerprint)}
        return replace(multistep_config(base, grid), **about | overrides)
    if name not in TYPES:
        raise ValueError(f"There is no sampler type {name!r}. Choose one of: {', '.join(NAMES)}.")
    sampler = TYPES[name]
    recipe = sampler.published if published else sampler.default
    # The other grids are for noise levels that reach far beyond 1; this one follows a flow model's shift.
    usual = "discrete" if facts.flow and facts.sigmas is not None else recipe.schedule
    spacing = overrides.pop("schedule", usual)
    rho = overrides.pop("rho", recipe.rho if spacing == recipe.schedule else USUAL_RHO.get(spacing, 1.0))
    wide = {"scale_dir": TABLE_WIDTH, "scale_time": TABLE_WIDTH, "features": "none"} if kind == "table" else {}
    settings: dict[str, Any] = {
        "max_order": sampler.max_order,
        "scale_dir": recipe.scale_dir,
        "scale_time": recipe.scale_time,
        "features": "bottleneck" if facts.bottleneck else "latent",
        "model": dict(facts.fingerprint),
        **wide,
        **overrides,
    }
    end: End = settings.pop("end", recipe.end)
    analytic = published or not facts.flow
    several = solver(sampler.solver, {"max_order": sampler.max_order}).multistep
    if end == "plain" and calls % 2 == 0 and (several or not analytic):
        end = "zero"  # where a multistep solver steps by the newest slope alone: as good as a plain call
    plain = end == "plain"
    first = (calls + plain) % 2 == 1
    if first and not analytic:
        raise ValueError(
            f"{calls} model calls cannot be planned here without the analytic first step: choose {calls + 1}."
        )
    return PredictorConfig(
        solver=sampler.solver,
        sigmas=_grid((calls + plain + first) // 2, end, spacing, rho, facts),
        sigma_min=facts.sigma_min,
        sigma_max=facts.sigma_max,
        schedule=spacing,
        rho=rho,
        analytic_first_step=first,
        plain_last=plain,
        flow=facts.flow,
        kind=kind,
        **settings,
    )


def _grid(intervals: int, end: End, spacing: str, rho: float, facts: ModelFacts) -> tuple[float, ...]:
    """So many intervals of a schedule; where it is even in time, a plain last one is half as long as the others."""
    even = end == "plain" and spacing in ("time_uniform", "discrete")
    points = 2 * intervals if even else intervals + 1
    grid = on_levels(schedule(spacing), facts.sigmas)(points, facts.sigma_min, facts.sigma_max, rho).tolist()
    if even:
        grid = [*grid[:-1:2], grid[-1]]
    return (*grid[:-1], grid[-1] if end == "sigma_min" else 0.0)
