"""What devices can do at most, to relate a run's FLOP/s to: model FLOPs utilisation (MFU)."""

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
