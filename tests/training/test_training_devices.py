"""Peaks of known devices, and none for others; deterministic algorithms."""

import os

import pytest
import torch

from coe_megatron.training import devices
from coe_megatron.training.devices import make_deterministic, peak_flops, slow_experts


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


@pytest.mark.parametrize(
    ("precision", "capability", "fast"),
    [("bf16", (9, 0), True), ("bf16", (10, 3), True), ("bf16", (8, 0), False), ("fp32", (9, 0), False)],
)
def test_devices_without_fast_experts_are_named(precision: str, capability: tuple[int, int], fast: bool) -> None:
    note = slow_experts(precision, capability)
    assert note is None if fast else f"{precision}, compute capability {capability[0]}.{capability[1]}" in str(note)


def test_there_is_no_such_note_on_cpu() -> None:
    assert torch.cuda.is_available() or slow_experts("fp32") is None


@pytest.mark.parametrize("amx", [True, False])
def test_bf16_on_a_cpu_without_amx_is_told(monkeypatch: pytest.MonkeyPatch, amx: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices, "has_amx", lambda: amx)
    note = slow_experts("bf16")
    assert note is None if amx else note is not None and "this CPU has no AMX" in note and "fp32" in note


def test_deterministic_algorithms_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"NCCL_ALGO": "Tree"})
    fills = torch.utils.deterministic.fill_uninitialized_memory
    try:
        make_deterministic()
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["NCCL_ALGO"] == "Tree", "the user's choice stays"
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fills
