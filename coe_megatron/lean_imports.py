"""Imports Megatron-Core and DeepSpeed without dependencies that a run may not need, which halves the start-up time.

* Megatron-Core decorates 41 functions with `@torch.compile`, which imports Inductor immediately, even if none of them
  is ever called (on a CPU, for example). Here Inductor is imported by the first call of such a function.
* Megatron-Core's inference code imports Weights & Biases if it is installed; a run that uses it imports it itself.

Programs and late imports call these functions; importing this package changes nothing.
"""

import gc
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any


def import_megatron() -> None:
    """Import `megatron.core`; does nothing if it is already imported."""
    if "megatron.core" not in sys.modules:
        with _deferred_compilation(), _hidden("wandb"):
            importlib.import_module("megatron.core")


def import_deepspeed_muon() -> None:
    """Import Muon, as `deepspeed.initialize` does for any optimizer, without Inductor."""
    with _deferred_compilation():
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")


@contextmanager
def without_collection() -> Iterator[None]:
    """Disable garbage collection: imports create almost no garbage, and take a fifth less time without it."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


@contextmanager
def _deferred_compilation() -> Iterator[None]:
    import torch

    compile_now = torch.compile
    torch.compile = _compile_at_first_call(compile_now)
    try:
        yield
    finally:
        torch.compile = compile_now


def _compile_at_first_call(compile_now: Callable) -> Callable:
    """`torch.compile` for functions, with or without options, deferred to the first call of each."""

    def decorate(function: Callable | None = None, **options: Any) -> Callable:
        if function is None:
            return lambda later: decorate(later, **options)
        compiled: list[Callable] = []

        @wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            if not compiled:
                compiled.append(compile_now(function, **options))
            return compiled[0](*arguments, **named)

        return call

    return decorate


@contextmanager
def _hidden(name: str) -> Iterator[None]:
    """Make a package look as if it were not installed, unless it is already imported."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
