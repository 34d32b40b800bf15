"""One folder for the temporary files of a program and its child processes, removed after they end, even if killed.

Torch, W&B and Python leave their temporary files behind when they are killed, and torchrun always leaves its logs. This
module directs all of them to `coe-UID/run-...` in the usual folder (TMPDIR, or /tmp). Each process that uses such a
folder holds a lock on it, which the kernel releases when the process ends; the next program that calls `enter` removes
folders without a lock.
"""

import atexit
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from coe_megatron.errors import ConfigError
from coe_megatron.files import problem

_RUN, _TORCHRUN = "run-", "torchrun-"


def enter(torchruns_logs: Path | None = None) -> Path:
    """Create a folder for the temporary files of this process and its children, and return it.

    A process whose parent has such a folder uses the parent's. The process that created the folder removes it at exit.
    Call this once, before anything creates a temporary file.

    Args:
        torchruns_logs: folder that a torchrun started by hand created for its logs, which it never removes. It is
            removed too, at a later start, since torchrun must have ended.

    Raises:
        ConfigError: TMPDIR cannot be used; one line.
    """
    place = _usual_folder()
    if place.name.startswith(_RUN) and place.parent.name == _user_folder():
        _hold(place)
        return place
    home = place / _user_folder()
    try:
        home.mkdir(mode=0o700, exist_ok=True)
        _require_own(home)
        with _locked(home):
            _sweep(home)
            folder = Path(tempfile.mkdtemp(prefix=_RUN, dir=home))
            _hold(folder)
    except OSError as error:
        raise problem(home, "the folder for temporary files (TMPDIR)", error) from None
    if torchruns_logs is not None and _is_torchruns(torchruns_logs, place):
        (folder / f"{_TORCHRUN}{os.getppid()}").symlink_to(torchruns_logs)
    os.environ["TMPDIR"], tempfile.tempdir = str(folder), None
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(home / "torchinductor"))  # kept for later runs
    atexit.register(_leave, folder, os.getpid())
    return folder


def _user_folder() -> str:
    return f"coe-{os.getuid()}"  # short, since paths of sockets in it are limited to 107 bytes


def _usual_folder() -> Path:
    try:
        return Path(tempfile.gettempdir())
    except OSError as error:
        raise ConfigError(f"TMPDIR: no folder for temporary files is writable ({error.strerror})") from None


def _require_own(home: Path) -> None:
    """Check that the folder is this user's: in a folder that all can write to, another user may have created it."""
    found = home.lstat()
    if found.st_uid != os.getuid() or home.is_symlink() or found.st_mode & 0o022:
        raise problem(home, "the folder for temporary files (TMPDIR)", "it belongs to another user, or is not a folder")


def _hold(folder: Path) -> None:
    with suppress(OSError):  # without locks on this file system, no process removes anything
        fcntl.flock(os.open(folder, os.O_RDONLY | os.O_DIRECTORY), fcntl.LOCK_SH)  # open until this process ends


@contextmanager
def _locked(home: Path) -> Iterator[None]:
    """Lock the parent folder, so that `_sweep` does not remove a folder between its creation and its lock."""
    descriptor = os.open(home, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _sweep(home: Path) -> None:
    """Remove the folders of processes that were killed."""
    for folder in home.glob(f"{_RUN}*"):
        with suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(folder, home.parent)
            finally:
                os.close(descriptor)


def _remove(folder: Path, place: Path) -> None:
    for link in folder.glob(f"{_TORCHRUN}*"):
        if Path("/proc", link.name.removeprefix(_TORCHRUN)).exists():
            return  # torchrun may still read how its ranks ended
        logs = Path(os.readlink(link))
        if _is_torchruns(logs, place):
            shutil.rmtree(logs, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)


def _is_torchruns(logs: Path, place: Path) -> bool:
    own = logs.is_dir() and not logs.is_symlink() and logs.lstat().st_uid == os.getuid()
    return own and logs.name.startswith("torchelastic_") and logs.parent == place


def _leave(folder: Path, process: int) -> None:
    if os.getpid() == process and not any(folder.glob(f"{_TORCHRUN}*")):  # not in a forked child
        shutil.rmtree(folder, ignore_errors=True)
