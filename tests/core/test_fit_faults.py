"""Every kind of fit stopped, killed, and asked of a model that fails: its predictor is never silently another."""

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import CASES, Case, multistep, undisturbed, uses_at_scales
from problems import SIGMA_MAX, Counting, Guided, mixture, multistep_config, noise, same
from torch import Tensor
from trials import Trials

from amed_core import Fit, TrainConfig, load_predictor, sample
from amed_core.files import load_state, save_state
from amed_core.fit.teacher import Heun
from amed_core.fit.trajectories import out_of_memory

SMALL = {"iterations": 2, "baselines": 2, "grids": 2, "teacher_calls": 6}
MORE = {
    "multistep, another teacher": Case(partial(multistep, teacher=Heun.of(multistep_config(3), 9))),
    "multistep, several uses and scales": Case(uses_at_scales),
}


def small(case: Case) -> Case:
    """The same kind, shorter."""
    return case if isinstance(case.settings, TrainConfig) else Case(case.make, replace(case.settings, **SMALL))


KINDS = {name: small(case) for name, case in (CASES | MORE).items()}
every_kind = pytest.mark.parametrize("name", KINDS)


def some_calls(name: str, count: int, what: str) -> list[int]:
    """So many of a fit's model calls, which chance chooses for `what` is tried; all of them if there are no more."""
    every = range(1, undisturbed(KINDS[name])[1].calls + 1)
    return sorted(random.Random(f"{name}, {what}").sample(every, min(count, len(every))))


def gone_on(name: str, state: Any, file: Path) -> tuple[Fit, Counting]:
    """A new fit that went on from a state to its end, on a model that is well."""
    save_state(file, state)
    fit, model = KINDS[name].fit()
    fit.load_state_dict(load_state(file))
    list(fit.events())
    return fit, model


def as_undisturbed(name: str, fit: Fit) -> bool:
    """Whether a finished fit is as if nothing had happened."""
    whole = undisturbed(KINDS[name])[0]
    alike = all(map(same, fit.predictors.predictors, whole.predictors.predictors))
    return alike and fit.losses == whole.losses and fit.summary().error == whole.summary().error


@every_kind
@pytest.mark.trust("resumed")
def test_stopped_at_model_calls_and_resumed_it_is_the_same_predictor(name: str, trials: Trials, tmp_path: Path) -> None:
    for call in some_calls(name, trials.many(1, 10**6), "stopped"):
        fit, model = KINDS[name].fit(interrupted_at=call)
        with pytest.raises(KeyboardInterrupt):
            list(fit.events())
        again, asked = gone_on(name, fit.state_dict(), tmp_path / "state.safetensors")
        trials.held(f"{name}, at call {call}", as_undisturbed(name, again), "another predictor")
        counted = again.model_calls == model.samples + asked.samples
        trials.held(f"{name}, at call {call}", counted, f"{again.model_calls} calls are counted")


class Failing:
    """Makes one call of a counting model fail."""

    def __init__(self, model: Counting, call: int, fault: str) -> None:
        self.model, self.call, self.fault = model, call, fault
        model.look, model.answered = self.look, self.answered

    def look(self) -> None:
        """Before the call."""
        if self.model.calls == self.call and self.fault == "memory":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")
        if self.model.calls == self.call and self.fault == "kernel":
            raise RuntimeError("a kernel failed")

    def answered(self, answer: Any) -> Any:
        """After it."""
        if self.model.calls != self.call or self.fault != "NaN":
            return answer
        return (torch.nan * answer[0], *answer[1:]) if isinstance(answer, tuple) else torch.nan * answer


def named(error: Exception, fault: str) -> bool:
    """Whether an error says what happened."""
    kinds = {"NaN": isinstance(error, FloatingPointError), "memory": out_of_memory(error)}
    return kinds.get(fault, "a kernel failed" in str(error))


def usable(name: str, fit: Fit) -> bool:
    """Whether its predictor samples, and its errors are known."""
    x, ask = SIGMA_MAX * noise(2, 1, 4, 4), Guided(3.0) if "guided" in name else mixture
    drawn: Tensor = sample(ask, x, fit.predictor.method(guidance=2.0))
    return bool(drawn.isfinite().all()) and torch.tensor(fit.summary().error or 0.0).isfinite().item() is True


@every_kind
@pytest.mark.parametrize("fault", ["NaN", "memory", "kernel"])
@pytest.mark.trust("training")
def test_a_model_that_fails_once_gives_the_same_predictor_or_says_so(
    name: str, fault: str, trials: Trials, tmp_path: Path
) -> None:
    """What a fault leaves is no poison: from its state the fit goes on as if there had been none."""
    for call in some_calls(name, trials.many(1, 10**6), fault):
        fit, model = KINDS[name].fit()
        Failing(model, call, fault)
        where = f"{name}, {fault} at call {call}"
        try:
            list(fit.events())
        except Exception as error:
            trials.held(where, named(error, fault), f"a raw {type(error).__name__}: {error}")
            again, _ = gone_on(name, fit.state_dict(), tmp_path / "state.safetensors")
            told = as_undisturbed(name, again) or bool(again.summary().warnings())  # of NaN that was met before
            trials.held(where, told, "its state leads silently to another predictor")
            continue
        halved = fault == "memory"  # which rounds otherwise
        told = halved or as_undisturbed(name, fit) or bool(fit.summary().warnings())
        trials.held(where, told and usable(name, fit), "silently another predictor, or none that samples")


@pytest.mark.parametrize("name", ["multistep", "multistep, several uses"])
def test_a_fit_that_began_anew_with_a_better_teacher_goes_on_with_that(name: str, tmp_path: Path) -> None:
    whole, _ = undisturbed(KINDS[name])
    refused = first_of(whole)["refused"]
    assert refused > 0, "or the test shows nothing"
    fit, model = KINDS[name].fit(interrupted_at=refused // 2 + 5)  # samples come in twos
    with pytest.raises(KeyboardInterrupt):
        list(fit.events())
    model.interrupted_at = 0
    assert first_of(fit)["refused"] == refused
    assert not first_of(fit)["history"]
    again, _ = gone_on(name, fit.state_dict(), tmp_path / "state.safetensors")
    assert as_undisturbed(name, again)
    assert first_of(again)["refused"] == refused


def first_of(fit: Fit) -> dict[str, Any]:
    """The state of the first of several fits."""
    state = fit.state_dict()
    fits = state.get("fits", [state])
    one: dict[str, Any] = fits["0"] if isinstance(fits, dict) else fits[0]
    return one


def test_a_set_that_ends_with_images_goes_on_from_what_its_last_call_left(tmp_path: Path) -> None:
    """Their grids begin at a level as a schedule rounds it."""
    name = "multistep, several uses"
    fit, model = KINDS[name].fit(interrupted_at=undisturbed(KINDS[name])[1].calls - 1)
    with pytest.raises(KeyboardInterrupt):
        list(fit.events())
    model.interrupted_at = 0
    again, _ = gone_on(name, fit.state_dict(), tmp_path / "state.safetensors")
    assert as_undisturbed(name, again)


KILLED = """
import sys, time
from pathlib import Path
sys.path[:0] = sys.argv[3:]
from amed_core import save_predictor
from amed_core.files import load_state, save_state
from test_fit_faults import KINDS
name, folder = sys.argv[1], Path(sys.argv[2])
fit, model = KINDS[name].fit()
state = folder / "state.safetensors"
if state.exists():
    fit.load_state_dict(load_state(state))
print("ready", flush=True)
model.look = lambda: save_state(state, fit.state_dict())  # all the time, so that it is killed while it writes, too
list(fit.events())
save_predictor(fit.predictors, folder / "predictor.safetensors")
state.unlink()
"""


def killed_again_and_again(name: str, folder: Path, chance: random.Random, most: int) -> Iterator[Path]:
    """A process that fits is killed at most so often, and begun anew until it finishes; after each kill, its folder."""
    root = Path(__file__).parents[2]
    paths = [str(root), str(root / "tests"), str(root / "tests" / "core")]
    for kill in range(most + 1):
        command = [sys.executable, "-c", KILLED, name, str(folder), *paths]
        with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == b"ready"
            if kill < most:
                time.sleep(chance.uniform(0.0, 0.5))
                process.kill()
        yield folder
        if process.returncode == 0:
            return


@pytest.mark.parametrize("name", ["network, differences", "multistep"])
@pytest.mark.trust("killed")
def test_killed_at_any_moment_it_goes_on_to_the_same_predictor(name: str, trials: Trials, tmp_path: Path) -> None:
    chance, kills = random.Random(name), 0
    for attempt in range(trials.many(1, 5)):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        for _ in killed_again_and_again(name, folder, chance, trials.many(1, 3)):
            kills += 1
            if (state := folder / "state.safetensors").exists():
                fit, _ = KINDS[name].fit()
                fit.load_state_dict(load_state(state))  # whole, whenever that was
        found = load_predictor(folder / "predictor.safetensors")
        whole = undisturbed(KINDS[name])[0].predictor
        trials.held(f"{name}, attempt {attempt}", same(found, whole), f"another predictor after {kills} processes")
        trials.held(f"{name}, attempt {attempt}", not (folder / "state.safetensors").exists(), "its state is left")
