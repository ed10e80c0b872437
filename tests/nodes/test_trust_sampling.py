"""Whatever goes wrong in whichever call of a sampling is told; the next run is right, and nothing is left behind."""

import logging
from typing import Any

import pytest
import torch
from families import Family, make
from toys import apply, everything_of, k_sample, predictor

CFG, CALLS, LESSON = 3.0, 5, 40  # calls of a run, and at most of one that teaches 4 of them
STUDENTS = ("amed", "amed_euler", "amed_dpm_2", "amed_ipndm", "amed_dpmpp_2m", "amed_dpmpp_3m")
FAMILIES = ("flux", "sd3", "lumina2", "wan21", "qwen_image")
SOME = 37  # of so many one, in the suite


class BrokenError(Exception):
    """What nobody expects."""


FAULTS: dict[str, tuple[type[Exception], str] | None] = {  # an exception, if that is what happens
    "NaN": None,
    "infinity": None,
    "memory": (torch.cuda.OutOfMemoryError, "CUDA out of memory. Tried to allocate 20 MiB"),
    "kernel": (RuntimeError, "a kernel"),
    "an exception": (BrokenError, "of another pack"),
    "Cancel": None,
}


def faulty(model: Any, fault: str, call: int) -> Any:
    """The MODEL, whose call of this number goes wrong, once."""
    import comfy.model_management as mm  # noqa: PLC0415

    clone, made = model.clone(), []

    def wrapper(apply_model: Any, parameters: Any) -> torch.Tensor:
        made.append(1)
        if len(made) == call and fault == "Cancel":
            mm.interrupt_current_processing()
        if len(made) == call and (raised := FAULTS[fault]) is not None:
            raise raised[0](raised[1])
        answer: torch.Tensor = apply_model(parameters["input"], parameters["timestep"], **parameters["c"])
        return answer * float(fault) if len(made) == call and fault in ("NaN", "infinity") else answer

    clone.set_model_unet_function_wrapper(wrapper)
    return clone


def told(family: Family, model: Any, steps: int, cfg: float, sampler: str) -> Any:
    """A sample, or the exception, with what ComfyUI's executor does with Cancel between nodes."""
    import comfy.model_management as mm  # noqa: PLC0415

    try:
        drawn = k_sample(family, model, steps, cfg, sampler)
        mm.throw_exception_if_processing_interrupted()
    except (Exception, mm.InterruptProcessingException) as error:  # which newer ComfyUI has beside all others
        return error
    return drawn


def well(fault: str, answer: Any) -> bool:
    """Whether the right error came of a fault."""
    import comfy.model_management as mm  # noqa: PLC0415

    if fault in ("NaN", "infinity"):
        return isinstance(answer, FloatingPointError) and "NaN or infinity" in str(answer)
    if (raised := FAULTS[fault]) is not None:
        return type(answer) is raised[0] and str(answer) == raised[1]
    return isinstance(answer, mm.InterruptProcessingException)


@pytest.mark.trust("sampling")
def test_a_fault_in_any_call_is_told_and_leaves_nothing(pack: Any, trials: Any) -> None:
    uses = [(name, student) for name in FAMILIES for student in STUDENTS]
    tries = [(use, fault, call) for use in uses for fault in FAULTS for call in range(1, CALLS + 1)]
    families, whole = {name: make(name) for name in FAMILIES}, {}
    for use, fault, call in tries if trials.full else tries[::SOME]:
        name, student = use
        family = families[name]
        applied = apply(pack, family, predictor(pack, family, student, guidance=CFG))
        if use not in whole:
            whole[use] = k_sample(family, applied, CALLS, CFG, student)
        before = everything_of(family.model)
        answer = told(family, faulty(applied, fault, call), CALLS, CFG, student)
        again = k_sample(family, applied, CALLS, CFG, student)
        left = everything_of(family.model) != before
        why = f"{answer!r:.100}, again alike: {bool((again == whole[use]).all())}, something left: {left}"
        trials.held(f"{use}, {fault} in call {call}", well(fault, answer) and "True, something left: False" in why, why)


@pytest.mark.trust("sampling")
def test_a_fault_in_any_call_of_a_lesson_costs_no_picture(
    pack: Any, user: Any, trials: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Only Cancel ends it; and when that is forgotten, the next run teaches as if nothing had been."""
    from test_learning import digits, files, learning  # noqa: PLC0415

    caplog.set_level(logging.WARNING)
    demo, kept = digits(pack, 1), user.parent / "amed_learned"
    made: list[int] = []
    counted = demo.model.clone()
    counted.set_model_unet_function_wrapper(
        lambda apply_model, parameters: (
            made.append(1),
            apply_model(parameters["input"], parameters["timestep"], **parameters["c"]),
        )[1]
    )
    expected = k_sample(demo, counted, 4, 1.0)
    assert 24 < len(made) <= LESSON * 10
    tries = [(fault, call) for fault in FAULTS for call in range(1, len(made) + 1, max(len(made) // LESSON, 1))]
    for fault, call in tries if trials.full else tries[::SOME]:
        for file in files(kept):
            file.unlink()
        before = everything_of(demo.model)
        answer = told(demo, learning(pack, faulty(demo.model, fault, call), forget=True), 4, 1.0, "amed")
        ended = well(fault, answer) if fault == "Cancel" else torch.is_tensor(answer) and answer.isfinite().all()
        for file in files(kept):
            file.unlink()
        again = k_sample(demo, learning(pack, demo.model, forget=True), 4, 1.0)
        alike, left = bool((again == expected).all()), everything_of(demo.model) != before
        why = f"{answer!r:.100}, again alike: {alike}, something left: {left}, kept: {len(files(kept))}"
        trials.held(f"{fault} in call {call}", bool(ended) and alike and not left and len(files(kept)) == 1, why)
