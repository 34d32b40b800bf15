"""Prepared data, and batches of samples (`samples` says what a sample is).

Legend: S sequence length, b rows of a micro-batch. A batch has a sample's keys with tensors of shape [b, S], and
attention_mask of shape [b, 1, S, S].
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided

from coe_megatron.data.manifest import MANIFEST, TOKEN_BYTES, TOKENIZER_CONFIG, Manifest, Split, SplitSummary
from coe_megatron.data.samples import Corpus, Sample, SampleSource
from coe_megatron.data.tokenizer import Tokenizer
from coe_megatron.errors import ConfigError

MAX_HASHED_BYTES = 1 << 27  # token files up to this size are hashed at every start, which takes half a second


@dataclass(frozen=True)
class PreparedData(Corpus):
    """A folder that `prepare` wrote.

    Attributes:
        folder: its path.
        manifest: its manifest.
        tokenizer: the tokenizer of its tokens.
    """

    folder: Path
    manifest: Manifest
    tokenizer: Tokenizer

    @classmethod
    def open(cls, folder: str | Path, name: str = "the data") -> "PreparedData":
        """Open a folder after checking its manifest, the file sizes, and the checksums of tokenizer and indices, and of
        token files up to MAX_HASHED_BYTES. Of larger token files each sample is checked when it is read.

        Args:
            name: the setting that names the folder, for messages.

        Raises:
            ConfigError: it is not prepared data, has another format, is incomplete, or is damaged.
        """
        folder = Path(folder)
        manifest = Manifest.read(folder, name)
        for file, summary in manifest.files.items():
            if file.endswith(".idx") or summary.bytes <= MAX_HASHED_BYTES:
                manifest.check(folder, file, name)
        tokenizer = Tokenizer(folder / manifest.tokenizer, name)
        if tokenizer.vocab_size != manifest.vocab_size:
            raise ConfigError(
                f"{name}: {folder / MANIFEST} has vocab_size {manifest.vocab_size}, but the tokenizer has "
                f"{tokenizer.vocab_size} pieces; prepare it again"
            )
        if tokenizer.sha256 != manifest.tokenizer_sha256:
            raise ConfigError(f"{name}: {folder / TOKENIZER_CONFIG} was not written by a preparation; prepare it again")
        return cls(folder, manifest, tokenizer)

    @property
    def token_bytes(self) -> int:
        return TOKEN_BYTES[self.manifest.token_dtype]

    def prefix(self, split: Split) -> Path:
        return self.folder / split

    def summary(self, split: Split) -> SplitSummary:
        return self.manifest.splits[split]

    def identity(self, split: Split) -> str:
        return self.manifest.files[f"{split}.bin"].sha256

    def check_resets(self) -> None:
        pass


class StepBatches:
    """The batches of every step, as a function of the step alone, so that resuming needs no state.

    Step s uses the next `global_batch` samples, whatever the number of ranks; micro-batch m of rank r has the rows from
    (m * dp_size + r) * micro_batch on. `BlendedOrder` defines the order of the samples.

    Args:
        corpora: the samples of each corpus.
        weights: weight of each corpus in samples, relative to their sum.
        seed: seed of the order, at least 0.
        global_batch: rows of a step over all ranks.
        micro_batch: rows of one forward pass on one rank (b).
        dp_rank, dp_size: this rank and the number of ranks that split the batch.

    Raises:
        ValueError: the sizes do not divide, a number is out of range, or a corpus is empty.
    """

    def __init__(
        self,
        corpora: Sequence[SampleSource],
        weights: Sequence[float] = (1.0,),
        *,
        seed: int,
        global_batch: int,
        micro_batch: int,
        dp_rank: int,
        dp_size: int,
    ) -> None:
        for corpus in corpora:
            _check_shard(corpus, micro_batch, dp_rank, dp_size)
        if global_batch < 1 or global_batch % (micro_batch * dp_size):
            raise ValueError(
                f"global_batch is {global_batch}: it must be a multiple of micro_batch * dp_size = "
                f"{micro_batch} * {dp_size} = {micro_batch * dp_size}"
            )
        if seed < 0:
            raise ValueError(f"seed is {seed}: it must be at least 0")
        self._corpora = corpora
        self._order = BlendedOrder([len(corpus) for corpus in corpora], weights, seed)
        self._global_batch = global_batch
        self._micro_batch = micro_batch
        self._rank, self._ranks = dp_rank, dp_size

    def for_step(self, step: int) -> list[Sample]:
        """This rank's micro-batches of a step in order, tensors [b, S].

        Args:
            step: counted from 0.

        Raises:
            ValueError: the step is negative.
        """
        own = self.rows(step)[:, self._rank]
        return [_stack([self._corpora[corpus][int(index)] for corpus, index in micro]) for micro in own]

    def rows(self, step: int) -> np.ndarray:
        """The samples of a step by micro-batch, rank and row, as (corpus, index): [micro-batches, dp_size, b, 2].

        Raises:
            ValueError: the step is negative.
        """
        return np.asarray(self.indices(step)).reshape(-1, self._ranks, self._micro_batch, 2)

    def indices(self, step: int) -> list[tuple[int, int]]:
        """The samples of the global batch of a step in order, as (corpus, index in the corpus).

        Raises:
            ValueError: the step is negative.
        """
        if step < 0:
            raise ValueError(f"step is {step}: it must be at least 0")
        return self._order.between(step * self._global_batch, (step + 1) * self._global_batch)


class BlendedOrder:
    """An endless order of the samples of several corpora, as a function of the seed alone.

    At every position, each corpus has provided its weight in samples to within about one (Megatron's
    `build_blending_indices`: the next sample comes from the corpus that is furthest behind). Each corpus is
    permuted again in each of its epochs; the permutation depends on (seed, epoch, corpus).

    Args:
        sizes: number of samples of each corpus.
        weights: weight of each corpus, relative to their sum.
        seed: at least 0.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        assert len(sizes) == len(weights) and 0 not in sizes
        self._sizes, self._seed = sizes, seed
        self._weights = np.array(weights) / sum(weights)
        self._corpus_of = np.empty(0, dtype=np.int16)  # by position, as far as needed so far
        self._latest = 0, np.zeros(len(sizes), dtype=np.int64)  # a position, and each corpus' count before it
        self._permutations: dict[int, tuple[int, np.ndarray]] = {}  # of each corpus: its latest epoch and permutation

    def between(self, first: int, end: int) -> list[tuple[int, int]]:
        """The samples at positions first ... end - 1, as (corpus, index in the corpus)."""
        self._grow(end)
        counts = self._counts_before(first)
        samples = []
        for corpus in self._corpus_of[first:end].tolist():
            samples.append((corpus, self._sample(corpus, int(counts[corpus]))))
            counts[corpus] += 1
        return samples

    def _grow(self, end: int) -> None:
        """Extend the choice of corpora; it does not depend on how many positions are computed at once."""
        if end <= len(self._corpus_of):
            return
        from megatron.core.datasets import helpers

        size = 2 * end
        self._corpus_of = np.empty(size, dtype=np.int16)
        unused = as_strided(np.zeros(1, dtype=np.int64), (size,), (0,))  # all entries share the same eight bytes
        helpers.build_blending_indices(self._corpus_of, unused, self._weights, len(self._weights), size, False)

    def _counts_before(self, position: int) -> np.ndarray:
        start, counts = self._latest
        if position < start:
            start, counts = 0, np.zeros_like(counts)
        since = self._corpus_of[start:position]
        counts = counts + np.bincount(since, minlength=len(counts))
        self._latest = position, counts
        return counts.copy()

    def _sample(self, corpus: int, number: int) -> int:
        epoch, offset = divmod(number, self._sizes[corpus])
        if self._permutations.get(corpus, (-1,))[0] != epoch:  # steps only increase, so one epoch suffices
            source = np.random.default_rng([self._seed, epoch, corpus])
            self._permutations[corpus] = epoch, source.permutation(self._sizes[corpus])
        return int(self._permutations[corpus][1][offset])


def validation_batches(
    dataset: SampleSource, micro_batch: int, dp_rank: int, dp_size: int, limit: int | None = None
) -> Iterator[Sample]:
    """This rank's shard of a fixed set of samples, each of which exactly one rank gets.

    All ranks get the same number of batches [b, S]; missing rows at the end are all padding and have no loss.

    Args:
        limit: number of samples from the start of the dataset; None for all.

    Raises:
        ValueError: a number is out of range, or the dataset is empty.
    """
    _check_shard(dataset, micro_batch, dp_rank, dp_size)
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}: it must be at least 1, or None for all samples")
    return _fixed_batches(dataset, micro_batch, dp_rank, dp_size, min(len(dataset), limit or len(dataset)))


def _fixed_batches(dataset: SampleSource, size: int, rank: int, ranks: int, count: int) -> Iterator[Sample]:
    filler = _without_loss(dataset[0])
    for start in range(rank * size, rank * size + count + (-count) % (size * ranks), size * ranks):
        yield _stack([dataset[row] if row < count else filler for row in range(start, start + size)])


def _check_shard(dataset: SampleSource, micro_batch: int, dp_rank: int, dp_size: int) -> None:
    if len(dataset) == 0:
        raise ConfigError("the dataset is empty: it has no sample")
    if micro_batch < 1:
        raise ValueError(f"micro_batch is {micro_batch}: it must be at least 1")
    if not 0 <= dp_rank < dp_size:
        raise ValueError(f"dp_rank is {dp_rank}: it must be at least 0 and below dp_size = {dp_size}")


def _without_loss(sample: Sample) -> Sample:
    masks = {
        "loss_mask": torch.zeros_like(sample["loss_mask"]),
        "padding_mask": torch.ones_like(sample["padding_mask"]),
    }
    return {**sample, **masks}


def _stack(samples: Sequence[Sample]) -> Sample:
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
