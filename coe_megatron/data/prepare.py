"""Prepare text: tokenizer, Megatron's indexed datasets for both splits, and a manifest, in one folder.

We read text in chunks and encode each chunk into a file in a hidden folder beside the output. Then we join these files
and rename the complete result to the output. So an interrupted preparation never looks finished, and it resumes where
it stopped. Equal settings and inputs give byte-identical files, whatever the number of workers and interruptions.
"""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from tqdm import tqdm

from coe_megatron.corpus.word_problems import generate
from coe_megatron.data.encode import DamagedChunk, Encoded, encode_chunk, read_encoded
from coe_megatron.data.manifest import (
    SPLIT_FILES,
    TOKENIZER,
    TOKENIZERS,
    FileSummary,
    Manifest,
    Split,
    SplitSummary,
    tokenizer_files,
)
from coe_megatron.data.prepare_settings import (
    SPLITS,
    PrepareSettings,
    check_output,
)
from coe_megatron.data.records import InputError, MalformedRecord
from coe_megatron.data.sources import (
    CHUNK_BYTES,
    Chunk,
    chunks_of,
    read_chunks,
)
from coe_megatron.data.staging import Staging, open_staging
from coe_megatron.data.tokenizer import (
    OTHER_SUFFIXES,
    Tokenizer,
    train_tokenizer,
)
from coe_megatron.data.word_tokenizer import END, write_word_tokenizer
from coe_megatron.data.workers import ordered_map
from coe_megatron.errors import ConfigError, one_line
from coe_megatron.files import is_plain_file, remove
from coe_megatron.lean_imports import import_megatron


def prepare(settings: PrepareSettings, *, progress: bool = False) -> Manifest:
    """Prepare the folder that the settings describe, and return its manifest.

    Args:
        progress: show progress bars on stderr.

    Raises:
        ConfigError: as `PrepareSettings.check_files`; or the tokenizer or its size is not valid, or another process is
            preparing this output. The output stays unchanged.
        InputError: an input is damaged or malformed (the message names file and line), or a split would be empty. The
            output stays unchanged.
        OSError: writing failed.
        ChildProcessError: a worker was killed; the next attempt resumes from there.
    """
    settings.check_files()
    output = settings.output.resolve()
    with open_staging(output) as staging:
        check_output(output, settings.overwrite)  # again: another process may just have finished
        if (changed := staging.begin(_job(settings))) and progress:
            print(one_line(f"starting over: {changed}"), file=sys.stderr)
        if progress and (done := _resumable_progress(staging)):
            print(f"resuming: {done}", file=sys.stderr)
        bar = partial(tqdm, unit_scale=True, mininterval=0.5, disable=not progress)
        tokenizer = _provide_tokenizer(settings, staging, bar)
        chunks = _encode(settings, staging, tokenizer, bar)
        folder = staging.new_output()
        for name in tokenizer_files(staging.tokenizer.name):
            shutil.copyfile(staging.tokenizer.with_name(name), folder / name)
        splits, malformed = join(settings, chunks, folder, tokenizer.vocab_size)
        manifest = _describe(settings, folder, tokenizer, splits, malformed)
        manifest.write(folder)
        staging.publish(output)
    return manifest


def _job(settings: PrepareSettings) -> dict[str, Any]:
    """Everything that determines the content of chunks; a job that differs in any value starts over."""
    tokenizer = settings.tokenizer_file
    paths = (*settings.inputs, *settings.valid_inputs, *([tokenizer] if tokenizer else []))
    other = {"eos": settings.eos, "encoding": settings.encoding}
    return {
        "files": [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in paths],
        "inputs": len(settings.inputs),
        "builtin": settings.builtin,
        "task": None if settings.task is None else asdict(settings.task),
        "vocab_size": settings.vocab_size,
        "tokenizer": tokenizer is not None,
        **({} if tokenizer is None or tokenizer.suffix not in OTHER_SUFFIXES else other),
        "template": [template.text for template in settings.templates.choices],
        "valid_fraction": settings.valid_fraction,
        "seed": settings.seed,
        "skip_malformed": settings.skip_malformed,
        "max_record_bytes": settings.max_record_bytes,
        "chunk_bytes": CHUNK_BYTES,
        "versions": {name: version(name) for name in ("coe-megatron", "sentencepiece")},
    }


def resumable_progress(output: Path) -> str:
    """The progress from which an interrupted preparation can resume, as a sentence; empty if there is none."""
    return _resumable_progress(Staging.of(output.resolve()))


def _resumable_progress(staging: Staging) -> str:
    if not is_plain_file(staging.tokenizer):
        return ""
    return f"the tokenizer and {staging.chunks_done} chunks of {CHUNK_BYTES >> 20} MiB of text are done"


@dataclass(frozen=True)
class SourceChunk:
    """A chunk, the split of its documents (None: their hash decides), and the position in all inputs after it."""

    chunk: Chunk
    split: Split | None
    position: int


@dataclass(frozen=True)
class ChunkSource:
    """All chunks in the order of the files; can be iterated several times."""

    settings: PrepareSettings

    @property
    def size(self) -> dict[str, Any]:
        """The final `position` and its unit, for a progress bar."""
        if self.settings.builtin is not None:
            return {"total": sum(_builtin_counts(self.settings).values()), "unit": " problems"}
        paths = (*self.settings.inputs, *self.settings.valid_inputs)
        return {"total": sum(path.stat().st_size for path in paths), "unit": "B"}

    def __iter__(self) -> Iterator[SourceChunk]:
        return self._builtin() if self.settings.builtin is not None else self._files()

    def _files(self) -> Iterator[SourceChunk]:
        inputs, valid_inputs = self.settings.inputs, self.settings.valid_inputs
        before = 0
        for index, path in enumerate((*inputs, *valid_inputs)):
            split: Split = "train" if index < len(inputs) else "valid"
            for chunk in read_chunks(path, self.settings.templates, self.settings.max_record_bytes):
                yield SourceChunk(chunk, split if valid_inputs else None, before + chunk.consumed)
            before += path.stat().st_size

    def _builtin(self) -> Iterator[SourceChunk]:
        position = 0
        for split, count in _builtin_counts(self.settings).items():
            for chunk in chunks_of(_builtin_records(self.settings, split, count), "built-in corpus", "problem"):
                position += len(chunk.payloads)
                yield SourceChunk(chunk, split, position)


def _builtin_records(settings: PrepareSettings, split: Split, count: int) -> Iterator[dict[str, str]]:
    return (generate if settings.task is None else settings.task.generate)(split, count, settings.seed)


def _builtin_counts(settings: PrepareSettings) -> dict[Split, int]:
    assert settings.builtin is not None
    return {"train": settings.builtin, "valid": max(1, round(settings.builtin * settings.valid_fraction))}


def _provide_tokenizer(settings: PrepareSettings, staging: Staging, bar: Callable[..., tqdm]) -> Tokenizer:
    """Train the tokenizer on the training documents, or copy the given one, unless an earlier attempt has done so."""
    if staging.tokenizer.exists():
        return Tokenizer(staging.tokenizer)
    scratch = staging.scratch(TOKENIZER)
    if settings.task is not None:
        with TemporaryDirectory() as folder:
            path = write_word_tokenizer(settings.task.words, Path(folder))
            _store_copy(path, Tokenizer(path, eos=END), staging, scratch)
    elif (given := settings.tokenizer_file) is None:
        assert settings.vocab_size is not None
        train_tokenizer(training_documents(settings, bar), settings.vocab_size, scratch)
        staging.store_tokenizer(scratch)
    else:
        tokenizer = Tokenizer(given, "--tokenizer", eos=settings.eos, encoding=settings.encoding)
        if settings.vocab_size not in (None, tokenizer.vocab_size):
            raise ConfigError(f"--vocab-size is {settings.vocab_size}: {given} has {tokenizer.vocab_size} pieces")
        _store_copy(given, tokenizer, staging, scratch)
    return Tokenizer(staging.tokenizer)


def _store_copy(path: Path, tokenizer: Tokenizer, staging: Staging, scratch: Path) -> None:
    shutil.copyfile(path, scratch)
    name = f"tokenizer{path.suffix}" if path.suffix in OTHER_SUFFIXES else TOKENIZER
    staging.store_tokenizer(scratch, name, tokenizer.config)


def training_documents(settings: PrepareSettings, bar: Callable[..., tqdm]) -> Iterator[str]:
    """Yield the documents that a tokenizer is trained on; a bar shows the progress.

    Raises:
        InputError: there is no document; or as `Recipe.documents`.
    """
    source, recipe = ChunkSource(settings), settings.recipe
    training = held_out = malformed = 0
    with bar(desc="tokenizer", **source.size) as shown:
        visible = not shown.disable
        for piece in source:
            for item in recipe.documents(piece.chunk, piece.split):
                if isinstance(item, MalformedRecord):
                    malformed += 1
                elif item[0] == "valid":
                    held_out += 1
                else:
                    training += 1
                    yield item[1]
            shown.update(piece.position - shown.n)
    if not training:
        raise InputError(_why_empty(settings, "train", held_out, malformed))
    if visible:
        print(f"training a tokenizer of {settings.vocab_size:,} pieces ...", file=sys.stderr)


def _encode(settings: PrepareSettings, staging: Staging, tokenizer: Tokenizer, bar: Callable[..., tqdm]) -> list[Path]:
    """Encode all chunks that are not encoded yet; returns the files of all chunks in order."""
    source, recipe, chunks = ChunkSource(settings), settings.recipe, []

    def tasks(verbose: bool) -> Iterator[tuple[Any, ...]]:
        for index, piece in enumerate(source):
            chunks.append(staging.chunk(index))
            if not _is_usable(chunks[-1], tokenizer.vocab_size, verbose):
                model = staging.tokenizer, tokenizer.sha256
                yield recipe, *model, piece.chunk, piece.split, chunks[-1], piece.position

    with (
        bar(desc="encoding", **source.size) as shown,
        closing(ordered_map(encode_chunk, tasks(not shown.disable), settings.workers)) as done,
    ):
        for position in done:
            shown.update(position - shown.n)
    return chunks


def _is_usable(chunk: Path, vocab_size: int, verbose: bool) -> bool:
    """Whether a chunk exists as it was written; anything else at its path is removed.

    Args:
        verbose: report a removed chunk on stderr.

    Raises:
        OSError: it cannot be removed.
    """
    if not os.path.lexists(chunk):
        return False
    try:
        read_encoded(chunk, vocab_size)
    except DamagedChunk as error:
        if verbose:
            print(f"{error}: encoding it again", file=sys.stderr)
        remove(chunk)
        return False
    return True


def join(
    settings: PrepareSettings, chunks: list[Path], folder: Path, vocab_size: int
) -> tuple[dict[str, SplitSummary], int]:
    """Write the indexed datasets of both splits; returns their summaries and the number of malformed records.

    Raises:
        InputError: a split is empty, or a chunk has been damaged since it was written.
    """
    writers = {split: _SplitWriter(folder / split, vocab_size) for split in SPLITS}
    malformed = 0
    for chunk in chunks:
        try:
            splits, malformed_here = read_encoded(chunk, vocab_size)
        except DamagedChunk as error:
            raise InputError(f"{error}: run the same command again") from error
        malformed += malformed_here
        for split in SPLITS:
            writers[split].add(splits[split])
    documents = sum(writer.documents for writer in writers.values())
    for split, writer in writers.items():
        if not writer.documents:
            raise InputError(_why_empty(settings, split, documents, malformed))
    return {split: writer.finish() for split, writer in writers.items()}, malformed


def _why_empty(settings: PrepareSettings, split: Split, documents: int, malformed: int) -> str:
    """One line on why a split has no documents; `documents` and `malformed` count both splits."""
    if not malformed:
        return f"the {split} split is empty: provide more documents or change --valid-fraction"
    records = (item for piece in ChunkSource(settings) for item in settings.recipe.documents(piece.chunk, piece.split))
    first = next(item for item in records if isinstance(item, MalformedRecord))
    subject = f"the {split} split is empty and {malformed:,}" if documents else f"all {malformed:,}"
    return f"{subject} records are malformed, the first: {first}"


class _SplitWriter:
    """Writes encoded documents as a Megatron indexed dataset, and counts documents, tokens and bytes."""

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        import_megatron()
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        self._prefix = prefix
        self._builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=_token_dtype(vocab_size))
        self._counts = np.zeros(vocab_size, dtype=np.int64)
        self.documents = self._bytes = 0

    def add(self, encoded: Encoded) -> None:
        ends = np.cumsum(encoded.lengths)
        for end, length in zip(ends, encoded.lengths, strict=True):
            self._builder.add_document(encoded.tokens[end - length : end], [length])
        self._counts += np.bincount(encoded.tokens, minlength=len(self._counts))
        self.documents += len(encoded.lengths)
        self._bytes += encoded.bytes

    def finish(self) -> SplitSummary:
        """Close the files."""
        self._builder.finalize(f"{self._prefix}.idx")
        tokens = int(self._counts.sum())
        return SplitSummary(self.documents, tokens, self._bytes, _entropy(self._counts), self._bytes / tokens)


def _entropy(counts: np.ndarray) -> float:
    """Shannon entropy in nats of the distribution given by counts."""
    frequencies = counts[counts > 0] / counts.sum()
    return float(-(frequencies * np.log(frequencies)).sum())


def _token_dtype(vocab_size: int) -> Any:
    """The integer type in which Megatron stores such tokens: uint16, or int32 for a large vocabulary."""
    from megatron.core.datasets.indexed_dataset import DType

    return DType.optimal_dtype(vocab_size)


def _describe(
    settings: PrepareSettings, folder: Path, tokenizer: Tokenizer, splits: dict[str, SplitSummary], malformed: int
) -> Manifest:
    given = next(name for name in TOKENIZERS if (folder / name).exists())
    files = *SPLIT_FILES, *tokenizer_files(given)
    source: dict[str, Any] = {"builtin": settings.builtin, "valid_fraction": settings.valid_fraction}
    if settings.task is not None:
        source["task"] = asdict(settings.task)
    if settings.inputs:
        source = {"input": [path.name for path in settings.inputs], "valid_fraction": settings.valid_fraction}
    if settings.valid_inputs:
        source = {**source, "valid": [path.name for path in settings.valid_inputs], "valid_fraction": None}
    return Manifest(
        vocab_size=tokenizer.vocab_size,
        token_dtype=_token_dtype(tokenizer.vocab_size).__name__,
        tokenizer_sha256=tokenizer.sha256,
        template=[template.text for template in settings.templates.choices],
        seed=settings.seed,
        source=source,
        malformed=malformed,
        splits=splits,
        files={name: FileSummary.of(folder / name) for name in files},
    )
