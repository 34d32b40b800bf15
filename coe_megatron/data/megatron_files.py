"""Indexed datasets of Megatron as a corpus: what a manifest and a tokenizer would say is read from the files."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coe_megatron.data.datasets import MAX_HASHED_BYTES
from coe_megatron.data.indexed_prefix import IndexedPrefix
from coe_megatron.data.manifest import FileSummary, Split
from coe_megatron.data.samples import Corpus
from coe_megatron.errors import ConfigError
from coe_megatron.files import problem

_PIECE_BYTES = 1 << 20


@dataclass(frozen=True)
class UnknownTokenizer:
    """What samples need of a tokenizer that we do not have.

    Attributes:
        vocab_size: all ids are below this.
        eos_id: the token in which documents end; None if they do not all end in the same.
        pad_id: any id, since masks mark the padding.
        sha256: empty.
    """

    vocab_size: int
    eos_id: int | None
    pad_id: int
    sha256: str = ""


@dataclass(frozen=True)
class MegatronFiles(Corpus):
    """PREFIX.bin and PREFIX.idx, which serve as any split.

    Attributes:
        files: the files.
        tokenizer: as far as it is known.
        sha256: checksum of the index and the tokens; of more than MAX_HASHED_BYTES of tokens, of a part.
    """

    files: IndexedPrefix
    tokenizer: UnknownTokenizer
    sha256: str

    @classmethod
    def open(cls, prefix: Path, name: str, vocab_size: int, limit: str) -> "MegatronFiles":
        """Open the files, after checking that the ids are in the vocabulary (of large files, a part of the ids).

        Args:
            name: the setting that names the prefix, for messages.
            vocab_size: all ids must be below this.
            limit: where that number is from, for the message.

        Raises:
            ConfigError: as `IndexedPrefix.read`, or an id is not in the vocabulary.
        """
        files = IndexedPrefix.read(prefix, name)
        digest = hashlib.sha256(FileSummary.of(files.idx).sha256.encode())
        least, largest = 0, 0
        for piece in _pieces(files.token_ids()):
            digest.update(piece.tobytes())
            least, largest = min(least, int(piece.min())), max(largest, int(piece.max()))
        if least < 0 or largest >= vocab_size:
            found = least if least < 0 else largest
            raise problem(files.bin, name, f"it contains token {found}, but {limit} is {vocab_size}")
        end = files.end_of_documents()
        return cls(files, UnknownTokenizer(vocab_size, end, end or 0), digest.hexdigest())

    @property
    def token_bytes(self) -> int:
        return np.dtype(self.files.dtype).itemsize

    def prefix(self, split: Split) -> Path:
        return self.files.prefix

    def summary(self, split: Split) -> IndexedPrefix:
        return self.files

    def identity(self, split: Split) -> str:
        return self.sha256

    def check_resets(self) -> None:
        if self.tokenizer.eos_id is None:
            raise ConfigError(
                f"data.reset_at_documents is true: the documents of {self.files.prefix} do not all end in one token, "
                "so that they cannot be told apart in a sample"
            )


def _pieces(tokens: np.ndarray) -> Iterator[np.ndarray]:
    """All tokens in pieces; of more than MAX_HASHED_BYTES, pieces of so many bytes together, evenly spread."""
    length = _PIECE_BYTES // tokens.itemsize
    starts = np.arange(0, len(tokens), length)
    most = MAX_HASHED_BYTES // _PIECE_BYTES
    if len(starts) > most:
        starts = starts[np.linspace(0, len(starts) - 1, most).astype(np.int64)]
    for start in starts:
        yield tokens[start : start + length]
