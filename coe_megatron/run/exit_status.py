"""How a run ended, in words that schedulers and scripts act on: exit statuses, and torchrun's error files.

Torchrun itself exits with 1 whatever its ranks did. Each rank that fails therefore leaves its status in the file that
torchrun names in TORCHELASTIC_ERROR_FILE (torch's own format, which torchrun reads for its report).
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
    """Exit statuses of `launch/pretrain_coe.py`; `again` says what a scheduler needs to know."""

    DONE = 0
    FAILED = 1  # with an unexpected error; also what torchrun makes of all others
    MISTAKE = 2  # in the config, the data or the command line
    STOPPED = 3  # it was asked to, and has saved
    DIVERGED = 4  # the loss, and nothing that `recovery` allows has helped
    NOT_SAVED = 5  # a checkpoint could not be written
    BUSY = 6  # another process writes the output folder
    HUNG = 7  # no progress for `recovery.hang_after` seconds; the stacks are written
    OUTPUT_LOST = 8  # the output folder was removed or moved while the run went on
    INTERRUPTED = 130  # from the keyboard

    @property
    def again(self) -> bool:
        """Whether the same command, started again by nobody's decision, may go on."""
        return self in _MAY_GO_ON


_MAY_GO_ON = {ExitStatus.FAILED, ExitStatus.STOPPED, ExitStatus.BUSY, ExitStatus.HUNG}


def verdict(statuses: Iterable[ExitStatus]) -> ExitStatus:
    """How a run failed, by the statuses of those that did, the first one first.

    That is the first that says more than FAILED, which may be but the loss of a peer.
    """
    return next((status for status in statuses if status is not ExitStatus.FAILED), ExitStatus.FAILED)


@dataclass(frozen=True)
class LastWords:
    """What a rank's error file says; `time` is in seconds since 1970, by the clock of its host."""

    rank: int
    host: str
    time: float
    status: ExitStatus
    message: str


def leave_error_file(status: int, message: str, stack: str = "", *, environment: Mapping[str, str]) -> None:
    """Write how this rank failed where torchrun, and whoever reads its logs, looks for it; nothing without torchrun.

    Args:
        message: one line.
        stack: the traceback, empty for what is no surprise.
        environment: TORCHELASTIC_ERROR_FILE and RANK are read.
    """
    if not (name := environment.get("TORCHELASTIC_ERROR_FILE")):
        return
    now = time.time()
    details = {"py_callstack": stack or message, "timestamp": str(int(now)), "time": now}
    details |= {"rank": rank_of(environment), "host": platform.node()}
    record = {"message": {"message": message, "errorCode": int(status), "extraInfo": details}}
    with suppress(OSError):  # the run's own error is the one to tell
        write_atomically(Path(name), json.dumps(record))


def read_error_file(path: Path) -> LastWords | None:
    """What a rank has left by `leave_error_file`; None of a file that is half written, or gone.

    Torch's own, of a rank that failed before ours could speak, say less: FAILED, the rank by its folder's name, the
    time by the file's.
    """
    rank = int(path.parent.name) if path.parent.name.isdecimal() else 0
    try:
        written = path.stat().st_mtime
        content = parse_json(read_limited(path, "error file", JSON_BYTES))
    except (OSError, ValueError):
        return None
    try:
        said: Any = content["message"]
        extra = said["extraInfo"]
        moment = float(extra["time"] if "time" in extra else extra["timestamp"])
        rank, host = int(extra.get("rank", rank)), str(extra.get("host", "unknown host"))
        return LastWords(rank, host, moment, known_status(said.get("errorCode")), str(said.get("message", "")))
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):  # no word of ours
        said = content.get("message") if isinstance(content, dict) else None
        return LastWords(rank, "unknown host", written, ExitStatus.FAILED, said if isinstance(said, str) else "")


def known_status(code: object) -> ExitStatus:
    """The status that a number stands for; FAILED for any other."""
    return ExitStatus(code) if code in list(ExitStatus) else ExitStatus.FAILED  # type: ignore[arg-type]
