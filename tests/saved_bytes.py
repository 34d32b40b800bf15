"""Measures what a model keeps between its forward and its backward pass: bytes of saved tensors, each storage once."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from coe_megatron.modules.recompute import Route


class _Kept:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor.detach()  # with its graph, which holds this object, it would live for ever


def kept_bytes(model: torch.nn.Module, forward: Callable[[], torch.Tensor]) -> int:
    """Bytes that the graph of `forward()` keeps for a backward pass, parameters apart.

    Routes, which a recomputed layer keeps outside the graph, are among them.
    """
    alive: list[weakref.ref] = []

    def pack(tensor: torch.Tensor) -> _Kept:
        kept = _Kept(tensor)
        alive.append(weakref.ref(kept))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        out = forward()
    tensors = [kept.tensor for ref in alive if (kept := ref()) is not None]
    for route in (found for found in gc.get_objects() if type(found) is Route):
        tensors += [tensor for tensor in (route.experts_TK, route.kept_TN) if tensor is not None]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    for parameter in model.parameters():
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    assert out.requires_grad
    return sum(storages.values())


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make, from their birth to their death, and the most there ever were."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._seen:
            return
        self._seen.add(storage._cdata)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, address: int, size: int) -> None:
        self._seen.discard(address)
        self.now -= size


def peak_bytes(model: torch.nn.Module, forward: Callable[[], torch.Tensor]) -> int:
    """The most bytes that live at once in a forward and backward pass, beside parameters and their gradients."""
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    with LiveBytes([*parameters, *(parameter.grad for parameter in parameters)]) as live:
        forward().backward()
    return live.most
