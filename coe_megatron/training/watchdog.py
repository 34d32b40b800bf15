"""Ends a rank that makes no progress any more, and says where it stood: the stacks of all its threads, in a file.

A rank that hangs makes all others wait for it in their next collective, so the watches of all ranks strike at the same
time; each gives the others a moment to write before it ends.
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
_LOOKS_EVERY = 1.0  # seconds, or a tenth of the limit where that is less
_TIMES_WITHOUT_ANY_THREAD = 10  # the limit, until the interpreter's own watchdog strikes
_SECONDS_PAST_THE_WATCH = 60.0  # for collectives to time out, which end a rank with less to say


def collective_timeout(hang_after: float | None) -> timedelta | None:
    """How long a collective may wait so that the watch, which says more, comes first; None for torch's default."""
    return None if hang_after is None else timedelta(seconds=hang_after + _SECONDS_PAST_THE_WATCH)


class HangDetector:
    """As a context it watches this process; `beat` says that there was progress.

    Time is counted in short waits, each for no more than it was meant to take: a process that was suspended as a whole
    (SIGSTOP, a machine asleep or paused, a debugger) did not hang meanwhile.

    Where even threads cannot run, because something holds Python's lock, the interpreter's own watchdog writes the
    stacks to stderr and ends the process, with status 1. It cannot tell that from being suspended, hence after ten
    times the limit only; the other ranks, which wait for this one, strike long before.

    Args:
        folder: for the stacks, `rank-00003.txt` for rank 3; made when it is needed.
        limit: seconds without progress; None never strikes.
        last_word: called with the exit status and a line before the process ends.
    """

    def __init__(self, folder: Path, rank: int, limit: float | None, last_word: Callable[[int, str], None]) -> None:
        self._file, self._rank, self._limit, self._last_word = folder / f"rank-{rank:05d}.txt", rank, limit, last_word
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._wait, name="hang watch", daemon=True)
        self._beat = (0, "starting")

    def beat(self, next_thing: str) -> None:
        """Progress was made, and `next_thing` (such as `step 12`) is what comes now."""
        self._beat = (self._beat[0] + 1, next_thing)

    def __enter__(self) -> "HangDetector":
        if self._limit is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._limit is not None:
            self._thread.join()  # so that it sets off no watchdog any more
            faulthandler.cancel_dump_traceback_later()

    def _wait(self) -> None:
        assert self._limit is not None
        look, seen, silent = min(_LOOKS_EVERY, self._limit / 10), self._beat, 0.0
        while not self._over.wait(look):
            faulthandler.dump_traceback_later(_TIMES_WITHOUT_ANY_THREAD * self._limit, exit=True)
            seen, silent = (seen, silent + look) if self._beat == seen else (self._beat, 0.0)
            if silent >= self._limit:
                self._strike()

    def _strike(self) -> None:
        message = f"rank {self._rank} on {platform.node()} hangs: no progress in {self._limit:g} s at {self._beat[1]}"
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with open(self._file, "w", opener=_without_waiting) as file:
                print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} process {os.getpid()}: {message}", file=file, flush=True)
                faulthandler.dump_traceback(file)
            message += f"; the stacks of its threads are in {self._file}"
        except OSError as error:
            message += f"; its stacks follow, {self._file} cannot be written: {error.strerror}"
            faulthandler.dump_traceback()
        print(message, file=sys.stderr, flush=True)
        self._last_word(ExitStatus.HUNG, message)
        time.sleep(_SECONDS_FOR_OTHERS)
        os._exit(ExitStatus.HUNG)  # what hangs cannot be asked to end


def _without_waiting(path: str, flags: int) -> int:
    """As `open` does, but for a pipe that nobody reads, which would wait."""
    return os.open(path, flags | os.O_NONBLOCK, 0o666)
