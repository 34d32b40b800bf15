"""Reading documents out of files: JSONL, Parquet and plain text, the first and last also compressed (.gz, .xz, .zst).

In plain text one or more blank lines separate documents; each is one record with the single field "text".

A file is read in chunks of records that are not parsed yet: reading a compressed file is one process's work, parsing
and what follows can be done by many.
"""

import gzip
import io
import json
import lzma
import string
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

JSON_LINES = (".jsonl", ".ndjson")
TEXT = (".txt", ".text", ".md")
PARQUET = (".parquet",)
COMPRESSED = (".gz", ".xz", ".zst")
CHUNK_BYTES = 4 << 20  # of records not yet parsed: seconds of work, and little memory
READABLE = ", ".join((*JSON_LINES, *TEXT, *PARQUET))

Record = Mapping[str, Any]


class MalformedRecord(ValueError):
    """A line, row or block that gives no document; the message says what is wrong with it."""


Placed = tuple[str, Record | MalformedRecord]  # where it stands, such as "line 3", and what stands there


@dataclass(frozen=True)
class Template:
    """How a record becomes a document: literal text and field names in braces, such as "{question} {answer}".

    A name in braces is a field's plain name; {{ and }} are braces themselves.

    Raises:
        ValueError: the text has no fields, or its braces make no sense.
    """

    text: str

    def __post_init__(self) -> None:
        if not self.fields:
            raise ValueError(f"template {self.text!r} names no field: write at least one in braces, such as {{text}}")

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """The names in braces, each once, in their order."""
        return tuple(dict.fromkeys(name for _, name in self._parts if name is not None))

    def render(self, record: Record) -> str:
        """The document of a record.

        Raises:
            MalformedRecord: a field is missing, or is neither text nor a number, or the document is empty.
        """
        pieces = (literal + ("" if name is None else _text_of(record, name)) for literal, name in self._parts)
        document = "".join(pieces)
        if not document or document.isspace():
            raise MalformedRecord(f"the document of {self.text!r} is empty")
        try:
            document.encode()
        except UnicodeEncodeError:
            raise MalformedRecord("half of a surrogate pair is no character") from None
        return document

    @cached_property
    def _parts(self) -> list[tuple[str, str | None]]:
        try:
            parts = list(string.Formatter().parse(self.text))
        except ValueError as error:
            raise ValueError(f"template {self.text!r} is not valid: {error}") from error
        for _, name, specification, conversion in parts:
            if name is not None and (not name or specification or conversion):
                raise ValueError(
                    f"template {self.text!r} is not valid: braces hold a field's plain name, as in {{text}}"
                )
        return [(literal, name) for literal, name, _, _ in parts]


@dataclass(frozen=True)
class Templates:
    """Templates for records of several kinds: each record takes the first whose fields it has."""

    choices: tuple[Template, ...]

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Templates":
        """From their texts."""
        return cls(tuple(map(Template, texts)))

    def fitting(self, names: Iterable[str]) -> Template:
        """The first template whose fields are all there; if none is, the first of all."""
        present = set(names)
        return next((choice for choice in self.choices if present.issuperset(choice.fields)), self.choices[0])

    def render(self, record: Record) -> str:
        """The document of a record.

        Raises:
            MalformedRecord: no template fits, or see `Template.render`.
        """
        return self.fitting(record).render(record)


def check_readable(path: Path) -> None:
    """Refuse a file that does not exist or whose kind is unknown, without reading it.

    Raises:
        ValueError: the message names the file and what would be valid.
    """
    if not path.is_file():
        raise ValueError(f"input {path} is not a file")
    _kind(path)


@dataclass(frozen=True)
class Chunk:
    """Records that follow each other in one place, not yet parsed.

    Attributes:
        source: where they stand, for messages: the file.
        unit: what numbers count there, such as "line".
        parse: makes a payload a record, or the error that it is; a function of a module, so that it can be pickled.
        payloads: numbers and what stands there.
        consumed: bytes of the file that were read up to the end of this chunk.
    """

    source: str
    unit: str
    parse: Callable[[Any], Record | MalformedRecord]
    payloads: list[tuple[int, Any]]
    consumed: int = 0

    def records(self) -> Iterator[Placed]:
        """Every record with its place; a malformed one is given as the error it is."""
        for number, payload in self.payloads:
            yield f"{self.unit} {number}", self.parse(payload)


def read_chunks(path: Path, templates: Templates) -> Iterator[Chunk]:
    """Yield a file's records in chunks of about CHUNK_BYTES, the same ones every time.

    Args:
        templates: of a Parquet file only the columns are read that the template for them needs.

    Raises:
        ValueError: the file as a whole cannot be read (unknown kind, damaged, truncated, a column missing).
    """
    kind = _kind(path)
    try:
        if kind in PARQUET:
            yield from _in_chunks(_parquet_rows(path, templates), str(path), "row", as_record)
            return
        parse = _json_record if kind in JSON_LINES else _text_record
        with path.open("rb") as file, _decompressed(file, path.suffix) as stream:
            numbered = _json_lines(stream) if kind in JSON_LINES else _text_blocks(stream)
            raw = ((number, payload, file.tell()) for number, payload in numbered)
            yield from _in_chunks(raw, str(path), "line", parse)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"input {path} cannot be read: {error}") from error


def chunks_of(records: Iterable[Record], source: str, unit: str) -> Iterator[Chunk]:
    """Chunks of records that stand in no file."""
    return _in_chunks(((number, record, 0) for number, record in enumerate(records, 1)), source, unit, as_record)


def as_record(payload: Record) -> Record:
    """What is a record already, as it is."""
    return payload


def _in_chunks(
    raw: Iterable[tuple[int, Any, int]], source: str, unit: str, parse: Callable[[Any], Record | MalformedRecord]
) -> Iterator[Chunk]:
    payloads: list[tuple[int, Any]] = []
    size = consumed = 0
    for number, payload, consumed in raw:
        payloads.append((number, payload))
        size += len(payload) if isinstance(payload, bytes) else sum(len(str(value)) for value in payload.values())
        if size >= CHUNK_BYTES:
            yield Chunk(source, unit, parse, payloads, consumed)
            payloads, size = [], 0
    if payloads:
        yield Chunk(source, unit, parse, payloads, consumed)


def _kind(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compressed = bool(suffixes) and suffixes[-1] in COMPRESSED
    kind = "".join((suffixes[:-1] if compressed else suffixes)[-1:])
    if kind not in JSON_LINES + TEXT and (kind not in PARQUET or compressed):
        raise ValueError(
            f"input {path} is of an unknown kind: its name must end in {READABLE} (text also with .gz, .xz, .zst)"
        )
    return kind


def _decompressed(file: BinaryIO, suffix: str) -> Any:
    """A stream of lines. Arrow's reader of zst, unlike others, refuses a truncated file."""
    match suffix.lower():
        case ".gz":
            return gzip.GzipFile(fileobj=file)
        case ".xz":
            return lzma.LZMAFile(file)
        case ".zst":
            from pyarrow import CompressedInputStream

            return io.BufferedReader(CompressedInputStream(file, "zstd"))
    return file


def _json_lines(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(stream, start=1):
        if line.strip():
            yield number, line


def _json_record(line: bytes) -> Record | MalformedRecord:
    try:
        record = json.loads(line.rstrip())
    except json.JSONDecodeError as error:
        return MalformedRecord(f"not valid JSON ({error.msg}, column {error.colno})")
    except ValueError as error:  # of UTF-8, or a number of thousands of digits
        return MalformedRecord(f"not valid JSON ({error})")
    return record if isinstance(record, dict) else MalformedRecord("not a JSON object")


def _text_blocks(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    block: list[bytes] = []
    start = 1
    for number, line in enumerate(stream, start=1):
        if line.strip():
            start = start if block else number
            block.append(line)
        elif block:
            yield start, b"".join(block)
            block = []
    if block:
        yield start, b"".join(block)


def _text_record(block: bytes) -> Record | MalformedRecord:
    try:
        return {"text": block.decode().rstrip("\r\n")}
    except UnicodeDecodeError as error:
        return MalformedRecord(f"not valid UTF-8 ({error})")


def _parquet_rows(path: Path, templates: Templates) -> Iterator[tuple[int, Record, int]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            fields = templates.fitting(columns).fields
            if missing := [name for name in fields if name not in columns]:
                raise ValueError(f"input {path} has no column {missing[0]!r}; there is {', '.join(columns)}")
            batches = file.iter_batches(batch_size=1024, columns=list(fields))
            rows = (row for batch in batches for row in batch.to_pylist())
            size, count = path.stat().st_size, file.metadata.num_rows
            for number, row in enumerate(rows, start=1):
                yield number, row, size * number // count
    except pyarrow.ArrowException as error:
        raise ValueError(f"input {path} cannot be read: {error}") from error


def _text_of(record: Record, name: str) -> str:
    if name not in record:
        raise MalformedRecord(f"field {name!r} is missing; there is {', '.join(record) or 'nothing'}")
    value = record[name]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise MalformedRecord(f"field {name!r} is {type(value).__name__}: it must be text or a number")
    return str(value)
