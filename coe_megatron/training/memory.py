"""Measured memory of this rank, in bytes by kind."""

import resource

import torch

from coe_megatron.zero import states
from coe_megatron.zero.engine import Engine


def measure(engine: Engine) -> dict[str, int]:
    """Bytes of this rank: parameters, the optimizer's fp32 state, and the peak so far.

    The peak is the allocator's on CUDA (`peak_allocated`) and the process's resident memory on CPU (`peak_resident`,
    with Python and all libraries in it).
    """
    parameters = sum(_bytes(getattr(p, "ds_tensor", p)) for p in engine.module.parameters())
    moments = [t for state in states.adam(engine).state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    masters = states.partitions(engine) if engine.zero_optimization_stage() else []
    measured = {"parameters": parameters, "optimizer": sum(_bytes(t) for t in [*moments, *masters])}
    if torch.cuda.is_available():
        return {**measured, "peak_allocated": torch.cuda.max_memory_allocated()}
    return {**measured, "peak_resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
