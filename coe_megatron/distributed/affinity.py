"""Keeps a rank on the processors near its GPU, as far as those who started it allow."""

import os
from contextlib import suppress
from pathlib import Path

import torch

_PCI_DEVICES = Path("/sys/bus/pci/devices")


def bind_near(device: torch.device) -> None:
    """Leave this process, with the threads that it has, those of its processors alone that are near a CUDA device.

    Nothing changes where the kernel does not say which these are, or where a scheduler has given it none of them.
    `torchrun --numa-binding` refuses to start a rank in both cases, and wherever the program numactl is missing.
    """
    found = torch.cuda.get_device_properties(device)
    name = f"{found.pci_domain_id:04x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"  # type: ignore[attr-defined]
    if near := processors_near(_PCI_DEVICES / name) & os.sched_getaffinity(0):
        for thread in os.listdir("/proc/self/task"):
            with suppress(ProcessLookupError):  # it has just ended
                os.sched_setaffinity(int(thread), near)


def processors_near(pci_device: Path) -> set[int]:
    """Which processors the kernel says are near a PCI device, by the device's folder in sysfs; none if it is silent."""
    try:
        ranges = (pci_device / "local_cpulist").read_text().strip()
    except OSError:
        return set()
    bounds = [part.partition("-") for part in ranges.split(",") if part]
    return {number for first, _, last in bounds for number in range(int(first), int(last or first) + 1)}
