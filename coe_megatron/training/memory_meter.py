"""Measured memory of this rank in bytes by kind: what is resident between passes, and what is transient within one.

    meter = MemoryMeter(engine)
    with meter.step():
        train_step(..., after_backward=meter.after_backward)
    meter.measured()            # `memory(run, stage).measured` of estimate/memory.py has the same from the config alone

On CUDA torch's allocator counts in every step. The CPU has no such counter, so we track every tensor from allocation to
release. This makes a step up to twice as long, so we measure only the first step of an attempt; with ZeRO stage 3 also
the second, because in the first DeepSpeed does not know yet what to prefetch.
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

_SAMPLES, _SAMPLE_SECONDS = 4, 0.02  # number of samples, and the time between them


class MemoryMeter:
    """Measures the steps of one engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._allocator = torch.cuda.is_available()
        self._live: LiveBytes | None = None
        self._steps_to_measure = 2 if engine.zero_optimization_stage() == 3 else 1
        self._resident = self._transient = self._peak = self._buckets = 0
        # Stages 1 and 2 have buckets only within a backward pass. The last parameter gets its gradient early.
        *_, last = engine.module.parameters()
        last.register_post_accumulate_grad_hook(self._measure_buckets)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Measure the step that runs in this context."""
        if self._allocator or not self._steps_to_measure:
            yield
            return
        self._steps_to_measure -= 1
        self._live = LiveBytes()
        before = _storages(self.tensors())
        with self._live:
            yield
        self._transient = max(self._transient, self._live.peak_transient)
        self._peak = max(self._peak, sum(before.values()) + self._live.peak)
        self._live = None

    def after_backward(self) -> None:
        """Call this after every backward pass: whatever is alive now is no activation."""
        buckets = _size(_buckets(self._engine))
        if self._allocator:
            self._resident = max(self._resident, torch.cuda.memory_allocated() - buckets)
        elif self._live is not None:
            gc.collect()  # garbage in reference cycles does not count
            self._resident = max(self._resident, self._resident_bytes(self._live) - buckets)

    def _measure_buckets(self, _parameter: torch.Tensor) -> None:
        buckets = _buckets(self._engine)
        self._buckets = max(self._buckets, _size(buckets))
        if self._live is not None:
            self._live.exclude(buckets)

    def _resident_bytes(self, live: "LiveBytes") -> int:
        """Bytes of tensors; the minimum of several samples, since gloo's threads release a bucket with a delay."""
        seen = []
        for _ in range(_SAMPLES if torch.distributed.get_world_size() > 1 else 1):
            live.settle()
            held = _storages(self.tensors())
            seen.append(sum(held.values()) + sum(size for storage, size in live.alive() if storage not in held))
            time.sleep(_SAMPLE_SECONDS if len(seen) < _SAMPLES else 0)
        return min(seen)

    def measured(self) -> dict[str, int]:
        """Bytes by kind, as far as they were measured.

        `weights` and `optimizer` are the tensors that the engine holds now; `communication_buckets` are the buffers in
        which DeepSpeed reduces gradients. `gradients` is everything else between two passes: gradients and Megatron's
        buffers. `activations` is everything else that is transient at the peak of a pass: activations, and temporary
        tensors such as weights that stage 3 gathers.
        `peak` is the maximum at any time, including the optimizer step: of tensors on the CPU, of the allocator on CUDA
        (`peak_reserved` is what it has reserved on the device). On the CPU `peak_resident` is the resident size of the
        process, including Python and all libraries.
        """
        kept = {"weights": _size(_weights(self._engine)), "optimizer": _size(_optimizer(self._engine))}
        if self._allocator:
            self._peak = torch.cuda.max_memory_allocated()
            self._transient = max(0, self._peak - self._resident - self._buckets)
        if self._peak:
            kept["gradients"] = self._resident - sum(kept.values())
            kept |= {"communication_buckets": self._buckets, "activations": self._transient, "peak": self._peak}
        if self._allocator:
            return {**kept, "peak_reserved": torch.cuda.max_memory_reserved()}
        return {**kept, "peak_resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}

    def tensors(self) -> list[torch.Tensor]:
        """Tensors that the engine holds: weights, gradients, and those of its optimizer."""
        parameters = list(self._engine.module.parameters())
        gradients = [p.grad for p in parameters if p.grad is not None]
        return [*_weights(self._engine), *gradients, *_optimizer(self._engine), *_found(vars(self._engine.optimizer))]


class LiveBytes(TorchDispatchMode):
    """Tracks the storages that operations allocate in this context, until they are released.

    Attributes:
        peak: maximum of live bytes.
        peak_transient: maximum, over passes, of live bytes that were allocated in the pass, were released by its end
            (`settle`), and were not excluded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.peak_transient = 0
        self._now = self._settled = self._allocations = 0
        self._pass_peak, self._peak_at, self._settled_at_peak = 0, 0, 0  # of this pass
        self._excluded: dict[int, tuple[int, int]] = {}  # as `_alive`, but kept after release
        self._alive: dict[int, tuple[int, int]] = {}  # storage: (allocation number, 0 before this pass; bytes)

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run the operation, and track the storages of results that are not storages of arguments."""
        out = function(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if not isinstance(tensor, torch.Tensor) or tensor.is_meta:
                continue
            if tensor.untyped_storage()._cdata not in given:
                self._track(tensor.untyped_storage())
        return out

    def alive(self) -> list[tuple[int, int]]:
        """Addresses and bytes of live storages."""
        return [(storage, size) for storage, (_, size) in self._alive.items()]

    def exclude(self, tensors: list[torch.Tensor]) -> None:
        """Exclude the storages of these tensors from the transient bytes of this pass."""
        found = [tensor.untyped_storage()._cdata for tensor in tensors]
        self._excluded |= {storage: self._alive[storage] for storage in found if storage in self._alive}

    def settle(self) -> None:
        """End a pass: what is alive now is resident, and not transient."""
        kept = sum(size for number, size in (self._alive | self._excluded).values() if 0 < number <= self._peak_at)
        self.peak_transient = max(self.peak_transient, self._pass_peak - self._settled_at_peak - kept)
        self._alive = {storage: (0, size) for storage, (_, size) in self._alive.items()}
        self._settled, self._excluded = self._now, {}
        self._pass_peak, self._peak_at, self._settled_at_peak = self._now, self._allocations, self._settled

    def _track(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self._alive:
            return
        self._allocations += 1
        self._alive[address] = (self._allocations, size)
        self._now += size
        if self._now > self._pass_peak:
            self._pass_peak, self._peak_at, self._settled_at_peak = self._now, self._allocations, self._settled
            self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._release, address)

    def _release(self, address: int) -> None:
        number, size = self._alive.pop(address)
        self._now -= size
        self._settled -= size if number == 0 else 0


def _weights(engine: Engine) -> list[torch.Tensor]:
    """Weights; with stage 3 this rank's partitions, and the parameters that are gathered now."""
    parameters = list(engine.module.parameters())
    return [*parameters, *(p.ds_tensor for p in parameters if hasattr(p, "ds_tensor"))]


def _buckets(engine: Engine) -> list[torch.Tensor]:
    """The current buffers in which stages 1 to 3 reduce gradients."""
    buckets = getattr(engine.optimizer, "ipg_buckets", {}).values()
    buffers = [bucket.buffer for bucket in buckets]
    return [t for buffer in buffers for t in (buffer if isinstance(buffer, list) else [buffer])]


def _optimizer(engine: Engine) -> list[torch.Tensor]:
    """fp32 master weights and moments."""
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
    """Address and bytes of every distinct storage on the rank's device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu").type
    found = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == device]
    return {storage._cdata: storage.nbytes() for storage in found}


def _size(tensors: list[torch.Tensor]) -> int:
    return sum(_storages(tensors).values())
