"""The time that is left: known soon, and falling from then on."""

import re
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from families import Family
from toys import heard, train

JUMP = 1.5  # times as long as just before what is left may be said to be,
SOON = 0.2  # once this part is done
FIRST, CALL = 20.0, 0.2  # seconds of a model call, which loads the model or not


@pytest.mark.parametrize(
    "how", [{"effort": "quick"}, {"effort": "quick", "steps": "3-5"}, {"effort": "standard"}], ids=str
)
def test_the_time_left_falls(pack: Any, monkeypatch: pytest.MonkeyPatch, how: dict[str, str]) -> None:
    """On a clock by which every model call takes the same time, but for the first, which loads the model."""
    model, positive, negative, latent, _ = pack.nodes.AMEDDemoModel.execute("0 to 9", 1).args
    now, told = [0.0], []

    def hear(parameters: Any) -> None:
        now[0] += CALL * len(parameters["input"]) if now[0] else FIRST

    monkeypatch.setattr(pack.nodes.fitting, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(pack.nodes.training, "tell", lambda node, text: told.append((now[0], text)))
    usual = {"trajectories": 0, "batch_size": 0, "held_out": 0, "teacher_calls": 0, "cfg": 1.0}
    train(pack, Family(heard(model, hear), positive, negative, latent), **usual, **how)
    known = [(at, *found) for at, text in told if (found := parts(text)) is not None]
    assert len(known) > 20
    late = [left for _, done, left in known if done >= SOON]
    assert all(b <= JUMP * a + 1 for a, b in pairwise(late)), late
    end = now[0]
    at, _, left = known[0]
    assert left == pytest.approx(end - at, rel=0.5), "the first call is not taken for all"


def parts(text: str) -> tuple[float, float] | None:
    """What a text says to be done and to be left, in seconds; None if it does not say."""
    if (found := re.match(r"(\d+)%, about (\d+) (s|min) left", text)) is None:
        return None
    return int(found[1]) / 100, int(found[2]) * (60.0 if found[3] == "min" else 1.0)
