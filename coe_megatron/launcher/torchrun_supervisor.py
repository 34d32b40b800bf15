"""Torchrun on this host, watched: it ends with its ranks' own status, can be asked to stop, and leaves nothing behind.

Torchrun by itself exits with 1 whatever its ranks did, starts ranks again that have nothing more to do, kills ranks 30
seconds after a signal however long their checkpoint takes, and leaves them as orphans when it is killed.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from coe_megatron.launcher.preloaded import Popen, Preloaded, is_loaded
from coe_megatron.run.exit_status import ExitStatus, read_error_file, verdict

_LOOKS_EVERY = 0.2  # seconds
_TORCHRUN_ENDS_ITS_RANKS = 35.0  # seconds; it gives them 30 between SIGTERM and SIGKILL
_TORCHRUN_ENDS_ITSELF = 5.0  # seconds after its last rank; cut off from its peers it would wait for them much longer
_KILLED_WITHIN = 30.0  # seconds
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Report:
    """How a rank failed, by its own error file; `attempt` counts torchrun's starts of the ranks from 0."""

    rank: int
    attempt: int
    time: float
    status: ExitStatus
    message: str


class Requests:
    """What others ask of a running torchrun; may be set from a signal handler or a thread."""

    def __init__(self) -> None:
        self.stop = threading.Event()  # after the step at hand, with a checkpoint
        self.end = threading.Event()  # at once

    def more(self) -> None:
        """Asked once: stop; asked again: end."""
        (self.end if self.stop.is_set() else self.stop).set()


def supervise(
    command: list[str], environment: Mapping[str, str], logs: Path, max_restarts: int, requests: Requests
) -> tuple[ExitStatus, Report | None]:
    """Run torchrun until it ends or is ended.

    Args:
        command: torchrun's, with `--log-dir` being `logs` and `--max-restarts` being `max_restarts`.
        logs: an empty folder, where the ranks' error files come to lie.

    Returns:
        The status of the ranks, and the report it comes from, None where no rank has left one.
    """
    adopt_orphans()
    others = frozenset(psutil.Process().children(recursive=True))
    # A session of its own: Ctrl-C in a terminal is for the caller, who asks torchrun's ranks to stop.
    with Preloaded() if is_loaded() else nullcontext() as preloaded:
        torchrun = Popen(command, preloaded, env=dict(environment), start_new_session=True)
    try:
        return _Watch(torchrun, logs, max_restarts, requests).until_the_end()
    finally:
        kill_descendants(others)


class _Watch:
    def __init__(self, torchrun: subprocess.Popen, logs: Path, max_restarts: int, requests: Requests) -> None:
        self.torchrun, self.logs, self.max_restarts, self.requests = torchrun, logs, max_restarts, requests
        self.signalled: set[int] = set()
        self.over_since: float | None = None  # when a rank had failed for good
        self.gone_since: float | None = None  # when all ranks had ended

    def until_the_end(self) -> tuple[ExitStatus, Report | None]:
        while self.torchrun.poll() is None:
            if self.requests.end.is_set():
                return ExitStatus.INTERRUPTED, None
            ranks = living_ranks(self.torchrun.pid)
            if self.requests.stop.is_set() and not self._pass_on(ranks):
                return ExitStatus.STOPPED, None
            if self._is_over(bool(ranks)):
                break
            time.sleep(_LOOKS_EVERY)
        if self.torchrun.returncode == 0:
            return ExitStatus.DONE, None
        cause = most_telling(reports(self.logs))
        if cause is None and self.torchrun.returncode == ExitStatus.MISTAKE:  # in torchrun's own arguments
            return ExitStatus.MISTAKE, None
        return (cause.status if cause else ExitStatus.FAILED), cause

    def _pass_on(self, ranks: list[psutil.Process]) -> bool:
        """Ask each rank to stop, once; False if none has been started yet, so that there is nothing to save."""
        for rank in ranks:
            if rank.pid not in self.signalled and catches(rank.pid, signal.SIGUSR1):
                self.signalled.add(rank.pid)
                rank.send_signal(signal.SIGUSR1)
        return bool(ranks or self.signalled)

    def _is_over(self, ranks_live: bool) -> bool:
        """Whether torchrun has had its time since its ranks failed in a way that no restart follows.

        Torchrun itself restarts after any failure as long as it may: then it is told to end.
        """
        cause = most_telling(reports(self.logs))
        if cause is None or (cause.attempt < self.max_restarts and may_restart(cause.status)):
            return False
        if self.over_since is None:
            self.over_since = time.monotonic()
            if cause.attempt < self.max_restarts:
                self.torchrun.terminate()
        if ranks_live:
            self.gone_since = None
            return time.monotonic() - self.over_since > _TORCHRUN_ENDS_ITS_RANKS
        self.gone_since = self.gone_since or time.monotonic()
        return time.monotonic() - self.gone_since > _TORCHRUN_ENDS_ITSELF


def may_restart(status: ExitStatus) -> bool:
    """Whether starting the ranks again at once, on the same hosts, can help."""
    return status in {ExitStatus.FAILED, ExitStatus.HUNG}


def reports(logs: Path) -> list[Report]:
    """What ranks have left in torchrun's `--log-dir`; files of others than our ranks (torch's own) count as FAILED."""
    found = []
    for file in logs.glob("*/attempt_*/*/error.json"):
        attempt = int(file.parents[1].name.removeprefix("attempt_"))
        if (said := read_error_file(file)) is not None:
            found.append(Report(said.rank, attempt, said.time, said.status, said.message))
    return found


def most_telling(found: list[Report]) -> Report | None:
    """Of the last attempt's reports the first one with its `verdict`; None where there is none."""
    last = max((report.attempt for report in found), default=0)
    those = sorted((report for report in found if report.attempt == last), key=lambda report: report.time)
    status = verdict(report.status for report in those)
    return next((report for report in those if report.status is status), None)


def living_ranks(torchrun: int) -> list[psutil.Process]:
    """The children of torchrun that lead a session, as its ranks do, and have not ended.

    Torchrun leaves those that have unburied while it waits.
    """
    try:
        children = psutil.Process(torchrun).children()
        return [child for child in children if child.status() != psutil.STATUS_ZOMBIE and _leads_session(child.pid)]
    except psutil.NoSuchProcess:
        return []


def _leads_session(pid: int) -> bool:
    try:
        return os.getsid(pid) == pid
    except ProcessLookupError:
        return False


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal, which would kill it otherwise; False if it is no more."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (number - 1) & 1)


def adopt_orphans(adopt: bool = True) -> None:
    """Become the parent of all processes below this one that lose theirs, so that none of them can be lost sight of."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(adopt), 0, 0, 0)


def kill_descendants(others: frozenset[psutil.Process]) -> None:
    """SIGKILL to all processes below this one that are not among these others, until there are none.

    One that waits for a disk or a device (state D) does not end before that answers: after `_KILLED_WITHIN` seconds a
    line on stderr names what is left, and this goes on without it.
    """
    deadline = time.monotonic() + _KILLED_WITHIN
    while left := set(psutil.Process().children(recursive=True)) - others:
        if time.monotonic() > deadline:
            named = ", ".join(
                f"{process.pid} ({_name(process)})" for process in sorted(left, key=lambda each: each.pid)
            )
            print(f"processes that do not end when killed stay: {named}", file=sys.stderr, flush=True)
            return
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(list(left), timeout=_LOOKS_EVERY)


def _name(process: psutil.Process) -> str:
    try:
        return f"{process.name()}, {process.status()}"
    except psutil.NoSuchProcess:
        return "just ended"
