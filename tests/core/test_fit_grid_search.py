"""Grids searched on the model itself."""

import itertools
import json
from dataclasses import asdict
from typing import Any

import pytest
import torch
from problems import FACTS, SIGMA_MAX, SIGMA_MIN, X, mixture, noise

from amed_core import PredictorConfig
from amed_core.call_list import call_sigmas
from amed_core.fit.grid_search import RULES, first_levels, left_at_end, search, searched
from amed_core.fit.teacher import TeacherPath, levels, path, products_of
from amed_core.samplers import TYPES, student_config


def passed() -> TeacherPath:
    return path(mixture, X, levels(SIGMA_MIN, SIGMA_MAX, 9, flow=False))


def cost_of(found: TeacherPath, grid: tuple[int, ...], rule: str) -> float:
    """What the points `grid` of a path cost, from the samples and slopes themselves."""
    variance, total = found.end.square().mean(), 0.0
    for n, (i, j) in enumerate(itertools.pairwise(grid)):
        moved, step = found.x[j] - found.x[i], found.levels[j] - found.levels[i]
        last = j == len(found.levels) - 1
        if rule == "euler" or n == 0 or (rule == "ipndm" and last):
            error = (moved - step * found.slopes[i]).square().sum()
        elif rule == "ipndm":
            error = (moved - step * (1.5 * found.slopes[i] - 0.5 * found.slopes[grid[n - 1]])).square().sum()
        else:
            slopes = torch.stack([found.slopes[i], found.slopes[grid[n - 1]]]).flatten(1)
            error = (moved.flatten() - torch.linalg.lstsq(slopes.T, moved.flatten()).solution @ slopes).square().sum()
        total += float(error * variance / (variance + found.levels[j] ** 2))
    return total


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("intervals", [2, 3, 4])
def test_the_searched_grid_is_the_cheapest_of_all(rule: Any, intervals: int) -> None:
    found = passed()
    last = len(found.levels) - 1
    every = [(0, *inner, last) for inner in itertools.combinations(range(1, last), intervals - 1)]
    cheapest = min(every, key=lambda grid: cost_of(found, grid, rule))
    grid = searched(products_of(found, finer=1), intervals, rule)
    assert grid == tuple(found.levels[n] for n in cheapest)


def test_more_intervals_than_levels_and_unknown_rules_are_refused() -> None:
    products = products_of(passed(), finer=1)
    with pytest.raises(ValueError, match="Raise teacher_calls"):
        searched(products, 10, "euler")
    with pytest.raises(ValueError, match="euler, ipndm, weights"):
        searched(products, 2, "heun")


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("calls", [3, 4, 5, 6, 7])
def test_students_with_two_calls_per_interval_have_searched_grids_too(name: str, calls: int) -> None:
    config = student_config(name, calls, FACTS)
    found = search(mixture, X, config)
    assert found.schedule == "searched"
    assert (found.calls, found.intervals, found.plain_last) == (calls, config.intervals, config.plain_last)
    assert found.sigmas[0] == pytest.approx(SIGMA_MAX)
    assert found.sigmas[-1] == 0.0
    assert len(call_sigmas(found, calls)) == calls + 1
    assert PredictorConfig.from_header(json.loads(json.dumps(asdict(found)))) == found


def test_published_grids_are_not_searched() -> None:
    with pytest.raises(ValueError, match="ends at 0"):
        search(mixture, X, student_config("amed", 5, FACTS, published=True))


def test_the_rule_of_every_sampler_type_is_one_that_there_is() -> None:
    assert {kind.grid_rule for kind in TYPES.values()} <= set(RULES)


def test_of_an_error_remains_what_a_gaussians_ode_leaves_of_it() -> None:
    """For Gaussian data of variance v an error shrinks by sqrt(v / (v + sigma^2)) on its way to 0."""
    products = products_of(passed())
    variance = float(passed().end.square().mean())
    found, sigma = left_at_end(products, flow=False), torch.tensor(products.levels, dtype=torch.float64)
    torch.testing.assert_close(found, variance / (variance + sigma**2), rtol=1e-6, atol=0)
    assert float(found[-1]) == 1


def test_first_levels_are_those_nearest_to_a_ratio_of_signal_to_noise() -> None:
    products = products_of(path(mixture, SIGMA_MAX * noise(32, 1, 4, 4), levels(SIGMA_MIN, SIGMA_MAX, 24, flow=False)))
    spread = products.variance**0.5
    found = first_levels(products.levels, products.variance, (0.03, 0.1, 0.1))
    assert len(found) == 2
    for level, ratio in zip(found, (0.03, 0.1), strict=True):
        assert min(products.levels, key=lambda one, r=ratio: abs(one - spread / r)) == level  # type: ignore[misc]
    assert first_levels(products.levels, products.variance, (1e-6,)) == [], "none lies above the first level"
