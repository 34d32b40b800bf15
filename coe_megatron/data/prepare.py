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
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import numpy as np
from tqdm import tqdm

from coe_megatron.corpus.fact_hops import FactTask
from coe_megatron.corpus.word_problems import generate
from coe_megatron.data.encode import DamagedChunk, Encoded, Recipe, encode_chunk, read_encoded
from coe_megatron.data.manifest import (
    DATA_FILES,
    MANIFEST,
    SPLIT_FILES,
    TOKENIZER,
    TOKENIZER_CONFIG,
    TOKENIZERS,
    FileSummary,
    Manifest,
    Split,
    SplitSummary,
    tokenizer_files,
)
from coe_megatron.data.records import InputError, MalformedRecord, Templates
from coe_megatron.data.sources import (
    CHUNK_BYTES,
    DEFAULT_RECORD_BYTES,
    MAX_RECORD_BYTES,
    Chunk,
    check_readable,
    chunks_of,
    read_chunks,
)
from coe_megatron.data.staging import Staging, check_staging_folder, open_staging
from coe_megatron.data.tokenizer import (
    MAX_VOCAB_SIZE,
    MIN_VOCAB_SIZE,
    OTHER_SUFFIXES,
    Tokenizer,
    find_tokenizer,
    train_tokenizer,
)
from coe_megatron.data.word_tokenizer import END, write_word_tokenizer
from coe_megatron.data.workers import ordered_map
from coe_megatron.errors import ConfigError, one_line
from coe_megatron.files import is_plain_file, kind_of, remove, require_file, require_folder, require_writable
from coe_megatron.lean_imports import import_megatron

SPLITS: tuple[Split, ...] = get_args(Split)
PROBLEM_TEMPLATE = "query : {query} response : {response}"
FACT_TEMPLATE = "{prompt} {answer}"
TEXT_TEMPLATE = "{text}"
_FIRST_RECORDS = 1000  # of each input, checked before anything is written
MAX_PROBLEMS = 10**12  # of the built-in corpus; more than any disk holds
MAX_WORKERS = 1024  # more than the processors of a host


@dataclass(frozen=True)
class PrepareSettings:
    """What to prepare, and into which folder.

    Attributes:
        output: the folder to make.
        inputs: files of documents (see `sources` for the formats); excludes `builtin`.
        builtin: number of training documents to draw from the built-in corpus; excludes `inputs`.
        task: of the built-in corpus: questions on facts, whose words are the tokens; None for word problems.
        vocab_size: pieces of the tokenizer to train; with `tokenizer`, the size that it must have.
        tokenizer: a SentencePiece model, a tokenizer.json, a .tiktoken file, or a folder that holds one of them, to use
            instead of training one.
        eos: the token that ends a document, if `tokenizer` is no SentencePiece model; see `OtherTokenizer`.
        encoding: tiktoken's name of the encoding of a .tiktoken file; see `OtherTokenizer`.
        template: templates of a document; a record uses the first whose fields it has. The default is "{text}"; for
            the built-in corpus "query : {query} response : {response}", and with a task "{prompt} {answer}".
        valid_inputs: files of validation documents; if empty, `valid_fraction` applies.
        valid_fraction: fraction of documents held out by their hash (equal documents stay together); for the built-in
            corpus the number of held-out problems relative to `builtin`.
        seed: seed of that hash and of the built-in corpus.
        skip_malformed: count malformed records instead of stopping at the first.
        max_record_bytes: limit for a line, a block of text, or a cell of Parquet; a larger record is malformed.
        overwrite: replace a folder that an earlier preparation wrote.
        workers: processes that parse and encode; their number affects only the time.

    Raises:
        ConfigError: a field is not valid, or contradicts another; the message names the option of
            launch/prepare_data.py, the only program that makes these settings.
    """

    output: Path
    inputs: tuple[Path, ...] = ()
    builtin: int | None = None
    task: FactTask | None = None
    vocab_size: int | None = None
    tokenizer: Path | None = None
    eos: str | None = None
    encoding: str | None = None
    template: tuple[str, ...] = ()
    valid_inputs: tuple[Path, ...] = ()
    valid_fraction: float = 0.02
    seed: int = 0
    skip_malformed: bool = False
    max_record_bytes: int = DEFAULT_RECORD_BYTES
    overwrite: bool = False
    workers: int = 1

    def __post_init__(self) -> None:
        self._check_source()
        if self.vocab_size is None and self.tokenizer is None and self.task is None:
            raise ConfigError("--vocab-size is missing: give it, or a --tokenizer")
        if self.vocab_size is not None and not MIN_VOCAB_SIZE <= self.vocab_size <= MAX_VOCAB_SIZE:
            raise ConfigError(
                f"--vocab-size is {self.vocab_size}: it must be at least {MIN_VOCAB_SIZE}, and at most {MAX_VOCAB_SIZE}"
            )
        if not 0 < self.valid_fraction < 1:
            raise ConfigError(f"--valid-fraction is {self.valid_fraction}: it must be between 0 and 1")
        if self.seed < 0:
            raise ConfigError(f"--seed is {self.seed}: it must be at least 0")
        if not 1 <= self.max_record_bytes <= MAX_RECORD_BYTES:
            raise ConfigError(
                f"--max-record-bytes is {self.max_record_bytes}: it must be at least 1, and at most {MAX_RECORD_BYTES}"
            )
        if not 1 <= self.workers <= MAX_WORKERS:
            raise ConfigError(f"--workers is {self.workers}: it must be at least 1, and at most {MAX_WORKERS}")

    @property
    def tokenizer_file(self) -> Path | None:
        """The file that `tokenizer` names, or that is in the folder of this name; None to train one.

        Raises:
            ConfigError: the folder holds no tokenizer.
        """
        return None if self.tokenizer is None else find_tokenizer(self.tokenizer, "--tokenizer")

    @property
    def templates(self) -> Templates:
        """The templates to use."""
        builtin = PROBLEM_TEMPLATE if self.task is None else FACT_TEMPLATE
        return Templates.of(self.template or (TEXT_TEMPLATE if self.inputs else builtin,))

    @property
    def recipe(self) -> Recipe:
        """How records become documents."""
        return Recipe(self.templates, self.seed, self.valid_fraction, self.skip_malformed)

    def check_files(self) -> None:
        """Check the inputs and the output path without writing anything.

        Raises:
            ConfigError: a file is missing, cannot be read or has an unknown format; or the output cannot be written, or
                must not be replaced.
            InputError: one of the first records of an input is malformed, and `skip_malformed` is false.
        """
        self.check_inputs()
        _check_output(self.output, self.overwrite)

    def check_inputs(self) -> None:
        """The checks of `check_files` that concern the inputs."""
        for path in self.inputs:
            check_readable(path, "--input")
        for path in self.valid_inputs:
            check_readable(path, "--valid")
        inputs = {path.resolve() for path in self.inputs}
        if shared := [path for path in self.valid_inputs if path.resolve() in inputs]:
            raise ConfigError(
                f"--valid names {shared[0]}, as --input does: training and validation text must be different files"
            )
        if not self.skip_malformed:
            self._check_first_records()
        if (tokenizer := self.tokenizer_file) is not None:
            require_file(tokenizer, "--tokenizer")
        suffix = "" if tokenizer is None else tokenizer.suffix
        if self.eos is not None and suffix not in OTHER_SUFFIXES:
            raise ConfigError(f"--eos is {self.eos}: only a --tokenizer that is no SentencePiece model needs it")
        if self.encoding is not None and suffix != ".tiktoken":
            raise ConfigError(f"--encoding is {self.encoding}: only a --tokenizer that is a .tiktoken file has one")

    def _check_first_records(self) -> None:
        for path in (*self.inputs, *self.valid_inputs):
            for chunk in islice(read_chunks(path, self.templates, self.max_record_bytes), 1):
                for _ in islice(self.recipe.documents(chunk, None), _FIRST_RECORDS):
                    pass

    def _check_source(self) -> None:
        if bool(self.inputs) == (self.builtin is not None):
            raise ConfigError("exactly one of --input and --builtin must be given")
        names = [name for template in self.templates.choices for name in template.fields]
        if self.builtin is None:
            if self.task is not None:
                raise ConfigError(f"--task is {self.task.kind}: it requires --builtin, the number of documents")
            return
        if not 1 <= self.builtin <= MAX_PROBLEMS:
            raise ConfigError(f"--builtin is {self.builtin}: it must be at least 1, and at most {MAX_PROBLEMS}")
        if self.valid_inputs:
            raise ConfigError("--valid requires --input: the built-in corpus has its own validation problems")
        fields = ("query", "response") if self.task is None else ("prompt", "answer")
        if unknown := [name for name in names if name not in fields]:
            raise ConfigError(f"--template names field {unknown[0]!r}: built-in problems have {' and '.join(fields)}")
        if self.task is not None:
            self._check_task(self.task)

    def _check_task(self, task: FactTask) -> None:
        for name, value in (("vocab-size", self.vocab_size), ("tokenizer", self.tokenizer)):
            if value is not None:
                raise ConfigError(f"--{name} is {value}: leave it out, the words of --task {task.kind} are its tokens")
        if self.builtin is not None and self.builtin < task.facts:
            raise ConfigError(f"--builtin is {self.builtin}: it must be at least {task.facts}, the number of facts")


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
        _check_output(output, settings.overwrite)  # again: another process may just have finished
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


def _check_output(output: Path, overwrite: bool) -> None:
    require_writable(output, "--output", "folder")
    if not output.resolve().name:
        raise ConfigError(f"--output is {output}: name a new folder")
    check_staging_folder(output.resolve())
    if kind_of(output, "--output") is None:
        return
    present = {path.name for path in require_folder(output, "--output").iterdir()}
    if present and not overwrite:
        raise ConfigError(f"--output is {output}: it is not empty; choose another folder, or use --overwrite")
    if foreign := sorted(present - {*DATA_FILES, *TOKENIZERS, TOKENIZER_CONFIG, MANIFEST}):
        raise ConfigError(
            f"--output is {output}: it contains {foreign[0]}, which no preparation wrote; remove it or choose another"
        )
