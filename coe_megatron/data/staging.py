"""The staging folder of a preparation: a hidden folder beside the output, which survives an interruption.

.NAME.partial/
    lock              held by the running process; released when it ends or dies
    job.json          what is being prepared; a different job starts over
    tokenizer.model   or another kind, with its configuration
    tokenizer.sha256  checksum of the model that encoded the chunks; with another model everything starts over
    chunks/N.npz      encoded chunks, each complete
    complete/         the output itself, renamed to its path once every byte is on disk
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from coe_megatron.data.manifest import TOKENIZER, TOKENIZER_CONFIG, TOKENIZERS, FileSummary
from coe_megatron.errors import ConfigError
from coe_megatron.files import is_plain_file, problem, remove, require_writable, to_disk, write_atomically

_NAME = "the hidden folder beside --output"


class Staging:
    """The staging folder of one output; `open_staging` creates it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._chunks = folder / "chunks"
        self._checksum = folder / "tokenizer.sha256"

    @classmethod
    def of(cls, output: Path) -> "Staging":
        """The staging folder of an output, whether it exists or not."""
        return cls(staging_folder(output))

    @property
    def tokenizer(self) -> Path:
        """Path of the tokenizer, which exists once it is complete."""
        paths = (self._folder / name for name in TOKENIZERS)
        return next((path for path in paths if os.path.lexists(path)), self._folder / TOKENIZER)

    @property
    def chunks_done(self) -> int:
        """Number of complete chunks."""
        return len(list(self._chunks.glob("*.npz")))

    def chunk(self, index: int) -> Path:
        """Path of a chunk, which exists once it is complete."""
        return self._chunks / f"{index:06}.npz"

    def store_tokenizer(self, model: Path, name: str = TOKENIZER, config: str | None = None) -> None:
        """Write the checksum of a finished model, and its configuration if it has one; then rename the model to its
        name in this folder."""
        to_disk(model)
        if config is not None:
            write_atomically(self._folder / TOKENIZER_CONFIG, config)
        write_atomically(self._checksum, FileSummary.of(model).sha256)
        model.rename(self._folder / name)

    def scratch(self, name: str) -> Path:
        """An unused path for an incomplete file."""
        path = self._folder / f"{name}.partial"
        remove(path)
        return path

    def new_output(self) -> Path:
        """Create an empty folder for the output."""
        folder = self._folder / "complete"
        remove(folder)
        folder.mkdir()
        return folder

    def publish(self, output: Path) -> None:
        """Rename the complete output to its path; older data there is replaced only now."""
        complete, replaced = self._folder / "complete", self._folder / "replaced"
        for path in complete.iterdir():
            to_disk(path)
        to_disk(complete)
        remove(replaced)
        if output.exists():
            output.rename(replaced)
        complete.rename(output)
        to_disk(output.parent)

    def begin(self, job: dict[str, Any]) -> str:
        """Keep the files of an earlier preparation of the same job, and delete those of another job.

        Returns:
            Why the files of the same job were deleted too; empty if they were kept.
        """
        text = json.dumps(job, indent=1).encode()
        record, changed = self._folder / "job.json", ""
        if not _content_equals(record, text):
            self._clear()
            write_atomically(record, text)
        elif not self._tokenizer_matches():
            changed = f"{self.tokenizer} has changed since it was written" if os.path.lexists(self.tokenizer) else ""
            self._clear(keep=record.name)
        if self._chunks.is_symlink() or not self._chunks.is_dir():
            remove(self._chunks)
            self._chunks.mkdir()
        return changed

    def _tokenizer_matches(self) -> bool:
        """Whether the tokenizer is the one that encoded the chunks."""
        return is_plain_file(self.tokenizer) and _content_equals(
            self._checksum, FileSummary.of(self.tokenizer).sha256.encode()
        )

    def _clear(self, keep: str = "") -> None:
        for path in self._folder.iterdir():
            if path.name not in ("lock", keep):
                remove(path)


@contextmanager
def open_staging(output: Path) -> Iterator[Staging]:
    """Lock the staging folder of an output. It is deleted at the end, and after an error that would occur again; after
    an interruption, or when disk or memory ran out, its files remain so that the next attempt can resume.

    Raises:
        ConfigError: another process is preparing this output, or the folder cannot be created.
    """
    folder = staging_folder(output)
    with _lock(folder, output):
        staging = Staging(folder)
        try:
            yield staging
        except BaseException as error:
            transient = isinstance(error, OSError | MemoryError) or not isinstance(error, Exception)
            if not (transient and staging.tokenizer.exists()):
                shutil.rmtree(folder)
            raise
        shutil.rmtree(folder)


def staging_folder(output: Path) -> Path:
    """Path of the staging folder of an output."""
    return output.with_name(f".{output.name}.partial")


def check_staging_folder(output: Path) -> None:
    """Raise ConfigError unless the staging folder of an output can be created or written to."""
    folder = require_writable(staging_folder(output), _NAME, "folder")
    if folder.is_symlink():
        raise problem(folder, _NAME, "it is a symbolic link, so its files cannot be renamed to the output: remove it")


def _content_equals(path: Path, content: bytes) -> bool:
    """Whether a plain file has exactly this content."""
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
                    f"--output is {output}: another process is preparing it; wait for that to finish"
                ) from None
            if _is_same_file(file, path):
                yield
                return


def _open_lock(path: Path) -> BinaryIO:
    """Open the lock file, creating it if needed; follows no link and does not block on a pipe.

    Raises:
        ConfigError: the path is not a plain file. We do not remove it, since another process may just have locked it.
        OSError: it cannot be opened; FileNotFoundError if the folder does not exist.
    """
    if os.path.lexists(path) and not is_plain_file(path):
        raise problem(path, _NAME, "the lock must be a plain file: remove it")
    return open(path, "ab", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666))


def _is_same_file(file: BinaryIO, path: Path) -> bool:
    """Whether the path still refers to the open file, which may have been removed before it was locked."""
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
