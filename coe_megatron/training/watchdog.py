"""End a rank that makes no progress, and write the stacks of all its threads to a file.

If one rank hangs, all others wait for it in their next collective, so the detectors of all ranks trigger at the same
time. Each waits a moment before it ends its process, so that the others can write too.
"""

import faulthandler
import os
import platform
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import TracebackType

from coe_megatron.run.exit_status import ExitStatus

_SECONDS_FOR_OTHERS = 5.0
_POLL_SECONDS = 1.0  # or a tenth of the limit, if that is less
_INTERPRETER_FACTOR = 10  # times the limit, until the interpreter's own watchdog triggers
_COLLECTIVE_MARGIN = 60.0  # seconds until collectives time out, with a less informative error


def collective_timeout(hang_after: float | None) -> timedelta | None:
    """Timeout of collectives, above that of the hang detector, whose report says more; None for torch's default."""
    return None if hang_after is None else timedelta(seconds=hang_after + _COLLECTIVE_MARGIN)


class HangDetector:
    """A context that monitors this process; `heartbeat` reports progress.

    We count time in short waits at their nominal length, so that a suspended process (SIGSTOP, a paused machine, a
    debugger) does not count as hanging.

    If even threads cannot run because something holds the GIL, the interpreter's own watchdog writes the stacks to
    stderr and ends the process with status 1. It cannot distinguish this from a suspended process, so it triggers only
    after ten times the limit; the other ranks, which wait for this one, trigger long before.

    Args:
        folder: for the stacks, `rank-00003.txt` for rank 3; created when needed.
        limit: seconds without progress; None disables the detector.
        on_hang: called with the exit status and a message before the process ends.
    """

    def __init__(self, folder: Path, rank: int, limit: float | None, on_hang: Callable[[int, str], None]) -> None:
        self._file, self._rank, self._limit, self._on_hang = folder / f"rank-{rank:05d}.txt", rank, limit, on_hang
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._wait, name="hang detector", daemon=True)
        self._beat = (0, "starting")

    def heartbeat(self, activity: str) -> None:
        """Report progress; `activity` (such as `step 12`) is what starts now."""
        self._beat = (self._beat[0] + 1, activity)

    def __enter__(self) -> "HangDetector":
        if self._limit is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._limit is not None:
            self._thread.join()  # so that it starts no further interpreter watchdog
            faulthandler.cancel_dump_traceback_later()

    def _wait(self) -> None:
        assert self._limit is not None
        interval, seen, silent = min(_POLL_SECONDS, self._limit / 10), self._beat, 0.0
        while not self._over.wait(interval):
            faulthandler.dump_traceback_later(_INTERPRETER_FACTOR * self._limit, exit=True)
            seen, silent = (seen, silent + interval) if self._beat == seen else (self._beat, 0.0)
            if silent >= self._limit:
                self._report_and_exit()

    def _report_and_exit(self) -> None:
        message = f"rank {self._rank} on {platform.node()} hangs: no progress in {self._limit:g} s at {self._beat[1]}"
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with open(self._file, "w", opener=_without_waiting) as file:
                print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} process {os.getpid()}: {message}", file=file, flush=True)
                faulthandler.dump_traceback(file)
            message += f"; the stacks of its threads are in {self._file}"
        except OSError as error:
            message += f"; its stacks follow, since {self._file} cannot be written: {error.strerror}"
            faulthandler.dump_traceback()
        print(message, file=sys.stderr, flush=True)
        self._on_hang(ExitStatus.HUNG, message)
        time.sleep(_SECONDS_FOR_OTHERS)
        os._exit(ExitStatus.HUNG)  # a hanging process cannot end cleanly


def _without_waiting(path: str, flags: int) -> int:
    """An opener that does not block on a pipe without a reader."""
    return os.open(path, flags | os.O_NONBLOCK, 0o666)
