"""Counts what a pass launches on a device, and how many bytes that reads and writes, by operator.

    with Launches() as forward:
        out = layer(x)
    with Launches() as backward:  # the engine's thread of the device has the modes of the one that called backward
        out.backward(gradient)
    forward.total, forward.of  # of all operators, and of each by name

An operator counts once if it writes at least one element, or hands one to the host: views, allocations and what changes
sizes alone do not. It may launch more kernels than one (a sort, a grouped product). Its bytes are the extents of its
distinct operands and of what it writes: an expanded tensor has one row, a gathered one all its rows, whether they are
read or not. Collectives are not counted.

Functions that torch.compile or Megatron's jit_fuser would fuse cannot be compiled without a GPU; `compiled` takes the
place of torch.compile and runs them as they are, operator by operator. `Launches(as_one=NAMES)` counts a call of one of
these as one launch that reads its arguments and writes its results. That is an assumption about the compiler. Where
autograd differentiates such a function itself, its backward pass is counted by operator all the same.
"""

import functools
import pkgutil
import types
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode, _pop_mode_temporarily
from torch.utils._pytree import tree_leaves

_OVERWRITES = ("copy_", "zero_", "fill_", "uniform_", "normal_")  # does not read what it writes in place
_TO_HOST = ("_local_scalar_dense", "equal")


class Work(NamedTuple):
    """Launches, and bytes read and written by them."""

    launches: int
    bytes: int


class Launches(TorchDispatchMode):
    """Counts while it is active, also in backward passes started meanwhile.

    Args:
        as_one: full names of compiled functions (`module.function`), of which a call counts as one launch.
        device: type of the device whose work is counted.

    Raises:
        ImportError, AttributeError: there is no such function.
    """

    def __init__(self, as_one: Collection[str] = (), device: str = "cuda") -> None:
        super().__init__()
        for name in as_one:
            pkgutil.resolve_name(name)
        self.as_one, self._device = frozenset(as_one), device
        self._launches, self._bytes = Counter[str](), Counter[str]()

    @property
    def total(self) -> Work:
        return Work(self._launches.total(), self._bytes.total())

    @property
    def of(self) -> dict[str, Work]:
        """By name of the operator or function, those with most launches first."""
        return {name: Work(count, self._bytes[name]) for name, count in self._launches.most_common()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if name.startswith("c10d::") or torch.Tag.inplace_view in func.tags:
            return out
        read, written = _operands(func, name, args, kwargs, out)
        if any(t.numel() for t in written) or name in _TO_HOST:
            self._add(name, read, written)
        return out

    def call(self, name: str, function: Callable, args: tuple, kwargs: dict) -> Any:
        """Call a compiled function as one launch."""
        with _pop_mode_temporarily():
            out = function(*args, **kwargs)
        self._add(name.rpartition(".")[2], _tensors((args, kwargs)), _tensors(out))
        return out

    def _add(self, name: str, read: Iterable[torch.Tensor], written: Iterable[torch.Tensor]) -> None:
        distinct = {_place(t): t for t in read}.values(), {_place(t): t for t in written}.values()
        touched = [t for part in distinct for t in part if t.device.type == self._device]
        if touched:
            self._launches[name] += 1
            self._bytes[name] += sum(map(_extent, touched))


def compiled(function: Any = None, **_options: Any) -> Any:
    """Takes the place of torch.compile: the function as it is, which `Launches` may count as one launch."""
    if function is None:
        return compiled
    if not isinstance(function, types.FunctionType):  # a module
        return function
    name = f"{function.__module__}.{function.__qualname__}"

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        mode = _get_current_dispatch_mode()
        if isinstance(mode, Launches) and name in mode.as_one:
            return mode.call(name, function, args, kwargs)
        return function(*args, **kwargs)

    return call


def _operands(func: Any, name: str, args: tuple, kwargs: dict, out: Any) -> tuple[list, list]:
    """The tensors that an operator reads and those that it writes."""
    given = [(a, args[i] if i < len(args) else kwargs.get(a.name)) for i, a in enumerate(func._schema.arguments)]
    changed = [(a, value) for a, value in given if a.alias_info is not None and a.alias_info.is_write]
    operands = _tensors((args, kwargs))
    storages = {t.untyped_storage()._cdata for t in operands}
    new = [t for t in _tensors(out) if t.untyped_storage()._cdata not in storages]  # neither a view nor in place
    written = [] if name.startswith(("empty", "new_empty")) else [*new, *_tensors([value for _, value in changed])]
    if name.endswith("_like") or name.startswith("new_"):
        return [], written
    lost = _tensors([value for a, value in changed if a.is_out or name in _OVERWRITES])
    return [t for t in operands if not any(t is other for other in lost)], written


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _place(t: torch.Tensor) -> tuple:
    return t.untyped_storage()._cdata, t.storage_offset(), t.dtype, t.shape, t.stride()


def _extent(t: torch.Tensor) -> int:
    """Bytes that a tensor covers in memory."""
    sizes = [size if stride else min(size, 1) for size, stride in zip(t.shape, t.stride(), strict=True)]
    return torch.Size(sizes).numel() * t.itemsize
