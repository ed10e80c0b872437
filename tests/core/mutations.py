"""Predictor files of every kind, damaged in every way that their structure allows, and what comes of them.

    python tests/core/mutations.py 7 1000                     # tries 1,000 files, the same ones for the same number 7
    AMED_KEEP=FOLDER python tests/core/mutations.py 7 1000    # and keeps those that break the promise

It runs in a process of its own, whose memory is limited, so that what asks for too much fails where nothing else does.
"""

import copy
import hashlib
import json
import os
import resource
import signal
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[2])]
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from problems import FACTS, SWITCH, Guided, midpoint_config, mixture, multistep_config, noise
from safetensors.torch import save
from torch import Tensor

from amed_core import AMEDPredictor, MidpointTable, MultistepTable, PredictorConfig, sample, student_config
from amed_core.call_list import call_sigmas, run_of
from amed_core.contents import PredictorFileError
from amed_core.features import MAPS
from amed_core.files import load_with_notes, read_configs, read_notes, save_predictor
from amed_core.predictor import Predictor, PredictorSet, outline
from amed_core.solvers import SOLVERS
from amed_core.types import Run

SECONDS, MEMORY = 5, 256 << 20  # that a file may take
LONGEST = 300  # characters of an error
SMALL = 1 << 17  # numbers that a mutant is written with, and elements of the samples that it draws
NAME = "mutant.safetensors"
Draw = Callable[[st.SearchStrategy[Any]], Any]


def several(config: PredictorConfig) -> PredictorConfig:
    """The same at two guidance scales."""
    return replace(config, guidances=(1.0, 3.0))


def kinds() -> dict[str, PredictorSet]:
    """Predictors of every kind, whose weights are moved a little at random."""
    guided, banded = multistep_config(guided=True, guidance=3.0), {"spectral": True, "first_sigma": 40.0, "channels": 1}
    configs = {
        "network": [student_config("amed_ipndm", 5, FACTS, hidden=8)],
        "network, latent": [student_config("amed_dpmpp_2m", 6, FACTS, hidden=8, features="latent")],
        "table": [midpoint_config("amed_dpm_2", 6)],
        "table, several guidances": [several(midpoint_config("amed", 5))],
        "multistep": [multistep_config()],
        "multistep, spectral": [multistep_config(**banded)],
        "multistep, guided": [guided],
        "multistep, several guidances": [several(replace(guided, **banded))],
        "multistep, passes": [replace(guided, spectral=True, negatives=(0, 2))],
        "multistep, two models": [multistep_config(5, switch_sigma=SWITCH, guided=True, guidance=3.0)],
        "set": [multistep_config(calls, spectral=True) for calls in (4, 3, 5)],
    }
    generator, made = torch.Generator().manual_seed(0), {}
    for name, every in configs.items():
        made[name] = PredictorSet(tuple(filled(config, generator) for config in every))
    return made


def filled(config: PredictorConfig, generator: torch.Generator) -> Predictor:
    """A predictor with numbers as a fit could have left them."""
    if config.kind == "network":
        return AMEDPredictor(config, generator)
    table = MidpointTable(config) if config.kind == "table" else MultistepTable(config)
    for values in table.parameters():
        values.sub_(0.02 * torch.rand(values.shape, generator=generator))
    return table


@dataclass
class Parts:
    """A file, taken apart. A text that begins with RAW stands in JSON for what follows it."""

    header: Any  # of ours: settings and notes
    metadata: Any
    entries: dict[str, Any]  # of tensors: type, shape and place
    data: bytes

    @classmethod
    def of(cls, data: bytes) -> "Parts":
        """Of a file that is whole."""
        length = int.from_bytes(data[:8], "little")
        entries = json.loads(data[8 : 8 + length])
        metadata = entries.pop("__metadata__")
        return cls(json.loads(metadata.pop("header")), metadata, entries, data[8 + length :])

    def joined(self) -> bytes:
        """The file again."""
        whole: Any = dict(self.entries)
        if isinstance(self.metadata, dict):
            whole["__metadata__"] = {**self.metadata, "header": _json(self.header)}
        else:
            whole["__metadata__"] = self.metadata
        text = _json(whole).encode()
        return struct.pack("<Q", len(text)) + text + self.data

    def retensored(self, tensors: dict[str, Tensor]) -> None:
        """Have these tensors in place of its own."""
        other = Parts.of(save(tensors, {"header": "{}"}))
        self.entries, self.data = other.entries, other.data


RAW = "RAW "
DIGITS, DEEP = f"{RAW}{'9' * 5000}", f"{RAW}{'[' * 5000}{']' * 5000}"
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 1.5, 0.0, -0.5, 1e-30, 1e30, 1e308, -1e308, 5e-324, 1e12, 1e4),
    *(float("nan"), float("inf"), -float("inf"), 10**9, 10**18, -(10**9), 10**30, DIGITS, DEEP),
    *("", "x", "5", "NaN", "x" * 20_000, "<img src=x onerror=alert(1)>", "\x00", "\ud800", "amed", "table"),
    *(
        [],
        {},
        [[]],
        [1],
        [1.0, 0.5],
        [0.5, 1.0],
        [80.0, 1.0, 0.0],
        [1] * 5000,
        {"a": 1},
        [None],
        ["x"],
        {"a": [1] * 99},
    ),
)


def odd(draw: Draw) -> Any:
    """Something that does not belong there."""
    return copy.deepcopy(draw(st.sampled_from(ODD)))


def _json(value: Any) -> str:
    """JSON in which texts that begin with RAW are not quoted."""
    text = json.dumps(value)
    for raw in (DIGITS, DEEP):
        text = text.replace(json.dumps(raw), raw.removeprefix(RAW))
    return text


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in JSON, as what holds it and its key there."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


def _chosen(draw: Draw, header: Any) -> tuple[Any, Any] | None:
    """A place in a header; settings more often than the single numbers in them. None if it has no places."""
    places = list(_places(header))
    settings = [place for place in places if isinstance(place[1], str)]
    return draw(st.sampled_from(draw(st.sampled_from([settings or places, places])))) if places else None


def replaced(draw: Draw, parts: Parts) -> None:
    """A setting is something else."""
    if (place := _chosen(draw, parts.header)) is not None:
        place[0][place[1]] = odd(draw)


def nudged(draw: Draw, parts: Parts) -> None:
    """A number is another one."""
    places = [p for p in _places(parts.header) if isinstance(p[0][p[1]], int | float)]
    if places:
        holder, key = draw(st.sampled_from(places))
        holder[key] = draw(st.one_of(st.floats(), st.integers(), st.integers(-1, 20), st.floats(0.0, 100.0)))


def removed(draw: Draw, parts: Parts) -> None:
    """A setting is missing."""
    if (place := _chosen(draw, parts.header)) is not None:
        del place[0][place[1]]


def added(draw: Draw, parts: Parts) -> None:
    """There is something that nobody knows."""
    holders = [parts.header, *(h[k] for h, k in _places(parts.header))]
    holder = draw(st.sampled_from([one for one in holders if isinstance(one, dict | list)] or [{}]))
    value = odd(draw)
    if isinstance(holder, dict):
        holder[draw(st.sampled_from(["x", "centred", "", "first", "model", "<b>", "x" * 1000]))] = value
    else:
        holder.append(value)


def multiplied(draw: Draw, parts: Parts) -> None:
    """A list, be it of levels or of predictors, is longer."""
    places = [p for p in _places(parts.header) if isinstance(p[0][p[1]], list) and len(_json(p[0][p[1]])) < 20_000]
    if places:
        holder, key = draw(st.sampled_from(places))
        holder[key] = holder[key] * draw(st.sampled_from([0, 2, 300]))


USUAL: dict[str, st.SearchStrategy[Any]] = {
    "solver": st.sampled_from(sorted(SOLVERS)),
    "kind": st.sampled_from(["network", "table", "multistep"]),
    "features": st.sampled_from(sorted(MAPS)),
    "prediction": st.sampled_from(["data", "noise"]),
    "max_order": st.integers(1, 4),
    "hidden": st.sampled_from([1, 2, 64]),
    "channels": st.sampled_from([0, 1, 4, 4096]),
    "first_sigma": st.sampled_from([0.0, 40.0, 79.9]),
    "switch_sigma": st.sampled_from([0.0, 0.01, 2.0, 79.9]),
    "guidance": st.floats(-100.0, 100.0),
    "guidances": st.sampled_from([[], [1.0, 2.0], [-5.0, 0.0, 1e6], list(range(64))]),
    "negatives": st.lists(st.integers(0, 5), max_size=3, unique=True).map(sorted),
    "sigma_min": st.floats(1e-9, 1.0),
    "sigma_max": st.floats(1.0, 1e9),
    **dict.fromkeys(("scale_dir", "scale_time"), st.sampled_from([0.0, 0.01, 0.5, 0.999])),
    **dict.fromkeys(("analytic_first_step", "plain_last", "lower_order_final", "thresholding"), st.booleans()),
    **dict.fromkeys(("flow", "spectral", "guided"), st.booleans()),
}


def retuned(draw: Draw, parts: Parts) -> None:
    """Settings are others, of which each may be so."""
    chosen = draw(st.sets(st.sampled_from(sorted(USUAL)), min_size=1, max_size=3))
    values = {name: draw(USUAL[name]) for name in sorted(chosen)}
    for config in parts.header["configs"] if isinstance(parts.header.get("configs"), list) else ():
        if isinstance(config, dict):
            config.update(values)


def regridded(draw: Draw, parts: Parts) -> None:
    """Another grid, from very small levels to very large ones."""
    powers = st.sampled_from([-300.0, -40.0, -12.0, -4.0, -1.0, 0.0, 1.0, 4.0, 12.0, 40.0])
    low, high = sorted((draw(powers), draw(powers)))
    points = draw(st.sampled_from([2, 3, 5, 9, 33, 100]))
    levels = [10 ** (high + (low - high) * k / points) for k in range(points)] + draw(st.sampled_from([[0.0], []]))
    for config in parts.header["configs"] if isinstance(parts.header.get("configs"), list) else ():
        if isinstance(config, dict):
            ends = {"sigma_min": 10**low, "sigma_max": levels[0]} if draw(st.booleans()) else {}
            config.update({"sigmas": levels, "first_sigma": 0.0, "channels": 0, **ends})


def of_another_kind(draw: Draw, parts: Parts) -> None:
    """The settings are those of another file."""
    parts.header["configs"] = Parts.of(draw(st.sampled_from(list(WHOLE.values())))).header["configs"]


def in_another_frame(draw: Draw, parts: Parts) -> None:
    """What surrounds the settings is something else."""
    other = odd(draw)
    formats = [{"format": other}, {"format": "amed_training_state"}]
    parts.metadata = draw(st.sampled_from([other, *formats, parts.metadata]))
    versions = [{**parts.header, "version": other}] if isinstance(parts.header, dict) else []
    parts.header = draw(st.sampled_from([parts.header, other, *versions]))


def fitting(draw: Draw, parts: Parts) -> None:
    """The tensors are such as the settings ask for, of any kind of number."""
    try:
        configs = [PredictorConfig.from_header(one) for one in json.loads(_json(parts.header))["configs"]]
        shapes = shapes_of([outline(config) for config in configs])
    except (ValueError, KeyError, TypeError, RecursionError):
        return
    if sum(shape.numel() for shape in shapes.values()) > SMALL:
        return
    low, high = draw(st.sampled_from([(0.6, 0.9), (-1.0, 1.0), (1.0, 1.0), (0.0, 0.0), (-1e4, 1e4), (0.9, 1.1)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    dtypes = draw(st.lists(st.sampled_from(FLOATS), min_size=1, max_size=2))
    parts.retensored(
        {
            name: (low + (high - low) * torch.rand(shape, generator=generator)).to(dtypes[n % len(dtypes)])
            for n, (name, shape) in enumerate(shapes.items())
        }
    )


FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
OTHERS = (torch.int32, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2)


def shapes_of(predictors: list[Predictor]) -> dict[str, torch.Size]:
    """The shapes of their tensors by their names in a file."""
    return {f"{k}.{name}": v.shape for k, one in enumerate(predictors) for name, v in one.state_dict().items()}


def tensors_of(parts: Parts) -> dict[str, Tensor]:
    """The tensors of a file that is whole but for its header."""
    kinds = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    found = {}
    for name, entry in parts.entries.items():
        begin, end = entry["data_offsets"]
        if entry["dtype"] in kinds and end > begin:
            values = torch.frombuffer(bytearray(parts.data[begin:end]), dtype=kinds[entry["dtype"]])
            found[name] = values.reshape(entry["shape"])
    return found


def with_numbers(draw: Draw, parts: Parts) -> None:
    """A number of a tensor, or all of them, are others."""
    tensors = tensors_of(parts)
    if not tensors:
        return
    values = tensors[draw(st.sampled_from(sorted(tensors)))].view(-1)
    numbers = [float("nan"), float("inf"), 1e38, -1e38, 1e4, -1e4, 9e3, 1.1e4, 0.0, 1.0, -1.0, 1e-38, 0.9999, 0.5]
    where = draw(st.sampled_from([slice(None), slice(0, 1), slice(-1, None)]))
    values[where] = draw(st.sampled_from(numbers))
    parts.retensored(tensors)


def with_other_tensors(draw: Draw, parts: Parts) -> None:
    """A tensor is missing, another one, of another name, kind or shape, or in another's place."""
    tensors = tensors_of(parts)
    if not tensors:
        return
    name, other = (draw(st.sampled_from(sorted(tensors))) for _ in range(2))
    values = tensors.pop(name)
    renamed = [f"1{name}", name.partition(".")[2], "x" * 10_000, "", "<b>", "__metadata", "0", other]
    changes: list[dict[str, Tensor]] = [
        {},
        {draw(st.sampled_from(renamed)): values},
        {name: tensors.get(other, values), other: values},
        {name: values.to(draw(st.sampled_from(FLOATS + OTHERS)))},
        {name: values.reshape(-1), other: values},
        {name: values[None]},
        {name: values.reshape(-1)[:0]},
        {name: torch.zeros(draw(st.integers(0, 3)), draw(st.integers(0, 70)))},
        {name: values, "extra": torch.zeros(3)},
    ]
    tensors |= draw(st.sampled_from(changes))
    parts.retensored({name: one.clone().contiguous() for name, one in tensors.items()})


def with_other_claims(draw: Draw, parts: Parts) -> None:
    """A tensor is said to be of another shape, kind or place than it is."""
    name = draw(st.sampled_from(sorted(parts.entries) or ["0.weights"]))
    other = odd(draw)
    shapes = [other, [10**9], [10**6, 10**6], [-1], [2**40, 2**40], [], [0], [1.0, 4]]
    spans = [other, [0, 2**62], [0, 0], [8, 4], [-4, 4], [0, 1], [0, 4 * 10**9]]
    entry = {
        "dtype": draw(st.sampled_from(["F32", "F16", "F64", "F8_E4M3", "I64", "C64", "F4", "x" * 1000, other])),
        "shape": draw(st.sampled_from(shapes)),
        "data_offsets": draw(st.sampled_from(spans)),
    }
    for key in draw(st.sets(st.sampled_from(sorted(entry)), max_size=2)):
        if name in parts.entries:
            entry[key] = parts.entries[name].get(key)
    parts.entries[name] = draw(st.sampled_from([entry, entry, other]))


def in_bytes(draw: Draw, data: bytes) -> bytes:
    """Bytes are flipped, cut away, put in or moved."""
    length = int.from_bytes(data[:8], "little")
    at = draw(st.one_of(st.integers(0, len(data) - 1), st.integers(0, min(8 + length, len(data) - 1))))
    size = draw(st.sampled_from([0, 1, length - 1, length + 1, 2**20, 2**31, 2**63, 2**64 - 1]))
    ways = {
        "flip": lambda: data[:at] + bytes([data[at] ^ (1 << draw(st.integers(0, 7)))]) + data[at + 1 :],
        "cut": lambda: data[:at],
        "put in": lambda: data[:at] + draw(st.binary(min_size=1, max_size=20)) + data[at:],
        "leave out": lambda: data[:at] + data[at + draw(st.integers(1, 50)) :],
        "claim": lambda: struct.pack("<Q", size % 2**64) + data[8:],
        "append": lambda: data + b"\0" * draw(st.sampled_from([1, 8, 10**5])),
        "random": lambda: draw(st.binary(max_size=200)),
    }
    return ways[draw(st.sampled_from(sorted(ways)))]()


OF_SETTINGS = (replaced, nudged, removed, added, multiplied, retuned, regridded, of_another_kind)
WHOLE: dict[str, bytes] = {}


def make_whole() -> None:
    """A file of every kind that is not damaged, as it is saved."""
    with tempfile.TemporaryDirectory() as folder:
        for name, every in kinds().items():
            save_predictor(every, Path(folder) / NAME, {"training": {"seed": 0, "teacher": "heun"}, "version": "0"})
            WHOLE[name] = (Path(folder) / NAME).read_bytes()


@st.composite
def mutants(draw: Draw) -> tuple[str, bytes]:
    """What was done to which file, and what came of it."""
    kind = draw(st.sampled_from(sorted(WHOLE)))
    parts = Parts.of(WHOLE[kind])
    usual = draw(st.booleans())  # so that many files can be read
    done = draw(st.lists(st.sampled_from((retuned, regridded) if usual else OF_SETTINGS), max_size=2))
    # Each of these leaves less of a file than the one before, which takes it apart.
    further = [[fitting], [fitting, with_numbers]] if usual else [[], [fitting], [with_numbers], [with_other_tensors]]
    done += draw(st.sampled_from(further))
    done += draw(st.sampled_from([[]] * 8 + [[with_other_claims], [in_another_frame]]))
    for mutation in done:
        mutation(draw, parts)
    data, told = parts.joined(), [kind, *(mutation.__name__ for mutation in done)]
    if not done or draw(st.integers(0, 9)) == 0:
        data = in_bytes(draw, data)
        told.append("in_bytes")
    return ", ".join(told), data


class SlowError(Exception):
    """It took too long."""


@contextmanager
def limited() -> Iterator[None]:
    """In here memory may grow by MEMORY, and after SECONDS there is an exception."""

    def stop(*_: object) -> None:
        raise SlowError(f"more than {SECONDS} s")

    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        signal.setitimer(signal.ITIMER_REAL, 0)


class Model(Guided):
    """A guided mixture that shows all that a predictor may ask for."""

    def __call__(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Any, Tensor]:  # type: ignore[override]
        denoised, _, guidance = super().__call__(x, sigma)
        return denoised, mixture(x, sigma)[1], guidance


def used(every: PredictorSet) -> None:
    """Sample in the ways that a file's predictors are meant for. Raises AssertionError if a sample is not finite."""
    assert every.sigmas(every.main.config.calls)
    for one in every.predictors[:3]:
        assert one.text()
        x = (one.config.sigmas[0] * noise(1, one.config.channels or 1, 2, 2)).float()
        for run in (None, *runs(one.config)):
            for guidance in (None, 2.0):
                assert sample(Model(3.0), x, one.method(run, guidance=guidance)).isfinite().all(), "it is not finite"


def runs(config: PredictorConfig) -> Iterator[Run]:
    """On a predictor's own levels, and on those for one call more, if it knows any."""
    for calls in (config.calls, config.calls + 1):
        why = ""
        try:
            yield run_of(call_sigmas(config, calls), config)
        except ValueError as error:
            why = str(error)
        assert len(why) <= LONGEST, "it is refused in a long text"


def outcome(path: Path) -> tuple[str, str]:
    """What came of a file, and how that broke the promise: empty if it did not."""
    came = "read"
    try:
        with limited():
            every, notes = load_with_notes(path)
            came = "sampled"
            assert read_configs(path) == tuple(one.config for one in every.predictors), "it was read in two ways"
            assert read_notes(path) == notes, "its notes were read in two ways"
            used(every)
    except PredictorFileError as error:
        came, text = "refused", str(error)
        return came, "" if NAME in text and clear(text) else f"{len(text)} characters: {text}"
    except FloatingPointError as error:
        return "not finite", "" if came == "sampled" and clear(str(error)) else f"{came}: {error}"
    except Exception as error:
        return came, f"{type(error).__name__}: {error}"
    return came, ""


def clear(text: str) -> bool:
    """Whether an error is short, without markup, and not that of a computer that lacks memory."""
    return len(text) <= LONGEST and not {"<", ">"} & set(text) and "memory" not in text and "allocate" not in text


def main(number: int, count: int) -> None:
    """Print a line of JSON for every file: what was done, what came of it, and how that broke the promise."""
    torch.set_num_threads(1)
    make_whole()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / NAME
        for kind, data in WHOLE.items():
            path.write_bytes(data)
            used(load_with_notes(path)[0])
            assert outcome(path) == ("sampled", ""), kind

        @seed(number)
        @settings(max_examples=count, database=None, deadline=None, suppress_health_check=list(HealthCheck))
        @given(mutants())
        def tried(mutant: tuple[str, bytes]) -> None:
            told, data = mutant
            path.write_bytes(data)
            came, why = outcome(path)
            print(json.dumps([told, came, why[:LONGEST]]), flush=True)
            if why and (kept := os.environ.get("AMED_KEEP")):
                (Path(kept) / f"{came}_{hashlib.sha256(data).hexdigest()[:8]}.safetensors").write_bytes(data)

        tried()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
