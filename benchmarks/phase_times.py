"""Time a preparation phase by phase in one process, and SentencePiece's own encoding of the same documents.

The phases alternate chunk by chunk, so that other load on the machine affects all of them equally.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sentencepiece import SentencePieceProcessor
from tqdm import tqdm

from coe_megatron.data.encode import encode_splits, write_encoded
from coe_megatron.data.prepare import ChunkSource, join, training_documents
from coe_megatron.data.prepare_settings import PrepareSettings
from coe_megatron.data.records import MalformedRecord
from coe_megatron.data.tokenizer import Tokenizer, train_tokenizer
from coe_megatron.text import aligned

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
PHASES = ("read", "parse", "encode", "write")


@dataclass(frozen=True)
class PhaseTimes:
    """Measured times.

    Attributes:
        bytes: size of all documents in UTF-8.
        tokens: number of tokens, eos included.
        vocab_size: pieces of the tokenizer.
        seconds: by phase: `read` (decompress, split into lines; or generate the built-in corpus), `parse` (JSON,
            template), `encode`, `write` (chunks, fsync, join into Megatron's indexed datasets); and `plain`,
            SentencePiece's own encoding.
    """

    bytes: int
    tokens: int
    vocab_size: int
    seconds: dict[str, float]

    def rate(self, *phases: str) -> float:
        """Throughput in megabytes of text per second, over the total time of the given phases."""
        return self.bytes / 1e6 / sum(self.seconds[phase] for phase in phases)

    @property
    def speedup(self) -> float:
        """How many times faster we encode than plain SentencePiece."""
        return self.seconds["plain"] / self.seconds["encode"]

    def as_dict(self) -> dict[str, Any]:
        """All measured and derived values, for JSON."""
        rates = {phase: self.rate(phase) for phase in self.seconds} | {"total": self.rate(*PHASES)}
        return {**vars(self), "megabytes_per_second": rates, "encode_speedup": self.speedup}

    def table(self) -> str:
        """The same as a text table."""
        lines = [f"{self.bytes / 1e6:,.1f} MB of text, {self.tokens:,} tokens, vocabulary size {self.vocab_size:,}"]
        rows = [(phase, self.seconds[phase], self.rate(phase)) for phase in (*PHASES, "plain")]
        rows.append(("total", sum(self.seconds[phase] for phase in PHASES), self.rate(*PHASES)))
        lines += aligned([(name, f"{seconds:.2f} s", f"{rate:.1f} MB/s") for name, seconds, rate in rows])
        return "\n".join([*lines, f"encoding speedup over plain SentencePiece: {self.speedup:.2f}"])


def time_preparation(settings: PrepareSettings, *, clock: str = "wall", progress: bool = False) -> PhaseTimes:
    """Prepare in this process into a temporary folder; training a tokenizer is not timed.

    Args:
        settings: what to prepare; output, overwrite and workers are not used.
        clock: `wall`, or `cpu` for the CPU time of this process, which is less sensitive to other load.

    Raises:
        ConfigError: the tokenizer or its size is not valid.
        InputError: an input is damaged or malformed.
    """
    bar = partial(tqdm, unit_scale=True, mininterval=0.5, disable=not progress)
    with TemporaryDirectory() as name:
        folder = Path(name)
        model = settings.tokenizer or folder / "tokenizer.model"
        if settings.tokenizer is None:
            assert settings.vocab_size is not None
            train_tokenizer(training_documents(settings, bar), settings.vocab_size, model)
        return _time_phases(settings, model, folder, CLOCKS[clock], bar)


def _time_phases(
    settings: PrepareSettings, model: Path, folder: Path, clock: Callable[[], float], bar: Callable[..., tqdm]
) -> PhaseTimes:
    from megatron.core.datasets import indexed_dataset  # noqa: F401  (import it before the timing starts)

    tokenizer, processor = Tokenizer(model, "--tokenizer"), SentencePieceProcessor(model_file=str(model))
    timer, source = _Timer(clock), ChunkSource(settings)
    chunks: list[Path] = []
    remaining = iter(source)
    with bar(desc="measuring", **source.size) as shown:
        while True:
            with timer.of("read"):
                chunk = next(remaining, None)
            if chunk is None:
                break
            with timer.of("parse"):
                found = list(settings.recipe.documents(chunk.chunk, chunk.split))
                documents = [item for item in found if not isinstance(item, MalformedRecord)]
            with timer.of("encode"):
                splits = encode_splits(documents, tokenizer)
            with timer.of("plain"):
                for _, document in documents:
                    processor.encode(document)
            with timer.of("write"):
                chunks.append(folder / f"{len(chunks)}.npz")
                write_encoded(chunks[-1], splits, len(found) - len(documents))
            shown.update(chunk.position - shown.n)
    with timer.of("write"):
        summaries, _ = join(settings, chunks, folder, tokenizer.vocab_size)
    size = sum(summary.bytes for summary in summaries.values())
    tokens = sum(summary.tokens for summary in summaries.values())
    return PhaseTimes(size, tokens, tokenizer.vocab_size, dict(timer.seconds))


class _Timer:
    """Accumulates seconds by name."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        start = self._clock()
        yield
        self.seconds[name] += self._clock() - start
