"""Read records from files: JSONL, Parquet and plain text; JSONL and text also compressed (.gz, .xz, .zst).

In plain text one or more blank lines separate documents; each document is a record with the single field "text".

We read a file in chunks of unparsed records: one process has to decompress a file, but many can parse and encode.
Memory holds at most one chunk and one record, whatever size the file decompresses to.
"""

import codecs
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

from coe_megatron.data.records import (
    BYTE_ORDER_MARK,
    InputError,
    MalformedRecord,
    Record,
    Templates,
    record_size,
    too_large,
)
from coe_megatron.errors import ConfigError
from coe_megatron.files import require_file
from coe_megatron.parsing import parse_json
from coe_megatron.text import shortened

JSON_LINES = (".jsonl", ".ndjson")
TEXT = (".txt", ".text", ".md")
PARQUET = (".parquet",)
COMPRESSED = (".gz", ".xz", ".zst")
CHUNK_BYTES = 4 << 20  # of unparsed records: seconds of work, and little memory
DEFAULT_RECORD_BYTES = 16 << 20  # about ten novels; a longer line is probably a file without line breaks
MAX_RECORD_BYTES = 1 << 30  # the most that can be sent to another process
READABLE = ", ".join((*JSON_LINES, *TEXT, *PARQUET))
_MAX_DEPTH = 256  # levels of JSON in a record; Python's own limit differs between processes
_MARK = BYTE_ORDER_MARK.encode()
_OTHER_ENCODINGS = {  # in this order: the first mark starts with the third
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}

LocatedRecord = tuple[str, Record | MalformedRecord]  # location, such as "line 3", and the record or its error
RawRecord = tuple[int, Any, int]  # number, unparsed payload or error, size in bytes


def check_readable(path: Path, option: str) -> None:
    """Refuse a file that does not exist or whose format is unknown, without reading it.

    Args:
        option: the option that names the file, for the message.

    Raises:
        ConfigError: the message names the file and what would be valid.
    """
    require_file(path, option)
    try:
        _kind(path)
    except InputError as error:
        raise ConfigError(str(error)) from None


@dataclass(frozen=True)
class Chunk:
    """Consecutive unparsed records of one source.

    Attributes:
        source: name of the source (the file), for messages.
        unit: what the numbers count, such as "line".
        parse: turns a payload into a record or an error; a module-level function, so that it can be pickled.
        payloads: pairs of a number and an unparsed record, or an error.
        consumed: bytes of the file read up to the end of this chunk.
    """

    source: str
    unit: str
    parse: Callable[[Any], Record | MalformedRecord]
    payloads: list[tuple[int, Any]]
    consumed: int = 0

    def records(self) -> Iterator[LocatedRecord]:
        """Yield every record, or its error, with its location."""
        for number, payload in self.payloads:
            record = payload if isinstance(payload, MalformedRecord) else self.parse(payload)
            yield f"{self.unit} {number}", record


def read_chunks(path: Path, templates: Templates, max_bytes: int = DEFAULT_RECORD_BYTES) -> Iterator[Chunk]:
    """Yield a file's records in chunks of about CHUNK_BYTES; the chunks are the same each time.

    Args:
        templates: of a Parquet file, only the columns that its template needs are read.
        max_bytes: limit for a record; a larger one is malformed, and is not kept in memory.

    Raises:
        InputError: the file as a whole cannot be read (unknown format, wrong encoding, damaged, truncated, a column
            missing or duplicated).
    """
    kind = _kind(path)
    try:
        if kind in PARQUET:
            from coe_megatron.data.parquet import parquet_rows

            yield from _in_chunks(parquet_rows(path, templates, max_bytes), str(path), "row", as_record)
            return
        read, parse = (_json_lines, _json_record) if kind in JSON_LINES else (_text_blocks, _text_record)
        with path.open("rb") as file, _decompressed(file, path.suffix) as stream:
            raw = ((*found, file.tell()) for found in read(_checked_lines(stream, max_bytes, path), max_bytes))
            yield from _in_chunks(raw, str(path), "line", parse)
    except (OSError, EOFError, MemoryError, lzma.LZMAError, zlib.error) as error:
        reason = shortened(str(error)) or "there is not enough memory to decompress it"
        raise InputError(f"input {path} cannot be read: {reason}") from error


def chunks_of(records: Iterable[Record], source: str, unit: str) -> Iterator[Chunk]:
    """Chunks of records that do not come from a file."""
    raw = ((number, record, record_size(record), 0) for number, record in enumerate(records, 1))
    return _in_chunks(raw, source, unit, as_record)


def as_record(payload: Record) -> Record:
    """Return a payload that is a record already."""
    return payload


def _in_chunks(
    raw: Iterable[tuple[int, Any, int, int]], source: str, unit: str, parse: Callable[[Any], Record | MalformedRecord]
) -> Iterator[Chunk]:
    payloads: list[tuple[int, Any]] = []
    size = consumed = 0
    for number, payload, bytes_here, consumed in raw:
        payloads.append((number, payload))
        size += bytes_here
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
        raise InputError(
            f"input {path} has an unknown format: its name must end in {READABLE} (text also with .gz, .xz, .zst)"
        )
    return kind


def _decompressed(file: BinaryIO, suffix: str) -> Any:
    """A stream of lines. For zst we use Arrow's reader because, unlike others, it refuses a truncated file."""
    match suffix.lower():
        case ".gz":
            return gzip.GzipFile(fileobj=file)
        case ".xz":
            return lzma.LZMAFile(file)
        case ".zst":
            from pyarrow import CompressedInputStream

            return io.BufferedReader(CompressedInputStream(file, "zstd"))
    return file


def _checked_lines(stream: BinaryIO, max_bytes: int, path: Path) -> Iterator[tuple[int, bytes]]:
    """`_lines`, after checking that no byte-order mark declares another encoding than UTF-8."""
    for number, line in _lines(stream, max_bytes):
        if number == 1 and (mark := next((mark for mark in _OTHER_ENCODINGS if line.startswith(mark)), None)):
            name = _OTHER_ENCODINGS[mark]
            raise InputError(f"input {path} is {name}: it must be UTF-8 (convert it with iconv -f {name} -t UTF-8)")
        yield number, line.removeprefix(_MARK)


def _lines(stream: BinaryIO, max_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Numbered lines; a line of more than `max_bytes` bytes is truncated and has no line break."""
    for number in count(1):
        line = stream.readline(max_bytes + len(_MARK) + 1)
        if not line:
            return
        yield number, line
        while line and not line.endswith(b"\n"):
            line = stream.readline(CHUNK_BYTES)


def _json_lines(lines: Iterable[tuple[int, bytes]], max_bytes: int) -> Iterator[RawRecord]:
    for number, line in lines:
        if len(line.rstrip(b"\r\n")) > max_bytes:
            yield number, too_large(max_bytes), len(line)
        elif line.strip():
            yield number, line, len(line)


def _json_record(line: bytes) -> Record | MalformedRecord:
    try:
        record = parse_json(line.rstrip().decode(), _MAX_DEPTH)
    except json.JSONDecodeError as error:
        return MalformedRecord(f"not valid JSON ({error.msg}, column {error.colno})")
    except ValueError as error:  # invalid UTF-8, NaN, a huge number, too deep nesting, a duplicate key
        return MalformedRecord(f"not valid JSON ({error})")
    return record if isinstance(record, dict) else MalformedRecord("not a JSON object")


def _text_blocks(lines: Iterable[tuple[int, bytes]], max_bytes: int) -> Iterator[RawRecord]:
    block: list[bytes] = []
    start, size = 1, 0
    for number, line in lines:
        if not line.strip():
            if block:
                yield start, b"".join(block), size
            block, size = [], 0
        elif size <= max_bytes:  # otherwise skip the rest of a block that is too large
            start = start if block else number
            block.append(line)
            size += len(line)
            if size > max_bytes + len(b"\r\n"):
                yield start, too_large(max_bytes), size
                block = []
    if block:
        yield start, b"".join(block), size


def _text_record(block: bytes) -> Record | MalformedRecord:
    try:
        return {"text": block.decode().rstrip("\r\n")}
    except UnicodeDecodeError as error:
        return MalformedRecord(f"not valid UTF-8 ({error})")
