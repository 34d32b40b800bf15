"""Encode chunks of records into files of token ids; many processes can do this in parallel."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, get_args

import numpy as np

from coe_megatron.data.manifest import Split
from coe_megatron.data.records import InputError, MalformedRecord, Templates
from coe_megatron.data.sources import Chunk
from coe_megatron.data.tokenizer import Tokenizer
from coe_megatron.files import atomic_file, is_plain_file

_SPLITS: tuple[Split, ...] = get_args(Split)


class DamagedChunk(InputError):
    """A file of encoded documents has changed since `write_encoded` wrote it; one line that names it."""


@dataclass(frozen=True)
class Recipe:
    """How records become documents of a split.

    Attributes:
        templates: templates of documents.
        seed: seed of the hash that chooses the held-out documents.
        valid_fraction: fraction of documents held out by their hash (equal documents stay together).
        skip_malformed: yield errors of malformed records instead of raising the first.
    """

    templates: Templates
    seed: int
    valid_fraction: float
    skip_malformed: bool

    def documents(self, chunk: Chunk, split: Split | None) -> Iterator[tuple[Split, str] | MalformedRecord]:
        """Yield the documents of a chunk, and the errors of malformed records with file and line.

        Args:
            split: the split of all its documents; if None, their hash decides.

        Raises:
            InputError: a record is malformed, and `skip_malformed` is false; the message names file and line.
        """
        for place, record in chunk.records():
            try:
                if isinstance(record, MalformedRecord):
                    raise record
                document = self.templates.render(record)
            except MalformedRecord as error:
                if not self.skip_malformed:
                    raise InputError(f"{chunk.source}, {place}: {error} (--skip-malformed would skip it)") from error
                yield MalformedRecord(f"{chunk.source}, {place}: {error}")
            else:
                yield split or self._split_of(document), document

    def _split_of(self, document: str) -> Split:
        digest = sha256(f"{self.seed} {document}".encode()).digest()
        return "valid" if int.from_bytes(digest[:8]) < self.valid_fraction * 2**64 else "train"


@dataclass(frozen=True)
class Encoded:
    """The encoded documents of one split in a chunk.

    Attributes:
        tokens: concatenated tokens of all documents [n], each document ending in eos; dtype `smallest_dtype`.
        lengths: number of tokens of each document, int64.
        bytes: size of the documents in UTF-8.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    bytes: int

    @classmethod
    def of(cls, documents: list[str], tokenizer: Tokenizer) -> "Encoded":
        """Encode documents."""
        dtype = smallest_dtype(tokenizer.vocab_size)
        rows = [_append_eos(tokenizer.encode(document), tokenizer.eos_id, dtype) for document in documents]
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        size = sum(len(document.encode()) for document in documents)
        return cls(np.concatenate(rows) if rows else np.empty(0, dtype), lengths, size)


def smallest_dtype(vocab_size: int) -> np.dtype:
    """The smallest dtype that holds all token ids."""
    return np.min_scalar_type(vocab_size - 1)


def encode_chunk(
    recipe: Recipe, tokenizer: Path, identity: str, chunk: Chunk, split: Split | None, target: Path, position: int
) -> int:
    """Write a chunk's documents as token ids to `target`, atomically.

    Args:
        tokenizer: path of a model file.
        identity: SHA-256 of that file.
        position: the value to return, for a progress bar over all chunks.

    Raises:
        InputError: as `Recipe.documents`.
    """
    found = list(recipe.documents(chunk, split))
    good = [item for item in found if not isinstance(item, MalformedRecord)]
    write_encoded(target, encode_splits(good, _open_tokenizer(tokenizer, identity)), len(found) - len(good))
    return position


def encode_splits(documents: list[tuple[Split, str]], tokenizer: Tokenizer) -> dict[str, Encoded]:
    """Encode documents, grouped by split."""
    return {
        name: Encoded.of([document for split, document in documents if split == name], tokenizer) for name in _SPLITS
    }


def write_encoded(target: Path, splits: dict[str, Encoded], malformed: int) -> None:
    """Write a file for `read_encoded`, atomically."""
    arrays: dict[str, Any] = {"malformed": malformed}
    for name, encoded in splits.items():
        arrays |= {f"{name}_{part}": value for part, value in vars(encoded).items()}
    with atomic_file(target) as file:
        np.savez(file, **arrays)


def read_encoded(path: Path, vocab_size: int) -> tuple[dict[str, Encoded], int]:
    """Read a file of `write_encoded`: the encoded documents of each split, and the number of malformed records.

    Args:
        vocab_size: size of the tokenizer that encoded the documents.

    Raises:
        DamagedChunk: it is not a plain file, or its content is not valid for such a tokenizer.
    """
    try:
        arrays = _arrays(path)
        splits: dict[str, Encoded] = {name: _encoded(arrays, name, vocab_size) for name in _SPLITS}
        return splits, _count(arrays, "malformed")
    except Exception as error:  # numpy and zipfile do not document what they raise on arbitrary bytes
        raise DamagedChunk(f"{path} is damaged ({str(error) or type(error).__name__})") from error


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a chunk by name; ValueError if the file is not a chunk."""
    if not is_plain_file(path):
        raise ValueError("it is not a plain file")
    loaded = np.load(path, allow_pickle=False)
    if not isinstance(loaded, np.lib.npyio.NpzFile):
        raise ValueError("it is a single array")
    with loaded:
        expected = {"malformed", *(f"{name}_{part.name}" for name in _SPLITS for part in fields(Encoded))}
        if wrong := expected.symmetric_difference(loaded.files):
            raise ValueError(f"{min(wrong)} is missing or unexpected")
        assert loaded.zip is not None
        if sum(part.file_size for part in loaded.zip.infolist()) > path.stat().st_size:
            raise ValueError("it is compressed")  # and could expand to any size
        return {name: loaded[name] for name in expected}


def _encoded(arrays: dict[str, np.ndarray], split: Split, vocab_size: int) -> Encoded:
    tokens = _vector(arrays, f"{split}_tokens", smallest_dtype(vocab_size))
    lengths = _vector(arrays, f"{split}_lengths", np.dtype(np.int64))
    # Check each length first, since the sum may overflow.
    if (lengths.size and not 1 <= lengths.min() <= lengths.max() <= tokens.size) or lengths.sum() != tokens.size:
        raise ValueError(f"{split}_lengths are not the lengths of documents with {tokens.size} tokens")
    if tokens.size and tokens.max() >= vocab_size:
        raise ValueError(f"{split}_tokens contains {tokens.max()}, but the tokenizer has {vocab_size} pieces")
    return Encoded(tokens, lengths, _count(arrays, f"{split}_bytes"))


def _vector(arrays: dict[str, np.ndarray], name: str, dtype: np.dtype) -> np.ndarray:
    if (found := arrays[name]).ndim != 1 or found.dtype != dtype:
        raise ValueError(
            f"{name} is a {found.ndim}-dimensional array of {found.dtype}, not a 1-dimensional one of {dtype}"
        )
    return found


def _count(arrays: dict[str, np.ndarray], name: str) -> int:
    if (found := arrays[name]).ndim or found.dtype.kind not in "iu" or found < 0:
        raise ValueError(f"{name} is not a count")
    return int(found)


def _append_eos(ids: np.ndarray, eos_id: int, dtype: np.dtype) -> np.ndarray:
    row = np.empty(len(ids) + 1, dtype)
    row[:-1], row[-1] = ids, eos_id
    return row


@lru_cache(maxsize=1)
def _open_tokenizer(path: Path, identity: str) -> Tokenizer:
    """A tokenizer, cached between chunks with the words it has encoded; `identity` detects a replaced model."""
    tokenizer = Tokenizer(path)
    assert tokenizer.sha256 == identity
    return tokenizer
