"""Lists of noise levels, one per model call, read back as intervals."""

import contextlib
import itertools
from itertools import pairwise

import pytest
import torch
from problems import GRID, SIGMA_MIN, multistep_config

from amed_core.call_list import call_sigmas, run_of
from amed_core.config import PredictorConfig
from amed_core.samplers import TYPES, ModelFacts, student_config

LOW, HIGH = 0.002, 80.0
FACTS = ModelFacts(LOW, HIGH)
FLOW = ModelFacts(0.001, 1.0, torch.arange(1, 1001) / 1000, flow=True)  # without shift


def configs() -> list[PredictorConfig]:
    made = []
    for name, calls, published, model in itertools.product(TYPES, range(2, 11), (False, True), (FACTS, FLOW)):
        if not (published and model.flow):
            with contextlib.suppress(ValueError):  # a flow model cannot take all odd numbers
                made.append(student_config(name, calls, model, published=published))
    return made


def test_the_own_list_has_one_level_per_call_and_is_read_back_as_the_own_grid() -> None:
    for config in configs():
        own = call_sigmas(config, config.calls)
        run = run_of(own, config)
        assert len(own) == config.calls + 1
        assert run.own_grid
        assert run.sigmas == config.sigmas
        assert run.calls == config.calls
        assert run.analytic_first_step == config.analytic_first_step


def test_any_piece_of_any_list_costs_one_call_per_level() -> None:
    for config in configs():
        for calls in range(1, 14):
            levels = call_sigmas(config, calls)
            assert len(levels) == calls + 1
            assert levels[0] == config.sigmas[0]
            assert levels[-1] == config.sigmas[-1]
            for begin, end in itertools.combinations(range(calls + 1), 2):
                if calls == config.calls or (begin, end) != (0, calls):
                    assert run_of(levels[begin : end + 1], config).calls == end - begin


def test_a_cut_at_a_grid_point_keeps_the_intervals_of_the_whole() -> None:
    for config in configs():
        own = call_sigmas(config, config.calls)
        for point in config.sigmas[1:-1]:
            cut = own.index(point)
            first, second = run_of(own[: cut + 1], config), run_of(own[cut:], config)
            assert first.sigmas + second.sigmas[1:] == config.sigmas
            assert first.plain | {p + len(first.sigmas) - 1 for p in second.plain} == run_of(own, config).plain


def test_another_number_of_calls_is_an_error_that_names_the_right_one() -> None:
    config = student_config("amed", 5, FACTS)
    with pytest.raises(ValueError, match="Set steps to 5"):
        run_of(call_sigmas(config, 8), config)


def test_the_tail_of_a_longer_list_is_planned() -> None:
    """What denoise below 1 asks for."""
    config = student_config("amed", 5, FACTS)
    levels = call_sigmas(config, 12)[-6:]
    run = run_of(levels, config)
    assert run.sigmas == (levels[0], levels[2], levels[4], levels[5])
    assert run.plain == {2}, "only the last call is plain"
    assert not run.own_grid
    assert not run.analytic_first_step


def test_an_interval_longer_than_the_predictors_own_is_crossed_by_plain_calls() -> None:
    config = student_config("amed", 5, FACTS)
    levels = [HIGH, 60.0, 0.02, LOW, 0.0]
    run = run_of(levels, config)
    assert run.sigmas == tuple(levels)
    assert run.plain == {0, 1, 2, 3}
    assert run.calls == 4


def test_intervals_as_long_as_the_predictors_own_are_planned_wherever_they_lie() -> None:
    config = student_config("amed_dpm_2", 6, FACTS, schedule="logsnr", end="sigma_min")
    ratio = config.sigmas[0] / config.sigmas[1]
    for start in (HIGH, 17.0, 3.0):
        assert run_of([start, start / ratio**0.4, start / ratio], config).plain == frozenset()
        assert run_of([start, start / ratio**0.4, start / ratio**1.4], config).plain == {0, 1}


@pytest.mark.parametrize("name", [name for name, kind in TYPES.items() if kind.solver in ("ipndm", "dpmpp")])
def test_off_its_grid_a_multistep_student_is_its_base_solver(name: str) -> None:
    config = student_config(name, 5, FACTS)
    levels = call_sigmas(config, 10)[-6:]
    run = run_of(levels, config)
    assert run.sigmas == levels
    assert run.plain == frozenset(range(5))


@pytest.mark.parametrize(
    ("sigmas", "words"),
    [
        ([80.0], "at least 2"),
        ([80.0, 90.0, 0.0], "must fall"),
        ([80.0, 10.0, 10.0, 0.0], "must fall"),
        ([80.0, float("nan"), 0.0], "must fall"),
        ([10.0, 1.0, -0.5], "must fall"),
        ([100.0, 10.0, 0.0], "above 80"),
    ],
)
def test_lists_that_cannot_be_sampled_are_refused(sigmas: list[float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        run_of(sigmas, student_config("amed", 5, FACTS))


def test_a_list_of_levels_is_its_own_only_from_the_beginning() -> None:
    config = multistep_config(5, sigmas=GRID)
    assert config.calls == 5
    assert call_sigmas(config, 5) == GRID
    assert run_of(GRID, config).own_grid
    assert run_of(GRID[:4], config).own_grid
    for other in (GRID[2:], (80.0, 5.0, 0.5, 0.0)):
        found = run_of(other, config)
        assert not found.own_grid
        assert found.calls == len(other) - 1
    with pytest.raises(ValueError, match="Set steps to 5"):
        run_of(call_sigmas(config, 8), config)


@pytest.mark.parametrize("last", [0.5, SIGMA_MIN])
@pytest.mark.parametrize("calls", [1, 2, 3, 4, 7, 10, 25])
def test_any_number_of_calls_spans_its_grid(last: float, calls: int) -> None:
    levels = call_sigmas(multistep_config(5, sigmas=(*GRID[:-2], last, 0.0)), calls)
    assert len(levels) == calls + 1
    assert all(a > b for a, b in pairwise(levels))
    assert (levels[0], levels[-1]) == (GRID[0], 0.0)
    assert min(levels[:-1]) >= SIGMA_MIN * (1 - 1e-9)
