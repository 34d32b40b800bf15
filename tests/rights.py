"""Tests as root take the rights of a user who owns nothing; other users have to take rights from a path instead."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

NOBODY = 65534


@contextmanager
def as_nobody() -> Iterator[None]:
    """The effective user of this process is one without rights, if it can be."""
    if os.getuid() != 0:
        yield
        return
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


@contextmanager
def private_folder() -> Iterator[Path]:
    """A folder that `as_nobody` may not look into, in one that it may; inside are a folder `d` and a file `f`."""
    with tempfile.TemporaryDirectory() as parent:
        private = Path(parent) / "private"
        (private / "d").mkdir(parents=True)
        (private / "f").write_text("x: 1\n")
        os.chmod(parent, 0o755)
        os.chmod(private, 0o700 if os.getuid() == 0 else 0)
        try:
            yield private
        finally:
            with suppress(OSError):
                os.chmod(private, 0o700)
