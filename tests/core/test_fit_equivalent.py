"""In how many calls another sampler comes as near."""

import math

import pytest

from amed_core.fit.equivalent import MOST, calls_for, calls_on


@pytest.mark.parametrize("fewest", [5, 6, 9, 12, 31, 100])
def test_it_finds_the_fewest_calls_in_few_tries(fewest: int) -> None:
    tried: list[int] = []

    def error(calls: int) -> float:
        tried.append(calls)
        return 1 / calls**2

    assert calls_for(1 / fewest**2, error, 5) == fewest
    assert len(set(tried)) == len(tried) <= 12


def test_an_error_that_is_not_reached_has_no_number_of_calls() -> None:
    assert calls_for(0.5 / MOST, lambda calls: 1 / calls, 5) is None
    assert calls_for(2.0, lambda calls: 1 / calls, 5) == 5, "fewer are not asked for"


def test_between_two_rungs_of_a_ladder_calls_follow_a_power_law() -> None:
    ladder = [(12, 1 / 144), (3, 1 / 9), (5, 1 / 25)]
    assert calls_on(ladder, 1 / 36) == pytest.approx(6)
    assert calls_on(ladder, 1 / 9) == 3
    assert calls_on(ladder, 0.2) == 0, "fewer than its first rung"
    assert calls_on(ladder, 0.001) == math.inf
    assert calls_on([(3, 0.1), (5, math.inf), (8, 0.05)], 0.05) == pytest.approx(8), "whoever has 5 may leave 2"
    assert calls_on([(3, math.inf), (5, 0.1)], 0.2) == 5, "nothing is known between"
