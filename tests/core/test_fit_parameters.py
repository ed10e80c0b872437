"""A table's numbers as one vector, and back."""

from functools import partial
from typing import Any

import pytest
import torch
from problems import (
    GRID,
    SWITCH,
    Counting,
    Guided,
    X,
    midpoint_config,
    mixture,
    multistep_config,
    noise,
    same,
    two_models,
)

from amed_core import PredictorConfig, build, trajectory
from amed_core.fit.end_to_end import resumed
from amed_core.fit.parameters import MidpointParameters, MultistepParameters, Parameters
from amed_core.fit.targets import Target
from amed_core.samplers import TYPES

MOVING = partial(MultistepParameters, grid=True)
CASES = [
    *((MidpointParameters, midpoint_config(name, calls), mixture) for name in TYPES for calls in (4, 5)),
    (MidpointParameters, midpoint_config(scale_time=0.0), mixture),
    (MultistepParameters, multistep_config(), mixture),
    (MultistepParameters, multistep_config(6), mixture),
    (MultistepParameters, multistep_config(guided=True), Guided(3.0)),
    (MOVING, multistep_config(), mixture),
    (MOVING, multistep_config(3, first_sigma=60.0, channels=1), mixture),
    (MultistepParameters, multistep_config(5, sigmas=GRID, switch_sigma=SWITCH), two_models),
]
every_kind = pytest.mark.parametrize(("make", "config", "denoiser"), CASES)


@every_kind
def test_a_table_has_the_numbers_it_was_made_from(make: Any, config: PredictorConfig, denoiser: Any) -> None:
    parameters: Parameters = make(config)
    table = build(config)
    here = parameters.of(table)
    assert same(parameters.table(table, here), table)
    other = here + parameters.differences(here) * noise(len(here)).abs().clamp(max=1)
    torch.testing.assert_close(parameters.of(parameters.table(table, other)), other, rtol=1e-6, atol=1e-6)
    assert same(parameters.table(table, here), table), "the table itself is left alone"


@every_kind
def test_differences_stay_inside_the_bounds(make: Any, config: PredictorConfig, denoiser: Any) -> None:
    parameters: Parameters = make(config)
    here = parameters.of(build(config))
    for numbers in (here, here.clamp(max=parameters.low + 1e-3), here.clamp(min=parameters.high - 1e-3)):
        changed = numbers + parameters.differences(numbers)
        assert bool(((parameters.low <= changed) & (changed <= parameters.high)).all())


@every_kind
def test_a_number_acts_from_where_it_is_said_to_and_on_so_many_calls(
    make: Any, config: PredictorConfig, denoiser: Any
) -> None:
    """Of what comes before, nothing changes, and from there on all is run again."""
    parameters: Parameters = make(config)
    table = build(config)
    here = parameters.of(table)
    steps = list(trajectory(denoiser, X, table.method()))
    for n, ((interval, where), calls) in enumerate(zip(parameters.acts(), parameters.calls_after(), strict=True)):
        changed = here.clone()
        changed[n] += parameters.differences(here)[n]
        varied = parameters.table(table, changed).method()
        whole = list(trajectory(denoiser, X, varied))
        assert all((a.x == b.x).all() for a, b in zip(steps[:interval], whole[:interval], strict=True))
        model = Counting(denoiser)
        target = Target(0, range(len(X)), X, model, X)
        resume = resumed(target, varied, steps, interval, where)
        (*_, last) = trajectory(model, X, varied, resume=resume)
        assert (last.x == whole[-1].x).all()
        assert model.calls == calls


def test_told_levels_are_moved_as_logarithms_and_the_first_one_down() -> None:
    """The model may know no level above its first."""
    config = multistep_config(3)
    parameters, table = MultistepParameters(config), build(config)
    numbers = parameters.of(table)
    told = [n for n, (_, where) in enumerate(parameters.acts()) if where == "start"]
    assert (numbers[told] == 0).all()
    numbers[told] = torch.tensor([-0.1, 0.2, 0.3], dtype=torch.float64)
    moved = dict(parameters.table(table, numbers).named_parameters())["scale_time"]
    torch.testing.assert_close(moved.log(), torch.tensor([-0.1, 0.2, 0.3]))
    assert parameters.differences(numbers)[told].sign().tolist() == [-1, 1, 1]


def test_levels_between_the_first_and_the_last_move_and_stay_in_order() -> None:
    """Even if all are moved as far towards each other as they may go; the first and the last one stay."""
    config = multistep_config(4)
    parameters, table = MOVING(config), build(config)
    here = parameters.of(table)
    torch.testing.assert_close(here[-3:].exp(), torch.tensor(config.sigmas[1:-1], dtype=torch.float64))
    for outer, inner in ((parameters.low, parameters.high), (parameters.high, parameters.low)):
        limit = torch.where(outer.isfinite(), outer, here)
        limit[-2] = inner[-2]
        sigmas = parameters.table(table, limit).config.sigmas
        assert sigmas == tuple(sorted(sigmas, reverse=True))
        assert len(set(sigmas)) == 5
        assert (sigmas[0], sigmas[-1]) == (config.sigmas[0], 0.0)
        moved = [a != b for a, b in zip(sigmas[1:-1], config.sigmas[1:-1], strict=True)]
        assert moved == [True, True, outer[-1] > here[-1]], "the last one is the model's smallest level"
