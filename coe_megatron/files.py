"""Checks of paths that users name, and atomic, durable writes. Standard library only.

Every check raises a ConfigError of one line that names the setting or option, the path, and the problem, whatever the
file system reports: no permission, a name that is too long, a dangling link, a file instead of a folder, a pipe or a
device.
"""

import os
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from itertools import count
from pathlib import Path
from typing import BinaryIO, Literal

from coe_megatron.errors import ConfigError, one_line
from coe_megatron.text import shortened

Kind = Literal["file", "folder", "special file"]
_TEMPORARY = ".tmp"  # suffix of the temporary file of `atomic_file`


def expand_user(text: str) -> str:
    """Replace `~` or `~name` at the start of a path by that user's home folder.

    Raises:
        ConfigError: there is no such user.
    """
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise ConfigError(
            f"{_shown(text)}: there is no such user here; write a file name that begins with ~ as ./~name"
        )
    return expanded


def user_path(text: str) -> Path:
    """`expand_user` as the type of an argparse option; refuses an empty path, which would mean the current folder."""
    if not text:
        raise ConfigError("the path is empty")
    return Path(expand_user(text))


def as_argument(path: Path) -> str:
    """A path as an argument that cannot be read as an option or as a home folder."""
    return f".{os.sep}{path}" if str(path).startswith(("-", "~")) else str(path)


def kind_of(path: Path, name: str) -> Kind | None:
    """The kind of file at a path, after following links; None if nothing exists there.

    Args:
        name: the setting or option, for the message.

    Raises:
        ConfigError: the path cannot be accessed, or is a dangling link.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        if os.path.islink(path):
            raise problem(path, name, f"it is a dangling link to {_shown(os.readlink(path))}") from None
        return None
    except (OSError, ValueError) as error:  # ValueError: a NUL, or text that cannot be encoded as a file name
        raise problem(path, name, error) from None
    return "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "special file"


def require_file(path: Path, name: str) -> Path:
    """Check that a path is a readable plain file, and return it. Raises as `kind_of`, and if it is not."""
    _require(kind_of(path, name), "file", path, name)
    if not os.access(path, os.R_OK, effective_ids=True):
        raise problem(path, name, "it cannot be read: permission denied")
    return path


def require_folder(path: Path, name: str) -> Path:
    """Check that a path is a folder that can be listed and entered, and return it. Raises as `kind_of`, and if not."""
    _require(kind_of(path, name), "folder", path, name)
    if not os.access(path, os.R_OK | os.X_OK, effective_ids=True):
        raise problem(path, name, "it cannot be read: permission denied")
    return path


def require_writable(path: Path, name: str, kind: Literal["file", "folder"], spare: int = 0) -> Path:
    """Check that a file or folder can be written, or created if it does not exist; returns the path.

    This writes nothing, so that `--dry-run` can use it. Missing parent folders count as creatable.

    Args:
        spare: bytes by which a temporary name beside it is longer.

    Raises:
        ConfigError: as `kind_of`, or it cannot be written there.
    """
    found = kind_of(path, name)
    if found is not None:
        _require(found, kind, path, name)
    place, missing = Path(os.path.abspath(path)), []
    while (found := kind_of(place, name)) is None:
        missing.append(place.name)
        place = place.parent
    if missing and found != "folder":
        raise problem(path, name, f"{_shown(place)} is a {found}, not a folder")
    longest = os.pathconf(place, "PC_NAME_MAX") - spare
    if too_long := [each for each in missing if len(os.fsencode(each)) > longest]:
        raise problem(path, name, f"{_shown(too_long[0])} is too long for a name (at most {longest} bytes)")
    if not os.access(place, os.W_OK | (os.X_OK if found == "folder" else 0), effective_ids=True):
        subject = "it" if not missing else _shown(place)
        raise problem(path, name, f"{subject} cannot be written: permission denied, or a read-only file system")
    return path


def require_replaceable(path: Path, name: str) -> Path:
    """Check that `write_atomically` can write a file, including its temporary name; returns the path.

    Raises:
        ConfigError: as `require_writable`, or a folder has the temporary name.
    """
    require_writable(path, name, "file", spare=len(_TEMPORARY))
    beside = _beside(path)
    if beside.is_dir() and not beside.is_symlink():
        raise problem(path, name, f"it cannot be used: {_in_the_way(beside)}")
    return path


def is_plain_file(path: Path) -> bool:
    """Whether a path is a plain file itself: not a link, and not a pipe that would block a read."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False


def read_limited(path: Path, name: str, most: int) -> bytes:
    """The content of a plain file of at most `most` bytes.

    Raises:
        ConfigError: as `require_file`, or it is larger.
    """
    require_file(path, name)
    try:
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise problem(path, name, error) from None
    if len(content) > most:
        raise problem(path, name, f"it has more than {most:,} bytes, which is too large for its kind")
    return content


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file atomically; see `atomic_file`."""
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which then replaces an older one: after a power cut, one of the two exists and is complete.

    Raises:
        OSError: writing failed; the older file is unchanged.
    """
    temporary = _beside(path)
    opened = new_file(temporary)
    try:
        with opened as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    to_disk(path.parent)


def new_file(path: Path) -> BinaryIO:
    """Create a plain file and open it for writing, after removing what an interrupted attempt may have left there.

    The old entry is neither opened nor followed: a pipe would block, and a link could lead to a file of somebody else.

    Raises:
        OSError: it cannot be created; IsADirectoryError if a folder has its name.
    """
    try:
        with suppress(FileNotFoundError):
            path.unlink()
    except OSError as error:
        if path.is_dir() and not path.is_symlink():
            raise IsADirectoryError(error.errno, _in_the_way(path), str(path)) from None
        raise
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, 0o666), "wb")


def remove(path: Path, ignore_errors: bool = False) -> None:
    """Remove a folder with its contents, or a file, link or pipe without opening it; does nothing if it is missing.

    Raises:
        OSError: it cannot be removed, and `ignore_errors` is False.
    """
    with suppress(OSError) if ignore_errors else nullcontext():
        try:
            mode = os.lstat(path).st_mode
        except FileNotFoundError:
            return
        if stat.S_ISDIR(mode):
            shutil.rmtree(path, ignore_errors)  # blocks if given a pipe
        else:
            path.unlink(missing_ok=True)


def set_aside(path: Path, why: str) -> Path:
    """Rename something damaged to `X.damaged` (`X.damaged-2` and so on), and report it on stderr in one line.

    Args:
        why: what is wrong with it; follows the path in the message.

    Returns:
        The new path.

    Raises:
        OSError: it cannot be renamed.
    """
    names = (path.with_name(f"{path.name}.damaged{'' if number == 1 else f'-{number}'}") for number in count(1))
    aside = next(name for name in names if not os.path.lexists(name))
    os.rename(path, aside)
    to_disk(path.parent)
    print(one_line(f"{path} {why}: it is kept as {aside.name} and created again"), file=sys.stderr)
    return aside


def to_disk(path: Path) -> None:
    """Flush a file's content, or a folder's own entries (names, renames), to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def problem(path: Path | str, name: str, reason: str | OSError | ValueError) -> ConfigError:
    """The error for a path, in one line; `name` is the setting or option that names the path."""
    if isinstance(reason, OSError):
        text = reason.strerror or str(reason)
        reason = f"it cannot be used: {text[:1].lower()}{text[1:]}"
    elif isinstance(reason, ValueError):
        reason = f"it is not a valid path ({reason})"
    return ConfigError(f"{name} is {_shown(path)}: {reason}")


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}{_TEMPORARY}")


def _in_the_way(folder: Path) -> str:
    return f"the folder {_shown(folder.name)} is in the way, remove it"


def _require(found: Kind | None, wanted: Kind, path: Path, name: str) -> None:
    if found is None:
        raise problem(path, name, f"there is no such {wanted}")
    if found != wanted:
        raise problem(path, name, f"it is a {found}, where a {wanted} is needed")


def _shown(path: Path | str) -> str:
    return shortened(one_line(str(path)))
