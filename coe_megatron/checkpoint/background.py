"""Runs work in a background thread of each rank while training continues."""

import sys
import threading
from collections.abc import Callable

import torch.distributed as dist

from coe_megatron.distributed.collectives import Group, is_rank0


class Background:
    """Runs one task at a time in a thread of this process. It forks no process that could outlive this one.

    The threads communicate over their own gloo group, since training uses the other groups at the same time. Creating
    it is collective. All ranks must call `wait` before the process ends: the interpreter aborts if it exits while torch
    runs in a thread.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo")
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[Group], None]) -> None:
        """Start `work(process group)`; collective. No other task may be running."""
        assert self._thread is None
        self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint", daemon=True)
        self._thread.start()

    def is_done(self) -> bool:
        """Whether no task is running on this rank; `wait` raises its error, if any."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> None:
        """Wait for the running task and raise its error, if any (usually on all ranks)."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self, work: Callable[[Group], None]) -> None:
        try:
            work(self._group)
        except BaseException as error:  # torch's CheckpointException is not an Exception
            self._error = error
            if is_rank0():  # `wait` raises it too, but possibly much later
                print(error, file=sys.stderr, flush=True)
