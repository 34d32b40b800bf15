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

from coe_megatron.errors import ConfigError

NAME = "run.lock"
_TRIES, _PAUSE_SECONDS = 10, 0.1  # a predecessor may be dying, and `is_held` takes the lock for a moment
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
        f"output is {folder}: another run is writing it, {(folder / NAME).read_text().strip()}; "
        "wait for its end, end it, or choose another output"
    )


def is_held(folder: Path) -> bool | None:
    """Whether a process has locked the folder; None if that cannot be found out."""
    try:
        with (folder / NAME).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False


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
