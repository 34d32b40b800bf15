"""Asked to stop: by Ctrl-C, SIGTERM or SIGUSR1, by a file that somebody makes, by the end of torchrun. Without torch.

A warning of an end that is near (a time limit, preemption) should not go through torchrun, which kills its ranks 30 s
after it has passed a signal on: it is sent to the ranks themselves, or is the stop file, which rank 0 looks for.
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

_SECONDS_BETWEEN_LOOKS = 1.0  # at the folder of the stop file, which may lie on a server


class Interruption:
    """Notes that this rank was asked to stop, from its making until `forget`; ranks agree on the step themselves.

    SIGTERM and SIGUSR1 may come several times (from a scheduler, and by way of torchrun) and change nothing then. The
    first Ctrl-C counts once `also_keyboard` was called; the second ends the run at once.

    Args:
        stop_file: its existence asks to stop; to be given to one rank.
    """

    def __init__(self, stop_file: Path | None = None) -> None:
        self._file, self._looked, self._status = stop_file, 0.0, ExitStatus.DONE
        self._before: dict[int, Any] = {
            number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGUSR1)
        }

    def also_keyboard(self) -> None:
        """Note Ctrl-C as well, from now on: a run has begun, which can be saved."""
        self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._note)

    def asked(self) -> ExitStatus:
        """DONE if nobody asked; STOPPED or INTERRUPTED, the status with which the run is to end."""
        if self._file is not None and time.monotonic() - self._looked > _SECONDS_BETWEEN_LOOKS:
            # Listing a folder makes NFS ask its server; it may answer from memory whether one file exists.
            if self._file.name in _names(self._file.parent):
                self._status = max(self._status, ExitStatus.STOPPED)
            self._looked = time.monotonic()
        return self._status

    def forget(self) -> None:
        """Give the signals back to whom they belonged."""
        self._restore(list(self._before))

    def _note(self, number: int, _frame: FrameType | None) -> None:
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
    except OSError:  # not made yet, or on a server that is away for a while: no reason to end a run
        return []


def stop_with_parent(number: signal.Signals = signal.SIGTERM) -> None:
    """Have the kernel send a signal to this process when its parent ends, by SIGKILL too: torchrun's ranks outlive it.

    To be called where the parent is a launcher, not the shell of a person who may log out.
    """
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, number)
