"""Several processes at one fit, on PyTorch's own distributed package; one process is the ordinary case."""

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, distributed


@dataclass(frozen=True)
class Workers:
    """How many processes share the trajectories of a fit, and which of them this is."""

    rank: int = 0
    count: int = 1

    def share(self, rows: range) -> range:
        """The part of these trajectories that is this process's to run."""
        begin, end = (len(rows) * part // self.count for part in (self.rank, self.rank + 1))
        return rows[begin:end]

    def sum(self, values: Tensor) -> Tensor:
        """The sum of every process's `values`, of any shape, in place; the same in all of them."""
        if self.count > 1:
            distributed.all_reduce(values)
        return values


ALONE = Workers()


@contextmanager
def torchrun(device: torch.device | str = "cpu") -> Iterator[Workers]:
    """The workers that `torchrun` started, joined for as long as this lasts; without it, this process alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    # Its functions' default arguments are the group there is when it is first imported, which PyTorch itself does late;
    # a group that is kept so lives on when it is destroyed, and at the process's exit its threads may abort it.
    importlib.import_module("torch.distributed.nn.functional")
    # Gradients are summed on the device, what a table is fitted from on the CPU.
    distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.device(device).type == "cuda" else "gloo")
    try:
        yield Workers(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()
