"""Measured memory of this rank, in bytes by kind: what stays between passes, and what comes and goes within one.

    meter = MemoryMeter(engine)
    with meter.step():
        train_step(..., after_backward=meter.after_backward)
    meter.measured()            # `memory(run, stage).measured` of estimate/memory.py has the same from the config alone

On CUDA torch's allocator counts, in every step. The CPU has no such counter: there every tensor is followed from its
birth to its death, which makes a step up to twice as long, so only the first one of an attempt is watched; of stage 3
the second one too, for in the first DeepSpeed does not know yet what to gather ahead.
"""

import gc
import resource
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from coe_megatron.zero import optimizer_states
from coe_megatron.zero.engine import Engine

_LOOKS, _BETWEEN_LOOKS = 4, 0.02  # how often, and seconds


class MemoryMeter:
    """Measures the steps of one engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._allocator = torch.cuda.is_available()
        self._live: LiveBytes | None = None
        self._to_watch = 2 if engine.zero_optimization_stage() == 3 else 1
        self._between = self._passing = self._peak = self._buckets = 0
        # Stages 1 and 2 have their buckets within a backward pass alone. The last parameter gets its gradient early.
        *_, last = engine.module.parameters()
        last.register_post_accumulate_grad_hook(self._look_at_buckets)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Measure the step made meanwhile."""
        if self._allocator or not self._to_watch:
            yield
            return
        self._to_watch -= 1
        self._live = LiveBytes()
        before = _storages(self._held())
        with self._live:
            yield
        self._passing = max(self._passing, self._live.most_passing)
        self._peak = max(self._peak, sum(before.values()) + self._live.most)
        self._live = None

    def after_backward(self) -> None:
        """To be called after every backward pass: what is there now is no activation."""
        buckets = _size(_buckets(self._engine))
        if self._allocator:
            self._between = max(self._between, torch.cuda.memory_allocated() - buckets)
        elif self._live is not None:
            gc.collect()  # what only waits for the collector, in a cycle of references, is not held
            self._between = max(self._between, self._stays(self._live) - buckets)

    def _look_at_buckets(self, _parameter: torch.Tensor) -> None:
        buckets = _buckets(self._engine)
        self._buckets = max(self._buckets, _size(buckets))
        if self._live is not None:
            self._live.set_apart(buckets)

    def _stays(self, live: "LiveBytes") -> int:
        """Bytes of tensors; the least of several looks, since gloo's threads let go of a bucket a moment later."""
        seen = []
        for _ in range(_LOOKS if torch.distributed.get_world_size() > 1 else 1):
            live.settle()
            held = _storages(self._held())
            seen.append(sum(held.values()) + sum(size for storage, size in live.alive() if storage not in held))
            time.sleep(_BETWEEN_LOOKS if len(seen) < _LOOKS else 0)
        return min(seen)

    def measured(self) -> dict[str, int]:
        """Bytes by kind, as far as was measured.

        `weights` and `optimizer` are the tensors that the engine holds now; `communication_buckets` are the buffers in
        which DeepSpeed reduces gradients. `gradients` is what else is there between two passes: gradients and
        Megatron's buffers. `activations` is what else comes and goes within a pass at its peak: beside activations that
        which a pass takes for a moment, such as weights that stage 3 gathers.
        `peak` is the most there was at once, in the optimizer's step as well: of tensors on the CPU, of the allocator
        on CUDA (`peak_reserved` is what it has taken from the device). On the CPU `peak_resident` is the process with
        Python and all libraries.
        """
        kept = {"weights": _size(_weights(self._engine)), "optimizer": _size(_optimizer(self._engine))}
        if self._allocator:
            self._peak = torch.cuda.max_memory_allocated()
            self._passing = max(0, self._peak - self._between - self._buckets)
        if self._peak:
            kept["gradients"] = self._between - sum(kept.values())
            kept |= {"communication_buckets": self._buckets, "activations": self._passing, "peak": self._peak}
        if self._allocator:
            return {**kept, "peak_reserved": torch.cuda.max_memory_reserved()}
        return {**kept, "peak_resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}

    def _held(self) -> list[torch.Tensor]:
        """Tensors that the engine holds: weights, gradients, and whatever its optimizer has."""
        parameters = list(self._engine.module.parameters())
        gradients = [p.grad for p in parameters if p.grad is not None]
        return [*_weights(self._engine), *gradients, *_optimizer(self._engine), *_found(vars(self._engine.optimizer))]


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make while it is entered, from their birth to their death.

    Attributes:
        most: the most bytes that there were at once.
        most_passing: of these what was gone at the next `settle`, not there at an earlier one, and not set apart.
    """

    def __init__(self) -> None:
        super().__init__()
        self.most = self.most_passing = 0
        self._now = self._settled = self._births = 0
        self._peak, self._peak_at, self._settled_at_peak = 0, 0, 0  # of this pass
        self._apart: dict[int, tuple[int, int]] = {}  # as `_alive`, also when they are gone
        self._alive: dict[int, tuple[int, int]] = {}  # storage: its birth, its bytes; settled ones were born at 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run the operation; storages of its results that are not those of its arguments are new."""
        out = function(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if not isinstance(tensor, torch.Tensor) or tensor.is_meta:
                continue
            if tensor.untyped_storage()._cdata not in given:
                self._note(tensor.untyped_storage())
        return out

    def alive(self) -> list[tuple[int, int]]:
        """Storages that are there now: their addresses, and bytes."""
        return [(storage, size) for storage, (_, size) in self._alive.items()]

    def set_apart(self, tensors: list[torch.Tensor]) -> None:
        """What these hold is no part of what passes."""
        found = [tensor.untyped_storage()._cdata for tensor in tensors]
        self._apart |= {storage: self._alive[storage] for storage in found if storage in self._alive}

    def settle(self) -> None:
        """A pass has ended: what is there now stays, and is no part of what passes."""
        stays = sum(size for birth, size in (self._alive | self._apart).values() if 0 < birth <= self._peak_at)
        self.most_passing = max(self.most_passing, self._peak - self._settled_at_peak - stays)
        self._alive = {storage: (0, size) for storage, (_, size) in self._alive.items()}
        self._settled, self._apart = self._now, {}
        self._peak, self._peak_at, self._settled_at_peak = self._now, self._births, self._settled

    def _note(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self._alive:
            return
        self._births += 1
        self._alive[address] = (self._births, size)
        self._now += size
        if self._now > self._peak:
            self._peak, self._peak_at, self._settled_at_peak = self._now, self._births, self._settled
            self.most = max(self.most, self._now)
        weakref.finalize(storage, self._forget, address)

    def _forget(self, address: int) -> None:
        birth, size = self._alive.pop(address)
        self._now -= size
        self._settled -= size if birth == 0 else 0


def _weights(engine: Engine) -> list[torch.Tensor]:
    """Of stage 3 this rank's parts, and what is whole at the moment."""
    parameters = list(engine.module.parameters())
    return [*parameters, *(p.ds_tensor for p in parameters if hasattr(p, "ds_tensor"))]


def _buckets(engine: Engine) -> list[torch.Tensor]:
    """In which stages 1 to 3 reduce gradients; those there are now."""
    buckets = getattr(engine.optimizer, "ipg_buckets", {}).values()
    buffers = [bucket.buffer for bucket in buckets]
    return [t for buffer in buffers for t in (buffer if isinstance(buffer, list) else [buffer])]


def _optimizer(engine: Engine) -> list[torch.Tensor]:
    """fp32 masters and moments."""
    moments = [
        t
        for state in optimizer_states.adam(engine).state.values()
        for t in state.values()
        if isinstance(t, torch.Tensor)
    ]
    return [*moments, *(optimizer_states.partitions(engine) if engine.zero_optimization_stage() else [])]


def _found(value: Any) -> Iterator[torch.Tensor]:
    """Tensors in nested containers."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _found(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _found(inner)
    elif is_dataclass(value):
        yield from _found(vars(value))


def _storages(tensors: list[torch.Tensor]) -> dict[int, int]:
    """Every storage on the rank's device once: its address, and bytes."""
    there = torch.device("cuda" if torch.cuda.is_available() else "cpu").type
    found = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == there]
    return {storage._cdata: storage.nbytes() for storage in found}


def _size(tensors: list[torch.Tensor]) -> int:
    return sum(_storages(tensors).values())
