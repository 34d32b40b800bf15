"""Temporary files of a program and of all that it starts lie in one folder, which goes with them, killed or not.

Torch, W&B and Python leave their temporary files behind when they are killed, torchrun its logs in any case. Here all
of them come to lie in `coe-UID/run-...` in the usual place (TMPDIR, else /tmp). Whoever uses such a folder holds a lock
on it, which the kernel takes back when the process ends; a folder that nobody holds is removed by the next that enters.
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
    """Have this process and its children put temporary files into a folder of theirs, which is returned.

    A process that was started by another one with such a folder shares that. The process that made it removes it at
    its end. To be called once, before anything has a temporary file.

    Args:
        torchruns_logs: a folder that torchrun, started by hand, has made for its logs in the usual place and never
            removes: it goes as well, but only when torchrun has ended, so at the next start.

    Raises:
        ConfigError: TMPDIR cannot be used; one line.
    """
    place = _usual_place()
    if place.name.startswith(_RUN) and place.parent.name == _own():
        _hold(place)
        return place
    home = place / _own()
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
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(home / "torchinductor"))  # is worth keeping
    atexit.register(_leave, folder, os.getpid())
    return folder


def _own() -> str:
    return f"coe-{os.getuid()}"  # short: the names of sockets in it may have 107 bytes


def _usual_place() -> Path:
    try:
        return Path(tempfile.gettempdir())
    except OSError as error:
        raise ConfigError(f"TMPDIR: no folder for temporary files can be written ({error.strerror})") from None


def _require_own(home: Path) -> None:
    """In a place where everybody may write, somebody else may have been first."""
    found = home.lstat()
    if found.st_uid != os.getuid() or home.is_symlink() or found.st_mode & 0o022:
        raise problem(home, "the folder for temporary files (TMPDIR)", "it belongs to somebody else, or is no folder")


def _hold(folder: Path) -> None:
    with suppress(OSError):  # a file system without locks: then nobody else gets one either, and nothing is removed
        fcntl.flock(os.open(folder, os.O_RDONLY | os.O_DIRECTORY), fcntl.LOCK_SH)  # open until this process ends


@contextmanager
def _locked(home: Path) -> Iterator[None]:
    """Nobody looks for what is left while another makes a folder that it does not hold yet."""
    descriptor = os.open(home, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _sweep(home: Path) -> None:
    """Remove what was left by those that were killed."""
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
            return  # it may still read there how its ranks ended
        logs = Path(os.readlink(link))
        if _is_torchruns(logs, place):
            shutil.rmtree(logs, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)


def _is_torchruns(logs: Path, place: Path) -> bool:
    own = logs.is_dir() and not logs.is_symlink() and logs.lstat().st_uid == os.getuid()
    return own and logs.name.startswith("torchelastic_") and logs.parent == place


def _leave(folder: Path, process: int) -> None:
    if os.getpid() == process and not any(folder.glob(f"{_TORCHRUN}*")):  # and not in a child that was forked
        shutil.rmtree(folder, ignore_errors=True)
