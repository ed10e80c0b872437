"""Solvers that learn nothing, on the usual grids."""

import pytest
import torch
from problems import GRID, SIGMA_MAX, SIGMA_MIN, SWITCH, Mixture, X, mixture, on, table_on

from amed_core import Ipndm, NoMidpoint, sample
from amed_core.config import switch_of
from amed_core.fit.baselines import baseline, baselines, bench_methods, solvers
from amed_core.solvers import restarted


def test_every_baseline_ends_at_zero_and_has_a_call_per_level() -> None:
    for calls in (2, 3, 4, 7):
        found = baselines(calls, SIGMA_MIN, SIGMA_MAX)
        assert len({one.name for one in found}) == len(found)
        for one in found:
            assert len(one.levels) == calls + 1
            assert one.levels[-1] == 0
            assert len(one.weights) == calls
    assert any("dpm_2" in one.name for one in baselines(5, SIGMA_MIN, SIGMA_MAX))


def test_a_models_own_timesteps_are_a_grid_too() -> None:
    table = torch.linspace(0.001, 1.0, 1000, dtype=torch.float64)
    names = [one.name for one in baselines(4, 0.003, 1.0, flow=True, model_sigmas=table)]
    assert "dpmpp-2 discrete zero" in names


@pytest.mark.parametrize("name", solvers(flow=False))
@pytest.mark.parametrize("switch", [0.0, SWITCH])
def test_written_as_a_table_a_baseline_samples_as_its_solver(name: str, switch: float) -> None:
    solver = solvers(flow=False)[name]
    table = table_on(GRID, switch_sigma=switch)
    table.weights.copy_(torch.tensor(baseline(name, solver, GRID, switch_sigma=switch).weights))
    own = restarted(solver, switch_of(GRID, switch))
    expected = sample(mixture, X, on(GRID, own, NoMidpoint()))
    torch.testing.assert_close(sample(mixture, X, table.method()), expected, rtol=1e-5, atol=1e-5)


def test_after_a_first_step_without_a_call_its_weights_are_of_the_level_it_leads_to() -> None:
    found, plain = (baseline("", Ipndm(3), grid, *first) for grid, first in ((GRID, (20.0,)), ((20.0, *GRID[1:]), ())))
    assert (found.levels, found.first_sigma) == (GRID, 20.0)
    assert found.weights == plain.weights


@pytest.mark.parametrize("calls", [2, 3, 6])
def test_every_method_of_a_benchmark_makes_its_calls_and_has_a_name_of_its_own(calls: int) -> None:
    methods = list(bench_methods(Mixture(), calls))
    assert len({method.name for method in methods}) == len(methods)
    for method in methods:
        assert method.calls == calls, method.name
