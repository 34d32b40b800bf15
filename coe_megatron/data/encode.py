"""From chunks of records to files of token ids: the part of a preparation that many processes share."""

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, get_args
from zipfile import BadZipFile

import numpy as np

from coe_megatron.data.manifest import Split
from coe_megatron.data.records import InputError, MalformedRecord, Templates
from coe_megatron.data.sources import Chunk
from coe_megatron.data.tokenizer import Tokenizer


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
        dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
        rows = [_with_end(tokenizer.encode(document), tokenizer.eos_id, dtype) for document in documents]
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        size = sum(len(document.encode()) for document in documents)
        return cls(np.concatenate(rows) if rows else np.empty(0, dtype), lengths, size)


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
        name: Encoded.of([document for split, document in documents if split == name], tokenizer)
        for name in get_args(Split)
    }


def write_encoded(target: Path, splits: dict[str, Encoded], malformed: int) -> None:
    """Write what `read_encoded` reads; the file is there whole or not at all."""
    arrays: dict[str, Any] = {"malformed": malformed}
    for name, encoded in splits.items():
        arrays |= {f"{name}_{part}": value for part, value in vars(encoded).items()}
    partial = target.with_suffix(f".{os.getpid()}.partial")
    with partial.open("wb") as file:
        np.savez(file, **arrays)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(target)


def read_encoded(path: Path) -> tuple[dict[str, Encoded], int]:
    """What `encode_chunk` wrote: what became of each split, and the number of malformed records.

    Raises:
        InputError: the file has been damaged since.
    """
    try:
        with np.load(path) as arrays:
            splits = {
                name: Encoded(arrays[f"{name}_tokens"], arrays[f"{name}_lengths"], int(arrays[f"{name}_bytes"]))
                for name in get_args(Split)
            }
            return splits, int(arrays["malformed"])
    except (ValueError, KeyError, EOFError, BadZipFile, zlib.error) as error:
        raise InputError(f"{path} is damaged ({error}): the same command begins anew") from error


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
