"""Collectives on Python objects, over any process group of all ranks (the default group when None).

If process groups are not initialised, this process is treated as the only rank.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import torch
import torch.distributed as dist

from coe_megatron.errors import ConfigError

Group: TypeAlias = dist.ProcessGroup | None
Result = TypeVar("Result")


def broadcast(value: Any, group: Group = None) -> Any:
    """Rank 0's value on all ranks."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, group=group)
    return box[0]


def run_on_rank0(action: Callable[[], Result], group: Group = None, *, shared: bool = True) -> Result:
    """Call `action` on rank 0 only and return its result on all ranks, so that not every rank reads the same file.

    Args:
        action: makes no collective call; its exceptions can be pickled, and also its result if `shared`.
        shared: False keeps the result on rank 0; other ranks return None, which `Result` should allow.

    Raises:
        Exception: what `action` raised, on all ranks.
    """
    result: Any = None
    error: Exception | None = None
    if is_rank0():
        try:
            result = action()
        except Exception as raised:
            error = raised
    there, failed = broadcast((result if shared else None, error), group)
    if error := error or failed:  # rank 0 keeps the traceback
        raise error
    return there if shared else result


def all_gather(items: list, group: Group = None) -> list:
    """The items of all ranks in one list, in rank order."""
    lists: list[Any] = [items]
    if dist.is_initialized():
        lists = [None] * dist.get_world_size()
        dist.all_gather_object(lists, items, group=group)
    return [item for part in lists for item in part]


def is_rank0() -> bool:
    """Whether this is rank 0, or process groups are not initialised."""
    return not dist.is_initialized() or dist.get_rank() == 0


def shard(items: Sequence) -> Sequence:
    """This rank's shard of a list that is equal on all ranks: every world_size-th item."""
    return items[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else items


def run_on_all(work: Callable[[], None], group: Group) -> None:
    """Call `work` on every rank and wait for all; if one rank fails, all ranks raise.

    Args:
        work: makes no collective call.

    Raises:
        OSError: the first rank's error.
    """
    failure = None
    try:
        work()
    except (OSError, RuntimeError, ConfigError) as error:  # torch.save turns an OSError into a RuntimeError
        failure = str(os_error_of(error))
    if failures := [found for found in all_gather([failure], group) if found]:
        raise OSError(failures[0])


def os_error_of(error: BaseException) -> BaseException:
    """The OSError behind an error of torch's writers, whose text says more (`No space left on device`)."""
    before: BaseException | None = error
    while before is not None and not isinstance(before, OSError):
        before = before.__cause__ or before.__context__
    return before or error


class Pending:
    """The result of a collective that is under way; other work can be done meanwhile.

    Args:
        work: None if there is nothing to wait for.
    """

    def __init__(self, tensor: torch.Tensor, work: dist.Work | None) -> None:
        self._tensor, self._work = tensor, work

    def result(self) -> torch.Tensor:
        """Wait (on CUDA the stream waits, and the host does not) and return the result; may be called again."""
        if self._work is not None:
            self._work.wait()
        return self._tensor


def start_sum(values: torch.Tensor, group: Group = None) -> Pending:
    """Start to sum a tensor over a group, on this rank's device; `values` is not changed."""
    summed = to_device(values).clone()
    return Pending(summed, dist.all_reduce(summed, group=group, async_op=True))


def to_device(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a CPU tensor to this rank's device, from pinned memory, so that the host does not wait for the device."""
    if tensor.is_cuda or not torch.cuda.is_available():
        return tensor
    return tensor.pin_memory().to(torch.cuda.current_device(), non_blocking=True)


def read(*numbers: float | torch.Tensor) -> list[float]:
    """Numbers and tensors of one number, on any device, as floats: one copy to the host for all of them."""
    there = [number.double().reshape(()) for number in numbers if isinstance(number, torch.Tensor) and number.is_cuda]
    values = iter(torch.stack(there).tolist() if there else [])
    return [
        next(values) if isinstance(number, torch.Tensor) and number.is_cuda else float(number) for number in numbers
    ]
