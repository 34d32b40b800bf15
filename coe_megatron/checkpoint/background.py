"""Work that goes on beside training, in a thread of each rank."""

import sys
import threading
from collections.abc import Callable

import torch.distributed as dist

from coe_megatron.distributed.collectives import Group, is_rank0


class Background:
    """Does one thing at a time in a thread of this process: no process is forked, and none can be left over.

    Its ranks talk over a process group of their own (gloo), since training uses the others at the same time. To be made
    by all ranks together, and waited for before the process ends: Python's way out aborts while torch is in a thread.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo")
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[Group], None]) -> None:
        """Begin with `work(process group)`, a collective call; nothing else may be under way."""
        assert self._thread is None
        self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint", daemon=True)
        self._thread.start()

    def is_done(self) -> bool:
        """Whether nothing is under way on this rank; what went wrong `wait` says."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> None:
        """Return when nothing is under way any more, and raise what went wrong (as a rule on all ranks)."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self, work: Callable[[Group], None]) -> None:
        try:
            work(self._group)
        except BaseException as error:  # torch's CheckpointException is no Exception
            self._error = error
            if is_rank0():  # whoever waits learns it too, but that may be much later
                print(error, file=sys.stderr, flush=True)
