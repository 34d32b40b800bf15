"""Reading documents out of files: JSONL, Parquet and plain text, the first and last also compressed (.gz, .xz).

In plain text one or more blank lines separate documents; each is one record with the single field "text".
"""

import gzip
import json
import lzma
import string
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

JSON_LINES = (".jsonl", ".ndjson")
TEXT = (".txt", ".text", ".md")
PARQUET = (".parquet",)
COMPRESSED = (".gz", ".xz")
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

    @property
    def fields(self) -> tuple[str, ...]:
        """The names in braces, each once, in their order."""
        return tuple(dict.fromkeys(name for _, name in self._parts() if name is not None))

    def render(self, record: Record) -> str:
        """The document of a record.

        Raises:
            MalformedRecord: a field is missing, or is neither text nor a number, or the document is empty.
        """
        pieces = (literal + ("" if name is None else _text_of(record, name)) for literal, name in self._parts())
        document = "".join(pieces)
        if not document.strip():
            raise MalformedRecord(f"the document of {self.text!r} is empty")
        if any("\ud800" <= character <= "\udfff" for character in document):
            raise MalformedRecord("half of a surrogate pair is no character")
        return document

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


def check_readable(path: Path) -> None:
    """Refuse a file that does not exist or whose kind is unknown, without reading it.

    Raises:
        ValueError: the message names the file and what would be valid.
    """
    if not path.is_file():
        raise ValueError(f"input {path} is not a file")
    _kind(path)


def read_records(path: Path, fields: Sequence[str]) -> Iterator[Placed]:
    """Yield every record of a file with its place ("line 3"); a malformed one is yielded as the error it is.

    Args:
        fields: what is wanted of each record; a Parquet file reads these columns alone.

    Raises:
        ValueError: the file as a whole cannot be read (unknown kind, damaged, truncated, a column missing).
    """
    kind = _kind(path)
    try:
        if kind in PARQUET:
            yield from _parquet_records(path, fields)
            return
        with _open(path) as stream:
            yield from _json_records(stream) if kind in JSON_LINES else _text_records(stream)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"input {path} cannot be read: {error}") from error


def _kind(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compressed = bool(suffixes) and suffixes[-1] in COMPRESSED
    kind = "".join((suffixes[:-1] if compressed else suffixes)[-1:])
    if kind not in JSON_LINES + TEXT and (kind not in PARQUET or compressed):
        raise ValueError(
            f"input {path} is of an unknown kind: its name must end in {READABLE} (text also with .gz, .xz)"
        )
    return kind


def _open(path: Path) -> BinaryIO:
    openers: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open}
    return openers.get(path.suffix.lower(), open)(path, "rb")


def _json_records(stream: BinaryIO) -> Iterator[Placed]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        yield f"line {number}", _json_record(line)


def _json_record(line: bytes) -> Record | MalformedRecord:
    try:
        record = json.loads(line)
    except ValueError as error:  # of JSON or of UTF-8
        return MalformedRecord(f"not valid JSON ({error})")
    return record if isinstance(record, dict) else MalformedRecord("not a JSON object")


def _text_records(stream: BinaryIO) -> Iterator[Placed]:
    block: list[bytes] = []
    start = 1
    for number, line in enumerate(stream, start=1):
        if line.strip():
            start = start if block else number
            block.append(line)
        elif block:
            yield f"line {start}", _text_record(block)
            block = []
    if block:
        yield f"line {start}", _text_record(block)


def _text_record(block: list[bytes]) -> Record | MalformedRecord:
    try:
        return {"text": b"".join(block).decode().rstrip("\r\n")}
    except UnicodeDecodeError as error:
        return MalformedRecord(f"not valid UTF-8 ({error})")


def _parquet_records(path: Path, fields: Sequence[str]) -> Iterator[Placed]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if missing := [name for name in fields if name not in columns]:
                raise ValueError(f"input {path} has no column {missing[0]!r}; there is {', '.join(columns)}")
            batches = file.iter_batches(batch_size=1024, columns=list(fields))
            rows = (row for batch in batches for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                yield f"row {number}", row
    except pyarrow.ArrowException as error:
        raise ValueError(f"input {path} cannot be read: {error}") from error


def _text_of(record: Record, name: str) -> str:
    if name not in record:
        raise MalformedRecord(f"field {name!r} is missing; there is {', '.join(record) or 'nothing'}")
    value = record[name]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise MalformedRecord(f"field {name!r} is {type(value).__name__}: it must be text or a number")
    return str(value)
