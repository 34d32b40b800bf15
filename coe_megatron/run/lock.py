"""A run's folder belongs to one process at a time: rank 0 holds a lock on a file in it for as long as the run lasts.

The kernel frees the lock when its process ends, by SIGKILL too, so nothing is ever left to be cleared away. Whether
other machines see it is for the file system to say.
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
_TRIES, _PAUSE_SECONDS = 10, 0.1  # a predecessor may be dying, and `is_held` takes the lock for a moment
_LONGEST_HOLDER = 300  # bytes
_IS_GONE = {errno.ENOENT, errno.ENOTDIR, errno.ESTALE}
_HAS_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


class FolderInUse(ConfigError):
    """Another process writes the folder, and may end by itself."""


def take(folder: Path) -> TextIO:
    """Lock a folder that exists; closing what is returned frees it.

    Where the file system has no locks, a line on stderr says that the folder is not guarded.

    Raises:
        FolderInUse: another process holds it; the line says which, and what to do.
        OSError: the lock's file cannot be written.
    """
    for _ in range(_TRIES):
        if (lock := _try(folder / NAME)) is not None:
            lock.truncate(0)
            print(f"process {os.getpid()} on {platform.node()}", file=lock, flush=True)
            return lock
        time.sleep(_PAUSE_SECONDS)
    raise FolderInUse(
        f"output is {folder}: another run is writing it, {_holder(folder / NAME)}; "
        "wait for its end, end it, or choose another output"
    )


def is_held(folder: Path) -> bool | None:
    """Whether a process has locked the folder; None if that cannot be found out."""
    try:
        with open(folder / NAME, opener=_without_waiting) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (OSError, ValueError):
        return None
    return False


def is_in_place(lock: TextIO, folder: Path) -> bool:
    """Whether a lock that `take` returned is that of the folder at this path still: not removed, moved or replaced.

    What cannot be looked at for a while, on a server that is away, counts as in place.
    """
    try:
        return os.path.samestat(os.stat(folder / NAME), os.fstat(lock.fileno()))
    except OSError as error:
        return error.errno not in _IS_GONE


def _without_waiting(path: str, flags: int) -> int:
    """As `open` does, but for a pipe, which would wait for its other end."""
    return os.open(path, flags | os.O_NONBLOCK)


def _holder(path: Path) -> str:
    """What the process that has the lock wrote of itself."""
    with path.open("rb") as file:
        return one_line(file.read(_LONGEST_HOLDER).decode(errors="replace").strip()) or "which one is not known"


def _try(path: Path) -> TextIO | None:
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file.fileno()).st_nlink:  # otherwise its last holder has deleted it since it was opened
            return file
    except BlockingIOError:
        pass
    except OSError as error:
        if error.errno in _HAS_NO_LOCKS:
            print(
                f"{path.parent} has no file locks: a second run with this output would not be noticed", file=sys.stderr
            )
            return file
        raise
    file.close()
    return None
