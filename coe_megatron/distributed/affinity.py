"""Binds a rank to the CPUs of its GPU's NUMA node, within the CPUs it was given."""

import os
from contextlib import suppress
from pathlib import Path

import torch

_PCI_DEVICES = Path("/sys/bus/pci/devices")


def set_cpu_affinity(device: torch.device) -> None:
    """Bind all threads of this process to those of its CPUs that are local to a CUDA device.

    Does nothing if the kernel does not report these CPUs, or if the scheduler gave this process none of them.
    `torchrun --numa-binding` refuses to start a rank in both cases, and also if numactl is not installed.
    """
    found = torch.cuda.get_device_properties(device)
    name = f"{found.pci_domain_id:04x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"  # type: ignore[attr-defined]
    if near := local_cpus(_PCI_DEVICES / name) & os.sched_getaffinity(0):
        for thread in os.listdir("/proc/self/task"):
            with suppress(ProcessLookupError):  # the thread has just ended
                os.sched_setaffinity(int(thread), near)


def local_cpus(pci_device: Path) -> set[int]:
    """The CPUs that the kernel reports as local to a PCI device, by its folder in sysfs; empty if it reports none."""
    try:
        ranges = (pci_device / "local_cpulist").read_text().strip()
    except OSError:
        return set()
    bounds = [part.partition("-") for part in ranges.split(",") if part]
    return {number for first, _, last in bounds for number in range(int(first), int(last or first) + 1)}
