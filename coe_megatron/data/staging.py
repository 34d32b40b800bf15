"""Where prepared data grows until it is whole: a hidden folder beside its place, which outlives an interruption.

.NAME.partial/
    lock              held by the process at work; a dead process holds none
    job.json          what is being prepared; another job starts anew
    tokenizer.model
    tokenizer.sha256  of the model that the chunks were made with; with another one all starts anew
    chunks/N.npz      each whole
    whole/            the output itself, renamed to its place when every byte is on the disk
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from coe_megatron.data.manifest import TOKENIZER, FileSummary
from coe_megatron.errors import ConfigError
from coe_megatron.files import is_plain_file, problem, remove, require_writable, to_disk, write_atomically

_NAME = "the hidden folder beside --output"


class Staging:
    """The folder of one output; `staged` makes it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._chunks = folder / "chunks"
        self._checksum = folder / "tokenizer.sha256"

    @classmethod
    def of(cls, output: Path) -> "Staging":
        """The folder that belongs to an output, whether it is there or not."""
        return cls(place_of(output))

    @property
    def tokenizer(self) -> Path:
        """Where the tokenizer stands once it is whole."""
        return self._folder / TOKENIZER

    @property
    def chunks_done(self) -> int:
        """How many chunks are whole."""
        return len(list(self._chunks.glob("*.npz")))

    def chunk(self, index: int) -> Path:
        """Where a chunk stands once it is whole."""
        return self._chunks / f"{index:06}.npz"

    def keep_tokenizer(self, model: Path) -> None:
        """Move a finished model, a file in this folder, to its place, its checksum first."""
        to_disk(model)
        write_atomically(self._checksum, FileSummary.of(model).sha256)
        model.rename(self.tokenizer)

    def scratch(self, name: str) -> Path:
        """A path for a file that is not whole yet, with nothing there."""
        path = self._folder / f"{name}.partial"
        remove(path)
        return path

    def new_whole(self) -> Path:
        """An empty folder for the output."""
        whole = self._folder / "whole"
        remove(whole)
        whole.mkdir()
        return whole

    def publish(self, output: Path) -> None:
        """Put the output in its place, where older data goes only when the new is there."""
        whole, replaced = self._folder / "whole", self._folder / "replaced"
        for path in whole.iterdir():
            to_disk(path)
        to_disk(whole)
        remove(replaced)
        if output.exists():
            output.rename(replaced)
        whole.rename(output)
        to_disk(output.parent)

    def begin(self, job: dict[str, Any]) -> str:
        """Keep what an earlier preparation of the same job left; what another one left goes.

        Returns:
            Why also what was left of the same job is gone; empty if it is not.
        """
        text = json.dumps(job, indent=1).encode()
        record, changed = self._folder / "job.json", ""
        if not _holds(record, text):
            self._clear()
            write_atomically(record, text)
        elif not self._has_its_tokenizer():
            changed = f"{self.tokenizer} is not as it was made" if os.path.lexists(self.tokenizer) else ""
            self._clear(but=record.name)
        if self._chunks.is_symlink() or not self._chunks.is_dir():
            remove(self._chunks)
            self._chunks.mkdir()
        return changed

    def _has_its_tokenizer(self) -> bool:
        """Whether the tokenizer is the one that was put there, and chunks were made with."""
        return is_plain_file(self.tokenizer) and _holds(self._checksum, FileSummary.of(self.tokenizer).sha256.encode())

    def _clear(self, but: str = "") -> None:
        for path in self._folder.iterdir():
            if path.name not in ("lock", but):
                remove(path)


@contextmanager
def staged(output: Path) -> Iterator[Staging]:
    """Hold the hidden folder of an output, alone. It goes at the end, and after every error that the next attempt would
    meet again; an interruption, or a want of disk or memory, leaves what there is to go on with.

    Raises:
        ConfigError: another process prepares this output, or the folder cannot be made.
    """
    folder = place_of(output)
    with _lock(folder, output):
        staging = Staging(folder)
        try:
            yield staging
        except BaseException as error:
            passing = isinstance(error, OSError | MemoryError) or not isinstance(error, Exception)
            if not (passing and staging.tokenizer.exists()):
                shutil.rmtree(folder)
            raise
        shutil.rmtree(folder)


def place_of(output: Path) -> Path:
    """The hidden folder of an output."""
    return output.with_name(f".{output.name}.partial")


def check_place(output: Path) -> None:
    """That the hidden folder of an output can be made, or is a folder that can be written to; ConfigError if not."""
    folder = require_writable(place_of(output), _NAME, "folder")
    if folder.is_symlink():
        raise problem(folder, _NAME, "it is a link, and nothing can be renamed from elsewhere: remove it")


def _holds(path: Path, content: bytes) -> bool:
    """Whether a plain file holds just this."""
    return is_plain_file(path) and path.stat().st_size == len(content) and path.read_bytes() == content


@contextmanager
def _lock(folder: Path, output: Path) -> Iterator[None]:
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise problem(folder, _NAME, error) from None
        path = folder / "lock"
        try:
            file = _open_lock(path)
        except FileNotFoundError:  # the last holder has just removed the folder
            continue
        except OSError as error:
            raise problem(path, _NAME, error) from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"--output is {output}: it is being prepared by another process; wait for it"
                ) from None
            if _is_at(file, path):
                yield
                return


def _open_lock(path: Path) -> BinaryIO:
    """Open a lock's file, which is made if it is not there; no link is followed, and no pipe waited for.

    Raises:
        ConfigError: something else is in its place. It is not removed: another process may just have put a lock there.
        OSError: it cannot be opened; FileNotFoundError where there is no folder.
    """
    if os.path.lexists(path) and not is_plain_file(path):
        raise problem(path, _NAME, "it is no plain file, and a lock must be one: remove it")
    return open(path, "ab", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666))


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Whether the open file still stands there, and was not removed before it was locked."""
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
