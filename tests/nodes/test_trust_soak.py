"""Many samplings and trainings in one process leave nothing behind: memory, threads, files and tensors are flat."""

import ctypes
import gc
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import make
from toys import apply, k_sample, predictor, train

STUDENTS = ("amed", "amed_euler", "amed_dpm_2", "amed_ipndm", "amed_dpmpp_2m", "amed_dpmpp_3m")


def held() -> dict[str, float]:
    """What this process holds, without the free memory that the C library keeps for later, where it can be asked."""
    import psutil  # noqa: PLC0415 - comes with ComfyUI

    gc.collect()
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)
    process = psutil.Process()
    return {
        "MB": process.memory_info().rss / 2**20,
        "threads": process.num_threads(),
        "files": len(process.open_files()),
        "tensors": sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects()),
    }


def round_of(pack: Any, family: Any, demo: Any, number: int) -> None:
    """Nine samplings, and a training."""
    for student in STUDENTS:
        applied = apply(pack, family, predictor(pack, family, student, guidance=3.0))
        k_sample(family, applied, 5, 3.0, student)
    k_sample(family, family.model, 4, 3.0, "euler", "normal")
    for steps in (3, 4):  # which learn
        k_sample(demo, demo.model, steps, 1.0, "amed", "amed")
    train(pack, family, paper=bool(number % 2), seed=number)


@pytest.mark.trust("soak")
def test_nothing_grows(pack: Any, user: Path, trials: Any) -> None:
    from test_learning import digits  # noqa: PLC0415

    family, demo, rounds = make("flux"), digits(pack, 1), trials.many(1, 33)
    warm = trials.many(1, 2)
    for number in range(warm):
        round_of(pack, family, demo, number)
    begun = held()
    for number in range(warm, rounds + warm):
        round_of(pack, family, demo, number)
    ended = held()
    print(f"{9 * rounds} samplings and {rounds} trainings: {begun}, then {ended}")
    for what in ("threads", "files", "tensors"):
        trials.held(what, ended[what] <= begun[what], f"{begun[what]} grew to {ended[what]}")
    most = begun["MB"] * (1.02 if trials.full else 1.05)
    trials.held("memory", ended["MB"] <= most, f"{begun['MB']:.1f} MB grew to {ended['MB']:.1f} MB")
    trials.held("states", not list(user.glob("*")), "a finished training leaves none")
