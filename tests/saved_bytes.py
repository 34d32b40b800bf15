"""Measures what a model keeps between its forward and its backward pass: bytes of saved tensors, each storage once.

Padding of the experts' rows, which the closed forms leave out, is left out here too.
"""

import gc
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from unittest import mock

import torch

from coe_megatron.local_backend import expert_mlp
from coe_megatron.model.recompute import RoutingRecord
from coe_megatron.training.memory_meter import LiveBytes


def without_padding() -> AbstractContextManager:
    """Experts multiply no more than their rows, also in bf16 on a CPU with AMX."""
    return mock.patch.object(expert_mlp, "needs_padding", lambda tokens_MD: False)


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

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor), without_padding():
        out = forward()
    tensors = [kept.tensor for ref in alive if (kept := ref()) is not None]
    for route in (found for found in gc.get_objects() if type(found) is RoutingRecord):
        tensors += [tensor for tensor in (route.experts_TK, route.kept_TN) if tensor is not None]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    for parameter in model.parameters():
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    assert out.requires_grad
    return sum(storages.values())


def peak_bytes(model: torch.nn.Module, forward: Callable[[], torch.Tensor]) -> int:
    """The most bytes that live at once in a forward and backward pass, beside parameters and their gradients."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with LiveBytes() as live, without_padding():
        forward().backward()
    return live.peak
