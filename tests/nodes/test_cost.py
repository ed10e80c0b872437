"""What sampling with a predictor costs beside the model: nothing that waits, and no more latents than the history."""

import gc
from itertools import pairwise
from typing import Any

import pytest
import torch
from families import Family, make
from torch.utils._python_dispatch import TorchDispatchMode
from toys import apply, k_sample, predictor

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")  # for a GPU's answer


class Waits(TorchDispatchMode):
    """Counts the operations that would make the host wait for a GPU: reading a value, or a size that depends on one."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function.overloadpacket.__name__ in WAITING
        return function(*args, **(kwargs or {}))


def waits(family: Family, model: Any, sampler: str, scheduler: str) -> list[int]:
    """Per model call but the first, how often the host waits until the next one is done."""
    seen = []
    with Waits() as mode:
        k_sample(family, model, 5, 3.0, sampler, scheduler, callback=lambda *heard: seen.append(mode.count))
    return [b - a for a, b in pairwise(seen)]


@pytest.mark.parametrize("name", ["sdxl", "flux"])
@pytest.mark.parametrize("student", ["amed", "amed_dpm_2", "amed_ipndm", "amed_dpmpp_3m"])
def test_the_loop_never_waits_for_a_gpu(pack: Any, name: str, student: str) -> None:
    family = make(name)
    changes: dict[str, Any] = {"guidance": 3.0, "scale_time": 0.2}
    applied = apply(pack, family, predictor(pack, family, student, **changes))
    assert waits(family, applied, student, "amed") == [0, 0, 0, 0]


def test_waiting_is_noticed(pack: Any) -> None:
    """ComfyUI's own samplers ask in every step whether the next sigma is 0."""
    family = make("flux")
    assert waits(family, family.model, "ipndm", "simple") == [1, 1, 1, 1]


def latents(family: Family, model: Any, sampler: str, scheduler: str) -> int:
    """How many tensors of a latent's size are alive at the end of a model call, at most."""
    size = family.latent["samples"].numel()
    seen = []

    def count(*heard: Any) -> None:
        tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and t.numel() == size]
        seen.append(len({t.untyped_storage().data_ptr() for t in tensors}))

    k_sample(family, model, 5, 3.0, sampler, scheduler, callback=count)
    return max(seen)


@pytest.mark.parametrize("student", ["amed", "amed_dpm_2", "amed_ipndm", "amed_dpmpp_2m", "amed_dpmpp_3m"])
def test_no_more_latents_are_alive_than_with_comfyuis_ipndm_and_one_per_remembered_evaluation(
    pack: Any, student: str
) -> None:
    """An evaluation keeps its sample beside the model's answer; ComfyUI's sampler keeps their difference only."""
    family = make("flux", shape=(16, 20, 12))
    made = predictor(pack, family, student, guidance=3.0)
    ours = latents(family, apply(pack, family, made), student, "amed")
    stock = latents(family, family.model, "ipndm", "simple")
    assert ours <= stock + made.network.config.build_solver().memory
