"""Which rank of an attempt failed first, and with what; read from what the ranks and their launchers leave behind.

An attempt's folder has, for each node, `ranks/node-I/` with a folder for each local rank somewhere below (torchrun puts
two of its own in between): `stdout.log`, `stderr.log`, and of a rank that failed `error.json` in torch's format. A rank
that was killed leaves no error: torchrun's report in `node-I.log` tells of it, or, where each rank is a task of its
own, `ended.json` with the status that its shell saw. Without torch.
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
from coe_megatron.run.exit_status import ExitStatus, known_status, read_error_file, verdict

_LAST_LINES, _LAST_BYTES = 12, 8192
_REPORT_BYTES = 1 << 20  # torchrun's report is the last that it writes
# Other ranks notice within moments that one was killed, and may say so before its launcher has.
_SECONDS_TO_NOTICE = 10
_REPORT = re.compile(
    r"Root Cause \(first observed failure\):\s*\[\d+\]:\s*"
    r"time\s*: (?P<time>\S+)\s+host\s*: (?P<host>\S+)\s+"
    r"rank\s*: (?P<rank>\d{1,9}) \(local_rank: (?P<local>\d{1,9})\)\s+"
    r"exitcode\s*: (?P<code>-?\d{1,5})",
    re.ASCII,
)


@dataclass(frozen=True)
class Failure:
    """How one rank ended, other than well.

    Attributes:
        time: seconds since 1970, by the clock of its machine.
        status: the rank's own; FAILED for one that was killed.
        killed: by which signal; None of a rank that ended by itself.
        log: its stderr, None where there is no such file.
    """

    rank: int
    host: str
    time: float
    status: ExitStatus
    message: str
    killed: str | None = None
    log: Path | None = None

    def told(self) -> str:
        """For a person: who, where, what, and the last lines of its log."""
        lines = [f"rank {self.rank} on {self.host}: {self.message}"]
        expected = self.status not in (ExitStatus.FAILED, ExitStatus.HUNG)  # the message says it all
        if not expected and self.log is not None and (last := _last_lines(self.log)):
            lines += [f"the end of {self.log}:", *(f"    {line}" for line in last)]
        return "\n".join(lines)


def find_failures(attempt: Path) -> list[Failure]:
    """All ranks of an attempt that failed, the first one first; none where nothing was left behind."""
    found: dict[int, Failure] = {}
    for failure in [*_errors(attempt), *_shells(attempt), *_reports(attempt)]:
        found.setdefault(failure.rank, failure)  # a rank's own words tell more than those about it
    return sorted(found.values(), key=lambda failure: failure.time - _SECONDS_TO_NOTICE * (failure.killed is not None))


def outcome(failures: list[Failure], launched: int) -> ExitStatus:
    """How an attempt ended as a whole: by its failing ranks, if any; else by the command that started them all.

    Args:
        failures: the first one first.
        launched: the exit status of that command, which is 0 only if all ranks are done.
    """
    return ExitStatus.DONE if launched == 0 else verdict(failure.status for failure in failures)


def _errors(attempt: Path) -> Iterator[Failure]:
    for path in sorted(attempt.glob("ranks/node-*/**/error.json")):
        if (said := read_error_file(path)) is not None:
            message = one_line(said.message)
            yield Failure(said.rank, said.host, said.time, said.status, message, log=_log(path.parent))


def _shells(attempt: Path) -> Iterator[Failure]:
    """From the shells around single ranks, which see a signal as 128 more; a file cut short is passed over."""
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
            yield _without_words(rank, host, moment, code, path.parent)


def _reports(attempt: Path) -> Iterator[Failure]:
    """From torchrun's reports: the rank that each node saw failing first."""
    for path in sorted(attempt.glob("node-*.log")):
        if not path.is_file():
            continue
        for report in _REPORT.finditer(_end_of(path, _REPORT_BYTES)):
            try:
                moment = datetime.strptime(report["time"], "%Y-%m-%d_%H:%M:%S").timestamp()
            except ValueError:  # a rank has said something that looks like one
                continue
            folders = sorted(attempt.glob(f"ranks/{path.stem}/*/attempt_*/{report['local']}"))
            folder = folders[-1] if folders else None
            yield _without_words(int(report["rank"]), report["host"], moment, int(report["code"]), folder)


def _without_words(rank: int, host: str, time: float, code: int, folder: Path | None) -> Failure:
    """Of a rank that left no error; `code` is its exit status, or below zero the number of a signal."""
    log = None if folder is None else _log(folder)
    if code >= 0:
        return Failure(rank, host, time, known_status(code), f"ended with status {code}, without a word", None, log)
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    said = f"was killed by {name}, without a word"
    if name == "SIGKILL":
        said += " (the kernel does that when memory runs out; the scheduler, at a limit)"
    return Failure(rank, host, time, ExitStatus.FAILED, said, name, log)


def _log(folder: Path) -> Path | None:
    path = folder / "stderr.log"
    return path if path.is_file() else None


def _last_lines(path: Path) -> list[str]:
    return [one_line(line) for line in _end_of(path, _LAST_BYTES).splitlines()[-_LAST_LINES:]]


def _end_of(path: Path, most: int) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - most))
        return file.read(most).decode(errors="replace")
