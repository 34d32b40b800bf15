"""Requests to stop: Ctrl-C, SIGTERM or SIGUSR1, a stop file, the end of torchrun. Does not import torch.

A warning before a time limit or preemption should not go through torchrun, which kills its ranks 30 s after it forwards
a signal. Send it to the ranks themselves, or create the stop file, which rank 0 polls.
"""

import ctypes
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any

from coe_megatron.run.exit_status import ExitStatus

_POLL_SECONDS = 1.0  # for the stop file, whose folder may be on a file server


class StopRequest:
    """Records that this rank was asked to stop, until `restore_handlers`; the ranks agree on the step separately.

    Repeated SIGTERM and SIGUSR1 (from a scheduler and through torchrun) have no further effect. After `handle_sigint`
    the first Ctrl-C asks to stop, and the second ends the run at once.

    Args:
        stop_file: a file whose existence asks to stop; pass it to one rank only.
    """

    def __init__(self, stop_file: Path | None = None) -> None:
        self._file, self._looked, self._status = stop_file, 0.0, ExitStatus.DONE
        self._before: dict[int, Any] = {
            number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGUSR1)
        }

    def handle_sigint(self) -> None:
        """Handle Ctrl-C too from now on: the run has started and can save."""
        self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._handle)

    def status(self) -> ExitStatus:
        """DONE if nobody asked to stop; otherwise STOPPED or INTERRUPTED, the exit status of the run."""
        if self._file is not None and time.monotonic() - self._looked > _POLL_SECONDS:
            # Listing the folder makes NFS ask the server; whether a single file exists may come from a cache.
            if self._file.name in _names(self._file.parent):
                self._status = max(self._status, ExitStatus.STOPPED)
            self._looked = time.monotonic()
        return self._status

    def restore_handlers(self) -> None:
        """Restore the previous signal handlers."""
        self._restore(list(self._before))

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        by_keyboard = number == signal.SIGINT
        self._status = max(self._status, ExitStatus.INTERRUPTED if by_keyboard else ExitStatus.STOPPED)
        if by_keyboard:
            self._restore([signal.SIGINT])

    def _restore(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            signal.signal(number, self._before.pop(number))


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:  # not created yet, or the file server is unavailable: no reason to end a run
        return []


def stop_with_parent(number: signal.Signals = signal.SIGTERM) -> None:
    """Have the kernel send a signal to this process when its parent ends; otherwise ranks outlive a killed torchrun.

    Call this only if the parent is a launcher, and not the shell of a user, who may log out.
    """
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, number)
