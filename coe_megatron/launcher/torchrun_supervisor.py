"""Supervises torchrun on this host: exits with the ranks' status, forwards stop requests, leaves no process behind.

Torchrun itself exits with 1 whatever its ranks did, restarts ranks that cannot succeed, kills ranks 30 seconds after a
signal however long their save takes, and leaves them as orphans when it is killed.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from coe_megatron.launcher.preloaded import Popen, Preloaded
from coe_megatron.run.exit_status import ExitStatus, read_error_file, root_status

_POLL_SECONDS = 0.2
_RANKS_END_SECONDS = 35.0  # torchrun gives its ranks 30 between SIGTERM and SIGKILL
_TORCHRUN_END_SECONDS = 5.0  # after its last rank; if cut off from its peers, torchrun waits much longer
_KILL_SECONDS = 30.0
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Report:
    """How a rank failed, from its error file; `attempt` counts torchrun's starts of the ranks from 0."""

    rank: int
    attempt: int
    time: float
    status: ExitStatus
    message: str


class Requests:
    """Requests to a running torchrun; may be set from a signal handler or a thread."""

    def __init__(self) -> None:
        self.stop = threading.Event()  # after the current step and at most one more, with a checkpoint
        self.end = threading.Event()  # immediately

    def more(self) -> None:
        """First request: stop. Second request: end."""
        (self.end if self.stop.is_set() else self.stop).set()


def supervise(
    command: list[str],
    environment: Mapping[str, str],
    logs: Path,
    max_restarts: int,
    requests: Requests,
    preloaded: Preloaded | None = None,
) -> tuple[ExitStatus, Report | None]:
    """Run torchrun until it ends or is ended.

    Args:
        command: of torchrun, with `--log-dir` set to `logs` and `--max-restarts` set to `max_restarts`.
        logs: an empty folder for the ranks' error files.
        preloaded: torchrun is forked from it, and it is then closed; None starts a new interpreter.

    Returns:
        The status of the ranks, and the report that it comes from, None if there is no report.
    """
    adopt_orphans()
    others = frozenset(psutil.Process().children(recursive=True))
    # In its own session: the caller handles Ctrl-C and asks the ranks to stop.
    torchrun = Popen(command, preloaded, env=dict(environment), start_new_session=True)
    if preloaded is not None:
        preloaded.close()
    try:
        return _Supervisor(torchrun, logs, max_restarts, requests).run()
    finally:
        kill_descendants(others)


class _Supervisor:
    def __init__(self, torchrun: subprocess.Popen, logs: Path, max_restarts: int, requests: Requests) -> None:
        self.torchrun, self.logs, self.max_restarts, self.requests = torchrun, logs, max_restarts, requests
        self.signalled: set[int] = set()
        self.failed_since: float | None = None  # when a rank failed without a restart to follow
        self.ended_since: float | None = None  # when all ranks had ended

    def run(self) -> tuple[ExitStatus, Report | None]:
        while self.torchrun.poll() is None:
            if self.requests.end.is_set():
                return ExitStatus.INTERRUPTED, None
            ranks = living_ranks(self.torchrun.pid)
            if self.requests.stop.is_set() and not self._request_stop(ranks):
                return ExitStatus.STOPPED, None
            if self._is_over(bool(ranks)):
                break
            time.sleep(_POLL_SECONDS)
        if self.torchrun.returncode == 0:
            return ExitStatus.DONE, None
        cause = root_cause(read_reports(self.logs))
        if cause is None and self.torchrun.returncode == ExitStatus.MISTAKE:  # in torchrun's own arguments
            return ExitStatus.MISTAKE, None
        return (cause.status if cause else ExitStatus.FAILED), cause

    def _request_stop(self, ranks: list[psutil.Process]) -> bool:
        """Ask each rank to stop, once; False if no rank has been started yet, so that there is nothing to save."""
        for rank in ranks:
            if rank.pid not in self.signalled and catches(rank.pid, signal.SIGUSR1):
                self.signalled.add(rank.pid)
                rank.send_signal(signal.SIGUSR1)
        return bool(ranks or self.signalled)

    def _is_over(self, ranks_live: bool) -> bool:
        """Whether to stop waiting for torchrun: a rank failed, no restart follows, and torchrun had time to end.

        Torchrun restarts the ranks after any failure as long as `--max-restarts` allows it; if a restart cannot help,
        this terminates torchrun.
        """
        cause = root_cause(read_reports(self.logs))
        if cause is None or (cause.attempt < self.max_restarts and may_restart(cause.status)):
            return False
        if self.failed_since is None:
            self.failed_since = time.monotonic()
            if cause.attempt < self.max_restarts:
                self.torchrun.terminate()
        if ranks_live:
            self.ended_since = None
            return time.monotonic() - self.failed_since > _RANKS_END_SECONDS
        self.ended_since = self.ended_since or time.monotonic()
        return time.monotonic() - self.ended_since > _TORCHRUN_END_SECONDS


def may_restart(status: ExitStatus) -> bool:
    """Whether an immediate restart of the ranks on the same hosts can help."""
    return status in {ExitStatus.FAILED, ExitStatus.HUNG}


def read_reports(logs: Path) -> list[Report]:
    """The error files of ranks in torchrun's `--log-dir`; those that torch itself wrote count as FAILED."""
    found = []
    for file in logs.glob("*/attempt_*/*/error.json"):
        attempt = int(file.parents[1].name.removeprefix("attempt_"))
        if (error := read_error_file(file)) is not None:
            found.append(Report(error.rank, attempt, error.time, error.status, error.message))
    return found


def root_cause(found: list[Report]) -> Report | None:
    """The first report of the last attempt with its `root_status`; None if there is no report."""
    last = max((report.attempt for report in found), default=0)
    of_last = sorted((report for report in found if report.attempt == last), key=lambda report: report.time)
    status = root_status(report.status for report in of_last)
    return next((report for report in of_last if report.status is status), None)


def living_ranks(torchrun: int) -> list[psutil.Process]:
    """The children of torchrun that lead a session, as its ranks do, and have not ended.

    Torchrun does not reap the others while it waits.
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
    """Whether a process has a handler for a signal, which would kill it otherwise; False if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (number - 1) & 1)


def adopt_orphans(adopt: bool = True) -> None:
    """Make this process the subreaper of its descendants, so that orphaned ones become its children."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(adopt), 0, 0, 0)


def kill_descendants(others: frozenset[psutil.Process]) -> None:
    """SIGKILL all descendants of this process except `others`, until none is left.

    A process that waits for a disk or device (state D) ends only when that answers. After `_KILL_SECONDS` this reports
    the remaining processes on stderr and returns.
    """
    deadline = time.monotonic() + _KILL_SECONDS
    while left := set(psutil.Process().children(recursive=True)) - others:
        if time.monotonic() > deadline:
            named = ", ".join(
                f"{process.pid} ({_name(process)})" for process in sorted(left, key=lambda each: each.pid)
            )
            print(f"these processes did not end after SIGKILL: {named}", file=sys.stderr, flush=True)
            return
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(list(left), timeout=_POLL_SECONDS)


def _name(process: psutil.Process) -> str:
    try:
        return f"{process.name()}, {process.status()}"
    except psutil.NoSuchProcess:
        return "just ended"
