"""What devices can do, by name: to foresee how long a run takes, and to relate what it reaches to the peak (MFU)."""

from dataclasses import dataclass

from coe_megatron.errors import ConfigError


@dataclass(frozen=True)
class Device:
    """A kind of device.

    Attributes:
        cuda_name: part of the name that CUDA gives it; "" if it is none of CUDA's.
        peak: dense bf16 products in FLOP/s; None where that is not known.
        rate: FLOP/s that training is assumed to reach in products of many rows.
        half_rows: rows that meet one expert's weights at which its products run at half that rate, for reading the
            weights takes as long as multiplying by them.
        memory: bytes that a run finds free on it; None where it shares them with all else.
    """

    cuda_name: str
    peak: float | None
    rate: float
    half_rows: float
    memory: int | None


def _gpu(cuda_name: str, peak: float, bandwidth: float, memory: float) -> Device:
    """Args: FLOP/s, bytes/s and GiB. In bf16 a weight has 2 bytes and costs 2 FLOPs a row."""
    rate = _ASSUMED_MFU * peak
    return Device(cuda_name, peak, rate, rate / bandwidth, int(memory * 2**30))


_ASSUMED_MFU = 0.25  # nobody has measured it yet with this project: calibrate where hours matter
# Peaks and bandwidths from NVIDIA's data sheets; memory as the driver reports it, rounded down. Where names contain
# each other the longer one comes first.
DEVICES = {
    "b200": _gpu("B200", 2.25e15, 8.0e12, 178),
    "h200": _gpu("H200", 9.89e14, 4.8e12, 139),
    "h100-pcie": _gpu("H100 PCIe", 7.56e14, 2.0e12, 79),
    "h100": _gpu("H100", 9.89e14, 3.35e12, 79),
    "a100": _gpu("A100", 3.12e14, 2.04e12, 79),
    # One core with AVX-512 and one thread, fp32, as docs/experiments.md has it.
    "cpu": Device("", None, 4.0e10, 24, None),
}


def device(name: str) -> Device:
    """A device by its name.

    Raises:
        ConfigError: there is none of that name; one line that begins with the name.
    """
    if name not in DEVICES:
        raise ConfigError(f"{name}: it must be one of {', '.join(DEVICES)}")
    return DEVICES[name]


def peak_of(cuda_name: str) -> float | None:
    """Dense bf16 peak in FLOP/s of a device that CUDA names so; None if it is not known."""
    found = (device for device in DEVICES.values() if device.cuda_name and device.cuda_name in cuda_name)
    return next((device.peak for device in found), None)
