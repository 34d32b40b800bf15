"""Finds which rank of an attempt failed first and why, from the files of ranks and launchers. Without torch.

An attempt's folder has `ranks/node-I/` for each node, with a folder for each local rank below it (torchrun adds two
levels in between): `stdout.log`, `stderr.log` and, for a failed rank, `error.json` in torch's format. A rank that was
killed writes no error. For such a rank torchrun's report is in `node-I.log`; if each rank is a task of its own
(COE_LAUNCH=tasks), the task records the rank's exit status in `ended.json`.
"""

import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from coe_megatron.errors import one_line
from coe_megatron.files import read_limited
from coe_megatron.parsing import JSON_BYTES, parse_json
from coe_megatron.run.exit_status import ExitStatus, known_status, read_error_file, root_status

_LAST_LINES, _LAST_BYTES = 12, 8192
_REPORT_BYTES = 1 << 20  # torchrun writes its report last
# Other ranks notice a killed rank within moments, and may report it before its launcher does.
_NOTICE_SECONDS = 10
_REPORT = re.compile(
    r"Root Cause \(first observed failure\):\s*\[\d+\]:\s*"
    r"time\s*: (?P<time>\S+)\s+host\s*: (?P<host>\S+)\s+"
    r"rank\s*: (?P<rank>\d{1,9}) \(local_rank: (?P<local>\d{1,9})\)\s+"
    r"exitcode\s*: (?P<code>-?\d{1,5})",
    re.ASCII,
)


@dataclass(frozen=True)
class Failure:
    """How a rank failed.

    Attributes:
        time: seconds since 1970, by the clock of its host.
        status: its exit status; FAILED if it was killed.
        killed: the name of the signal; None if it ended by itself.
        log: its stderr; None if there is no such file.
    """

    rank: int
    host: str
    time: float
    status: ExitStatus
    message: str
    killed: str | None = None
    log: Path | None = None

    def describe(self) -> str:
        """Text: rank, host, error, and the last lines of its log."""
        lines = [f"rank {self.rank} on {self.host}: {self.message}"]
        expected = self.status not in (ExitStatus.FAILED, ExitStatus.HUNG)  # the message is enough
        if not expected and self.log is not None and (last := _last_lines(self.log)):
            lines += [f"the end of {self.log}:", *(f"    {line}" for line in last)]
        return "\n".join(lines)


def find_failures(attempt: Path) -> list[Failure]:
    """The failed ranks of an attempt in order of time; empty if they left no files."""
    found: dict[int, Failure] = {}
    for failure in [*_errors(attempt), *_task_records(attempt), *_reports(attempt)]:
        found.setdefault(failure.rank, failure)  # a rank's own error says more than a report about it
    return sorted(found.values(), key=lambda failure: failure.time - _NOTICE_SECONDS * (failure.killed is not None))


def outcome(failures: list[Failure], launched: int) -> ExitStatus:
    """The status of an attempt, from its failed ranks and the exit status of the launch command.

    Args:
        failures: in order of time.
        launched: exit status of the launch command, 0 only if all ranks are done.
    """
    return ExitStatus.DONE if launched == 0 else root_status(failure.status for failure in failures)


def _errors(attempt: Path) -> Iterator[Failure]:
    for path in sorted(attempt.glob("ranks/node-*/**/error.json")):
        if (error := read_error_file(path)) is not None:
            message = one_line(error.message)
            yield Failure(error.rank, error.host, error.time, error.status, message, log=_log(path.parent))


def _task_records(attempt: Path) -> Iterator[Failure]:
    """From the tasks of single ranks, which record a signal as 128 + its number; skips incomplete files."""
    for path in sorted(attempt.glob("ranks/node-*/**/ended.json")):
        try:
            ended = parse_json(read_limited(path, "record", JSON_BYTES))
            rank, code, moment, host = (
                int(ended["rank"]),
                int(ended["status"]),
                float(ended["time"]),
                str(ended["host"]),
            )
        except (OSError, ValueError, KeyError, TypeError, OverflowError):
            continue
        code = 128 - code if code - 128 in signal.valid_signals() and code != ExitStatus.INTERRUPTED else code
        if code != 0:
            yield _without_error_file(rank, host, moment, code, path.parent)


def _reports(attempt: Path) -> Iterator[Failure]:
    """From torchrun's reports: the rank that failed first on each node."""
    for path in sorted(attempt.glob("node-*.log")):
        if not path.is_file():
            continue
        for report in _REPORT.finditer(_end_of(path, _REPORT_BYTES)):
            try:
                moment = datetime.strptime(report["time"], "%Y-%m-%d_%H:%M:%S").timestamp()
            except ValueError:  # other output that looks like a report
                continue
            folders = sorted(attempt.glob(f"ranks/{path.stem}/*/attempt_*/{report['local']}"))
            folder = folders[-1] if folders else None
            yield _without_error_file(int(report["rank"]), report["host"], moment, int(report["code"]), folder)


def _without_error_file(rank: int, host: str, time: float, code: int, folder: Path | None) -> Failure:
    """The failure of a rank without an error file; `code` is its exit status, or minus the number of a signal."""
    log = None if folder is None else _log(folder)
    if code >= 0:
        return Failure(
            rank, host, time, known_status(code), f"ended with status {code} and no error message", None, log
        )
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    message = f"was killed by {name}"
    if name == "SIGKILL":
        message += " (by the kernel when memory runs out, or by the scheduler at a limit)"
    return Failure(rank, host, time, ExitStatus.FAILED, message, name, log)


def _log(folder: Path) -> Path | None:
    path = folder / "stderr.log"
    return path if path.is_file() else None


def _last_lines(path: Path) -> list[str]:
    return [one_line(line) for line in _end_of(path, _LAST_BYTES).splitlines()[-_LAST_LINES:]]


def _end_of(path: Path, max_bytes: int) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - max_bytes))
        return file.read(max_bytes).decode(errors="replace")
