"""Megatron's indexed datasets as another program wrote them: PREFIX.bin and PREFIX.idx, without a manifest."""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coe_megatron.data.manifest import Split
from coe_megatron.files import kind_of, problem, require_file

_MAGIC, _VERSION = b"MMIDIDX\x00\x00", 1
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype, sequences, documents + 1
_DTYPES = {1: np.uint8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}  # Megatron's codes of integers


@dataclass(frozen=True)
class IndexedPrefix:
    """An indexed dataset, described by its index alone; it has one split, which serves as any.

    Attributes:
        prefix: path of the two files without their suffixes.
        dtype: of a token, by name.
        documents: number of documents.
        tokens: number of tokens.
        bytes_per_token: always None: the text is not known.
    """

    prefix: Path
    dtype: str
    documents: int
    tokens: int
    bytes_per_token: None = None

    @property
    def splits(self) -> "dict[Split, IndexedPrefix]":
        """As `Manifest.splits`."""
        return {"train": self, "valid": self}

    @property
    def bin(self) -> Path:
        """The file of tokens."""
        return Path(f"{self.prefix}.bin")

    @property
    def idx(self) -> Path:
        """The index."""
        return Path(f"{self.prefix}.idx")

    @classmethod
    def read(cls, prefix: Path, name: str) -> "IndexedPrefix":
        """Read the index, and check that the tokens are as many as it says.

        Args:
            name: the setting that names the prefix, for messages.

        Raises:
            ConfigError: a file is missing or cannot be read; the index is not valid or does not fit the tokens; or a
                document has several sequences.
        """
        bin_, idx = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        require_file(idx, name)
        size = require_file(bin_, name).stat().st_size
        try:
            dtype, lengths, starts = _read_index(idx)
        except (OSError, ValueError) as error:
            raise problem(idx, name, f"it is not the index of a dataset of tokens ({error})") from None
        tokens = int(lengths.sum(dtype=np.int64))
        if tokens * dtype.itemsize != size:
            raise problem(bin_, name, f"it has {size} bytes, but its index requires {tokens * dtype.itemsize}")
        if (starts != np.cumsum(lengths, dtype=np.int64) - lengths).any():
            raise problem(idx, name, "its documents are not one after the other in the file of tokens")
        if not tokens:
            raise problem(idx, name, "it has no tokens")
        return cls(prefix, dtype.name, len(lengths), tokens)

    def end_of_documents(self) -> int | None:
        """The token in which documents end; None if they do not all end in the same (of the first thousand)."""
        _, lengths, _ = _read_index(self.idx)
        ends = np.cumsum(lengths[:1000], dtype=np.int64)[lengths[:1000] > 0] - 1
        last = np.unique(self.token_ids()[ends])
        return int(last[0]) if len(last) == 1 else None

    def token_ids(self) -> np.ndarray:
        """All tokens [tokens], mapped from the file."""
        return np.memmap(self.bin, dtype=self.dtype, mode="r")


def is_prefix(path: Path, name: str) -> bool:
    """Whether a path names an indexed dataset: PATH.idx exists, and PATH itself does not.

    Raises:
        ConfigError: the path cannot be accessed.
    """
    return kind_of(path, name) is None and bool(path.name) and kind_of(Path(f"{path}.idx"), name) is not None


def _read_index(path: Path) -> tuple[np.dtype, np.ndarray, np.ndarray]:
    """Type of a token; number of tokens of each document, and its first token, int64; ValueError if it is no index."""
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size or header[: len(_MAGIC)] != _MAGIC:
        raise ValueError("it does not begin as one")
    _, version, code, sequences, ends = _HEADER.unpack(header)
    if version != _VERSION or code not in _DTYPES:
        raise ValueError(f"version {version}, type {code}")
    if ends != sequences + 1:
        raise ValueError("its documents have several sequences: write each document as one")
    if path.stat().st_size != _HEADER.size + 12 * sequences + 8 * ends:
        raise ValueError(f"it has {path.stat().st_size} bytes, which does not fit {sequences} documents")
    dtype = np.dtype(_DTYPES[code])
    content = np.memmap(path, dtype=np.uint8, mode="r", offset=_HEADER.size)
    lengths = content[: 4 * sequences].view("<i4").astype(np.int64)
    starts = content[4 * sequences : 12 * sequences].view("<i8")
    if sequences and lengths.min() < 0:
        raise ValueError("a document has a negative length")
    return dtype, lengths, starts // dtype.itemsize
