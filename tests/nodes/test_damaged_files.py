"""Files in the models folder that cannot be read, or that say what they should not, as people meet them."""

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import Family
from toys import apply, k_sample, predictor
from trials import Trials

SCRIPT = "<img src=x onerror=alert(1)>"
DEEP = json.dumps("DEEP")  # stands in JSON for what is nested too deeply
LONGEST = 300  # characters of an error


def rewritten(data: bytes, **header: Any) -> bytes:
    """A predictor file whose header says something else."""
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    told = json.loads(entries["__metadata__"]["header"])
    entries["__metadata__"]["header"] = json.dumps(told | header)
    text = json.dumps(entries).replace(json.dumps(DEEP)[1:-1], "[" * 5000 + "]" * 5000).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


@pytest.fixture
def damaged(pack: Any, flux: Family, models: Path) -> Mapping[str, Path]:
    """Files of the models folder that are none, by what is wrong with them."""
    whole = models / "whole.safetensors"
    pack.amed_core.files.save_predictor(predictor(pack, flux).predictor, whole)
    data = whole.read_bytes()
    whole.unlink()
    contents = {
        "empty": b"",
        "text": b"a letter to a friend, much longer than eight bytes",
        "cut": data[:-1],
        "header": data[:500],
        "longer": data + b"\0",
        "old": rewritten(data, version=1),
        "new": rewritten(data, version=3),
        "none": rewritten(data, configs=[]),
        "list": rewritten(data, configs=[[1]]),
        "many": rewritten(data, configs=[{}] * 10_000),
        "deep": rewritten(data, notes="DEEP"),
        "script": rewritten(data, configs=[{SCRIPT: SCRIPT}]),
        "notes": rewritten(data, notes=[SCRIPT]),
    }
    for name, content in contents.items():
        (models / f"{name}.safetensors").write_bytes(content)
    with (models / "huge.safetensors").open("wb") as file:
        file.truncate(1_600_000_000)
    (models / "folder.safetensors").mkdir()
    if os.name == "posix":
        (models / f"{SCRIPT}.safetensors").write_bytes(b"")
        os.mkfifo(models / "pipe.safetensors")
    return {path.name: path for path in models.iterdir()}


@pytest.mark.trust("files")
def test_what_cannot_be_read_costs_no_list_and_no_picture(
    pack: Any, flux: Family, models: Path, damaged: Mapping[str, Path], trials: Trials
) -> None:
    nodes = pack.nodes
    options = nodes.AMEDLoadPredictor.define_schema().inputs[0].options
    for name in damaged:
        about = nodes.routes.about(name)
        clear = about["brief"] == "cannot be read" and 20 < len(about["full"]) <= LONGEST
        trials.held(f"about {name}", clear and not {"<", ">"} & set(about["full"]), str(about))
        if name in options:
            changed = [nodes.AMEDLoadPredictor.fingerprint_inputs(name) for _ in range(2)]
            well = bool(changed[0]) == damaged[name].is_file() and changed[0] == changed[1]
            trials.held(f"fingerprint of {name}", well, str(changed))
            with pytest.raises(ValueError, match=r"safetensors") as caught:
                nodes.AMEDLoadPredictor.execute(name)
            trials.held(f"load {name}", len(str(caught.value)) <= LONGEST, str(caught.value))
    core = pack.amed_core
    config = core.student_config("amed_multistep", 5, nodes.pairing.model_facts(flux.model))
    table = core.predictor.build(config)
    pack.amed_core.files.save_predictor(table, models / "a whole one.safetensors")
    os.utime(models / "a whole one.safetensors", (1, 1))  # so that all others are looked at before it
    drawn = k_sample(flux, flux.model, 5, 1.0)
    asked = apply(pack, flux, nodes.values.NotedPredictor(table))
    trials.held("sampling", torch.equal(drawn, k_sample(flux, asked, 5, 1.0)), "another picture")


def test_the_version_of_a_file_is_another_where_the_file_is(pack: Any, flux: Family, models: Path) -> None:
    load, path = pack.nodes.AMEDLoadPredictor, models / "one.safetensors"
    seen = []
    for seed in (1, 2):
        pack.amed_core.files.save_predictor(predictor(pack, flux, seed=seed).predictor, path)
        seen.append(load.fingerprint_inputs("one.safetensors"))
        assert load.fingerprint_inputs("one.safetensors") == seen[-1]
    assert seen[0] != seen[1]
    assert load.fingerprint_inputs("gone.safetensors") == ""


def test_a_file_and_its_notes_are_of_one_version(
    pack: Any, flux: Family, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though another one takes its place as soon as it was read."""
    files, contents = pack.amed_core.files, pack.amed_core.contents
    one, other = predictor(pack, flux, seed=1), predictor(pack, flux, "amed_euler", calls=4, seed=2)
    path, reading = models / "one.safetensors", contents.load
    files.save_predictor(one.predictor, path, {"which": "one"})

    def swapped(data: bytes) -> Any:
        files.save_predictor(other.predictor, path, {"which": "other"})
        return reading(data)

    monkeypatch.setattr(contents, "load", swapped)
    found = pack.nodes.predictor_files.loaded("one.safetensors")
    assert (found.notes["which"], found.config.calls) == ("one", 5)
    assert files.read_notes(path) == {"which": "other"}


@pytest.mark.trust("files")
@pytest.mark.parametrize("name", ["gone.safetensors", "x" * 5000, "../" * 500, SCRIPT, "\0", "\ud800", ""])
def test_a_name_that_nothing_has_is_told_in_short(pack: Any, models: Path, name: str) -> None:
    models.mkdir()
    for number in range(200):
        (models / f"{number:03}_{'y' * 100}.safetensors").touch()
    assert len(pack.nodes.AMEDLoadPredictor.validate_inputs(name)) <= LONGEST
    assert pack.nodes.routes.about(name)["brief"] == "cannot be read"
    assert len(pack.nodes.routes.about(name)["full"]) <= LONGEST
    with pytest.raises(ValueError, match="There is no predictor file") as caught:
        pack.nodes.AMEDLoadPredictor.execute(name)
    assert len(str(caught.value)) <= LONGEST


@pytest.mark.trust("scripts")
def test_what_a_file_says_of_its_model_is_no_markup_in_any_text(
    pack: Any, flux: Family, models: Path, trials: Trials
) -> None:
    nodes, made = pack.nodes, predictor(pack, flux)
    odd = {name: SCRIPT if isinstance(fact, str) else fact for name, fact in made.config.model.items()}
    one = replace(made.config, model={**odd, "guidance": SCRIPT, "guider": SCRIPT})
    pack.amed_core.files.save_predictor(pack.amed_core.AMEDPredictor(one), models / "odd.safetensors", {"a": SCRIPT})
    found = nodes.predictor_files.loaded("odd.safetensors")
    guider = flux_guider(flux)
    texts = {
        "describe": nodes.values.describe(found),
        "briefly": nodes.values.briefly(found),
        "settings": nodes.values.settings(found),
        "telling": nodes.saving.telling(found),
        "saved": nodes.AMEDSavePredictor.execute(found, "auto").args[0],
        "notes": json.dumps(found.notes),
        "facts": json.dumps(dict(found.config.model)),
        "differences": " ".join(nodes.pairing.differences(found.config, nodes.pairing.fingerprint(flux.model), guider)),
        **nodes.routes.about("odd.safetensors"),
    }
    with pytest.raises(ValueError, match="made for another model") as caught:
        k_sample(flux, apply(pack, flux, found), 5, 1.0)
    texts["refused"] = str(caught.value)
    for name, text in texts.items():
        trials.held(name, bool(text) and not {"<", ">"} & set(text), text)


def flux_guider(flux: Family) -> Any:
    import comfy.samplers  # noqa: PLC0415 - ComfyUI's

    guider = comfy.samplers.CFGGuider(flux.model)
    guider.set_cfg(1.0)
    guider.inner_model = flux.model.model
    return guider


@pytest.mark.trust("scripts")
def test_all_texts_reach_the_browser_as_text(pack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys  # noqa: PLC0415
    from types import SimpleNamespace  # noqa: PLC0415

    sent: list[str] = []
    instance = SimpleNamespace(send_progress_text=lambda text, node, client: sent.append(text), client_id="a browser")
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=instance)))
    node = SimpleNamespace(hidden=SimpleNamespace(unique_id="1"))
    pack.nodes.values.say(node, SCRIPT)
    pack.nodes.values.tell(node, f"& {SCRIPT}")
    assert sent == ["&lt;img src=x onerror=alert(1)&gt;", "AMED: &amp; &lt;img src=x onerror=alert(1)&gt;"]
