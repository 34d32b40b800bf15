"""What devices can do at most, to relate a run's FLOP/s to (MFU), and how to make them repeat themselves bit by bit."""

import os

import torch

# Dense bf16 peak in FLOP/s, from NVIDIA's data sheets; the first name that the device's own contains counts.
_PEAK_BF16 = {
    "B200": 2.25e15,
    "H200": 9.89e14,
    "H100 PCIe": 7.56e14,
    "H100": 9.89e14,
    "A100": 3.12e14,
}


def peak_flops(precision: str, device_name: str | None = None) -> float | None:
    """Dense peak of this rank's device in FLOP/s; None on CPU, for an unknown device, or in fp32.

    Args:
        precision: `bf16` or `fp32`.
        device_name: as CUDA names the device; asked for when None.
    """
    if device_name is None:
        device_name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    if precision != "bf16":
        return None
    return next((peak for name, peak in _PEAK_BF16.items() if name in device_name), None)


def make_deterministic() -> None:
    """Let torch, cuBLAS and NCCL take only algorithms that give the same bits every time; call it before `start`.

    An operation that has none raises torch's own error. Memory is not filled, which torch would do beside.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
