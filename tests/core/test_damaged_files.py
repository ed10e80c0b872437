"""What a damaged file costs, a predictor or a state: one error, or nothing, as its sample is finite."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

if sys.platform != "linux":
    pytest.skip("memory is limited as Linux does it", allow_module_level=True)

import mutations
import state_mutations
from mutations import DEEP, DIGITS, NAME, WHOLE, Parts
from trials import Trials

from amed_core.contents import LARGEST_FILE, PredictorFileError
from amed_core.files import load_with_notes, read_configs, read_notes

pytestmark = pytest.mark.trust("files")
PREDICTORS, STATES = 700, 300  # files in a process
PROCESSES = 20  # of each, where all is tried
SECONDS = 600  # for one


def tried(trials: Trials, script: str, count: int, most: int) -> Counter[str]:
    """Try so many files in each of some processes. What came of them, by name."""
    came: Counter[str] = Counter()
    for number in range(trials.many(1, PROCESSES)):
        command = [sys.executable, script, str(number), str(count)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        for told, what, why in lines:
            came[what] += 1
            trials.held(f"{number}: {told}", not why, f"{what}: {why}")
        if done.returncode or len(lines) != most:
            trials.held(f"{number}: after {len(lines)} files", False, f"the process ended: {done.stderr[-200:]}")
    print(trials.tried, dict(came))
    return came


def test_a_mutant_is_refused_in_words_or_gives_a_finite_sample(trials: Trials) -> None:
    came = tried(trials, mutations.__file__, PREDICTORS, PREDICTORS)
    assert came["refused"] > 0.5 * trials.tried
    assert came["sampled"] > 0.1 * trials.tried, "many can be read, so that what they say is looked at, too"
    assert came["not finite"], "and some have numbers that lead too far"


def test_a_mutated_state_is_refused_in_words_or_is_gone_on_from(trials: Trials) -> None:
    """What refuses one is as it was, and ends as if it had met none."""
    readers = len(state_mutations.FITS) + len(state_mutations.LEARNERS)
    came = tried(trials, state_mutations.__file__, STATES, STATES + readers)
    assert came["refused"] > 0.5 * trials.tried
    assert came["taken"] > 0.05 * trials.tried, "some can be read, so that what they say is looked at, too"


LIMITS = """
import sys, time
sys.path.append(sys.argv[1])
import mutations, torch
mutations.SECONDS = 0.2
for greedy in (lambda: torch.ones(mutations.MEMORY), lambda: bytearray(2 * mutations.MEMORY), lambda: time.sleep(9)):
    try:
        with mutations.limited():
            greedy()
    except Exception as error:
        print(type(error).__name__)
print(len(torch.ones(mutations.MEMORY)))
"""


def test_the_limits_of_memory_and_time_are_real() -> None:
    command = [sys.executable, "-c", LIMITS, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["RuntimeError", "MemoryError", "SlowError", str(mutations.MEMORY)]


# Of every way in which a file was once found to break the promise, one.


def setting(**changes: Any) -> Callable[[Parts], None]:
    """Of the first predictor."""
    return lambda parts: parts.header["configs"][0].update(changes)


def header(**changes: Any) -> Callable[[Parts], None]:
    """Of the header."""
    return lambda parts: parts.header.update(changes)


def tensor(change: Callable[[torch.Tensor], torch.Tensor], name: str = "") -> Callable[[Parts], None]:
    """The first tensor is another one, and maybe of another name."""

    def changed(parts: Parts) -> None:
        tensors = mutations.tensors_of(parts)
        first = min(tensors)
        values = change(tensors.pop(first)).contiguous()
        parts.retensored({**tensors, name or first: values})

    return changed


SETTINGS = {
    "model is a number": ("network", setting(model=5), "model must hold"),
    "settings are a number": ("table", header(configs=[7]), "no JSON object"),
    "settings are a list": ("network", header(configs=[["solver"]]), "no JSON object"),
    "there are no settings": ("network", header(configs=[]), "the settings of 1 to"),
    "too many": ("multistep", lambda parts: header(configs=parts.header["configs"] * 300)(parts), "1 to 256"),
    "a text for a level": ("network", setting(sigma_min="low"), "sigma_min must be a number"),
    "a list for a level": ("multistep", setting(sigma_max=[80.0]), "sigma_max must be a number"),
    "a huge integer": ("network", setting(sigma_max=10**400), "sigma_max must be a number"),
    "an integer of 5,000 digits": ("network", setting(hidden=DIGITS), "header is unreadable"),
    "5,000 brackets": ("network", setting(model=DEEP), "nested too deeply"),
    "notes of 5,000 brackets": ("network", header(notes=DEEP), "nested too deeply"),
    "notes are a list": ("network", header(notes=["heun"]), "notes are no JSON object"),
    "a number for a yes": ("network", setting(plain_last=5), "plain_last must be true or false"),
    "a yes for a number": ("network", setting(hidden=True), "hidden must be a whole number"),
    "half a unit": ("network", setting(hidden=1.5), "hidden must be a whole number"),
    "no unit": ("network", setting(hidden=0), "hidden is at least 1"),
    "2.6 GB": ("network", setting(hidden=10**7), "at most 4,096 hidden units"),
    "64 GB": ("multistep, spectral", setting(channels=10**9), "at most 4,096 channels"),
    "fewer channels than none": ("multistep, spectral", setting(channels=-1), "channels 0"),
    "1.6 TB": ("multistep", setting(guidances=list(range(1000))), "at most 64 guidance scales"),
    "too long a grid": ("multistep", setting(sigmas=list(range(2000, 0, -1))), "at most 1,000 numbers"),
    "a level is infinite": ("table", setting(sigmas=[float("inf"), 1.0, 0.0]), "sigmas must be a number"),
    "a guidance that is none": ("multistep", setting(guidance=[1.0]), "guidance must be a number"),
    "a text of markup": ("network", setting(schedule="<img src=x onerror=alert(1)>"), "plain characters"),
    "a long text": ("network", setting(solver="x" * 100_000), "plain characters"),
    "a long name": ("network", setting(**{"x" * 100_000: 1}), "unknown settings"),
    "whole numbers as weights": ("network", tensor(lambda x: x.int()), "of the type I32"),
    "eight bits as weights": ("network", tensor(lambda x: x.to(torch.float8_e4m3fn)), "of the type F8_E4M3"),
    "another shape": ("multistep", tensor(lambda x: x[..., None]), "not of the shape"),
    "another name": ("network", tensor(lambda x: x, "x" * 10_000), "unknown predictors"),
    "a tensor of 4 TB": ("table", lambda parts: parts.entries["0.plans"].update(shape=[10**12]), "not of the shape"),
}
NUMBERS = {
    "weights of 1e38": ("multistep", tensor(lambda x: x.fill_(1e38)), "out of their range"),
    "a midpoint outside its interval": ("table", tensor(lambda x: x.fill_(1.5)), "out of their range"),
    "weights that are NaN": ("network", tensor(lambda x: x.fill_(torch.nan)), "NaN or infinite"),
}


@pytest.fixture(scope="module", autouse=True)
def whole() -> None:
    """A file of every kind that is not damaged."""
    mutations.make_whole()


def refused(path: Path, words: str, *readers: Callable[[Path], Any]) -> None:
    """Whether every one of the readers says the same, in words and in short."""
    for reader in readers:
        with pytest.raises(PredictorFileError, match=words) as caught:
            reader(path)
        text = str(caught.value)
        assert NAME in text
        assert mutations.clear(text), text


def mutant(tmp_path: Path, kind: str, change: Callable[[Parts], None]) -> Path:
    parts = Parts.of(WHOLE[kind])
    change(parts)
    path = tmp_path / NAME
    path.write_bytes(parts.joined())
    return path


@pytest.mark.parametrize(("kind", "change", "words"), SETTINGS.values(), ids=SETTINGS)
def test_a_header_is_refused_by_whoever_reads_it(
    tmp_path: Path, kind: str, change: Callable[[Parts], None], words: str
) -> None:
    refused(mutant(tmp_path, kind, change), words, load_with_notes, read_configs, read_notes)


@pytest.mark.parametrize(("kind", "change", "words"), NUMBERS.values(), ids=NUMBERS)
def test_numbers_are_refused_that_no_fit_gives(
    tmp_path: Path, kind: str, change: Callable[[Parts], None], words: str
) -> None:
    path = mutant(tmp_path, kind, change)
    refused(path, words, load_with_notes)
    assert read_configs(path), "of which no number is read"


@pytest.mark.parametrize(
    ("data", "size", "words"),
    [
        (b"", 1_600_000_000, "too large for a predictor"),
        ((2 << 20).to_bytes(8, "little"), LARGEST_FILE, "too large for a predictor"),
        ((1 << 63).to_bytes(8, "little"), 1000, "shorter than it says"),
        (b"", 0, "shorter than it says"),
    ],
    ids=["1.6 GB", "a header of 2 MB", "a header of 8 EB", "empty"],
)
def test_a_file_of_another_size_is_refused_unread(tmp_path: Path, data: bytes, size: int, words: str) -> None:
    path = tmp_path / NAME
    with path.open("wb") as file:
        file.write(data)
        file.truncate(size)
    refused(path, words, load_with_notes, read_configs, read_notes)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    refused(tmp_path / NAME, "There is no file", load_with_notes, read_configs)
    refused(tmp_path / ("x" * 90) / ("y" * 200) / NAME, "There is no file", load_with_notes, read_configs)
    with pytest.raises(PredictorFileError, match="There is no file"):
        load_with_notes(Path("a\0b"))


def test_a_path_of_markup_and_control_characters_is_told_without_them(tmp_path: Path) -> None:
    path = tmp_path / "\n\x1b[31m\udcff.safetensors"
    path.write_bytes(b"none")
    with pytest.raises(PredictorFileError, match="shorter than it says") as caught:
        load_with_notes(path)
    assert str(caught.value).isprintable()


def test_notes_are_made_plain(tmp_path: Path) -> None:
    notes = {"<b>": "<img src=x onerror=alert(1)>", "long": "x" * 5000, "date": "2026-11-27T22:34:09+00:00"}
    path = mutant(tmp_path, "network", header(notes={**notes, "seed": 2**64 - 1, "losses": [1.5, None, {"a": True}]}))
    assert read_notes(path) == {
        "b": "img src=x onerror=alert(1)",
        "long": "x" * 200,
        "date": notes["date"],
        "seed": 2**64 - 1,
        "losses": [1.5, None, {"a": True}],
    }
