"""Imports Megatron-Core and DeepSpeed without what they bring in passing, which is half of a program's start.

* `@torch.compile` over 41 functions imports Inductor at once, also where none of them is ever called (on a CPU, say):
  here the first call of a function does.
* Megatron's inference imports Weights & Biases where that is installed; a run that uses it imports it itself.

Programs call it, and what imports these late; importing the package changes nothing.
"""

import gc
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any


def import_megatron() -> None:
    """Import Megatron-Core's heart; does nothing where that has happened."""
    if "megatron.core" not in sys.modules:
        with _compiling_later(), _without("wandb"):
            importlib.import_module("megatron.core")


def import_deepspeed_muon() -> None:
    """Import Muon, which `deepspeed.initialize` does whatever the optimizer is: it brings Inductor too."""
    with _compiling_later():
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")


@contextmanager
def without_collection() -> Iterator[None]:
    """While this lasts Python does not look for garbage: imports make next to none, and take a fifth less time."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


@contextmanager
def _compiling_later() -> Iterator[None]:
    import torch

    compile_now = torch.compile
    torch.compile = _at_first_call(compile_now)
    try:
        yield
    finally:
        torch.compile = compile_now


def _at_first_call(compile_now: Callable) -> Callable:
    """`torch.compile` for functions, with or without options, put off to the first call of each."""

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
def _without(name: str) -> Iterator[None]:
    """As if a package were not installed, unless it is imported already."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
