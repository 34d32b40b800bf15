"""The file of a split's tokens, watched while samples are drawn from it: damage is told from a bug."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from coe_megatron.errors import ConfigError


class DamagedTokens(ConfigError):
    """What one rank may find alone, in the samples that it draws; one line that names the file."""


class TokenFile:
    """Looks at what is read of a split: files too large to be hashed at the start, or changed under a running run.

    Attributes:
        path: of its .bin.
        bytes: it must have; the memory of a file that became shorter ends the process (SIGBUS).
        vocab_size: above all its tokens.
    """

    def __init__(self, path: Path, size: int, vocab_size: int) -> None:
        self.path, self.bytes, self.vocab_size = path, size, vocab_size
        self._file = path.open("rb")  # as the mapping does, it outlives the name

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Around what follows the index into the file.

        Raises:
            DamagedTokens: it leads nowhere, or the file is shorter than it was.
        """
        if (size := os.fstat(self._file.fileno()).st_size) < self.bytes:
            raise self._damaged(f"it has {size} bytes instead of {self.bytes}")
        try:
            yield
        except (IndexError, ValueError) as error:
            raise self._damaged(f"its index, or the order kept in the run's folder, leads nowhere ({error})") from error

    def check(self, *tokens: Tensor) -> None:
        """Refuse what is no token.

        Raises:
            DamagedTokens: names it.
        """
        for some in tokens:
            least, largest = (int(value) for value in some.aminmax())
            if least < 0 or largest >= self.vocab_size:
                found = least if least < 0 else largest
                raise self._damaged(f"it holds token {found}, and the tokenizer has {self.vocab_size}")

    def _damaged(self, reason: str) -> DamagedTokens:
        return DamagedTokens(f"{self.path} is damaged: {reason}; prepare the data again")
