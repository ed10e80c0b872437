"""What sampling with a predictor costs beside the model: nothing that waits, and no more latents than the history."""

import contextlib
import gc
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from families import Family, make
from torch.utils._python_dispatch import TorchDispatchMode
from toys import apply, k_sample, predictor

READING = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal", "unique")


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a GPU: reading a value, or a size that depends on one, and copying.

    On the CPU nothing is copied, and every value counts that is read.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.reads = self.copies = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = [argument.name for argument in function._schema.arguments]
        given = dict(zip(names, args, strict=False)) | (kwargs or {})
        kind = function.overloadpacket.__name__
        self.reads += kind in READING and args[0].device.type == self.device.type
        self.copies += kind in ("to", "_to_copy", "copy_") and crosses(given)
        return function(*args, **(kwargs or {}))


def crosses(given: dict[str, Any]) -> bool:
    """Whether a copy goes from the host to another device or back, and the host waits until it is done."""
    this, other = given["self"].device, given.get("src", given.get("other"))
    that = this if other is None else other.device
    that = given.get("device") or that
    to_host = (this if "src" in given else that).type == "cpu"
    return (this.type == "cpu") != (that.type == "cpu") and (to_host or not given.get("non_blocking"))


def waits(family: Family, model: Any, sampler: str, scheduler: str) -> tuple[list[int], list[int]]:
    """Per model call but the first: how often the host waits for a value, and for a copy, until the next is done."""
    seen = []
    with Waits(family.model.load_device) as mode:
        k_sample(
            family, model, 5, 3.0, sampler, scheduler, callback=lambda *heard: seen.append((mode.reads, mode.copies))
        )
    reads, copies = zip(*seen, strict=True)
    return [b - a for a, b in pairwise(reads)], [b - a for a, b in pairwise(copies)]


@pytest.mark.parametrize("name", ["sdxl", "flux"])
@pytest.mark.parametrize("student", ["amed", "amed_dpm_2", "amed_ipndm", "amed_dpmpp_3m"])
def test_the_loop_never_waits_for_a_gpu(pack: Any, name: str, student: str) -> None:
    """Nor for copies, of which there may be some in ComfyUI's own part of a call."""
    family = make(name)
    changes: dict[str, Any] = {"guidance": 3.0, "scale_time": 0.2}
    applied = apply(pack, family, predictor(pack, family, student, **changes))
    reads, copies = waits(family, applied, student, "amed")
    _, stock_copies = waits(family, family.model, "ipndm", "simple")
    assert reads == [0, 0, 0, 0]
    assert sum(copies) <= sum(stock_copies), "per picture"


@pytest.mark.usefixtures("pack")
def test_waiting_is_noticed() -> None:
    """ComfyUI's own samplers ask in every step whether the next sigma is 0."""
    family = make("flux")
    reads, _ = waits(family, family.model, "ipndm", "simple")
    assert reads == [1, 1, 1, 1]


@pytest.mark.parametrize("inference", [True, False])
def test_every_copy_between_host_and_device_is_noticed_unless_nobody_waits(inference: bool) -> None:
    """A device that is not there stands in for a GPU; it has no values to copy back."""
    here, there = torch.zeros(2), torch.zeros(2, device="meta")

    def counted(work: Callable[[], Any]) -> int:
        mode = Waits(torch.device("meta"))
        with torch.inference_mode(inference), contextlib.suppress(NotImplementedError, RuntimeError), mode:
            work()
        return mode.copies

    assert counted(lambda: here.to(there.device)) == 1
    assert counted(lambda: here.to(there)) == 1
    assert counted(lambda: here.to(there.device, non_blocking=True)) == 0
    assert counted(there.cpu) == 1
    assert counted(there.tolist) == 1
    assert counted(lambda: there.to("cpu", torch.float64, non_blocking=True)) == 1
    assert counted(lambda: there.copy_(here)) == 1
    assert counted(lambda: here.copy_(there)) == 1
    assert counted(lambda: here.to(torch.float64)) == 0
    assert counted(lambda: here.clone().copy_(here)) == 0


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
    assert ours <= stock + made.config.build_solver().memory
