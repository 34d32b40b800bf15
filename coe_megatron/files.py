"""Paths that users name, looked at before anything is done with them, and files that must survive a power cut.

Every check raises a ConfigError of one line that names the setting or option, the path, and what is wrong with it,
whatever the file system answers: no permission, a name that is too long, a dangling link, a file where a folder should
be, a pipe or a device. Standard library only.
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
_TEMPORARY = ".tmp"  # ending of what `atomic_file` writes beside


def expand_user(text: str) -> str:
    """A path with `~` or `~name` at its beginning replaced by that user's home; any other text as it is.

    Raises:
        ConfigError: there is no such user.
    """
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise ConfigError(f"{_shown(text)}: there is no such user here; a name that begins with ~ is written ./~name")
    return expanded


def user_path(text: str) -> Path:
    """`expand_user` as the type of an argparse option; an empty path is refused, for it would mean this folder."""
    if not text:
        raise ConfigError("a path is needed, not an empty text")
    return Path(expand_user(text))


def as_argument(path: Path) -> str:
    """A path as an argument that no program takes for an option, or for somebody's home: what `user_path` undoes."""
    return f".{os.sep}{path}" if str(path).startswith(("-", "~")) else str(path)


def kind_of(path: Path, name: str) -> Kind | None:
    """What is at a path, links followed; None if nothing is.

    Args:
        name: of the setting or option, for the message.

    Raises:
        ConfigError: it cannot be looked at, or is a link that leads nowhere.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        if os.path.islink(path):
            raise problem(path, name, f"it is a link to {_shown(os.readlink(path))}, where nothing is") from None
        return None
    except (OSError, ValueError) as error:  # a ValueError: a NUL, or text that no file name can hold
        raise problem(path, name, error) from None
    return "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "special file"


def require_file(path: Path, name: str) -> Path:
    """A plain file that can be read; returns it. Raises as `kind_of`, and if it is missing or something else."""
    _require(kind_of(path, name), "file", path, name)
    if not os.access(path, os.R_OK, effective_ids=True):
        raise problem(path, name, "it cannot be read: permission denied")
    return path


def require_folder(path: Path, name: str) -> Path:
    """A folder that can be listed and entered; returns it. Raises as `kind_of`, and if it is missing or otherwise."""
    _require(kind_of(path, name), "folder", path, name)
    if not os.access(path, os.R_OK | os.X_OK, effective_ids=True):
        raise problem(path, name, "it cannot be read: permission denied")
    return path


def require_writable(path: Path, name: str, kind: Literal["file", "folder"], spare: int = 0) -> Path:
    """A place for a file or folder: one of that kind that can be written, or nothing yet where it can be made.

    Nothing is written: also for `--dry-run`. Folders above that are missing will have to be made.

    Args:
        spare: bytes by which a temporary name beside it is longer.

    Raises:
        ConfigError: as `kind_of`, and if it cannot be written there.
    """
    found = kind_of(path, name)
    if found is not None:
        _require(found, kind, path, name)
    place, missing = Path(os.path.abspath(path)), []
    while (found := kind_of(place, name)) is None:
        missing.append(place.name)
        place = place.parent
    if missing and found != "folder":
        raise problem(path, name, f"{_shown(place)} is a {found}, and no folder")
    longest = os.pathconf(place, "PC_NAME_MAX") - spare
    if too_long := [each for each in missing if len(os.fsencode(each)) > longest]:
        raise problem(path, name, f"{_shown(too_long[0])} is too long for a name (at most {longest} bytes)")
    if not os.access(place, os.W_OK | (os.X_OK if found == "folder" else 0), effective_ids=True):
        said = "it" if not missing else _shown(place)
        raise problem(path, name, f"{said} cannot be written: permission denied, or a read-only file system")
    return path


def require_replaceable(path: Path, name: str) -> Path:
    """A file that `write_atomically` can write, the temporary name beside it included; returns it.

    Raises:
        ConfigError: as `require_writable`, and if a folder has the temporary name.
    """
    require_writable(path, name, "file", spare=len(_TEMPORARY))
    beside = _beside(path)
    if beside.is_dir() and not beside.is_symlink():
        raise problem(path, name, f"it cannot be used: {_in_the_way(beside)}")
    return path


def is_plain_file(path: Path) -> bool:
    """Whether a plain file is at a path itself: no link to one, nothing that reading would wait for."""
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
        raise problem(path, name, f"it has more than {most:,} bytes, which is too much for what it should hold")
    return content


def write_atomically(path: Path, content: str | bytes) -> None:
    """Put a file in the place of an older one; as `atomic_file`."""
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which then takes the place of an older one: after a power cut either is there, and whole.

    Raises:
        OSError: it cannot be written; the older one is there still.
    """
    temporary = _beside(path)
    made = new_file(temporary)
    try:
        with made as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    to_disk(path.parent)


def new_file(path: Path) -> BinaryIO:
    """A new plain file to write, open, in the place of what an attempt that was cut short may have left.

    What is there is removed, and neither opened nor followed: a pipe would wait for its reader, and a link may lead to
    a file that is none of ours.

    Raises:
        OSError: it cannot be made; of a folder in its place it says so.
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
    """Remove a folder with all that is in it; of a link, a pipe or a file the entry alone, which is not opened.

    Raises:
        OSError: it cannot be removed, unless that is ignored. That nothing is there is no error.
    """
    with suppress(OSError) if ignore_errors else nullcontext():
        try:
            mode = os.lstat(path).st_mode
        except FileNotFoundError:
            return
        if stat.S_ISDIR(mode):
            shutil.rmtree(path, ignore_errors)  # of a pipe it would wait for a writer
        else:
            path.unlink(missing_ok=True)


def set_aside(path: Path, why: str) -> Path:
    """Give what is damaged another name, `X.damaged` or `X.damaged-2` and so on, and say so in a line on stderr.

    Args:
        why: what is wrong with it, to follow its path.

    Returns:
        Where it is now.

    Raises:
        OSError: it cannot be renamed.
    """
    names = (path.with_name(f"{path.name}.damaged{'' if number == 1 else f'-{number}'}") for number in count(1))
    aside = next(name for name in names if not os.path.lexists(name))
    os.rename(path, aside)
    to_disk(path.parent)
    print(one_line(f"{path} {why}: it is kept as {aside.name}, and made anew"), file=sys.stderr)
    return aside


def to_disk(path: Path) -> None:
    """Bring a file's content, or a folder's own entries (names, renames), to the disk before this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def problem(path: Path | str, name: str, reason: str | OSError | ValueError) -> ConfigError:
    """The error that says in one line what is wrong with a path; `name` is the setting or option that gave it."""
    if isinstance(reason, OSError):
        said = reason.strerror or str(reason)
        reason = f"it cannot be used: {said[:1].lower()}{said[1:]}"
    elif isinstance(reason, ValueError):
        reason = f"it is no path ({reason})"
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
