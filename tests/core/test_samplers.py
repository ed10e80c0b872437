"""The sampler types: what their recipes give for any model and number of calls."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import pytest
import torch
from problems import FACTS, SHAPE, SIGMA_MAX, SIGMA_MIN, Mixture, mixture, noise, same

from amed_core import (
    FitConfig,
    PredictorConfig,
    build,
    fit_predictor,
    load_predictor,
    make_fit,
    sample,
    save_predictor,
    student_config,
)
from amed_core import solvers as every_solver
from amed_core.call_list import call_sigmas
from amed_core.fit.teacher import TEACHERS
from amed_core.fit.trajectories import gaussian
from amed_core.samplers import MULTISTEP_STUDENT, NAMES, TYPES, ModelFacts, SamplerType, sampler_name
from amed_core.schedules import discrete
from amed_core.types import History, Sample, Sigma, Stage, StepPlan

FLOW = ModelFacts(0.001, 1.0, torch.arange(1, 1001) / 1000, flow=True)
KINDS: Sequence[dict[str, Any]] = ({"published": True}, {}, {"kind": "table"})


@pytest.mark.parametrize("calls", range(2, 9))
@pytest.mark.parametrize("how", KINDS, ids=["published", "default", "table"])
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_costs_the_calls_it_is_asked_for_and_survives_its_file(
    name: str, how: dict[str, Any], calls: int
) -> None:
    config = student_config(name, calls, FACTS, **how)
    assert config.calls == calls
    assert config.sigmas[0] == pytest.approx(SIGMA_MAX)
    assert config.sigmas[-1] in (0.0, pytest.approx(SIGMA_MIN))
    assert len(call_sigmas(config, calls)) == calls + 1
    assert sampler_name(config) == name
    assert PredictorConfig.from_header(json.loads(json.dumps(asdict(config)))) == config
    method = build(config).method()
    assert method.calls == calls
    x = SIGMA_MAX * noise(2, *SHAPE)
    assert sample(mixture, x, method).isfinite().all()


@pytest.mark.parametrize("calls", range(2, 9))
@pytest.mark.parametrize("how", KINDS, ids=["published", "default", "table"])
@pytest.mark.parametrize("name", NAMES)
def test_for_a_flow_model_a_recipe_costs_its_calls_or_says_how_many_there_may_be(
    name: str, how: dict[str, Any], calls: int
) -> None:
    published = bool(how.get("published"))
    # Where every interval takes two calls, and where a plain last one takes one, not all numbers can be had.
    possible = [n for n in (calls, calls + 1) if can_be(name, n, how)]
    assert possible, "at least one of two neighbours can"
    if calls not in possible:
        with pytest.raises(ValueError, match=f"choose {calls + 1}"):
            student_config(name, calls, FLOW, **how)
        return
    config = student_config(name, calls, FLOW, **how)
    assert config.calls == calls
    assert config.flow
    assert not config.analytic_first_step or published


def can_be(name: str, calls: int, how: dict[str, Any]) -> bool:
    try:
        student_config(name, calls, FLOW, **how)
    except ValueError:
        return False
    return True


def test_published_odd_numbers_take_the_analytic_first_step_and_even_ones_do_not() -> None:
    for calls in range(2, 11):
        assert student_config("amed", calls, FACTS, published=True).analytic_first_step == (calls % 2 == 1)


@pytest.mark.parametrize(("calls", "levels"), [(5, (0, 2, 4, 5)), (3, (0, 2, 3)), (7, (0, 2, 4, 6, 7))])
def test_on_an_even_grid_every_call_spans_the_same_time(calls: int, levels: tuple[int, ...]) -> None:
    config = student_config("amed", calls, FLOW)
    expected = [float(discrete(calls + 1, 0.001, 1.0, table=FLOW.sigmas)[i]) for i in levels[:-1]]
    assert list(config.sigmas[:-1]) == pytest.approx(expected)


def test_settings_for_several_guidance_scales() -> None:
    config = student_config(MULTISTEP_STUDENT, 5, FACTS, guidance=2.0, guidances=(2.0, 4.0))
    assert (config.guidances, config.kind, config.intervals) == ((2.0, 4.0), "multistep", 5)


@pytest.mark.parametrize("calls", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_fewer_than_two_calls_and_unknown_names_are_refused(name: str, calls: int) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        student_config(name, calls, FACTS)
    with pytest.raises(ValueError, match=", ".join(NAMES)):
        student_config(name + "?", 5, FACTS)


@pytest.mark.parametrize("name", TYPES)
def test_a_type_names_what_there_is(name: str) -> None:
    assert TYPES[name].solver in every_solver.SOLVERS
    assert TYPES[name].teacher in TEACHERS


@dataclass(frozen=True)
class Halfway:
    """A new plugin solver, as a contributor would write one: Euler's method with the midpoint's slope in half of it."""

    memory: ClassVar[int] = 0
    multistep: ClassVar[bool] = False
    divides_by_r: ClassVar[bool] = False

    def to_mid(self, history: History, sigma: Sigma, stage: Stage) -> Sample:
        del stage
        return history[-1].x + (sigma - history[-1].sigma) * history[-1].slope

    def to_next(self, history: History, sigma: Sigma, plan: StepPlan | None, stage: Stage) -> Sample:
        if plan is None:
            return self.to_mid(history, sigma, stage)
        start, mid = history[-2:]
        return start.x + plan.scale_dir * (sigma - start.sigma) * (start.slope + mid.slope) / 2


def test_a_new_solver_and_one_row_are_all_that_a_new_sampler_type_needs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setitem(every_solver.SOLVERS, "halfway", (Halfway, {}))  # type: ignore[arg-type]
    row = SamplerType("halfway", TYPES["amed"].published, "heun", 1, "weights")
    monkeypatch.setitem(TYPES, "amed_halfway", row)  # type: ignore[arg-type]
    network = fit_predictor(Mixture(), "amed_halfway", 5, trajectories=64)
    assert len(network.losses) == 16
    config = student_config("amed_halfway", 5, FACTS, kind="table")
    settings = FitConfig(trajectories=12, held_out=8, batch_size=4, teacher_calls=20, iterations=4)
    table = make_fit(config, settings, gaussian(mixture, SHAPE, SIGMA_MAX))
    list(table.events())
    gain = table.summary().gain
    assert gain is not None
    assert gain > 0.2
    for fit in (network, table):
        save_predictor(fit.predictor, tmp_path / "p.safetensors")
        loaded = load_predictor(tmp_path / "p.safetensors")
        assert same(loaded, fit.predictor)
        assert sampler_name(loaded.config) == "amed_halfway"
