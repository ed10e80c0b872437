"""Which predictor a config stands for, and what all of them offer."""

from dataclasses import replace

import pytest
import torch
from problems import FACTS, SCALES, X, midpoint_config, mixture, multistep_config, on, same

from amed_core import AMEDPredictor, MidpointTable, MultistepTable, NoMidpoint, PredictorConfig, build, sample
from amed_core.call_list import call_sigmas, run_of
from amed_core.features import look_at_bottleneck
from amed_core.predictor import stacked
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
