"""Exit statuses for schedulers and scripts, and torchrun's error files.

Torchrun exits with 1 whatever its ranks did. So each rank that fails writes its status to the file that torchrun names
in TORCHELASTIC_ERROR_FILE, in torch's own format, which torchrun reads for its report.
"""

import json
import platform
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from coe_megatron.distributed.environment import rank_of
from coe_megatron.files import read_limited, write_atomically
from coe_megatron.parsing import JSON_BYTES, parse_json


class ExitStatus(IntEnum):
    """Exit statuses of `launch/pretrain_coe.py`; `retryable` tells a scheduler whether to restart."""

    DONE = 0
    FAILED = 1  # with an unexpected error; also what torchrun makes of all others
    MISTAKE = 2  # in the config, the data or the command line
    STOPPED = 3  # on request, after a save
    DIVERGED = 4  # the loss diverged, and `recovery` has used up its rollbacks
    NOT_SAVED = 5  # a checkpoint could not be written
    BUSY = 6  # another process has locked the output folder
    HUNG = 7  # no progress for `recovery.hang_after` seconds; stack traces are written
    OUTPUT_LOST = 8  # the output folder was removed or moved during the run
    INTERRUPTED = 130  # from the keyboard

    @property
    def retryable(self) -> bool:
        """Whether the same command may succeed when it is restarted automatically."""
        return self in _RETRYABLE


_RETRYABLE = {ExitStatus.FAILED, ExitStatus.STOPPED, ExitStatus.BUSY, ExitStatus.HUNG}


def root_status(statuses: Iterable[ExitStatus]) -> ExitStatus:
    """The status of a failed run, given those of its failed ranks in order of time.

    This is the first one other than FAILED, since FAILED may only mean that a peer was lost.
    """
    return next((status for status in statuses if status is not ExitStatus.FAILED), ExitStatus.FAILED)


@dataclass(frozen=True)
class RankError:
    """The contents of a rank's error file; `time` is in seconds since 1970, by the clock of its host."""

    rank: int
    host: str
    time: float
    status: ExitStatus
    message: str


def write_error_file(status: int, message: str, stack: str = "", *, environment: Mapping[str, str]) -> None:
    """Write this rank's error to the file that torchrun has named; does nothing without torchrun.

    Args:
        message: one line.
        stack: the traceback; empty for expected errors.
        environment: provides TORCHELASTIC_ERROR_FILE and RANK.
    """
    if not (name := environment.get("TORCHELASTIC_ERROR_FILE")):
        return
    now = time.time()
    details = {"py_callstack": stack or message, "timestamp": str(int(now)), "time": now}
    details |= {"rank": rank_of(environment), "host": platform.node()}
    record = {"message": {"message": message, "errorCode": int(status), "extraInfo": details}}
    with suppress(OSError):  # report the run's own error instead
        write_atomically(Path(name), json.dumps(record))


def read_error_file(path: Path) -> RankError | None:
    """Read a file of `write_error_file`; None if it is incomplete or gone.

    Files that torch wrote, for a rank that failed before `write_error_file` could run, say less: the status is FAILED,
    the rank comes from the folder's name, and the time is the file's.
    """
    rank = int(path.parent.name) if path.parent.name.isdecimal() else 0
    try:
        written = path.stat().st_mtime
        content = parse_json(read_limited(path, "error file", JSON_BYTES))
    except (OSError, ValueError):
        return None
    try:
        record: Any = content["message"]
        extra = record["extraInfo"]
        moment = float(extra["time"] if "time" in extra else extra["timestamp"])
        rank, host = int(extra.get("rank", rank)), str(extra.get("host", "unknown host"))
        return RankError(rank, host, moment, known_status(record.get("errorCode")), str(record.get("message", "")))
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):  # not written by `write_error_file`
        message = content.get("message") if isinstance(content, dict) else None
        return RankError(rank, "unknown host", written, ExitStatus.FAILED, message if isinstance(message, str) else "")


def known_status(code: object) -> ExitStatus:
    """The status with this number; FAILED for an unknown one."""
    return ExitStatus(code) if code in list(ExitStatus) else ExitStatus.FAILED  # type: ignore[arg-type]
