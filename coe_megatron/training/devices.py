"""What devices can do at most, to relate a run's FLOP/s to (MFU), and how to make them repeat themselves bit by bit."""

import os

import torch

from coe_megatron.estimate.devices import peak_of


def peak_flops(precision: str, device_name: str | None = None) -> float | None:
    """Dense peak of this rank's device in FLOP/s; None on CPU, for an unknown device, or in fp32.

    Args:
        precision: `bf16` or `fp32`.
        device_name: as CUDA names the device; asked for when None.
    """
    if device_name is None:
        device_name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return peak_of(device_name) if precision == "bf16" else None


def make_deterministic() -> None:
    """Let torch, cuBLAS and NCCL take only algorithms that give the same bits every time; call it before `start`.

    An operation that has none raises torch's own error. Memory is not filled, which torch would do beside.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
