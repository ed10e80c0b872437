"""What every fit promises: it can be stopped at any model call, goes on as if it had not been, and counts truly."""

import copy
import json
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import CASES, equal, every_fit, finished
from problems import SHAPE, SIGMA_MAX, Counting, Guided, mixture, noise, same
from torch import Tensor

from amed_core import Fit, FitSummary, sample
from amed_core.files import load_state, save_state
from amed_core.types import Denoiser

STOPS = 3  # of a fit that is really stopped; what its state would be is looked at in every call


def counted(state: Any) -> Any:
    """A state without its counts of calls."""
    if isinstance(state, dict):
        return {key: counted(value) for key, value in state.items() if key not in ("model_calls", "all_calls")}
    return [counted(value) for value in state] if isinstance(state, list) else state


def stopped(name: str, call: int) -> tuple[Fit, Counting]:
    fit, model = CASES[name].fit(call)
    with pytest.raises(KeyboardInterrupt):
        list(fit.events())
    return fit, model


@every_fit
@pytest.mark.trust("resumed")
def test_from_its_state_in_any_model_call_it_goes_on_as_if_it_had_not_been_stopped(name: str, tmp_path: Path) -> None:
    """A stop inside a call leaves the state that there is in it. From equal states a fit goes on equally: one of each
    is enough.
    """
    whole, _ = finished(name)
    fit, model = CASES[name].fit()
    states: list[tuple[int, Any]] = []

    def look() -> None:
        state = fit.state_dict()
        assert fit.model_calls == model.samples
        if not states or not equal(counted(state), counted(states[-1][1])):
            states.append((model.calls, copy.deepcopy(state)))

    model.look = look
    list(fit.events())
    assert len(states) >= len(fit.losses)
    for call, state in states:
        save_state(tmp_path / "state.safetensors", state)
        second, _ = CASES[name].fit()
        second.load_state_dict(load_state(tmp_path / "state.safetensors"))
        list(second.events())
        assert same(second.predictor, whole.predictor), f"stopped at call {call}"
        assert second.losses == whole.losses


@every_fit
@pytest.mark.trust("resumed")
def test_stopped_inside_a_model_call_it_goes_on_as_if_it_had_not_been(name: str, tmp_path: Path) -> None:
    whole, model = finished(name)
    for call in range(1, model.calls + 1, model.calls // STOPS):
        first, asked = stopped(name, call)
        assert first.model_calls == asked.samples
        save_state(tmp_path / "state.safetensors", first.state_dict())
        second, again = CASES[name].fit()
        second.load_state_dict(load_state(tmp_path / "state.safetensors"))
        list(second.events())
        assert same(second.predictor, whole.predictor), f"stopped at call {call}"
        assert second.losses == whole.losses
        assert second.model_calls == asked.samples + again.samples
        assert second.summary().error == whole.summary().error


@every_fit
@pytest.mark.trust("resumed")
def test_stopped_at_any_model_call_the_same_fit_can_go_on(name: str) -> None:
    whole, model = finished(name)
    for call in (model.calls // 2, model.calls):
        fit, asked = stopped(name, call)
        list(fit.events())
        assert same(fit.predictor, whole.predictor)
        assert fit.model_calls == asked.samples


@every_fit
def test_leaving_the_events_and_coming_back_goes_on(name: str) -> None:
    whole, _ = finished(name)
    fit, _ = CASES[name].fit()
    while any(True for _ in fit.events()):  # takes one event of a new iterator at a time
        pass
    assert same(fit.predictor, whole.predictor)
    assert list(fit.events()) == [], "after the end there is nothing"
    assert fit.losses == whole.losses


@every_fit
def test_a_finished_state_has_nothing_left_to_do(name: str, tmp_path: Path) -> None:
    whole, model = finished(name)
    save_state(tmp_path / "state.safetensors", whole.state_dict())
    again, asked = CASES[name].fit()
    again.load_state_dict(load_state(tmp_path / "state.safetensors"))
    assert list(again.events()) == []
    assert asked.samples == 0
    assert again.model_calls == model.samples
    assert same(again.predictor, whole.predictor)
    assert again.summary() == whole.summary()


def test_what_a_state_had_no_room_for_is_expected_to_be_made_again() -> None:
    case = CASES["multistep, states without all targets"]
    first: Any = case.fit()[0]
    next(first.events())
    part = first.state_dict()
    first.runs.fitted.state_bytes = first.runs.judged.state_bytes = 2**20
    whole = first.state_dict()
    found: list[Any] = []
    for state in (part, whole):
        found.append(case.fit()[0])
        found[-1].load_state_dict(state)
    again = found[0].expected_calls - found[1].expected_calls
    assert again == 4 * found[0].runs.fitted.teacher.model_calls, "two batches of two have no room"
    for fit in found:
        list(fit.events())
    assert found[0].model_calls - found[1].model_calls == again
    assert found[0].expected_calls <= found[0].model_calls


@every_fit
def test_the_same_settings_give_the_same_predictor(name: str) -> None:
    fit, _ = CASES[name].fit()
    list(fit.events())
    assert same(fit.predictor, finished(name)[0].predictor)


@every_fit
def test_after_every_event_counts_are_true_and_the_predictor_samples(name: str) -> None:
    fit, model = CASES[name].fit()
    x = SIGMA_MAX * noise(2, *SHAPE)
    ask = Guided(3.0) if "guided" in name else mixture
    total, before = finished(name)[0].model_calls, 0
    for event in fit.events():
        assert before < event.model_calls <= fit.model_calls == model.samples
        before = event.model_calls if len(fit.losses) > 1 else 0
        assert 0 < fit.expected_calls <= total, "fewer there will not be"
        assert sample(ask, x, fit.predictor.method(guidance=2.0)).isfinite().all()
        assert event.student.shape == event.teacher.shape
    assert fit.expected_calls <= fit.model_calls


@every_fit
def test_the_calls_expected_of_a_new_fit_are_nearly_those_that_it_takes(name: str) -> None:
    fit, _ = CASES[name].fit(teacher_calls=100)  # that of a poorer teacher, which is given up, nobody can expect
    expected = fit.expected_calls
    list(fit.events())
    assert 0.5 * fit.model_calls < expected <= fit.model_calls


@every_fit
def test_a_summary_is_complete_whenever_it_is_asked_for(name: str) -> None:
    fit, _ = CASES[name].fit()
    complete(fit.summary())
    for _ in fit.events():
        complete(fit.summary())
    summary = fit.summary()
    assert summary.model_calls == fit.model_calls
    if "none held out" in name:
        assert summary.gain is None
        assert summary.sentence() == summary.headline() == ""
        return
    assert summary.error is not None
    assert summary.baseline_error
    assert summary.gain == pytest.approx(1 - summary.error / summary.baseline_error)
    assert summary.sentence()
    assert summary.headline()


def complete(summary: FitSummary) -> None:
    assert summary.objective
    assert summary.teacher
    assert summary.settings
    header = json.loads(json.dumps(summary.header(), allow_nan=False))
    for field in fields(FitSummary):
        assert field.name in header or field.name in ("settings", "details")
    assert header["trajectories"] == summary.settings["trajectories"]


@every_fit
@pytest.mark.trust("states")
def test_a_state_of_other_settings_is_refused(name: str) -> None:
    state = finished(name)[0].state_dict()
    for changes in ({"trajectories": 12}, {"batch_size": 1}, {"teacher_calls": 10}):
        other, _ = CASES[name].fit(**changes)
        with pytest.raises(ValueError, match=next(iter(changes))):
            other.load_state_dict(state)
    for others in CASES:
        if others != name:
            with pytest.raises(ValueError, match=r"state"):
                CASES[others].fit()[0].load_state_dict(state)


def damaged(state: Any) -> Iterator[tuple[str, Any]]:
    """Every state in which one thing is missing, or of another type or shape; and where."""
    wrong: list[tuple[str, Any]]
    if isinstance(state, dict):
        for key, value in state.items():
            rest = {k: v for k, v in state.items() if k != key}
            yield f"{key} is missing", rest
            for where, other in damaged(value):
                yield f"{key}, {where}", {**state, key: other}
        wrong = [("a list", [])]
    elif isinstance(state, list | tuple):
        for place, value in enumerate(state):
            for where, other in damaged(value):
                yield f"{place}, {where}", [*state[:place], other, *state[place + 1 :]]
        wrong = [("a number", 7)]
    elif isinstance(state, Tensor):
        cut = state[:-1] if state.ndim and len(state) else state.new_zeros(2, 3)
        wrong = [("a text", "0.5"), ("another shape", cut)]
    elif state is None:
        wrong = [("a text", "nothing")]
    else:
        wrong = [("nothing", {}), ("a list", [state])]
    for what, other in wrong:
        yield f"is {what}", other


@every_fit
@pytest.mark.trust("states")
def test_a_damaged_state_is_refused_and_leaves_the_fit_as_new(name: str) -> None:
    part, _ = stopped(name, finished(name)[1].calls - 1)
    new, model = CASES[name].fit()
    fresh = new.state_dict()
    found = 0
    every = list(damaged(part.state_dict()))
    for where, state in every[:: 1 + len(every) // 400]:
        if where.endswith("is missing") and re.search(
            r"targets, |tables, \d, 0, |table, 0, |linearised, \d|fits, 0 ", where
        ):
            continue  # what is not there is made again, or begun; settings that are not there are the usual ones
        found += 1
        assert "state" in refusal(new, state), f"{where} was taken"
    assert found > 30
    assert equal(new.state_dict(), fresh)
    list(new.events())
    assert new.model_calls == model.samples
    assert same(new.predictor, finished(name)[0].predictor)


def refusal(fit: Fit, state: Any) -> str:
    """Why a fit does not take a state; empty if it does."""
    try:
        fit.load_state_dict(state)
    except ValueError as error:
        return str(error)
    return ""


@every_fit
@pytest.mark.trust("training")
def test_a_model_that_answers_nan_is_an_error_that_keeps_the_predictor_finite(name: str) -> None:
    def broken(denoiser: Denoiser) -> Denoiser:
        def answer(x: Tensor, sigma: Tensor) -> Any:
            found = denoiser(x, sigma)
            return (torch.nan * found[0], *found[1:]) if isinstance(found, tuple) else torch.nan * found

        return answer  # type: ignore[return-value]

    fit = CASES[name].make(CASES[name].settings, broken)
    with pytest.raises(FloatingPointError):
        list(fit.events())
    assert all(values.isfinite().all() for values in fit.predictor.state_dict().values())
