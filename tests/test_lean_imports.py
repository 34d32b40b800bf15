"""Megatron-Core imported without Inductor and Weights & Biases, and the same functions as ever."""

import subprocess
import sys

import pytest
import torch

from coe_megatron import lean_imports

LOOK = """
import sys
from coe_megatron.lean_imports import import_megatron
import pytest
import torch
compile_now = torch.compile
import_megatron()
assert torch.compile is compile_now
import coe_megatron.training.loop
from coe_megatron.lean_imports import import_deepspeed_muon
import_deepspeed_muon()
from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam
assert torch.compile is compile_now
heavy = {"torch._inductor", "torch._dynamo", "wandb", "matplotlib"} & sys.modules.keys()
assert not heavy, heavy
import wandb
"""


@pytest.mark.thorough
def test_what_is_not_needed_is_not_imported() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", LOOK], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_function_is_compiled_at_its_first_call_and_once() -> None:
    calls = []

    def compile_now(function, **options):
        calls.append(options)
        return lambda *arguments: ("compiled", function(*arguments))

    decorate = lean_imports._compile_at_first_call(compile_now)

    @decorate
    def plain(x: torch.Tensor) -> torch.Tensor:
        """Doubles."""
        return 2 * x

    with_options = decorate(dynamic=True)(plain.__wrapped__)
    assert not calls and plain.__doc__ == "Doubles."
    assert [plain(2), plain(3), with_options(1)] == [("compiled", 4), ("compiled", 6), ("compiled", 2)]
    assert calls == [{}, {"dynamic": True}]
