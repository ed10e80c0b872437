"""States of fits and of learners, damaged in every way that their structure allows, and what comes of them.

    python tests/core/state_mutations.py 7 1000                     # tries 1,000 files, the same ones for the number 7
    AMED_KEEP=FOLDER python tests/core/state_mutations.py 7 1000    # and keeps those that break the promise

As with `mutations.py`, in a process of its own. Of most files the checksum is right, as if the pack had written them.
"""

import contextlib
import copy
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[2])]
import mutations
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from kinds import CASES, equal
from mutations import FLOATS, LONGEST, NAME, OTHERS, Draw, Model, Parts, clear, in_bytes, limited, odd
from problems import FACTS, SHAPE, SIGMA_MAX, Mixture, Smooth
from safetensors.torch import load
from torch import Tensor

from amed_core import Fit, sample, student_config
from amed_core.contents import PredictorFileError
from amed_core.files import _checksum, load_state, save_state
from amed_core.fit.learner import Learner
from amed_core.fit.protocol import StateError
from amed_core.fit.trajectories import noise

# Of fits whose states differ in kind: the others of `CASES` differ in what they ask.
FITS = (
    *("network, reverse", "network, differences", "midpoints", "multistep, grid moved"),
    *("midpoints, several scales", "multistep, several uses", "multistep, guided, passes"),
)
LEARNERS = ("learner", "learner, levels", "learner, guided, bands")
LEVELS = (80.0, 20.0, 5.0, 1.0)  # that a user chose
OF_SETTINGS = ("config", "predictor_config")
GOES_ON = 2  # events of a fit whose state was taken
Place = tuple[Any, Any]  # what holds something, and its key there


def places(value: Any, *, with_settings: bool) -> Iterator[Place]:
    """Every place in a state, as what holds it and its key there."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        if with_settings or key not in OF_SETTINGS:
            yield from places(value[key], with_settings=with_settings)


def chosen(draw: Draw, state: Any, kind: Any = object) -> Place | None:
    """A place of something of a kind; seldom one in the settings, of which all are compared. None without any."""
    found = list(places(state, with_settings=draw(st.integers(0, 9)) == 0))
    fitting = [(holder, key) for holder, key in found if isinstance(holder[key], kind)]
    return draw(st.sampled_from(fitting)) if fitting else None


NUMBERS = (
    *(0, 1, -1, 2, 3, 7, 100, 10**6, 10**9, 10**12, 10**18, -(10**9), 2**63, 2**64, 10**400),
    *(0.0, -0.0, 0.5, 1.0, -1.0, 2.0, 1e-300, 1e30, 1e300, -1e300, float("nan"), float("inf"), -float("inf")),
)
INTS, DECIMALS = (tuple(n for n in NUMBERS if isinstance(n, kind)) for kind in (int, float))


def removed(draw: Draw, state: Any) -> None:
    """Something is missing."""
    if (place := chosen(draw, state)) is not None:
        del place[0][place[1]]


def renamed(draw: Draw, state: Any) -> None:
    """Something has another name."""
    place = chosen(draw, state)
    if place is not None and isinstance(place[0], dict):
        other = draw(st.sampled_from(["x", "", "0", "1", "-1", "99", 0, 1, "x" * 10_000, "<b>", "items", "tensor"]))
        place[0][other] = place[0].pop(place[1])


def replaced(draw: Draw, state: Any) -> None:
    """Something is something else."""
    if (place := chosen(draw, state)) is not None:
        value = odd(draw)
        readable = value if value not in (mutations.DEEP, mutations.DIGITS) else deep(draw(st.sampled_from([90, 300])))
        place[0][place[1]] = readable


def deep(depth: int) -> Any:
    """Lists in lists."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def nudged(draw: Draw, state: Any) -> None:
    """A number is another one, of its own kind or not."""
    if (place := chosen(draw, state, int | float)) is not None:
        holder, key = place
        value = holder[key]
        own = (True, False) if isinstance(value, bool) else DECIMALS if isinstance(value, float) else INTS
        holder[key] = draw(st.sampled_from(draw(st.sampled_from([own, own, (value + 1, value - 1, -value), NUMBERS]))))


def exchanged(draw: Draw, state: Any) -> None:
    """Two things stand in each other's places, or one in both."""
    one, other = chosen(draw, state), chosen(draw, state)
    if one is not None and other is not None:
        (here, key), (there, name) = one, other
        mine, theirs = copy.deepcopy(here[key]), copy.deepcopy(there[name])
        there[name] = mine
        if draw(st.booleans()) and key in (here if isinstance(here, dict) else range(len(here))):
            here[key] = theirs


def wrapped(draw: Draw, state: Any) -> None:
    """Something stands a level deeper, or what is in it stands for it."""
    if (place := chosen(draw, state)) is not None:
        holder, key = place
        value = holder[key]
        inside = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
        ways = [[value], {"x": value}, {"0": value}, *inside[:1], *inside[-1:]]
        holder[key] = ways[draw(st.integers(0, len(ways) - 1))]


def lengthened(draw: Draw, state: Any) -> None:
    """A list is longer or shorter."""
    if (place := chosen(draw, state, list)) is not None:
        holder, key = place
        value = holder[key]
        lengths = [value[:-1], value[1:], value * 2, value * 100, [], [*value, odd(draw)], value[::-1]]
        small = [one for one in lengths if len(one) < 2000]
        holder[key] = small[draw(st.integers(0, len(small) - 1))]


def with_numbers(draw: Draw, state: Any) -> None:
    """A number of a tensor, or all of them, are others."""
    if (place := chosen(draw, state, Tensor)) is not None:
        holder, key = place
        values = holder[key].clone().contiguous()
        flat = values.view(-1)
        if len(flat):
            numbers = [float("nan"), float("inf"), -float("inf"), 1e38, -1e38, 1e4, 0.0, 1.0, -1.0, 1e-38, 0.5, -1e-3]
            number = draw(st.sampled_from(numbers))
            where = draw(st.sampled_from([slice(None), slice(0, 1), slice(-1, None)]))
            flat[where] = number if flat.is_floating_point() else int(abs(number) < 1)
        holder[key] = values


def reshaped(draw: Draw, state: Any) -> None:
    """A tensor has another shape or another kind of numbers, or is no tensor."""
    if (place := chosen(draw, state, Tensor)) is not None:
        holder, key = place
        values = holder[key]
        first = values[:1] if values.ndim else values
        ways: list[Callable[[], Any]] = [
            lambda: values.reshape(-1),
            lambda: values[None],
            lambda: values[..., None],
            lambda: values.reshape(-1)[:0],
            lambda: values.reshape(-1)[0] if values.numel() else torch.tensor(0.0),
            lambda: first,
            lambda: torch.cat([values, values]) if values.ndim else values[None],
            lambda: values.mT.contiguous() if values.ndim > 1 else values[None],
            lambda: torch.zeros(draw(st.integers(0, 3)), draw(st.integers(0, 70))),
            values.tolist,
            lambda: values.to(draw(st.sampled_from(FLOATS))),
            lambda: values.to(draw(st.sampled_from(FLOATS + OTHERS))),
        ]
        holder[key] = ways[draw(st.integers(0, len(ways) - 1))]()


def added(draw: Draw, state: Any) -> None:
    """There is something that nobody knows."""
    if (place := chosen(draw, state, dict | list)) is not None:
        holder = place[0][place[1]]
        if isinstance(holder, dict):
            holder[draw(st.sampled_from(["x", "0", "1", "99", "-1", "x" * 1000, "<b>"]))] = odd(draw)
        else:
            holder.append(odd(draw))


def of_another(draw: Draw, state: Any) -> None:
    """A part of it is that of another state."""
    place = chosen(draw, state)
    other = draw(st.sampled_from(sorted(WHOLE)))
    found = chosen(draw, copy.deepcopy(WHOLE[other].state))
    if place is not None and found is not None:
        place[0][place[1]] = found[0][found[1]]


DECODED = (
    *(removed, renamed, replaced, replaced, nudged, nudged, nudged, exchanged, wrapped, lengthened, lengthened),
    *(with_numbers, with_numbers, reshaped, reshaped, added, of_another),
)
SUBTLE = (nudged, nudged, with_numbers, lengthened)  # of which more can be read
# Of what stands in the file before it is decoded.
FRAMED = (mutations.replaced, mutations.nudged, mutations.removed, mutations.added, mutations.multiplied)
OF_TENSORS = (mutations.with_numbers, mutations.with_other_tensors)
LAST = (mutations.with_other_claims, mutations.in_another_frame)  # each leaves a file that no other takes apart


@dataclass(frozen=True)
class Whole:
    """A state that is not damaged, and who reads it."""

    kind: str
    state: dict[str, Any]
    data: bytes  # of its file


WHOLE: dict[str, Whole] = {}


@st.composite
def mutants(draw: Draw) -> tuple[str, str, bytes]:
    """Which state, what was done to it, and the file that came of that."""
    name = draw(st.sampled_from(sorted(WHOLE)))
    whole = WHOLE[name]
    if draw(st.integers(0, 4)) == 0:
        told, data = framed(draw, whole.data)
        return name, ", ".join((name, *told)), data
    way = draw(st.sampled_from((DECODED, SUBTLE)))
    done = draw(st.lists(st.sampled_from(way), min_size=1, max_size=2))
    state = copy.deepcopy(whole.state)
    for mutation in done:
        mutation(draw, state)
    return name, ", ".join((name, *(one.__name__ for one in done))), written(state)


def framed(draw: Draw, data: bytes) -> tuple[list[str], bytes]:
    """A file in which something is another before it is decoded, with the checksum of that or of what it was."""
    parts, told = Parts.of(data), list[str]()
    for kinds in (FRAMED, OF_TENSORS, LAST):
        for mutation in draw(st.sampled_from([(), (), *((one,) for one in kinds)])):
            mutation(draw, parts)
            told.append(mutation.__name__)
    if draw(st.booleans()):
        sign(parts)
        told.append("signed")
    data = parts.joined()
    if not told or draw(st.integers(0, 3)) == 0:
        return [*told, "in_bytes"], in_bytes(draw, data)
    return told, data


def sign(parts: Parts) -> None:
    """Give what can be read its own checksum."""
    with contextlib.suppress(Exception):
        header = json.loads(mutations._json(parts.header))
        parts.header["checksum"] = _checksum(header["state"], load(parts.joined()))


def written(state: Any) -> bytes:
    """The file of a state, with its checksum."""
    with tempfile.TemporaryDirectory() as folder:
        save_state(Path(folder) / NAME, state)
        return (Path(folder) / NAME).read_bytes()


Reader = TypeVar("Reader", Fit, Learner)


def took(fresh: Reader, busy: Reader, before: dict[str, Any], state: dict[str, Any]) -> Reader:
    """A new reader that took the state.

    Raises StateError if it refused it, as one that is busy then does, too, whose own state is `before`; AssertionError
    if one of them took it, or is another for it.
    """
    own = fresh.state_dict()
    try:
        fresh.load_state_dict(state)
    except StateError:
        assert equal(fresh.state_dict(), own), "what refused it is another"
        try:
            busy.load_state_dict(state)
        except StateError:
            assert equal(busy.state_dict(), before), "what refused it while it was busy is another"
            raise
        raise AssertionError("one took what the other refused") from None
    return fresh


class OfFit:
    """What must hold of a state of a fit."""

    def __init__(self, name: str) -> None:
        self.case = CASES[name]
        self.whole, _ = self.case.fit()
        list(self.whole.events())
        self.busy, _ = self.case.fit()  # in the middle of its work
        list(islice(self.busy.events(), 1))
        self.before = copy.deepcopy(self.busy.state_dict())

    def states(self) -> dict[str, dict[str, Any]]:
        """As they are before the first event, between two, and at the end."""
        early, model = self.case.fit(interrupted_at=20)
        try:
            list(early.events())
        except KeyboardInterrupt:
            model.interrupted_at = 0
        return {"early": early.state_dict(), "middle": self.before, "late": self.whole.state_dict()}

    def read(self, state: dict[str, Any]) -> Fit:
        """A new fit that took the state. Raises StateError."""
        return took(self.case.fit()[0], self.busy, self.before, state)

    def used(self, fit: Fit) -> None:
        """Go on with a fit, and sample. Raises AssertionError if a sample is not finite."""
        assert fit.expected_calls >= 0
        assert fit.model_calls >= 0
        for _ in islice(fit.events(), GOES_ON):
            written(fit.state_dict())
        if fit.begun:
            json.dumps(fit.summary().header())
            for one in fit.predictors.predictors:
                x = one.config.sigmas[0] * noise(range(2), SHAPE, 1)
                assert sample(Model(3.0), x, one.method()).isfinite().all(), "it is not finite"

    def right(self) -> bool:
        """Whether what refused so many states still ends as if it had met none."""
        list(self.busy.events())
        return equal(self.busy.predictors.main.state_dict(), self.whole.predictors.main.state_dict())


class OfLearner:
    """What must hold of a state of a learner."""

    def __init__(self, name: str) -> None:
        self.in_bands = name == "learner, guided, bands"
        self.make = partial(learner, LEVELS if name == "learner, levels" else (), guided=self.in_bands)
        self.one = self.taught(1)
        self.busy = self.taught(1)
        self.before = copy.deepcopy(self.busy.state_dict())

    def taught(self, pictures: int) -> Learner:
        """One that has learned from so many pictures."""
        made = self.make()
        for number in range(pictures):
            self.teach(made, number)
        return made

    def noise(self, *rows: int) -> Tensor:
        """Where pictures begin."""
        return SIGMA_MAX * noise(rows, (1, 16, 16) if self.in_bands else SHAPE, 3)

    def teach(self, made: Learner, number: int) -> None:
        """Let it learn from a picture."""
        x = self.noise(number)
        made.learn(self.denoiser, x, made.taught(self.denoiser, x))

    @property
    def denoiser(self) -> Any:
        """Who answers."""
        return Smooth(3.0) if self.in_bands else Mixture()

    def states(self) -> dict[str, dict[str, Any]]:
        """Of a guess, and after one picture and two."""
        guessed, two = self.make(), self.taught(2)
        guessed.guess(self.one, "a guess", 12)
        return {"guess": guessed.state_dict(), "one": self.one.state_dict(), "two": two.state_dict()}

    def read(self, state: dict[str, Any]) -> Learner:
        """A learner that took the state, or a new one if its situation is another. Raises StateError."""
        try:
            return took(self.make(), self.busy, self.before, state)
        except StateError:
            Learner.of(state)  # of any situation
            return self.make()

    def used(self, made: Learner) -> None:
        """Sample and learn from one more picture. Raises AssertionError if a sample is not finite."""
        assert made.teacher_calls > 0
        assert made.calls_for(1) > 0
        if made.candidates:
            assert made.chosen.name
            json.dumps([made.held_out_ratio, made.done])
            other = self.make()
            other.guess(made, "from a state", 24)
            x = self.noise(8, 9)
            for one in (made, other):
                assert sample(self.denoiser, x, one.chosen.table.method()).isfinite().all(), "it is not finite"
        self.teach(made, 5)
        written(made.state_dict())
        assert made.chosen.table.weights.isfinite().all()

    def right(self) -> bool:
        """Whether what refused so many states still learns as if it had met none."""
        self.teach(self.busy, 1)
        self.teach(self.one, 1)
        return equal(self.busy.state_dict(), self.one.state_dict())


def learner(levels: tuple[float, ...], *, guided: bool) -> Learner:
    """One that knows nothing."""
    facts = replace(FACTS, guided=guided)
    config = student_config("amed_multistep", len(levels) - 1 if levels else 4, facts, guidance=3.0 if guided else 1.0)
    if levels:
        config = replace(config, sigmas=(levels[0], *config.sigmas[1:]))
    return Learner(config, levels)


READERS: dict[str, Any] = {}


def make_whole() -> None:
    """States of every kind that are not damaged."""
    makers: dict[str, Callable[[], Any]] = {name: partial(OfFit, name) for name in FITS}
    makers |= {name: partial(OfLearner, name) for name in LEARNERS}
    for kind, make in makers.items():
        READERS[kind] = make()
        for when, state in READERS[kind].states().items():
            WHOLE[f"{kind}, {when}"] = Whole(kind, copy.deepcopy(state), written(state))


def outcome(path: Path, kind: str) -> tuple[str, str]:
    """What came of a file, and how that broke the promise: empty if it did not."""
    came, reader = "read", READERS[kind]
    try:
        with limited():
            state = load_state(path)
            came = "decoded"
            made = reader.read(state)
            came = "taken"
        with limited():
            reader.used(made)
    except PredictorFileError as error:
        text = str(error)
        return "refused", "" if came == "read" and NAME in text and clear(text) else f"{came}: {len(text)}: {text}"
    except StateError as error:
        text = str(error)
        return "refused", "" if came == "decoded" and clear(text) else f"{came}: {len(text)}: {text}"
    except FloatingPointError as error:
        return "not finite", "" if came == "taken" and clear(str(error)) else f"{came}: {error}"
    except Exception as error:
        return came, f"{type(error).__name__}: {error}"
    return came, ""


def main(number: int, count: int) -> None:
    """Print a line of JSON for every file: what was done, what came of it, and how that broke the promise."""
    torch.set_num_threads(1)
    make_whole()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / NAME
        for name, whole in WHOLE.items():
            path.write_bytes(whole.data)
            assert outcome(path, whole.kind) == ("taken", ""), name

        @seed(number)
        @settings(max_examples=count, database=None, deadline=None, suppress_health_check=list(HealthCheck))
        @given(mutants())
        def tried(mutant: tuple[str, str, bytes]) -> None:
            name, told, data = mutant
            path.write_bytes(data)
            came, why = outcome(path, WHOLE[name].kind)
            print(json.dumps([told, came, why[:LONGEST]]), flush=True)
            if why and (kept := os.environ.get("AMED_KEEP")):
                file = f"{WHOLE[name].kind}_{came}_{hashlib.sha256(data).hexdigest()[:8]}.safetensors"
                (Path(kept) / file).write_bytes(data)

        tried()
    for kind, reader in READERS.items():
        print(json.dumps([kind, "went on", "" if reader.right() else "it ended otherwise"]), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
