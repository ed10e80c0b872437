"""What every fit offers: its settings, what came of it, and states that are refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from problems import SMALL

from amed_core import FitSummary, TrainConfig
from amed_core.fit.protocol import StateError
from amed_core.fit.reading import of_kind, of_shape, reading_state, refuse_other_settings
from amed_core.fit.teacher import TEACHERS

SUMMARY = FitSummary("end to end", "iPNDM, 24 calls", "euler polynomial", 1000, None, None)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"trajectories": 0}, "at least 1 trajectory"),
        ({"batch_size": 0}, "batch of at least 1"),
        ({"learning_rate": 0.0}, "positive learning rate"),
        ({"teacher": "rk4"}, ", ".join(TEACHERS)),
        ({"gradient": "guess"}, "finite difference"),
    ],
)
def test_settings_that_cannot_be_trained_with_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TrainConfig(**settings)


def test_settings_that_cannot_be_fitted_with_are_refused() -> None:
    for changes in ({"trajectories": 0}, {"held_out": 0}, {"batch_size": 0}, {"iterations": 0}, {"teacher_calls": 1}):
        with pytest.raises(ValueError, match="at least 1 trajectory"):
            replace(SMALL, **changes)


@pytest.mark.parametrize(
    ("error", "base", "words"), [(0.02, 0.08, "75% less"), (0.08, 0.08, "NOT better"), (0.1, 0.08, "NOT better")]
)
def test_few_words_say_the_same_as_the_sentence(error: float, base: float, words: str) -> None:
    summary = replace(SUMMARY, error=error, baseline_error=base)
    assert summary.headline().startswith(words)
    assert words in summary.sentence()
    assert "euler polynomial" in summary.sentence()
    assert summary.gain == pytest.approx(1 - error / base)


@pytest.mark.parametrize(("error", "base"), [(None, None), (0.0, 0.0), (None, 0.1)])
def test_what_was_not_measured_is_not_spoken_of(error: float | None, base: float | None) -> None:
    summary = replace(SUMMARY, error=error, baseline_error=base)
    assert summary.gain is None
    assert summary.headline() == summary.sentence() == ""


def test_a_header_has_settings_details_and_results() -> None:
    summary = replace(SUMMARY, error=0.1, baseline_error=0.2, settings={"trajectories": 4}, details={"iterations": 2})
    header = summary.header()
    assert (header["trajectories"], header["iterations"], header["error"], header["gain"]) == (4, 2, 0.1, 0.5)


def test_a_state_of_other_settings_is_told_which() -> None:
    saved = {"config": {**vars(SMALL)}}
    refuse_other_settings(saved, {"config": SMALL})
    with pytest.raises(StateError, match="iterations, budget differ"):
        refuse_other_settings(saved, {"config": replace(SMALL, iterations=5, budget=1)})


@pytest.mark.parametrize(
    "read",
    [
        lambda state: state["gone"],
        lambda state: state["list"][5],
        lambda state: of_kind(state["list"], int),
        lambda state: of_kind(True, int),
        lambda state: of_shape(state["tensor"], (3, 2)),
        lambda state: of_shape(state["list"], ()),
        lambda state: state["tensor"] @ state["tensor"],
        lambda state: state["list"].shape,
        lambda state: int("seven"),
    ],
)
def test_whatever_is_wrong_with_a_state_is_one_error(read: Any) -> None:
    state = {"list": [1], "tensor": torch.zeros(2, 3)}
    with pytest.raises(StateError, match="cannot be used"), reading_state():
        read(state)


def test_other_errors_and_a_users_stop_pass() -> None:
    for error in (KeyboardInterrupt, FloatingPointError, OSError):
        with pytest.raises(error), reading_state():
            raise error
