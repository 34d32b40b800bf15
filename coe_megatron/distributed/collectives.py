"""What the ranks do together around files, over any process group of all ranks (the default one when None).

Without process groups this process is alone.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import torch.distributed as dist

from coe_megatron.errors import ConfigError

Group: TypeAlias = dist.ProcessGroup | None
Result = TypeVar("Result")


def broadcast(value: Any, group: Group = None) -> Any:
    """The first rank's value on all ranks."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, group=group)
    return box[0]


def run_on_rank0(action: Callable[[], Result], group: Group = None, *, shared: bool = True) -> Result:
    """What `action` returns on the first rank, which alone calls it: a thousand ranks would read one file all at once.

    Args:
        action: without a collective call in it; its errors can be pickled, and its result if it is shared.
        shared: False keeps the result on the first rank; the others have None, which `Result` should allow for.

    Raises:
        Exception: on all ranks what `action` raised; the others would wait for the first and end in an error of theirs.
    """
    result: Any = None
    error: Exception | None = None
    if is_rank0():
        try:
            result = action()
        except Exception as raised:
            error = raised
    there, failed = broadcast((result if shared else None, error), group)
    if error := error or failed:  # on the first rank with its traceback
        raise error
    return there if shared else result


def all_gather(items: list, group: Group = None) -> list:
    """What all ranks have, in one list."""
    lists: list[Any] = [items]
    if dist.is_initialized():
        lists = [None] * dist.get_world_size()
        dist.all_gather_object(lists, items, group=group)
    return [item for part in lists for item in part]


def is_rank0() -> bool:
    """Whether this rank does what one rank has to do for all."""
    return not dist.is_initialized() or dist.get_rank() == 0


def shard(items: Sequence) -> Sequence:
    """This rank's part of a list that all ranks have."""
    return items[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else items


def run_on_all(work: Callable[[], None], group: Group) -> None:
    """Do something on every rank and wait for all; what fails on one is raised on all.

    Args:
        work: without a collective call in it.

    Raises:
        OSError: what the disk said first.
    """
    failure = None
    try:
        work()
    except (OSError, RuntimeError, ConfigError) as error:  # torch.save makes the second of the first
        failure = str(os_error_of(error))
    if failures := [found for found in all_gather([failure], group) if found]:
        raise OSError(failures[0])


def os_error_of(error: BaseException) -> BaseException:
    """Of an error of torch's writers the OSError before it, whose text says more (`No space left on device`)."""
    before: BaseException | None = error
    while before is not None and not isinstance(before, OSError):
        before = before.__cause__ or before.__context__
    return before or error
