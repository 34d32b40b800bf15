"""Table of devices: speeds to predict the time of a run, and peaks to compute its MFU."""

from dataclasses import dataclass

from coe_megatron.errors import ConfigError


@dataclass(frozen=True)
class Device:
    """A kind of device.

    Attributes:
        cuda_name: part of its name in CUDA; "" if it is not a CUDA device.
        peak: dense bf16 peak in FLOP/s; None if unknown.
        rate: FLOP/s that training is assumed to reach in large matrix products.
        half_rows: rows per expert at which its matrix products reach half of `rate`, because loading the weights takes
            as long as multiplying by them.
        memory: bytes available to a run; None if other programs share the memory.
    """

    cuda_name: str
    peak: float | None
    rate: float
    half_rows: float
    memory: int | None


def _gpu(cuda_name: str, peak: float, bandwidth: float, memory: float) -> Device:
    """A GPU by peak FLOP/s, bytes/s and GiB. In bf16 a weight has 2 bytes and costs 2 FLOPs per row."""
    rate = _ASSUMED_MFU * peak
    return Device(cuda_name, peak, rate, rate / bandwidth, int(memory * 2**30))


_ASSUMED_MFU = 0.25  # not measured with this project: calibrate if predicted hours matter
# Peaks and bandwidths from NVIDIA's data sheets; memory as the driver reports it, rounded down. If one CUDA name
# contains another, it comes first.
DEVICES = {
    "b200": _gpu("B200", 2.25e15, 8.0e12, 178),
    "h200": _gpu("H200", 9.89e14, 4.8e12, 139),
    "h100-pcie": _gpu("H100 PCIe", 7.56e14, 2.0e12, 79),
    "h100": _gpu("H100", 9.89e14, 3.35e12, 79),
    "a100": _gpu("A100", 3.12e14, 2.04e12, 79),
    # One core with AVX-512, one thread, fp32: measured, see docs/experiments.md.
    "cpu": Device("", None, 4.0e10, 24, None),
}


def device(name: str) -> Device:
    """A device by name.

    Raises:
        ConfigError: there is no such device; one line that begins with the name.
    """
    if name not in DEVICES:
        raise ConfigError(f"{name}: it must be one of {', '.join(DEVICES)}")
    return DEVICES[name]


def find_device(name: str) -> Device | None:
    """A device by its name in CUDA, or `cpu` with anything after it; None if unknown."""
    if name.startswith("cpu"):
        return DEVICES["cpu"]
    return next((device for device in DEVICES.values() if device.cuda_name and device.cuda_name in name), None)


def peak_of(cuda_name: str) -> float | None:
    """Dense bf16 peak in FLOP/s of a device by its name in CUDA; None if unknown."""
    found = find_device(cuda_name)
    return None if found is None else found.peak
