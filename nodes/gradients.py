"""Derivatives through a ComfyUI model, which keeps its weights as inference tensors."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import comfy.model_management
import torch
from torch import nn


@contextmanager
def marked_as_training() -> Iterator[None]:
    """Newer ComfyUI takes fused kernels, which autograd does not know, unless it is told that it is training."""
    management = comfy.model_management
    if not hasattr(management, "in_training"):
        yield
        return
    before, management.in_training = management.in_training, True
    try:
        yield
    finally:
        management.in_training = before


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Let autograd run through a model that was loaded in inference mode.

    While it lasts, the model's parameters and buffers are aliases of the same memory, which autograd accepts. Nothing
    is copied, and the originals come back whatever happens. Blocks may change activations in place.
    """
    originals: list[tuple[dict[str, Any], str, Any]] = []
    try:
        places: list[dict[str, Any]] = [t for m in model.modules() for t in (m._parameters, m._buffers)]
        for tensors in places:
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_inference():
                    originals.append((tensors, name, tensor))
                    tensors[name] = _alias(tensor)
        with torch.autograd.graph.allow_mutation_on_saved_tensors() as saved:
            saved.original = _KeptOriginals()
            yield
    finally:
        for tensors, name, tensor in originals:
            tensors[name] = tensor


class _KeptOriginals(WeakKeyDictionary[Any, torch.Tensor]):
    """Tensors that autograd saved, by what stands for them in its graph, which keeps them alive.

    PyTorch knows a saved tensor by its identity and address, and lets it go once it was cloned because a block changes
    it in place. A later tensor may then have both, and would be taken for that clone: its gradient is silently wrong.
    """

    def __init__(self) -> None:
        super().__init__()
        self.cloned: WeakKeyDictionary[Any, torch.Tensor] = WeakKeyDictionary()

    def __delitem__(self, handle: Any) -> None:
        self.cloned[handle] = self.pop(handle)


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    alias.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
    return nn.Parameter(alias, requires_grad=False) if isinstance(tensor, nn.Parameter) else alias


def without_inference_tensors(value: Any) -> Any:
    """A conditioning, or anything nested like one, with its inference tensors cloned; autograd refuses them."""
    if isinstance(value, torch.Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, dict):
        return {key: without_inference_tensors(v) for key, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(without_inference_tensors(v) for v in value)
    return value
