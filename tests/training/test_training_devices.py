"""Peaks of known devices, and none for others."""

import pytest

from coe_megatron.training.devices import peak_flops


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 9.89e14),
        ("NVIDIA H100 80GB HBM3", 9.89e14),
        ("NVIDIA H100 PCIe", 7.56e14),
        ("NVIDIA A100-SXM4-80GB", 3.12e14),
        ("Some Other Device", None),
        ("", None),
    ],
)
def test_the_peak_of_a_device(name: str, peak: float | None) -> None:
    assert peak_flops("bf16", name) == peak
    assert peak_flops("fp32", name) is None
