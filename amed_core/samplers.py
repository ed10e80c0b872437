"""The settings of every sampler type: as published, and as they measured best here."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from .config import PredictorConfig
from .multistep import multistep_config
from .schedules import USUAL_RHO, discrete, schedule

End = Literal["plain", "zero", "sigma_min"]


@dataclass(frozen=True)
class Recipe:
    """What to build for a sampler type, whatever the number of model calls.

    `end` is how the grid ends: "sigma_min" as published; "zero", its last midpoint then placed from
    sigma_min; or "plain", at 0 with one plain call whose answer is the sample.
    """

    solver: str
    schedule: str
    rho: float
    max_order: int = 3
    scale_dir: float = 0.01
    scale_time: float = 0.0
    end: End = "plain"


# The launch scripts of Zhou et al. (2024); where they have none, their closest.
PUBLISHED: Mapping[str, Recipe] = {
    "amed": Recipe("amed", "time_uniform", 1.0, end="sigma_min"),
    "amed_euler": Recipe("euler", "polynomial", 7.0, end="sigma_min"),
    "amed_dpm_2": Recipe("dpm_2", "polynomial", 7.0, end="sigma_min"),
    "amed_ipndm": Recipe("ipndm", "polynomial", 7.0, max_order=4, scale_time=0.2, end="sigma_min"),
    "amed_dpmpp_2m": Recipe("dpmpp", "logsnr", 1.0, max_order=2, end="sigma_min"),  # their table 5's best schedule
    "amed_dpmpp_3m": Recipe("dpmpp", "logsnr", 1.0, max_order=3, end="sigma_min"),
}
# A plain last call beats both other endings at equal calls (benchmarks/last_interval.py), and it leaves
# odd numbers of calls without the analytic first step, which not every model allows. With it, the
# grid that is even in time suits every student but DPM-Solver++.
DEFAULT: Mapping[str, Recipe] = {
    name: replace(recipe, end="plain")
    if recipe.solver == "dpmpp"
    else replace(recipe, end="plain", schedule="time_uniform", rho=1.0)
    for name, recipe in PUBLISHED.items()
}
# To 0 they step by the newest slope alone, so their last midpoint is as good as a plain call.
MULTISTEP = ("ipndm", "dpmpp")
MULTISTEP_STUDENT = "amed_multistep"


def multistep_student(
    calls: int, sigma_min: float, sigma_max: float, *, flow: bool = False, **settings: Any
) -> PredictorConfig:
    """The settings of a multistep table before its fit, which finds its grid. `settings` are PredictorConfig's.

    Raises ValueError for fewer than 2 calls.
    """
    if calls < 2:
        raise ValueError(f"{calls} model calls cannot be planned here: at least 2 are needed.")
    grid = (*schedule("polynomial")(calls, sigma_min, sigma_max, 7.0).tolist(), 0.0)
    plain = multistep_config(PredictorConfig("ipndm", grid, sigma_min, sigma_max, flow=flow), grid)
    return replace(plain, **settings)


def predictor_config(
    name: str,
    calls: int,
    sigma_min: float,
    sigma_max: float,
    *,
    published: bool = False,
    analytic: bool = True,
    table: Tensor | None = None,
    **overrides: Any,
) -> PredictorConfig:
    """The settings of student `name` for `calls` model calls between two noise levels.

    As published, odd numbers of calls take the analytic first step and even ones do not. With a
    plain last call it is the other way round; where `analytic` is False, and for multistep students,
    even numbers end at 0 without either. `table` is a discrete model's sigmas, for the discrete
    schedule. `overrides` are fields of Recipe and PredictorConfig; a schedule without a rho gets its
    usual one. Raises ValueError for an unknown name, listing the valid ones, for fewer
    than 2 calls, and for a number of calls that would need the analytic first step against `analytic`.
    """
    recipes = PUBLISHED if published else DEFAULT
    if name not in recipes:
        raise ValueError(f"There is no student {name!r}. Choose one of: {', '.join(recipes)}.")
    recipe = recipes[name]
    spacing = overrides.pop("schedule", recipe.schedule)
    rho = overrides.pop("rho", recipe.rho if spacing == recipe.schedule else USUAL_RHO.get(spacing, 1.0))
    end: End = overrides.pop("end", recipe.end)
    if end == "plain" and calls % 2 == 0 and (not analytic or recipe.solver in MULTISTEP):
        end = "zero"
    plain = end == "plain"
    first = (calls + plain) % 2 == 1
    if calls < 2 or (first and not analytic):
        raise ValueError(
            f"{calls} model calls cannot be planned here"
            + (": at least 2 are needed." if calls < 2 else f" without the analytic first step: choose {calls + 1}.")
        )
    intervals = (calls + plain + first) // 2
    # On grids that are even in time a plain last interval is half as long as one that takes two calls.
    even = plain and spacing in ("time_uniform", "discrete")
    points = 2 * intervals if even else intervals + 1
    if spacing == "discrete":
        grid = discrete(points, sigma_min, sigma_max, rho, table).tolist()
    else:
        grid = schedule(spacing)(points, sigma_min, sigma_max, rho).tolist()
    if even:
        grid = [*grid[:-1:2], grid[-1]]
    if end != "sigma_min":
        grid[-1] = 0.0
    settings: dict[str, Any] = {
        "max_order": recipe.max_order,
        "scale_dir": recipe.scale_dir,
        "scale_time": recipe.scale_time,
        **overrides,
    }
    return PredictorConfig(
        solver=recipe.solver,
        sigmas=tuple(grid),
        sigma_min=sigma_min,
        sigma_max=sigma_max,
        schedule=spacing,
        rho=rho,
        analytic_first_step=first,
        plain_last=plain,
        **settings,
    )


# The teacher of the student's own family is the best one (Zhou et al. 2024, table 4); its inner points as published.
RECIPES = {
    "amed": ("heun", 1),
    "euler": ("euler", 2),
    "dpm_2": ("dpm_2", 1),
    "ipndm": ("ipndm", 2),
    "dpmpp": ("dpmpp", 2),
}
# Of a student, by its solver: what measured best (benchmarks/grids.py).
RULE_OF = {"amed": "midpoint", "dpm_2": "midpoint", "euler": "midpoint"}
RULE_OF |= {"ipndm": "ipndm", "dpmpp": "euler"}
