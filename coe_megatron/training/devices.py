"""What devices can do at most, to relate a run's FLOP/s to (MFU), and how to make them repeat themselves bit by bit."""

import os

import torch

from coe_megatron.estimate.machine import machine_of_device
from coe_megatron.local_backend.expert_mlp import has_amx

_FAST_CAPABILITIES = (9, 10)
_NO_AMX = (
    "this CPU has no AMX: training.precision fp32 is faster here than bf16 (benchmarks/bench_layer.py --dtype both "
    "measures by how much)"
)


def peak_flops(precision: str, device_name: str | None = None) -> float | None:
    """Dense peak of this rank's device in FLOP/s; None on CPU, for an unknown device, or in fp32.

    Args:
        precision: `bf16` or `fp32`.
        device_name: as CUDA names the device; asked for when None.
    """
    if device_name is None:
        device_name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    found = machine_of_device(device_name) if device_name and precision == "bf16" else None
    return None if found is None else found.bf16.peak


def slow_experts(precision: str, capability: tuple[int, int] | None = None) -> str | None:
    """Why the experts are slow on this rank's device; None if they are not.

    In torch 2.13 there are grouped products for bf16 on compute capability 9 and 10. On other GPUs one is a loop over
    experts, and the host waits for the row counts in each. On a CPU, bf16 is fast with AMX only.

    Args:
        precision: `bf16` or `fp32`.
        capability: the device's compute capability; asked for when None.
    """
    if capability is None:
        if not torch.cuda.is_available():
            return None if precision != "bf16" or has_amx() else _NO_AMX
        capability = torch.cuda.get_device_capability()
    major, minor = capability
    if precision == "bf16" and major in _FAST_CAPABILITIES:
        return None
    return (
        f"experts run one after the other here ({precision}, compute capability {major}.{minor}): torch has fast "
        "grouped products for bf16 on 9.x and 10.x"
    )


def make_deterministic() -> None:
    """Let torch, cuBLAS and NCCL take only algorithms that give the same bits every time; call it before `start`.

    An operation that has none raises torch's own error. Memory is not filled, which torch would do beside.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
