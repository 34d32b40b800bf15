"""From text to a folder of prepared data: tokenizer, Megatron's indexed datasets for both splits, manifest.

The folder is written under a hidden name beside its place and renamed when it is whole, so an interrupted
preparation never looks finished. Equal settings and inputs give equal files, byte for byte.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from secrets import token_hex
from typing import Any, get_args

import numpy as np
from tqdm import tqdm

from coe_megatron.data.corpus import generate
from coe_megatron.data.manifest import DATA_FILES, MANIFEST, TOKENIZER, FileSummary, Manifest, Split, SplitSummary
from coe_megatron.data.sources import MalformedRecord, Template, check_readable, read_records
from coe_megatron.data.tokenizer import Tokenizer, train_tokenizer

SPLITS: tuple[Split, ...] = get_args(Split)
PROBLEM_TEMPLATE = "query : {query} response : {response}"
TEXT_TEMPLATE = "{text}"
SMALLEST_VOCABULARY = 261  # 256 bytes, 4 special pieces and a character


@dataclass(frozen=True)
class PrepareSettings:
    """What to prepare, and where.

    Attributes:
        output: the folder to make.
        inputs: files of documents (see `sources` for kinds); or else
        builtin: how many training problems to draw from the built-in corpus.
        vocab_size: pieces of the tokenizer to train; with `tokenizer`, what that one must have.
        tokenizer: a SentencePiece model to take instead of training one.
        template: how a record becomes a document; default "{text}", for the built-in corpus
            "query : {query} response : {response}".
        valid_inputs: files of validation documents; without them,
        valid_fraction: the share of documents held out by their hash (equal documents stay together); for the
            built-in corpus the number of held-out problems relative to `builtin`.
        seed: of that hash and of the built-in corpus.
        skip_malformed: count records that give no document instead of stopping at the first.
        overwrite: replace a folder that an earlier preparation wrote.

    Raises:
        ValueError: a field, or two of them together, make no sense.
    """

    output: Path
    inputs: tuple[Path, ...] = ()
    builtin: int | None = None
    vocab_size: int | None = None
    tokenizer: Path | None = None
    template: str | None = None
    valid_inputs: tuple[Path, ...] = ()
    valid_fraction: float = 0.02
    seed: int = 0
    skip_malformed: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        self._check_source()
        if self.vocab_size is None and self.tokenizer is None:
            raise ValueError("vocab-size is missing: give it, or a tokenizer")
        if self.vocab_size is not None and self.vocab_size < SMALLEST_VOCABULARY:
            raise ValueError(f"vocab-size is {self.vocab_size}: it must be at least {SMALLEST_VOCABULARY}")
        if not 0 < self.valid_fraction < 1:
            raise ValueError(f"valid-fraction is {self.valid_fraction}: it must be between 0 and 1")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}: it must be at least 0")

    @property
    def document_template(self) -> Template:
        """The template to use."""
        return Template(self.template or (TEXT_TEMPLATE if self.inputs else PROBLEM_TEMPLATE))

    def check_files(self) -> None:
        """Look for the inputs and the place of the output, without reading or writing anything.

        Raises:
            ValueError: a file is missing or of an unknown kind, or the output must not be replaced.
        """
        for path in (*self.inputs, *self.valid_inputs):
            check_readable(path)
        if self.tokenizer is not None and not self.tokenizer.is_file():
            raise ValueError(f"tokenizer {self.tokenizer} is not a file")
        _check_output(self.output, self.overwrite)

    def _check_source(self) -> None:
        if bool(self.inputs) == (self.builtin is not None):
            raise ValueError("exactly one of input and builtin must be given")
        names = self.document_template.fields
        if self.builtin is None:
            return
        if self.builtin < 1:
            raise ValueError(f"builtin is {self.builtin}: it must be at least 1")
        if self.valid_inputs:
            raise ValueError("valid goes with input: the built-in corpus has validation problems of its own")
        if unknown := [name for name in names if name not in ("query", "response")]:
            raise ValueError(f"template names field {unknown[0]!r}: built-in problems have query and response")


def prepare(settings: PrepareSettings, *, progress: bool = False) -> Manifest:
    """Make the folder that the settings describe and return its manifest.

    Args:
        progress: show bars on stderr.

    Raises:
        ValueError: an input is missing, damaged or malformed (the message names file and line), a split would be
            empty, the tokenizer does not suit, or the output must not be replaced. `output` stays as it was then.
    """
    settings.check_files()
    documents = _Documents(settings)

    def shown(task: str) -> tqdm:
        return tqdm(documents, desc=task, unit=" documents", mininterval=1, disable=not progress)

    with _staged(settings.output.resolve()) as folder:
        tokenizer = _provide_tokenizer(settings, folder / TOKENIZER, shown)
        with shown("encoding") as shown_documents:
            splits = _write_splits(folder, tokenizer, shown_documents)
        manifest = _describe(settings, folder, tokenizer, splits, documents.malformed)
        manifest.write(folder)
    return manifest


@dataclass
class _Documents:
    """The documents of both splits, in the order of the files; can be gone through again and again."""

    settings: PrepareSettings
    malformed: int = field(default=0, init=False)

    def __iter__(self) -> Iterator[tuple[Split, str]]:
        self.malformed = 0
        template = self.settings.document_template
        if self.settings.builtin is not None:
            for split, problem in _builtin_problems(self.settings):
                yield split, template.render(problem)
            return
        for path in self.settings.inputs:
            for document in self._read(path, template):
                yield self._split_of(document), document
        for path in self.settings.valid_inputs:
            for document in self._read(path, template):
                yield "valid", document

    def _read(self, path: Path, template: Template) -> Iterator[str]:
        for place, record in read_records(path, template.fields):
            try:
                if isinstance(record, MalformedRecord):
                    raise record
                yield template.render(record)
            except MalformedRecord as error:
                if not self.settings.skip_malformed:
                    raise ValueError(f"{path}, {place}: {error} (skip-malformed would go on)") from error
                self.malformed += 1

    def _split_of(self, document: str) -> Split:
        if self.settings.valid_inputs:
            return "train"
        digest = sha256(f"{self.settings.seed} {document}".encode()).digest()
        return "valid" if int.from_bytes(digest[:8]) < self.settings.valid_fraction * 2**64 else "train"


def _builtin_problems(settings: PrepareSettings) -> Iterator[tuple[Split, dict[str, str]]]:
    assert settings.builtin is not None
    counts = {"train": settings.builtin, "valid": max(1, round(settings.builtin * settings.valid_fraction))}
    for split in SPLITS:
        for problem in generate(split, counts[split], settings.seed):
            yield split, problem


def _provide_tokenizer(settings: PrepareSettings, path: Path, shown: Callable[[str], tqdm]) -> Tokenizer:
    """Train the tokenizer on the training documents, or take the given one."""
    if settings.tokenizer is None:
        assert settings.vocab_size is not None
        with shown("tokenizer") as documents:
            texts = (text for split, text in documents if split == "train")
            return train_tokenizer(texts, settings.vocab_size, path)
    tokenizer = Tokenizer(settings.tokenizer)
    if settings.vocab_size not in (None, tokenizer.vocab_size):
        raise ValueError(f"vocab-size is {settings.vocab_size}: {settings.tokenizer} has {tokenizer.vocab_size} pieces")
    shutil.copyfile(settings.tokenizer, path)
    return tokenizer


def _write_splits(
    folder: Path, tokenizer: Tokenizer, documents: Iterable[tuple[Split, str]]
) -> dict[str, SplitSummary]:
    writers = {split: _SplitWriter(folder / split, tokenizer) for split in SPLITS}
    for split, text in documents:
        writers[split].add(text)
    return {split: writer.finish() for split, writer in writers.items()}


class _SplitWriter:
    """Encodes documents, writes them as a Megatron indexed dataset, and counts."""

    BATCH = 256  # documents encoded at once

    def __init__(self, prefix: Path, tokenizer: Tokenizer) -> None:
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        self._prefix = prefix
        self._tokenizer = tokenizer
        self._builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=_token_dtype(tokenizer.vocab_size))
        self._waiting: list[str] = []
        self._counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
        self._documents = self._bytes = 0

    def add(self, text: str) -> None:
        self._waiting.append(text)
        if len(self._waiting) == self.BATCH:
            self._flush()

    def finish(self) -> SplitSummary:
        """Close the files; a split without documents is refused."""
        self._flush()
        self._builder.finalize(f"{self._prefix}.idx")
        tokens = int(self._counts.sum())
        if not tokens:
            raise ValueError(f"the {self._prefix.name} split is empty: give more documents or change valid-fraction")
        return SplitSummary(self._documents, tokens, self._bytes, _entropy(self._counts), self._bytes / tokens)

    def _flush(self) -> None:
        for text, ids in zip(self._waiting, self._tokenizer.encode_many(self._waiting), strict=True):
            row = np.array([*ids, self._tokenizer.eos_id])
            self._builder.add_document(row, [len(row)])
            np.add.at(self._counts, row, 1)
            self._documents += 1
            self._bytes += len(text.encode())
        self._waiting = []


def _entropy(counts: np.ndarray) -> float:
    """Shannon entropy in nats of the distribution that counts give."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _token_dtype(vocab_size: int) -> Any:
    """The smallest integer type Megatron would store such tokens in: uint16, or int32 for a large vocabulary."""
    from megatron.core.datasets.indexed_dataset import DType

    return DType.optimal_dtype(vocab_size)


def _describe(
    settings: PrepareSettings, folder: Path, tokenizer: Tokenizer, splits: dict[str, SplitSummary], malformed: int
) -> Manifest:
    source: dict[str, Any] = {"builtin": settings.builtin, "valid_fraction": settings.valid_fraction}
    if settings.inputs:
        source = {"input": [path.name for path in settings.inputs], "valid_fraction": settings.valid_fraction}
    if settings.valid_inputs:
        source = {**source, "valid": [path.name for path in settings.valid_inputs], "valid_fraction": None}
    return Manifest(
        vocab_size=tokenizer.vocab_size,
        token_dtype=_token_dtype(tokenizer.vocab_size).__name__,
        tokenizer_sha256=tokenizer.sha256,
        template=settings.document_template.text,
        seed=settings.seed,
        source=source,
        malformed=malformed,
        splits=splits,
        files={name: FileSummary.of(folder / name) for name in DATA_FILES},
    )


def _check_output(output: Path, overwrite: bool) -> None:
    if not output.exists():
        return
    if not output.is_dir():
        raise ValueError(f"output {output} is a file: name a folder")
    present = {path.name for path in output.iterdir()}
    if present and not overwrite:
        raise ValueError(f"output {output} is not empty: choose another folder, or overwrite it")
    if foreign := sorted(present - {*DATA_FILES, MANIFEST}):
        raise ValueError(f"output {output} holds {foreign[0]}, which no preparation wrote: remove it or choose another")


@contextmanager
def _staged(output: Path) -> Iterator[Path]:
    """A hidden folder beside `output` that takes its place at the end, and vanishes when something goes wrong."""
    staging = output.with_name(f".{output.name}.{token_hex(4)}.partial")
    staging.mkdir(parents=True)
    try:
        yield staging
        _move_into_place(staging, output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _move_into_place(staging: Path, output: Path) -> None:
    if not output.exists() or not any(output.iterdir()):
        staging.rename(output)
        return
    old = output.with_name(f"{staging.name}.old")
    output.rename(old)
    staging.rename(output)
    shutil.rmtree(old)
