"""Token ids of documents as samples, of one document each or packed.

Legend: S sequence length. A sample is a dict of tensors of shape [S]:
    tokens        int64    what the model reads
    labels        int64    tokens shifted by one: labels[i] follows tokens[i]
    loss_mask     float32  1 where labels[i] is a real token (eos counts), 0 elsewhere
    position_ids  int64    0 ... S - 1
    padding_mask  bool     True where tokens[i] is padding
If attention resets at the documents of a packed sample, there is also, of shape [1, S, S],
    attention_mask  bool   True where attention is forbidden
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from coe_megatron.data.manifest import Split
from coe_megatron.data.packed_index import build_once, gpt_dataset
from coe_megatron.data.token_file import TokenFile
from coe_megatron.errors import ConfigError

Sample = dict[str, Tensor]
Mode = Literal["row", "packed"]


class SampleSource(Protocol):
    """A sized, indexable source of samples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


class TokenizerFacts(Protocol):
    """What samples need of a tokenizer: `Tokenizer`, or what is known of one."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def eos_id(self) -> int | None: ...
    @property
    def pad_id(self) -> int: ...
    @property
    def sha256(self) -> str: ...


class Summary(Protocol):
    """What is known of the text of a split."""

    @property
    def tokens(self) -> int: ...
    @property
    def bytes_per_token(self) -> float | None: ...


class Corpus(ABC):
    """Token ids of documents as samples.

    Attributes:
        tokenizer: the tokenizer of its tokens.
    """

    tokenizer: TokenizerFacts

    @property
    @abstractmethod
    def token_bytes(self) -> int:
        """Bytes of a token on disk."""

    @abstractmethod
    def prefix(self, split: Split) -> Path:
        """Path of a split's .bin and .idx files, without their suffixes."""

    @abstractmethod
    def summary(self, split: Split) -> Summary:
        """What is known of a split's text."""

    @abstractmethod
    def identity(self, split: Split) -> str:
        """Checksum of a split's tokens."""

    @abstractmethod
    def check_resets(self) -> None:
        """Raise ConfigError if the ends of documents cannot be told in a packed sample."""

    def samples(
        self,
        mode: Mode,
        split: Split,
        seq_length: int,
        *,
        seed: int,
        cache_dir: str | Path,
        reset_at_documents: bool = False,
        answer_tokens: int | None = None,
    ) -> SampleSource:
        """The samples of a split in one of two modes; see `rows` and `packed`, and their arguments.

        Raises:
            ValueError: there is no such mode or split, or seq_length is not valid.
        """
        if mode not in get_args(Mode):
            raise ValueError(f"mode is {mode!r}: it must be one of {', '.join(get_args(Mode))}")
        if mode == "row":
            return self.rows(split, seq_length, answer_tokens)
        return self.packed(split, seq_length, seed=seed, cache_dir=cache_dir, reset_at_documents=reset_at_documents)

    def rows(self, split: Split, seq_length: int, answer_tokens: int | None = None) -> "RowDataset":
        """One document per sample, truncated after seq_length labels or padded, in the order of preparation.

        Args:
            answer_tokens: limits the loss to so many tokens of each document, the last ones before its end; None for
                loss on all.

        Raises:
            ValueError: there is no such split, or seq_length is below 1.
        """
        documents, pad_id = self._indexed(split, seq_length), self.tokenizer.pad_id
        return RowDataset(documents, seq_length, pad_id, self._tokens(split), answer_tokens)

    def packed(
        self, split: Split, seq_length: int, *, seed: int, cache_dir: str | Path, reset_at_documents: bool = False
    ) -> "PackedDataset":
        """Windows of seq_length labels over the concatenated shuffled documents (Megatron's GPTDataset).

        Every token except the first is a label exactly once. The remainder that fills no window is dropped in training
        and padded in validation.

        Under torch.distributed all ranks must call this: rank 0 builds the index, the others wait.

        Args:
            seed: seed of the order of documents, and so of the windows.
            cache_dir: folder of the index, visible to all ranks.
            reset_at_documents: whether attention is limited to one document and positions start at 0 in each;
                otherwise both cross document boundaries.

        Raises:
            ValueError: there is no such split.
            ConfigError: it has too few tokens for one window.
        """
        indexed = self._indexed(split, seq_length)
        if reset_at_documents:
            self.check_resets()
        tokens = self.summary(split).tokens
        if split == "train" and tokens <= seq_length:
            raise ConfigError(f"seq_length is {seq_length}: it must be below the {tokens} tokens of the train split")
        cache = Path(cache_dir) / f"{split}-{self.identity(split)[:16]}-{seq_length}-{seed}"
        config = {"random_seed": seed, "sequence_length": seq_length, **_document_resets(reset_at_documents)}
        source = indexed, str(self.prefix(split)), split, self.tokenizer
        dataset = build_once(cache, lambda path: gpt_dataset(*source, path, config))
        return PackedDataset(dataset, self.tokenizer.pad_id, self._tokens(split))

    def truncated_fraction(self, seq_length: int) -> float:
        """The fraction of training documents that `rows` truncates: those with more than seq_length + 1 tokens."""
        indexed = self._indexed("train", seq_length)  # keep it alive: its lengths are a view of its memory map
        return float((indexed.sequence_lengths > seq_length + 1).mean())

    def _tokens(self, split: Split) -> TokenFile:
        size = self.summary(split).tokens * self.token_bytes
        return TokenFile(Path(f"{self.prefix(split)}.bin"), size, self.tokenizer.vocab_size)

    def _indexed(self, split: Split, seq_length: int) -> Any:
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        if split not in get_args(Split):
            raise ValueError(f"split is {split!r}: it must be one of {', '.join(get_args(Split))}")
        if seq_length < 1:
            raise ValueError(f"seq_length is {seq_length}: it must be at least 1")
        return IndexedDataset(str(self.prefix(split)))


class RowDataset:
    """One document per sample; `Corpus.rows` makes it."""

    def __init__(
        self, documents: Sequence[np.ndarray], seq_length: int, pad_id: int, file: TokenFile, answer_tokens: int | None
    ) -> None:
        self._documents = documents
        self._seq_length = seq_length
        self._pad_id = pad_id
        self._file = file
        self._answer_tokens = answer_tokens

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> Sample:
        size = self._seq_length
        with self._file.reading():
            complete = self._documents[index]
            document = complete[: size + 1]
        row = torch.full((size + 1,), self._pad_id, dtype=torch.int64)
        row[: len(document)] = torch.from_numpy(document.astype(np.int64))
        self._file.check(row)
        positions = torch.arange(size)
        return {
            "tokens": row[:-1],
            "labels": row[1:],
            "loss_mask": self._has_loss(positions, len(complete)).float(),
            "position_ids": positions,
            "padding_mask": positions >= len(document),
        }

    def _has_loss(self, positions: Tensor, length: int) -> Tensor:
        """Where labels of a document count, bool; `length` includes the token that ends it."""
        if self._answer_tokens is None:
            return positions < length - 1
        end = length - 2  # the position whose label ends the document
        return (positions < end) & (positions >= end - self._answer_tokens)


class PackedDataset:
    """Megatron's GPTDataset with a padding mask and the tokenizer's pad id; `Corpus.packed` makes it."""

    def __init__(self, dataset: Any, pad_id: int, file: TokenFile) -> None:
        self._dataset = dataset
        self._pad_id = pad_id
        self._file = file

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Sample:
        with self._file.reading():
            sample = self._dataset[index]
        self._file.check(sample["tokens"], sample["labels"])
        no_label = sample["loss_mask"] == 0
        # A token is padding if it was padding as the label of the position before.
        padding = torch.cat((torch.zeros(1, dtype=torch.bool), no_label[:-1]))
        return {
            **sample,
            "tokens": sample["tokens"].masked_fill(padding, self._pad_id),
            "labels": sample["labels"].masked_fill(no_label, self._pad_id),
            "padding_mask": padding,
        }


def _document_resets(reset: bool) -> dict[str, bool]:
    return dict.fromkeys(("reset_position_ids", "reset_attention_mask", "create_attention_mask"), reset)
