"""Locks a run's folder for one process: rank 0 holds a lock on a file in it during the run.

The kernel releases the lock when its process ends, even by SIGKILL, so no stale lock remains. Whether other hosts see
the lock depends on the file system.
"""

import errno
import fcntl
import os
import platform
import sys
import time
from pathlib import Path
from typing import TextIO

from coe_megatron.errors import ConfigError, one_line

NAME = "run.lock"
_TRIES, _PAUSE_SECONDS = 10, 0.1  # a previous run may be ending, and `is_held` takes the lock for a moment
_LONGEST_HOLDER = 300  # bytes
_IS_GONE = {errno.ENOENT, errno.ENOTDIR, errno.ESTALE}
_HAS_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


class FolderInUse(ConfigError):
    """Another process has locked the folder; it may end by itself."""


def take(folder: Path) -> TextIO:
    """Lock an existing folder; closing the returned file releases the lock.

    If the file system has no locks, this warns on stderr that the folder is not protected.

    Raises:
        FolderInUse: another process holds the lock; the message names it and says what to do.
        OSError: the lock file cannot be written.
    """
    for _ in range(_TRIES):
        if (lock := _try(folder / NAME)) is not None:
            lock.truncate(0)
            print(f"process {os.getpid()} on {platform.node()}", file=lock, flush=True)
            return lock
        time.sleep(_PAUSE_SECONDS)
    raise FolderInUse(
        f"output is {folder}: another run has locked it, {_holder(folder / NAME)}; "
        "wait until it ends, stop it, or choose another output"
    )


def is_held(folder: Path) -> bool | None:
    """Whether a process has locked the folder; None if this cannot be determined."""
    try:
        with open(folder / NAME, opener=_open_nonblocking) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (OSError, ValueError):
        return None
    return False


def is_in_place(lock: TextIO, folder: Path) -> bool:
    """Whether the folder of a lock is still at this path, not removed, moved or replaced.

    A folder that is temporarily inaccessible, such as on an unreachable file server, counts as in place.
    """
    try:
        return os.path.samestat(os.stat(folder / NAME), os.fstat(lock.fileno()))
    except OSError as error:
        return error.errno not in _IS_GONE


def _open_nonblocking(path: str, flags: int) -> int:
    """An opener that does not block on a pipe without a writer."""
    return os.open(path, flags | os.O_NONBLOCK)


def _holder(path: Path) -> str:
    """The process that holds the lock, as recorded in the file."""
    with path.open("rb") as file:
        return one_line(file.read(_LONGEST_HOLDER).decode(errors="replace").strip()) or "the process is unknown"


def _try(path: Path) -> TextIO | None:
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file.fileno()).st_nlink:  # otherwise its last holder has deleted the file since it was opened
            return file
    except BlockingIOError:
        pass
    except OSError as error:
        if error.errno in _HAS_NO_LOCKS:
            print(
                f"{path.parent} has no file locks: a second run with this output would not be detected", file=sys.stderr
            )
            return file
        raise
    file.close()
    return None
