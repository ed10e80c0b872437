"""Files that load completely or not at all."""

import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from problems import SIGMA_MAX, SIGMA_MIN, midpoint_config, mixture, multistep_config, noise, same
from safetensors import safe_open
from safetensors.torch import save_file

from amed_core import (
    AMEDPredictor,
    MidpointTable,
    MultistepTable,
    PredictorConfig,
    load_predictor,
    polynomial,
    sample,
    save_predictor,
)
from amed_core.config import MOST_UNITS
from amed_core.contents import LARGEST_FILE, PredictorFileError
from amed_core.files import load_predictors, load_state, read_notes, save_state, write_json
from amed_core.predictor import PredictorSet

ROOT = Path(__file__).parents[2]
CONFIG = PredictorConfig(
    "dpmpp", tuple(polynomial(4, SIGMA_MIN, SIGMA_MAX).tolist()), SIGMA_MIN, SIGMA_MAX, scale_time=0.2, guidance=3.5
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "sub" / "p.safetensors"
    save_predictor(AMEDPredictor(CONFIG), path, {"seed": 3})
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_file_rebuilds_its_own_sampler(tmp_path: Path, dtype: torch.dtype) -> None:
    predictor = AMEDPredictor(CONFIG, torch.Generator().manual_seed(5)).to(dtype)
    save_predictor(predictor, tmp_path / "p.safetensors", {"teacher": "dpmpp", "seed": 5})
    loaded = load_predictor(tmp_path / "p.safetensors")
    assert loaded.config == CONFIG
    x = SIGMA_MAX * noise(2, 1, 4, 4)
    ours, theirs = (sample(mixture, x, p.method()) for p in (predictor, loaded))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=0)
    assert read_notes(tmp_path / "p.safetensors") == {"teacher": "dpmpp", "seed": 5}


def test_the_header_is_json_that_anyone_can_read(file: Path) -> None:
    with safe_open(file, framework="pt") as opened:
        header = json.loads(opened.metadata()["header"])
    assert header["configs"][0]["guidance"] == 3.5
    assert header["configs"][0]["sigmas"] == list(CONFIG.sigmas)


@pytest.mark.trust("files")
@pytest.mark.parametrize("keep", [0, 4, 8, 100, 2000, -1])
def test_a_cut_file_is_damaged(file: Path, keep: int) -> None:
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(PredictorFileError, match=r"p\.safetensors is damaged"):
        load_predictor(file)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("end", [0, 1])
def test_plans_at_the_ends_of_their_ranges_survive_rounding(tmp_path: Path, dtype: torch.dtype, end: int) -> None:
    table = MidpointTable(midpoint_config("amed_dpm_2"))
    table.plans.copy_(torch.tensor([bounds[end] for bounds in table.config.bounds]))
    save_predictor(table.to(dtype), tmp_path / "p.safetensors")
    assert same(load_predictor(tmp_path / "p.safetensors"), table)


def test_what_is_shipped_and_what_was_not_trained_is_far_within_the_limits(tmp_path: Path) -> None:
    for path in sorted((ROOT / "predictors").glob("*.safetensors")):
        assert max(float(w.abs().max()) for one in load_predictors(path).predictors for w in one.parameters()) < 100
        assert path.stat().st_size < LARGEST_FILE / 100
    for hidden in (1, MOST_UNITS):
        predictor = AMEDPredictor(replace(CONFIG, hidden=hidden))
        save_predictor(predictor, tmp_path / "p.safetensors")
        assert same(load_predictor(tmp_path / "p.safetensors"), predictor)


@pytest.mark.trust("files")
def test_files_that_are_no_predictors_are_named(tmp_path: Path, file: Path) -> None:
    (tmp_path / "text.safetensors").write_text("a letter to a friend, much longer than eight bytes")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    save_state(tmp_path / "state.safetensors", {"a": 1})
    for name, words in (
        ("text", "damaged"),
        ("other", "no amed_predictor"),
        ("state", "no amed_predictor"),
        ("gone", "no file"),
    ):
        with pytest.raises(PredictorFileError, match=words):
            load_predictor(tmp_path / f"{name}.safetensors")
    assert load_predictor(file)


def rewrite(path: Path, weights: dict[str, torch.Tensor] | None = None, **header: object) -> None:
    with safe_open(path, framework="pt") as opened:
        found = json.loads(opened.metadata()["header"])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    save_file({**tensors, **(weights or {})}, path, {"format": "amed_predictor", "header": json.dumps(found | header)})


@pytest.mark.trust("files")
def test_weights_that_do_not_fit_or_are_not_finite_are_refused(file: Path) -> None:
    rewrite(file, {"0.head_r.weight": torch.full((1, 20), torch.nan)})
    with pytest.raises(PredictorFileError, match="NaN"):
        load_predictor(file)
    rewrite(file, {"0.head_r.weight": torch.zeros(1, 21)})
    with pytest.raises(PredictorFileError, match="do not fit"):
        load_predictor(file)


@pytest.mark.trust("files")
@pytest.mark.parametrize(("version", "remedy"), [(99, "Update it"), (1, "Train it again")])
def test_files_of_other_versions_say_what_to_do(file: Path, version: int, remedy: str) -> None:
    rewrite(file, version=version)
    with pytest.raises(PredictorFileError, match=remedy):
        load_predictor(file)


@pytest.mark.trust("files")
def test_a_file_holds_a_set_in_its_order(tmp_path: Path) -> None:
    """Each with its own numbers, and in a file with fewer of them than its header says none is made up."""
    path, tables = tmp_path / "set.safetensors", []
    for number, calls in enumerate((5, 3, 4)):
        tables.append(MultistepTable(multistep_config(calls)))
        tables[-1].weights.fill_(number)
    save_predictor(PredictorSet(tuple(tables)), path)
    found = load_predictors(path)
    assert [one.config for one in found.predictors] == [one.config for one in tables]
    assert all(same(one, other) for one, other in zip(found.predictors, tables, strict=True))
    assert load_predictor(path).config.calls == 5
    with safe_open(path, framework="pt") as opened:
        kept = {name: opened.get_tensor(name) for name in opened.keys() if not name.startswith("1.")}  # noqa: SIM118
        about = opened.metadata()
    save_file(kept, path, about)
    with pytest.raises(PredictorFileError, match="do not fit its header"):
        load_predictors(path)
    kept["7.weights"] = torch.zeros(2)
    save_file(kept, path, about)
    with pytest.raises(PredictorFileError, match="unknown predictors"):
        load_predictors(path)


@pytest.mark.trust("files")
def test_bad_settings_in_a_header_name_the_file(file: Path) -> None:
    rewrite(file, configs=[{"solver": "rk4", "sigmas": [80.0, 1.0], "sigma_min": 0.1, "sigma_max": 80.0}])
    with pytest.raises(PredictorFileError, match=r"p.safetensors .*rk4"):
        load_predictor(file)


@pytest.mark.trust("saving")
def test_a_failed_write_leaves_the_old_file_and_nothing_else(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = file.read_bytes()

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        save_predictor(AMEDPredictor(replace(CONFIG, guidance=9.0)), file)
    with pytest.raises(OSError, match="No space"):
        write_json(file.with_name("rows.json"), [])
    assert file.read_bytes() == old
    assert [p.name for p in file.parent.iterdir()] == ["p.safetensors"]


def test_states_keep_structure_and_bits(tmp_path: Path) -> None:
    state = {
        "tensor": noise(3, 4),
        "nested": {"list": [1, 2.5, None, "a", noise(1)], "empty": {}, 7: torch.tensor(3)},
        "integer": torch.arange(5, dtype=torch.uint8),
    }
    save_state(tmp_path / "s.safetensors", state)
    loaded = load_state(tmp_path / "s.safetensors")
    assert list(loaded["nested"]) == ["list", "empty", 7]
    assert loaded["nested"]["list"][:4] == [1, 2.5, None, "a"]
    assert (loaded["tensor"] == state["tensor"]).all()
    assert loaded["integer"].dtype == torch.uint8


@pytest.mark.trust("supply")
def test_nothing_here_unpickles_or_evaluates() -> None:
    sources = [*(ROOT / "amed_core").rglob("*.py"), *(ROOT / "nodes").glob("*.py"), ROOT / "__init__.py"]
    assert len(sources) > 15
    for source in sources:
        text = source.read_text()
        for word in ("import pickle", "torch.load", "torch.save", " eval(", " exec("):
            assert word not in text, f"{source.name} has {word}"


WRITER = """
import sys
from pathlib import Path
from amed_core import AMEDPredictor, save_predictor
from amed_core.samplers import ModelFacts, student_config
facts = ModelFacts(0.002, 80.0)
predictors = [AMEDPredictor(student_config("amed", 5, facts, hidden=2000 + n)) for n in range(2)]
print("ready", flush=True)
while True:
    for predictor in predictors:
        save_predictor(predictor, Path(sys.argv[1]))
"""


@pytest.mark.trust("saving")
def test_killed_at_any_moment_a_writer_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    file = tmp_path / "p.safetensors"
    for delay in (0.01, 0.05, 0.12):
        command = [sys.executable, "-c", WRITER, str(file)]
        with subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline().strip() == b"ready"
            while not file.exists():
                time.sleep(0.001)
            time.sleep(delay)
            writer.kill()
        assert load_predictor(file).config.hidden in (2000, 2001)


@pytest.mark.trust("scripts")
def test_texts_of_a_file_are_made_plain_and_odd_facts_are_refused(tmp_path: Path) -> None:
    """What a file says of its model is shown in browsers: it holds no markup, however it was made."""
    facts = {"family": "SDXL<img src=x onerror=alert(1)>", "loras": "none", "shift": 1.5, "patches": "x" * 5000}
    path = tmp_path / "shared.safetensors"
    save_predictor(AMEDPredictor(replace(CONFIG, model=facts)), path)
    found = load_predictor(path).config.model
    assert found == {"family": "SDXLimg srcx onerroralert(1)", "loras": "none", "shift": 1.5, "patches": "x" * 200}
    for odd in ({"family": ["SDXL"]}, {"shift": math.inf}, {"<b>": 1.0}, {f"fact_{n}": 1.0 for n in range(100)}):
        save_predictor(AMEDPredictor(replace(CONFIG, model=odd)), path)
        with pytest.raises(PredictorFileError, match="model "):
            load_predictor(path)


@pytest.mark.trust("states")
def test_a_state_holds_parts_of_tensors_of_any_layout(tmp_path: Path) -> None:
    """A part of one number seems contiguous whatever its stride is."""
    whole = torch.arange(12.0, dtype=torch.float64).reshape(3, 4)
    parts = [whole[:1, 1], whole.T, whole[:, ::2], whole[1, 2]]
    save_state(tmp_path / "state.safetensors", {"parts": parts})
    found = load_state(tmp_path / "state.safetensors")["parts"]
    assert all(torch.equal(one, part) for one, part in zip(found, parts, strict=True))
