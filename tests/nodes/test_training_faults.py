"""Trainings that are stopped, fail, meet a damaged state or a full disk: the predictor is never silently another."""

import os
import random
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from families import Family, control_net, make, prompt
from toys import heard, stopped_at, train
from trials import Trials

SHORT = {"steps": 3, "teacher_calls": 6, "trajectories": 2, "held_out": 1, "batch_size": 2}
COARSE = {"teacher": "my recipe", "teacher_sampler": "euler", "teacher_scheduler": "simple", "teacher_steps": 4}
KINDS: dict[str, dict[str, Any]] = {
    "default": SHORT,
    "several cfg": SHORT | {"cfg_max": 5.0},
    "several steps": SHORT | {"steps": "3-4", "effort": "quick"},
    "noise and images": SHORT | {"starts": "noise and images", "effort": "quick"},
    "passes": SHORT | {"steps": "5", "passes": 4, "effort": "quick"},
    "recipe": SHORT | {"teacher_calls": 0} | COARSE,
    "two models": SHORT | {"two models": True},
    "network": {"paper": True, "trajectories": 4, "epochs": 2},
    "network, reverse": {"paper": True, "trajectories": 4, "gradient": "reverse"},
    "table": {"paper": True, "predictor_type": "table", "trajectories": 2, "held_out": 2},
}
# Of the others the suite tries some in `test_training.py` and `test_paper_training.py`.
FEW_STOPPED = ["several cfg", "several steps", "passes", "recipe", "two models", "network, reverse"]
FEW_FAILING = ["default", "network", "table"]
FAULTS: dict[str, Exception | None] = {
    "NaN": None,
    "memory": torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB"),
    "kernel": RuntimeError("a kernel failed"),
}


@pytest.fixture(scope="module")
def flux(pack: Any) -> Family:
    del pack
    return make("flux")


def trained(pack: Any, family: Family, kind: str, model: Any = None, **changes: Any) -> Any:
    """What the node hands out of a kind of training."""
    how = KINDS[kind] | changes
    if how.pop("two models", False):
        prompts = (family.positive, family.negative)
        two = pack.nodes.AMEDTwoModelsGuider.execute(model or family.model, family.model, *prompts, 3.0, 0.875).args[0]
        return train(pack, family, **how, guider=two)
    return train(pack, family, model, **how)


def alike(one: Any, other: Any) -> bool:
    """Whether two trainings ended with the same predictors and the same losses."""

    def learned(made: Any) -> list[torch.Tensor]:
        return [values for part in made.every.predictors for values in part.state_dict().values()]

    ours, theirs = learned(one[0]), learned(other[0])
    same = len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))
    return same and one[1] == other[1]


@pytest.fixture(scope="module")
def undisturbed(pack: Any, flux: Family) -> Callable[[str], tuple[Any, int]]:
    """By kind, what comes of a training that nothing disturbs, and the calls of the model that it takes."""

    @cache
    def made(kind: str) -> tuple[Any, int]:
        asked: list[Any] = []
        return trained(pack, flux, kind, heard(flux.model, asked.append)), len(asked)

    return made


def failing(family: Family, call: int, error: Exception | None) -> Any:
    """The MODEL, which answers NaN, or raises an error, in one of its calls."""
    model, made = family.model.clone(), []

    def wrapper(apply_model: Any, parameters: Any) -> torch.Tensor:
        made.append(1)
        if len(made) == call and error is not None:
            raise error
        answer: torch.Tensor = apply_model(parameters["input"], parameters["timestep"], **parameters["c"])
        return answer * float("nan") if len(made) == call else answer

    model.set_model_unet_function_wrapper(wrapper)
    return model


def cancelled(pack: Any, family: Family, kind: str = "default", call: int = 20, **changes: Any) -> Any:
    """The MODEL of a training that was cancelled in one of its calls."""
    import comfy.model_management as mm  # noqa: PLC0415

    model, _ = stopped_at(family, call)
    with pytest.raises(mm.InterruptProcessingException):
        trained(pack, family, kind, model, **changes)
    return model


# Stopped and failing


@pytest.mark.parametrize("kind", KINDS if Trials().full else FEW_STOPPED)
@pytest.mark.trust("resumed")
def test_cancelled_at_model_calls_it_goes_on_to_the_same_predictor(
    pack: Any, flux: Family, user: Path, undisturbed: Any, kind: str, trials: Trials
) -> None:
    whole, calls = undisturbed(kind)
    for call in sorted(random.Random(kind).sample(range(1, calls), min(trials.many(1, 20), calls - 1))):
        model = cancelled(pack, flux, kind, call)
        again = trained(pack, flux, kind, model)
        trials.held(f"{kind}, at call {call}", alike(again, whole), "another predictor")
        trials.held(f"{kind}, at call {call}", not list(user.glob("*")), "its state is left")


@pytest.mark.parametrize("kind", KINDS if Trials().full else [*FEW_STOPPED, "network"])
@pytest.mark.trust("resumed")
def test_cancelled_in_its_very_last_call_it_is_whole_now_or_when_it_goes_on(
    pack: Any, flux: Family, user: Path, undisturbed: Any, kind: str
) -> None:
    """ComfyUI looks at Cancel between two calls, and some versions after the last one; else it stops what follows."""
    import comfy.model_management as mm  # noqa: PLC0415

    whole, calls = undisturbed(kind)
    model, made = stopped_at(flux, calls)
    try:
        finished = trained(pack, flux, kind, model)
    except mm.InterruptProcessingException:
        finished = trained(pack, flux, kind, model)
    else:
        with pytest.raises(mm.InterruptProcessingException):
            mm.throw_exception_if_processing_interrupted()
    assert len(made) >= calls
    assert alike(finished, whole)
    assert not list(user.glob("*")), "its state is left"


def said(error: Exception, fault: str, oom: Callable[[Exception], bool]) -> bool:
    """Whether an error says what happened."""
    kinds = {"NaN": isinstance(error, FloatingPointError), "memory": oom(error)}
    return kinds.get(fault, "a kernel failed" in str(error))


@pytest.mark.parametrize("kind", KINDS if Trials().full else FEW_FAILING)
@pytest.mark.trust("training")
def test_a_model_that_fails_once_gives_the_same_predictor_or_says_so(
    pack: Any, flux: Family, undisturbed: Any, kind: str, trials: Trials
) -> None:
    """The next training with a model that is well is as if there had been no fault."""
    (whole, calls), chance = undisturbed(kind), random.Random(kind)
    tried = [(fault, call) for fault in FAULTS for call in range(1, calls + 1)]
    for fault, call in chance.sample(tried, min(trials.many(1, 60), len(tried))):
        where = f"{kind}, {fault} at call {call}"
        try:
            made = trained(pack, flux, kind, failing(flux, call, FAULTS[fault]))
        except Exception as error:
            oom = pack.amed_core.fit.trajectories.out_of_memory
            trials.held(where, said(error, fault, oom), f"a raw {type(error).__name__}: {error}")
        else:
            told = "The model answered NaN" in made[2] or "Autograd failed" in made[2]
            finite = all(v.isfinite().all() for one in made[0].every.predictors for v in one.state_dict().values())
            trials.held(where, finite and (told or fault == "memory" or alike(made, whole)), "another predictor")
        trials.held(where, alike(trained(pack, flux, kind), whole), "the next training gives another predictor")


# States that cannot be used


def cut(state: Any, file: Path, save: Any) -> None:
    del state, save
    file.write_bytes(file.read_bytes()[:-50])


def flipped(state: Any, file: Path, save: Any) -> None:
    del state, save
    data = bytearray(file.read_bytes())
    data[-5] ^= 4  # of a tensor
    file.write_bytes(bytes(data))


def lacking(state: Any, file: Path, save: Any) -> None:
    save(file, {name: value for name, value in state.items() if name != "progress"})


def of_another_fit(state: Any, file: Path, save: Any) -> None:
    save(file, {"another": state})


def infinite_goals(state: Any, file: Path, save: Any) -> None:
    for ends in state["targets"]:
        for end in ends.values():
            end.flatten()[0] = torch.inf
    save(file, state)


def smaller_goals(state: Any, file: Path, save: Any) -> None:
    state["targets"] = [{name: end[..., :2] for name, end in ends.items()} for ends in state["targets"]]
    save(file, state)


def a_folder(state: Any, file: Path, save: Any) -> None:
    del state, save
    file.unlink()
    file.mkdir()


DAMAGES = [cut, flipped, lacking, of_another_fit, infinite_goals, smaller_goals, a_folder]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.trust("states")
def test_a_damaged_state_is_told_and_training_begins_anew(
    pack: Any, flux: Family, user: Path, undisturbed: Any, caplog: pytest.LogCaptureFixture, damage: Any
) -> None:
    model = cancelled(pack, flux, call=30)
    (file,) = user.glob("*.safetensors")
    files = pack.amed_core.files
    damage(files.load_state(file), file, files.save_state)
    again = trained(pack, flux, "default", model)
    assert "the state of this training cannot be used, so it begins anew" in caplog.text
    assert "before it was stopped" not in again[2]
    assert alike(again, undisturbed("default")[0])


@pytest.mark.trust("states")
def test_a_flipped_bit_is_seen_wherever_it_is(pack: Any, flux: Family, user: Path, trials: Trials) -> None:
    cancelled(pack, flux, call=30)
    (file,) = user.glob("*.safetensors")
    whole, chance = file.read_bytes(), random.Random(0)
    state = pack.amed_core.files.load_state(file)
    for _ in range(trials.many(50, 3000)):
        bit = chance.randrange(8 * len(whole))
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(bytes(data))
        try:
            found = pack.amed_core.files.load_state(file)
        except ValueError:
            trials.held(f"bit {bit}", True)
        else:
            trials.held(f"bit {bit}", str(found) == str(state), "goes unnoticed")


@pytest.mark.parametrize("other", ["prompt", "weights", "version", "ComfyUI"])
@pytest.mark.trust("states")
def test_what_is_another_training_begins_anew(
    pack: Any, user: Path, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, job = make("flux"), pack.nodes.training_job
    model, changes = cancelled(pack, family), {}
    if other == "prompt":
        changes["positives"] = [prompt("flux", 9)]
    if other == "weights":
        with torch.no_grad():
            next(iter(family.model.model.diffusion_model.parameters())).mul_(1.01)
    if other in ("version", "ComfyUI"):
        monkeypatch.setattr(job, {"version": "__version__", "ComfyUI": "COMFYUI_VERSION"}[other], "99.0")
    assert "before it was stopped" not in trained(pack, family, "default", model, **changes)[2]
    assert len(list(user.glob("*.safetensors"))) == 1, "that of the other training, which may go on"


def test_a_control_net_is_known_by_its_picture_its_strength_and_its_weights(pack: Any) -> None:
    def prompt_with(**changes: Any) -> list[Any]:
        control = control_net(5 + changes.pop("seed", 0))
        control.set_cond_hint(torch.full((1, 3, 8, 8), changes.pop("picture", 0.5)), 1.0, (0.0, 1.0))
        for name, value in changes.items():
            setattr(control, name, value)
        return [[torch.zeros(1, 2, 4), {"control": control}]]

    digest = pack.nodes.training_subject.digest
    assert digest(prompt_with()) == digest(prompt_with())
    for changes in ({"picture": 0.6}, {"strength": 0.4}, {"seed": 1}, {"timestep_percent_range": (0.2, 1.0)}):
        assert digest(prompt_with(**changes)) != digest(prompt_with())
    assert digest(prompt_with(previous_controlnet=control_net(9))) != digest(prompt_with())


# A disk that takes no more, and what fails beside the fit

FULL_DISK, READ_ONLY = OSError(28, "No space left on device"), OSError(30, "Read-only file system")


def refusing(error: Exception) -> Callable[..., Any]:
    """A function that raises this error."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise error

    return refuse


@pytest.mark.parametrize("error", [FULL_DISK, READ_ONLY])
@pytest.mark.trust("states")
def test_a_state_that_cannot_be_written_costs_nothing(
    pack: Any, flux: Family, user: Path, undisturbed: Any, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    whole = undisturbed("default")[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack.nodes.fitting, "SAVED_EVERY", 0.0)
        patch.setattr(pack.amed_core.files.os, "replace", refusing(error))
        made = trained(pack, flux, "default")
        assert caplog.text.count("the state of this training is not kept") == 1, "said once"
        assert "The state of this training is not kept: the log says why" in made[2]
        cancelled(pack, flux)  # which is no other error
    assert alike(made, whole)
    assert not list(user.glob("*")), "nor is anything half written"


BESIDE = {
    "preview": ("previews.Preview", "_sheet"),
    "plot": ("training", "plot"),
    "report": ("fitting", "report"),
    "comparison": ("fitting", "calls_for"),
    "price": ("fitting.Progress", "_price"),
    "picture on the node": ("training.ui", "PreviewImage"),
    "text on the node": ("training", "say"),
}


@pytest.mark.parametrize("what", BESIDE)
@pytest.mark.trust("states")
def test_what_fails_beside_a_fit_does_not_cost_it(
    pack: Any, flux: Family, undisturbed: Any, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    whole = undisturbed("default")[0]
    place, name = BESIDE[what]
    owner: Any = pack.nodes
    for part in place.split("."):
        owner = getattr(owner, part)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack.nodes.fitting, "TOLD_EVERY", 0.0)
        patch.setattr(owner, name, refusing(ZeroDivisionError("an odd model")))
        made = trained(pack, flux, "default")
    assert alike(made, whole)
    assert "an odd model" in caplog.text
    assert made[3].shape[0] == 1
    assert made[2]


@pytest.mark.trust("states")
def test_a_predictor_that_cannot_be_saved_is_handed_over_and_its_state_kept(
    pack: Any, flux: Family, user: Path, models: Path, undisturbed: Any
) -> None:
    asked: list[Any] = []
    model = heard(flux.model, asked.append)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack.nodes.training, "saved", refusing(FULL_DISK))
        made = trained(pack, flux, "default", model, save_as="auto")
    assert "NOT saved (No space left on device)" in made[2]
    assert len(list(user.glob("*.safetensors"))) == 1
    asked.clear()
    again = trained(pack, flux, "default", model, save_as="auto")
    assert "Saved as" in again[2]
    assert alike(again, made)
    assert len(asked) < 0.6 * undisturbed("default")[1], "those that show what it is worth"
    assert len(list(models.glob("*.safetensors"))) == 1
    assert not list(user.glob("*"))


# How much is kept, and for how long


@pytest.mark.trust("states")
def test_the_newest_ten_states_are_kept_for_thirty_days(pack: Any, flux: Family, user: Path) -> None:
    user.mkdir(parents=True)
    now, day = time.time(), 86_400
    ages = {f"{number:016x}.safetensors": number * day for number in range(1, 13)}
    ages |= {"f" * 16 + ".safetensors": 31 * day, "of the user.safetensors": 99 * day}
    ages |= {".amed-1.tmp": 2 * day, ".amed-2.tmp": 60}
    for name, age in ages.items():
        (user / name).write_bytes(b"")
        os.utime(user / name, (now - age, now - age))
    cancelled(pack, flux)
    left = {path.name for path in user.iterdir()}
    assert "of the user.safetensors" in left
    assert ".amed-2.tmp" in left, "somebody may be writing it"
    assert ".amed-1.tmp" not in left
    assert {f"{number:016x}.safetensors" for number in range(1, 10)} <= left
    assert len(left) == 10 + 2


@pytest.mark.trust("states")
def test_a_state_that_is_too_large_is_not_written_and_that_is_said_once(
    pack: Any,
    flux: Family,
    user: Path,
    undisturbed: Any,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls, texts = undisturbed("default")[1], list[str]()
    monkeypatch.setattr(pack.nodes.states, "MOST_BYTES", 1000)
    monkeypatch.setattr(pack.nodes.fitting, "SAVED_EVERY", 0.0)
    monkeypatch.setattr(pack.nodes.training, "tell", lambda node, text: texts.append(text))
    cancelled(pack, flux, call=calls - 10)
    assert not list(user.glob("*"))
    assert caplog.text.count("the state of this training is not kept") == 1
    assert "it takes 0.1 MB, and at most 0.0 MB are kept" in caplog.text
    assert "It has no state to go on from" in texts[-1]


@pytest.mark.trust("states")
def test_never_writes_nothing_but_the_predictor(
    pack: Any, flux: Family, user: Path, models: Path, undisturbed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, texts = undisturbed("default")[1], list[str]()
    monkeypatch.setattr(pack.nodes.fitting, "SAVED_EVERY", 0.0)
    monkeypatch.setattr(pack.nodes.training, "tell", lambda node, text: texts.append(text))
    cancelled(pack, flux, call=calls - 10)
    assert list(user.glob("*"))
    assert list(models.rglob("*.safetensors"))
    cancelled(pack, flux, call=calls - 10, keep_state="never")
    assert not list(user.glob("*")), "nor what was kept before"
    assert not list(models.rglob("*.safetensors"))
    assert texts[-1].endswith("Nothing of it was kept, as keep_state says")
    made = trained(pack, flux, "default", keep_state="never", save_as="auto")
    assert "before it was stopped" not in made[2]
    assert [path.parent for path in models.rglob("*") if path.is_file()] == [models]
