"""Where prepared data grows until it is whole: a hidden folder beside its place, which outlives an interruption.

.NAME.partial/
    lock              held by the process at work; a dead process holds none
    job.json          what is being prepared; another job starts anew
    tokenizer.model
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

from coe_megatron.data.manifest import TOKENIZER
from coe_megatron.errors import ConfigError
from coe_megatron.files import problem, to_disk


class Staging:
    """The folder of one output; `staged` makes it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._chunks = folder / "chunks"

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
        """Move a finished model, a file in this folder, to its place."""
        to_disk(model)
        model.rename(self.tokenizer)

    def scratch(self, name: str) -> Path:
        """A path for a file that is not whole yet."""
        return self._folder / f"{name}.partial"

    def new_whole(self) -> Path:
        """An empty folder for the output."""
        whole = self._folder / "whole"
        shutil.rmtree(whole, ignore_errors=True)
        whole.mkdir()
        return whole

    def publish(self, output: Path) -> None:
        """Put the output in its place, where older data goes only when the new is there."""
        whole, replaced = self._folder / "whole", self._folder / "replaced"
        for path in whole.iterdir():
            to_disk(path)
        to_disk(whole)
        shutil.rmtree(replaced, ignore_errors=True)
        if output.exists():
            output.rename(replaced)
        whole.rename(output)
        to_disk(output.parent)

    def begin(self, job: dict[str, Any]) -> None:
        """Keep what an earlier preparation of the same job left; what another one left goes."""
        text = json.dumps(job, indent=1)
        record = self._folder / "job.json"
        if not record.is_file() or record.read_bytes() != text.encode():
            self._clear()
            scratch = self.scratch("job")
            scratch.write_text(text)
            to_disk(scratch)
            scratch.rename(record)
        self._chunks.mkdir(exist_ok=True)

    def _clear(self) -> None:
        for path in self._folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "lock":
                path.unlink()


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


@contextmanager
def _lock(folder: Path, output: Path) -> Iterator[None]:
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise problem(folder, "the hidden folder beside --output", error) from None
        path = folder / "lock"
        try:
            file = path.open("ab")
        except FileNotFoundError:  # the last holder has just removed the folder
            continue
        except OSError as error:
            raise problem(path, "the hidden folder beside --output", error) from None
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


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Whether the open file still stands there, and was not removed before it was locked."""
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
