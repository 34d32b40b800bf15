"""Layers whose tokens travel between two ranks, on CPU or on the pretended device; run by test_rehearsal_exchanges.

On the device collectives deliver as late as they may, and a few cases are repeated with mistakes.

torchrun --nproc-per-node 2 tests/rehearsal/exchanges.py OUTPUT
"""

import sys
from collections.abc import Callable
from typing import Any, get_args
from unittest import mock

import torch
from early_reads import late_delivery
from layers import BF16, LOSSES, SHARED, waits
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from model_build import copy_from_oracle, gradient, make_config, make_layer, make_oracle
from saved_bytes import without_padding

from coe_megatron.chain.settings import ChainSettings, Recompute
from coe_megatron.distributed.flights import Flight
from coe_megatron.local_backend import megatron_compat, without_cuda

ITERATIONS = 2
LAYOUTS = {
    "DP 2": {},
    "EP 2": {"expert_model_parallel_size": 2},
    "ETP 2": {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2},
}
WAYS: dict[str, dict[str, Any]] = {
    "alltoall": {},
    "deduplicated": {"deduplicated": True},
    "chunks": {"overlap_chunks": 2},
    "chunks, deduplicated": {"overlap_chunks": 2, "deduplicated": True},
}
Case = tuple[str, str, str]
CASES: list[Case] = [
    *(("DP 2", "chunks", recompute) for recompute in ("iteration", "layer")),
    ("ETP 2", "alltoall", "experts"),
    ("ETP 2", "deduplicated", "iteration"),
    ("ETP 2", "chunks, deduplicated", "layer"),
    *(("EP 2", way, recompute) for way in WAYS for recompute in get_args(Recompute)),
]
WITH_MISTAKES = [("EP 2", "chunks, deduplicated", recompute) for recompute in ("none", "iteration")]


def use_layout(layout: dict[str, int]) -> None:
    """Other process groups on the same ranks."""
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(**layout)
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)


def run(layout: str, way: str, recompute: str) -> dict[str, Any]:
    """Output, gradients and waits of a forward and backward pass, this rank's."""
    torch.manual_seed(1)
    sizes = LAYOUTS[layout]
    changes = {**sizes, **BF16, **LOSSES, **SHARED, "sequence_parallel": layout == "ETP 2"}
    config, chain = make_config(hidden_size=32, moe_ffn_hidden_size=16, **changes), ChainSettings(ITERATIONS)
    oracle, layer = make_oracle(config, chain), make_layer(config, chain, recompute=recompute, **WAYS[way])
    copy_from_oracle(layer, oracle)
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    h_SBD = torch.randn(6, 3, 32, generator=generator).bfloat16().to(torch.cuda.current_device()).requires_grad_()
    before = waits()
    out_SBD = layer._forward_mlp(h_SBD)
    forward = waits()
    out_SBD.backward(torch.linspace(-1, 1, out_SBD.numel(), device=out_SBD.device).view_as(out_SBD).bfloat16())
    found = {"forward waits": forward - before, "backward waits": waits() - forward}
    found |= {"out": out_SBD.detach().cpu(), "input": h_SBD.grad.cpu()}
    return found | {name: gradient(value).cpu() for name, value in layer.named_parameters()}


def run_all(cases: list[Case] = CASES) -> dict[Case, dict[str, Any]]:
    found: dict[Case, dict[str, Any]] = {}
    for layout, sizes in LAYOUTS.items():
        use_layout(sizes)
        with without_padding():  # as in layers
            found |= {case: run(*case) for case in cases if case[0] == layout}
    return found


def early_rows() -> Any:
    """Rows are read when they have not been waited for."""
    arrive: Callable = Flight.arrive

    def too_early(flight: Flight) -> Any:
        flight.arriving = tuple(rows.clone() for rows in flight.arriving)
        return arrive(flight)

    return mock.patch.object(Flight, "arrive", too_early)


def early_gradients() -> Any:
    """The same in the backward pass alone: there a flight has what arrives until it is waited for."""
    wait: Callable = Flight.wait

    def too_early(flight: Flight) -> None:
        early = [gradients.clone() for gradients in flight.arriving]
        wait(flight)
        for gradients, read in zip(flight.arriving, early, strict=True):
            gradients.copy_(read)

    return mock.patch.object(Flight, "wait", too_early)


MISTAKES = {"early rows": early_rows, "early gradients": early_gradients}


def run_late() -> dict[str, dict[Case, dict[str, Any]]]:
    """With collectives that are as late as they may be: all cases, and a few with each mistake."""
    with late_delivery():
        found = {"": run_all()}
        for name, mistake in MISTAKES.items():
            with mistake():
                found[name] = run_all(WITH_MISTAKES)
    return found


if __name__ == "__main__":
    megatron_compat.install()
    without_cuda.install()
    torch.distributed.init_process_group("nccl")
    torch.save(run_late(), f"{sys.argv[1]}.{torch.distributed.get_rank()}")
