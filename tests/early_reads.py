"""Asynchronous collectives that deliver as late as they may: only when they are waited for.

    with late_delivery():
        work = torch.distributed.all_to_all_single(output, input, async_op=True)
        ...           # output holds NaN (integers: their largest value)
        work.wait()   # now it holds what came; AssertionError if input, or output, was written since the launch
    # AssertionError if a collective was never waited for

With gloo and small tensors a read that comes too early usually finds the right numbers; with NCCL it does not. Tensors
may be on any device; on the pretended one, counts of waits and launches stay as they were. A collective without
`async_op`, or of a coalescing manager, is left alone. The functions are replaced in all modules that have them, but not
where classes or objects keep one. A work offers `wait` alone.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

# The parameters that are written and that are read; an all-reduce has one tensor for both.
_BUFFERS = {
    "all_gather": ("tensor_list", "tensor"),
    "all_gather_into_tensor": ("output_tensor", "input_tensor"),
    "all_gather_single": ("output_tensor", "input_tensor"),  # not in every release of torch, as the other one
    "all_reduce": ("tensor", "tensor"),
    "all_to_all": ("output_tensor_list", "input_tensor_list"),
    "all_to_all_single": ("output", "input"),
    "reduce_scatter": ("output", "input_list"),
    "reduce_scatter_single": ("output", "input"),
    "reduce_scatter_tensor": ("output", "input"),
}
COLLECTIVES = {name: buffers for name, buffers in _BUFFERS.items() if hasattr(dist, name)}


@contextmanager
def late_delivery() -> Iterator[None]:
    """Replace torch.distributed's collectives meanwhile.

    Raises:
        AssertionError: a tensor of a collective was written between its launch and its `wait`, or a collective was
            never waited for; with the name of the collective and the line that launched it.
    """
    works: list[_LateWork] = []
    late = {getattr(dist, name): _late(getattr(dist, name), *names, works) for name, names in COLLECTIVES.items()}
    _replace(late)
    try:
        yield
    finally:
        _replace({ours: theirs for theirs, ours in late.items()})
    forgotten = [work.name for work in works if not work.waited]
    assert not forgotten, f"never waited for: {', '.join(forgotten)}"


def poison(tensor: torch.Tensor) -> None:
    """Fill with what no program would take for data."""
    if tensor.is_floating_point() or tensor.is_complex():
        tensor.fill_(float("nan"))
    else:
        tensor.fill_(True if tensor.dtype is torch.bool else torch.iinfo(tensor.dtype).max)


class _LateWork:
    """The work of a collective between copies of the caller's tensors."""

    def __init__(self, name: str, work: Any, outputs: list[torch.Tensor], inputs: Any, copies: list[torch.Tensor]):
        self.name, self.waited = name, False
        self._work, self._outputs, self._copies = work, [t.data for t in outputs], copies  # .data: as autograd sees it
        for t in self._outputs:
            poison(t)
        # After the poison, since an output may be a part of an input, or the other way round.
        self._before = {
            "the output was written": [(t, t.clone()) for t in self._outputs],
            "the input was written": [(t, t.clone()) for t in map(torch.Tensor.detach, tree_leaves(inputs))],
        }

    def wait(self, *timeout: Any, **more: Any) -> bool:
        """Deliver; the device itself is waited for as by the collective's own work."""
        if self.waited:
            return True
        self.waited = True
        self._work.wait(*timeout, **more)
        with _disable_current_modes():
            for what, pairs in self._before.items():
                assert all(_same_bits(*pair) for pair in pairs), f"{self.name}: {what} before wait()"
            for output, copy in zip(self._outputs, self._copies, strict=True):
                output.copy_(copy)
        for kept in (self._before, self._outputs, self._copies):
            kept.clear()
        return True


def _late(real: Callable, written: str, read: str, works: list[_LateWork]) -> Callable:
    signature = inspect.signature(real)

    def collective(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        given = call.arguments
        if not given.get("async_op") or distributed_c10d._world.pg_coalesce_state:
            return real(*args, **kwargs)
        outputs, inputs = tree_leaves(given[written]), given[read]
        with _disable_current_modes():
            given[written] = tree_map(torch.empty_like, given[written])
            given[read] = tree_map(lambda t: t.detach().clone(), inputs)
        copies = tree_leaves(given[written])
        work = real(*call.args, **call.kwargs)
        if work is None:  # this rank is not in the group
            return None
        caller = sys._getframe(1)
        name = f"{real.__name__} ({Path(caller.f_code.co_filename).name}:{caller.f_lineno})"
        with _disable_current_modes():
            works.append(_LateWork(name, work, outputs, inputs, copies))
        return works[-1]

    return collective


def _replace(functions: dict[Callable, Callable]) -> None:
    """Replace functions in all modules that have them, but in their own, where they may call themselves by name."""
    by_id = {id(function): other for function, other in functions.items()}
    for module in [module for module in sys.modules.values() if module is not distributed_c10d]:
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if id(value) in by_id:
                setattr(module, name, by_id[id(value)])


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (a, b)))
