"""Which predictor a config stands for, and what all of them offer."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from problems import FACTS, SCALES, X, midpoint_config, mixture, multistep_config, on, same

from amed_core import AMEDPredictor, MidpointTable, MultistepTable, NoMidpoint, PredictorConfig, build, sample
from amed_core.call_list import call_sigmas, run_of
from amed_core.features import look_at_bottleneck
from amed_core.predictor import PredictorSet, asked_levels, stacked
from amed_core.samplers import student_config

CONFIGS = {
    AMEDPredictor: student_config("amed_ipndm", 5, FACTS),
    MidpointTable: midpoint_config("amed", 5),
    MultistepTable: multistep_config(5),
}
every_kind = pytest.mark.parametrize("kind", CONFIGS)


@every_kind
def test_a_config_stands_for_its_kind_of_predictor_which_tells_what_it_learned(kind: type) -> None:
    predictor = build(CONFIGS[kind])
    assert type(predictor) is kind
    assert predictor.config == CONFIGS[kind]
    assert len(predictor.text().splitlines()) > CONFIGS[kind].planned


@every_kind
def test_its_levels_are_those_that_a_model_is_told(kind: type) -> None:
    """One for every call, those of the grid among them, and the midpoints as they are where it sees nothing."""
    config = CONFIGS[kind]
    asked = asked_levels(build(config))
    assert len(asked) == config.calls
    assert all(a > b > 0 for a, b in pairwise(asked))
    grid = config.sigmas[1:-1] if config.analytic_first_step else config.sigmas[:-1]
    assert all(any(level == pytest.approx(one) for one in asked) for level in grid)


@every_kind
def test_on_its_own_list_of_levels_a_predictor_samples_as_on_its_grid(kind: type) -> None:
    config = CONFIGS[kind]
    predictor = build(config)
    run = run_of(call_sigmas(config, config.calls), config)
    expected = sample(mixture, X, predictor.method())
    assert (sample(mixture, X, predictor.method(run, guidance=3.0, look=look_at_bottleneck)) == expected).all()


@every_kind
def test_on_other_levels_it_makes_one_call_per_level(kind: type) -> None:
    config = CONFIGS[kind]
    levels = call_sigmas(config, 12)[-8:]
    method = build(config).method(run_of(levels, config))
    assert method.calls == 7
    assert sample(mixture, levels[0] / X.std() * X, method).isfinite().all()


@pytest.mark.parametrize("config", [midpoint_config(), multistep_config(4)], ids=["midpoints", "multistep"])
def test_a_stack_is_each_table_at_its_scale(config: PredictorConfig) -> None:
    tables = [build(config) for _ in SCALES]
    for number, table in enumerate(tables):
        for values in table.parameters():
            values.mul_(1 + 0.05 * number)
    several = stacked(replace(config, guidance=SCALES[0], guidances=SCALES), tables)
    for scale, table in zip(SCALES, tables, strict=True):
        one, other = (sample(mixture, X, predictor.method(guidance=scale)) for predictor in (several, table))
        torch.testing.assert_close(one, other)
    assert same(stacked(several.config, tables), several)


def test_a_multistep_table_off_its_grid_is_its_base_solver() -> None:
    config = CONFIGS[MultistepTable]
    levels = (80.0, 7.0, 0.9, 0.0)
    plain = sample(mixture, X, on(levels, config.build_solver(), NoMidpoint()))
    assert (sample(mixture, X, build(config).method(run_of(levels, config))) == plain).all()


# Sets


def tables(*configs: PredictorConfig) -> PredictorSet:
    return PredictorSet(tuple(MultistepTable(config) for config in configs))


def of_calls(calls: int, **changes: Any) -> PredictorConfig:
    return multistep_config(calls, **changes)


def of_image(calls: int, level: float, **changes: Any) -> PredictorConfig:
    return multistep_config(calls, sigmas=(*(level * 0.5**k for k in range(calls)), 0.0), **changes)


def test_a_set_finds_what_is_made_for_a_run() -> None:
    every = tables(of_calls(5), of_calls(3), of_image(3, 2.0), of_image(3, 1.0))
    assert every.calls == (3, 5)
    for one in every.predictors:
        grid = one.config.sigmas
        assert every.made_for(grid) is one
        assert every.starting_at(grid[0], one.config.calls) is one
        assert every.from_level(grid[0], one.config.calls) is one
    assert every.made_for((80.0, 1.0, 0.0)) is None
    assert every.sigmas(3) == every.predictors[1].config.sigmas
    assert every.sigmas(4)[0] == every.main.config.sigmas[0], "interpolated"
    assert len(every.sigmas(4)) == 5


@pytest.mark.parametrize(("start", "found"), [(2.2, 2.0), (1.7, 2.0), (1.45, None), (1.2, 1.0), (0.5, None)])
def test_an_image_may_start_near_a_level_that_was_learned(start: float, found: float | None) -> None:
    every = tables(of_calls(3), of_image(3, 2.0), of_image(3, 1.0))
    one = every.from_level(start, 3)
    if found is None:
        assert one is None
        return
    assert one is not None
    grid = one.config.sigmas
    assert grid[0] == start
    assert grid[-2:] == (found / 4, 0.0), "the lowest levels stay"
    assert all(a > b for a, b in pairwise(grid))
    assert every.starting_at(start, 4) is None, "of another number of calls"


def test_an_image_that_starts_below_a_grids_last_levels_has_no_predictor() -> None:
    every = tables(of_calls(2), multistep_config(2, sigmas=(1.0, 0.95, 0.0)))
    assert every.starting_at(0.9, 2) is every.predictors[1]
    assert every.from_level(0.9, 2) is None


def test_pure_noise_is_not_drawn_out_from() -> None:
    """What was learned there takes it that nothing is known of the picture."""
    every = tables(of_calls(3))
    assert every.from_level(0.9 * every.main.config.sigmas[0], 3) is None


def test_of_several_guidance_scales_the_nearest_is_taken() -> None:
    every = tables(of_calls(3, guidance=1.0), of_calls(3, guidance=4.0), of_calls(3, guidance=7.0))
    for guidance, number in ((1.0, 0), (2.4, 0), (2.6, 1), (6.0, 2), (20.0, 2), (None, 0)):
        assert every.starting_at(every.main.config.sigmas[0], 3, guidance) is every.predictors[number]


def test_merged_sets_have_each_use_once_and_the_newer_one_of_equals() -> None:
    ours, theirs = tables(of_calls(3), of_calls(5)), tables(of_calls(5), of_calls(4))
    every = ours.merged(theirs)
    assert every.calls == (3, 4, 5)
    assert every.main is ours.main
    assert every.predictors[1] is theirs.main


def test_what_does_not_go_together_is_no_set() -> None:
    with pytest.raises(ValueError, match="at least one"):
        PredictorSet(())
    with pytest.raises(ValueError, match="Only multistep"):
        PredictorSet((MultistepTable(of_calls(3)), build(midpoint_config("amed", 3))))
    with pytest.raises(ValueError, match="one model"):
        tables(of_calls(3), of_calls(3, sigma_max=90.0))
