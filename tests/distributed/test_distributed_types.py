"""Types of tensors by the ranks of a group, checked by spmd_types: does a gradient still have to be summed?

The collectives of Megatron's tensor parallelism, and the gather of context parallelism, say of their output whether its
gradient is the same on all ranks (invariant), or a part of the sum (replicated). Where an invariant tensor meets one
that differs between ranks, the parts are not summed: an error, without a number computed twice.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import pytest
import spmd_types
import spmd_types.checker
import torch
from megatron.core.tensor_parallel import layers, mappings
from model_build import HIDDEN, make_config, make_layer, make_mla_config
from ranks import run_ranks
from spmd_types import I, R, S, V, register_local_autograd_function, rules
from torch.distributed.device_mesh import init_device_mesh

from coe_megatron.chain.settings import ChainSettings
from coe_megatron.local_backend import attention, latent_attention

LENGTH, ROWS = 8, 3
ATTENTIONS = {
    "MHA": make_config,
    "GQA": partial(make_config, num_query_groups=1),
    "MLA": make_mla_config,
    "MLA of latent queries": partial(make_mla_config, q_lora_rank=12),
}


def declare() -> None:
    """What Megatron's collectives do to types; products differ between ranks, as their weights do."""
    declared: dict[type, Callable[..., Any]] = {
        mappings._GatherFromModelParallelRegion: lambda *, input_, group: rules.all_gather(
            input_, group, src=S(input_.ndim - 1), dst=I
        ),
        mappings._ScatterToSequenceParallelRegion: lambda *, input_, group: rules.convert(
            input_, group, src=I, dst=S(0)
        ),
        mappings._GatherFromSequenceParallelRegion: lambda *, input_, group, tensor_parallel_output_grad: (
            rules.all_gather(input_, group, src=S(0), dst=R if tensor_parallel_output_grad else I)
        ),
        mappings._ReduceScatterToSequenceParallelRegion: lambda *, input_, group: rules.reduce_scatter(
            input_, group, src=V, dst=S(0)
        ),
        layers.LinearWithGradAccumulationAndAsyncCommunication: lambda *, input, weight: rules.einsum(
            "sbd,od->sbo", input, weight
        ),
    }
    for one_rank in (mappings._CopyToModelParallelRegion, mappings._ReduceFromModelParallelRegion):
        register_local_autograd_function(one_rank)  # used without tensor parallelism alone
    for function, rule in declared.items():
        function.spmd_typecheck = staticmethod(rule)  # type: ignore[attr-defined]


def mistakes(axis: str) -> dict[str, AbstractContextManager]:
    """What one may do wrong, by the attention that it concerns."""
    if axis == "tensor":
        as_megatron = mock.patch.object(latent_attention, "_by_rows", lambda projection, rows, output: output)
        return {name: as_megatron for name in ATTENTIONS if "MLA" in name}
    unsummed = partial(mappings.gather_from_sequence_parallel_region, tensor_parallel_output_grad=False)
    return {name: mock.patch.object(attention, "gather_from_sequence_parallel_region", unsummed) for name in ATTENTIONS}


def errors_of(axis: str) -> dict[tuple[str, bool], str]:
    """The checker's word on each attention, without and with the mistake."""
    declare()
    found = {}
    for name, make in ATTENTIONS.items():
        for is_wrong in (False, True):
            if is_wrong and name not in mistakes(axis):
                continue
            with mistakes(axis)[name] if is_wrong else nullcontext():
                found[name, is_wrong] = error_of(axis, make)
    return found


def error_of(axis: str, make: Callable[..., Any]) -> str:
    layouts = {
        "tensor": {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_tensor_parallel_size": 1},
        "context": {"context_parallel_size": 2},
    }
    layer = make_layer(make(**layouts[axis]), ChainSettings(1)).self_attention
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=(axis,))
    group = mesh.get_group(axis)
    states = torch.randn(LENGTH // 2, ROWS, HIDDEN, requires_grad=True)
    # Permissive: Megatron's angles have no type.
    with spmd_types.set_current_mesh(mesh), spmd_types.checker.typecheck(strict_mode="permissive"):
        spmd_types.assert_type(states, {group: V})
        for parameter in layer.parameters():  # norms' are the same on all ranks, and a hook sums their gradients
            spmd_types.assert_type(parameter, {group: V if axis == "tensor" and parameter.ndim > 1 else R})
        try:
            layer(states, None)
        except spmd_types.SpmdTypeError as error:
            return str(error)
    return ""


@pytest.mark.ranks
@pytest.mark.parametrize("axis", ["tensor", "context"])
def test_gradients_of_attention_are_summed_by_type(axis: str) -> None:
    groups = {"tensor": "tensor_model_parallel_size", "context": "context_parallel_size"}
    found, _ = run_ranks(errors_of, 2, axis, **{groups[axis]: 2})
    for (name, is_wrong), error in found.items():
        assert ("Invariant type" in error and "cannot mix" in error) if is_wrong else not error, (name, error)
    assert sum(is_wrong for _, is_wrong in found) == (2 if axis == "tensor" else 4)
