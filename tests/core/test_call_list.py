"""Lists of noise levels, one per model call, read back as intervals."""

import itertools

import pytest
import torch

from amed_core.call_list import call_sigmas, read
from amed_core.config import PredictorConfig
from amed_core.samplers import DEFAULT, predictor_config
from amed_core.schedules import discrete

LOW, HIGH = 0.002, 80.0


def configs() -> list[PredictorConfig]:
    made = []
    for name, calls, published, analytic in itertools.product(DEFAULT, range(2, 11), (False, True), (False, True)):
        try:
            made.append(predictor_config(name, calls, LOW, HIGH, published=published, analytic=analytic))
        except ValueError:
            assert published, "only the published grids may need the analytic first step"
            assert not analytic
    return made


@pytest.mark.parametrize("name", DEFAULT)
def test_a_recipe_costs_exactly_the_calls_it_is_asked_for(name: str) -> None:
    for config, calls in ((predictor_config(name, calls, LOW, HIGH), calls) for calls in range(2, 11)):
        assert config.calls == calls


def test_published_odd_numbers_take_the_analytic_first_step_and_even_ones_do_not() -> None:
    for calls in range(2, 11):
        assert predictor_config("amed", calls, LOW, HIGH, published=True).analytic_first_step == (calls % 2 == 1)


@pytest.mark.parametrize(("calls", "levels"), [(5, (0, 2, 4, 5)), (3, (0, 2, 3)), (7, (0, 2, 4, 6, 7))])
def test_on_an_even_grid_every_call_spans_the_same_time(calls: int, levels: tuple[int, ...]) -> None:
    table = torch.arange(1, 1001) / 1000  # a flow model without shift
    config = predictor_config("amed", calls, 0.001, 1.0, schedule="discrete", analytic=False, table=table)
    expected = [float(discrete(calls + 1, 0.001, 1.0, table=table)[i]) for i in levels[:-1]]
    assert list(config.sigmas[:-1]) == pytest.approx(expected)


def test_the_own_list_has_one_level_per_call_and_is_read_back_as_the_own_grid() -> None:
    for config in configs():
        own = call_sigmas(config, config.calls)
        run = read(own, config)
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
                    assert read(levels[begin : end + 1], config).calls == end - begin


def test_a_cut_at_a_grid_point_keeps_the_intervals_of_the_whole() -> None:
    for config in configs():
        own = call_sigmas(config, config.calls)
        for point in config.sigmas[1:-1]:
            cut = own.index(point)
            first, second = read(own[: cut + 1], config), read(own[cut:], config)
            assert first.sigmas + second.sigmas[1:] == config.sigmas
            assert first.plain | {p + len(first.sigmas) - 1 for p in second.plain} == read(own, config).plain


def test_another_number_of_calls_is_an_error_that_names_the_right_one() -> None:
    config = predictor_config("amed", 5, LOW, HIGH)
    with pytest.raises(ValueError, match="Set steps to 5"):
        read(call_sigmas(config, 8), config)


def test_the_tail_of_a_longer_list_is_planned() -> None:
    """What denoise below 1 asks for."""
    config = predictor_config("amed", 5, LOW, HIGH)
    levels = call_sigmas(config, 12)[-6:]
    run = read(levels, config)
    assert run.sigmas == (levels[0], levels[2], levels[4], levels[5])
    assert run.plain == {2}, "only the last call is plain"
    assert not run.own_grid
    assert not run.analytic_first_step


def test_an_interval_longer_than_the_predictors_own_is_crossed_by_plain_calls() -> None:
    config = predictor_config("amed", 5, LOW, HIGH)
    levels = [HIGH, 60.0, 0.02, LOW, 0.0]
    run = read(levels, config)
    assert run.sigmas == tuple(levels)
    assert run.plain == {0, 1, 2, 3}
    assert run.calls == 4


def test_intervals_as_long_as_the_predictors_own_are_planned_wherever_they_lie() -> None:
    config = predictor_config("amed_dpm_2", 6, LOW, HIGH, schedule="logsnr", end="sigma_min")
    ratio = config.sigmas[0] / config.sigmas[1]
    for start in (HIGH, 17.0, 3.0):
        assert read([start, start / ratio**0.4, start / ratio], config).plain == frozenset()
        assert read([start, start / ratio**0.4, start / ratio**1.4], config).plain == {0, 1}


@pytest.mark.parametrize("name", [name for name, recipe in DEFAULT.items() if recipe.solver in ("ipndm", "dpmpp")])
def test_off_its_grid_a_multistep_student_is_its_base_solver(name: str) -> None:
    config = predictor_config(name, 5, LOW, HIGH)
    levels = call_sigmas(config, 10)[-6:]
    run = read(levels, config)
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
        read(sigmas, predictor_config("amed", 5, LOW, HIGH))
