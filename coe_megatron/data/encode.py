"""From chunks of records to files of token ids: the part of a preparation that many processes share."""

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
    """A file of encoded documents that `write_encoded` did not write so; one line that names it."""


@dataclass(frozen=True)
class Recipe:
    """How records become documents of a split.

    Attributes:
        templates: of documents.
        seed: of the held-out share.
        valid_fraction: share of the documents held out by their hash (equal documents stay together).
        skip_malformed: count records that give no document instead of stopping at the first.
    """

    templates: Templates
    seed: int
    valid_fraction: float
    skip_malformed: bool

    def documents(self, chunk: Chunk, split: Split | None) -> Iterator[tuple[Split, str] | MalformedRecord]:
        """The documents of a chunk, and the errors of records that give none, with file and line.

        Args:
            split: of all its documents; None lets their hash decide.

        Raises:
            InputError: a record gives no document, and is not to be skipped; the message names file and line.
        """
        for place, record in chunk.records():
            try:
                if isinstance(record, MalformedRecord):
                    raise record
                document = self.templates.render(record)
            except MalformedRecord as error:
                if not self.skip_malformed:
                    raise InputError(f"{chunk.source}, {place}: {error} (--skip-malformed would go on)") from error
                yield MalformedRecord(f"{chunk.source}, {place}: {error}")
            else:
                yield split or self._split_of(document), document

    def _split_of(self, document: str) -> Split:
        digest = sha256(f"{self.seed} {document}".encode()).digest()
        return "valid" if int.from_bytes(digest[:8]) < self.valid_fraction * 2**64 else "train"


@dataclass(frozen=True)
class Encoded:
    """What a chunk's documents of one split became.

    Attributes:
        tokens: of all documents, one after the other, each with its eos; in the smallest type that holds them.
        lengths: tokens of each document.
        bytes: of the documents in UTF-8.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    bytes: int

    @classmethod
    def of(cls, documents: list[str], tokenizer: Tokenizer) -> "Encoded":
        """Encode documents."""
        dtype = token_type(tokenizer.vocab_size)
        rows = [_with_end(tokenizer.encode(document), tokenizer.eos_id, dtype) for document in documents]
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        size = sum(len(document.encode()) for document in documents)
        return cls(np.concatenate(rows) if rows else np.empty(0, dtype), lengths, size)


def token_type(vocab_size: int) -> np.dtype:
    """The smallest type that holds all tokens."""
    return np.min_scalar_type(vocab_size - 1)


def encode_chunk(
    recipe: Recipe, tokenizer: Path, identity: str, chunk: Chunk, split: Split | None, target: Path, position: int
) -> int:
    """Write a chunk's documents as token ids to `target`, which is there whole or not at all.

    Args:
        tokenizer: a model file, and
        identity: its SHA-256.
        position: given back, to show how far all chunks are.

    Raises:
        InputError: as `Recipe.documents`.
    """
    found = list(recipe.documents(chunk, split))
    good = [item for item in found if not isinstance(item, MalformedRecord)]
    write_encoded(target, encode_splits(good, _open_tokenizer(tokenizer, identity)), len(found) - len(good))
    return position


def encode_splits(documents: list[tuple[Split, str]], tokenizer: Tokenizer) -> dict[str, Encoded]:
    """Encode documents, each split by itself."""
    return {
        name: Encoded.of([document for split, document in documents if split == name], tokenizer) for name in _SPLITS
    }


def write_encoded(target: Path, splits: dict[str, Encoded], malformed: int) -> None:
    """Write what `read_encoded` reads; the file is there whole or not at all."""
    arrays: dict[str, Any] = {"malformed": malformed}
    for name, encoded in splits.items():
        arrays |= {f"{name}_{part}": value for part, value in vars(encoded).items()}
    with atomic_file(target) as file:
        np.savez(file, **arrays)


def read_encoded(path: Path, vocab_size: int) -> tuple[dict[str, Encoded], int]:
    """What `write_encoded` wrote: what became of each split, and the number of malformed records.

    Args:
        vocab_size: of the tokenizer that the documents were encoded with.

    Raises:
        DamagedChunk: it is no plain file, or not one that could have been written with such a tokenizer.
    """
    try:
        arrays = _arrays(path)
        splits: dict[str, Encoded] = {name: _encoded(arrays, name, vocab_size) for name in _SPLITS}
        return splits, _count(arrays, "malformed")
    except Exception as error:  # of numpy's and zipfile's readers nobody lists what foreign bytes make them raise
        raise DamagedChunk(f"{path} is damaged ({str(error) or type(error).__name__})") from error


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a chunk by name; ValueError if they are not those of one."""
    if not is_plain_file(path):
        raise ValueError("it is no plain file")
    loaded = np.load(path, allow_pickle=False)
    if not isinstance(loaded, np.lib.npyio.NpzFile):
        raise ValueError("it holds a single array")
    with loaded:
        expected = {"malformed", *(f"{name}_{part.name}" for name in _SPLITS for part in fields(Encoded))}
        if wrong := expected.symmetric_difference(loaded.files):
            raise ValueError(f"{min(wrong)} is missing, or too much")
        assert loaded.zip is not None
        if sum(part.file_size for part in loaded.zip.infolist()) > path.stat().st_size:
            raise ValueError("it is compressed")  # to any size
        return {name: loaded[name] for name in expected}


def _encoded(arrays: dict[str, np.ndarray], split: Split, vocab_size: int) -> Encoded:
    tokens = _row(arrays, f"{split}_tokens", token_type(vocab_size))
    lengths = _row(arrays, f"{split}_lengths", np.dtype(np.int64))
    # Each by itself first: a sum may overflow.
    if (lengths.size and not 1 <= lengths.min() <= lengths.max() <= tokens.size) or lengths.sum() != tokens.size:
        raise ValueError(f"{split}_lengths are not the lengths of documents with {tokens.size} tokens")
    if tokens.size and tokens.max() >= vocab_size:
        raise ValueError(f"{split}_tokens holds {tokens.max()}, and the tokenizer has {vocab_size} pieces")
    return Encoded(tokens, lengths, _count(arrays, f"{split}_bytes"))


def _row(arrays: dict[str, np.ndarray], name: str, dtype: np.dtype) -> np.ndarray:
    if (found := arrays[name]).ndim != 1 or found.dtype != dtype:
        raise ValueError(f"{name} is {found.ndim}-dimensional of type {found.dtype}, not one row of {dtype}")
    return found


def _count(arrays: dict[str, np.ndarray], name: str) -> int:
    if (found := arrays[name]).ndim or found.dtype.kind not in "iu" or found < 0:
        raise ValueError(f"{name} is no count")
    return int(found)


def _with_end(ids: np.ndarray, eos_id: int, dtype: np.dtype) -> np.ndarray:
    row = np.empty(len(ids) + 1, dtype)
    row[:-1], row[-1] = ids, eos_id
    return row


@lru_cache(maxsize=1)
def _open_tokenizer(path: Path, identity: str) -> Tokenizer:
    """Kept from chunk to chunk, with the words it knows; the identity tells a new model under an old name."""
    tokenizer = Tokenizer(path)
    assert tokenizer.sha256 == identity
    return tokenizer
