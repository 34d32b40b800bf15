"""Checks on a split's token file while samples are read from it, so that a damaged file is not reported as a bug."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from coe_megatron.errors import ConfigError


class DamagedTokens(ConfigError):
    """Damage that a single rank may find in the samples it reads; one line that names the file."""


class TokenFile:
    """Checks the tokens read of a split: files may be too large to hash at the start, or change during the run.

    Attributes:
        path: the .bin file.
        bytes: the size that it must have; reading a memory-mapped file that shrank ends the process (SIGBUS).
        vocab_size: all token ids must be below this.
    """

    def __init__(self, path: Path, size: int, vocab_size: int) -> None:
        self.path, self.bytes, self.vocab_size = path, size, vocab_size
        self._file = path.open("rb")  # stays open when the file is deleted, as the memory map does

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Context in which a sample is read through the index.

        Raises:
            DamagedTokens: the index is not valid, or the file has shrunk.
        """
        if (size := os.fstat(self._file.fileno()).st_size) < self.bytes:
            raise self._damaged(f"it has {size} bytes instead of {self.bytes}")
        try:
            yield
        except (IndexError, ValueError) as error:
            raise self._damaged(
                f"its index, or the sample order in the run's folder, is not valid ({error})"
            ) from error

    def check(self, *tokens: Tensor) -> None:
        """Check that all token ids are valid.

        Raises:
            DamagedTokens: an id is not valid; the message names it.
        """
        for ids in tokens:
            least, largest = (int(value) for value in ids.aminmax())
            if least < 0 or largest >= self.vocab_size:
                found = least if least < 0 else largest
                raise self._damaged(f"it contains token {found}, but the tokenizer has {self.vocab_size} pieces")

    def _damaged(self, reason: str) -> DamagedTokens:
        return DamagedTokens(f"{self.path} is damaged: {reason}; prepare the data again")
