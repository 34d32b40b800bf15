"""Reading documents out of files: JSONL, Parquet and plain text, the first and last also compressed (.gz, .xz, .zst).

In plain text one or more blank lines separate documents; each is one record with the single field "text".

A file is read in chunks of records that are not parsed yet: reading a compressed file is one process's work, parsing
and what follows can be done by many. No more than one record too many is in memory, whatever the file decompresses to.
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
CHUNK_BYTES = 4 << 20  # of records not yet parsed: seconds of work, and little memory
RECORD_BYTES = 16 << 20  # some ten novels: more is a file that was taken for a line
LARGEST_RECORD_BYTES = 1 << 30  # what can be handed to another process
READABLE = ", ".join((*JSON_LINES, *TEXT, *PARQUET))
_DEEPEST = 256  # levels of JSON in a record; Python itself would give up at a depth that differs between processes
_MARK = BYTE_ORDER_MARK.encode()
_OTHER_ENCODINGS = {  # in this order, for the first begins as the third does
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}

Placed = tuple[str, Record | MalformedRecord]  # where it stands, such as "line 3", and what stands there
Raw = tuple[int, Any, int]  # number; what stands there, not parsed, or the error that it is; its bytes


def check_readable(path: Path, option: str) -> None:
    """Refuse a file that does not exist or whose kind is unknown, without reading it.

    Args:
        option: that names the file, for the message.

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
    """Records that follow each other in one place, not yet parsed.

    Attributes:
        source: where they stand, for messages: the file.
        unit: what numbers count there, such as "line".
        parse: makes a payload a record, or the error that it is; a function of a module, so that it can be pickled.
        payloads: numbers and what stands there, or the error that it is.
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
            record = payload if isinstance(payload, MalformedRecord) else self.parse(payload)
            yield f"{self.unit} {number}", record


def read_chunks(path: Path, templates: Templates, most: int = RECORD_BYTES) -> Iterator[Chunk]:
    """Yield a file's records in chunks of about CHUNK_BYTES, the same ones every time.

    Args:
        templates: of a Parquet file only the columns are read that the template for them needs.
        most: bytes of a record; a larger one is malformed, and not kept in memory.

    Raises:
        InputError: the file as a whole cannot be read (unknown kind, other encoding, damaged, truncated, a column
            missing or there twice).
    """
    kind = _kind(path)
    try:
        if kind in PARQUET:
            from coe_megatron.data.parquet import parquet_rows

            yield from _in_chunks(parquet_rows(path, templates, most), str(path), "row", as_record)
            return
        read, parse = (_json_lines, _json_record) if kind in JSON_LINES else (_text_blocks, _text_record)
        with path.open("rb") as file, _decompressed(file, path.suffix) as stream:
            raw = ((*found, file.tell()) for found in read(_checked_lines(stream, most, path), most))
            yield from _in_chunks(raw, str(path), "line", parse)
    except (OSError, EOFError, MemoryError, lzma.LZMAError, zlib.error) as error:
        reason = shortened(str(error)) or "there is not enough memory to decompress it"
        raise InputError(f"input {path} cannot be read: {reason}") from error


def chunks_of(records: Iterable[Record], source: str, unit: str) -> Iterator[Chunk]:
    """Chunks of records that stand in no file."""
    raw = ((number, record, record_size(record), 0) for number, record in enumerate(records, 1))
    return _in_chunks(raw, source, unit, as_record)


def as_record(payload: Record) -> Record:
    """What is a record already, as it is."""
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


def _checked_lines(stream: BinaryIO, most: int, path: Path) -> Iterator[tuple[int, bytes]]:
    """`_lines`, if they are not of another encoding by the byte-order mark at the beginning."""
    for number, line in _lines(stream, most):
        if number == 1 and (mark := next((mark for mark in _OTHER_ENCODINGS if line.startswith(mark)), None)):
            name = _OTHER_ENCODINGS[mark]
            raise InputError(f"input {path} is {name}: it must be UTF-8 (iconv -f {name} -t UTF-8 makes it so)")
        yield number, line.removeprefix(_MARK)


def _lines(stream: BinaryIO, most: int) -> Iterator[tuple[int, bytes]]:
    """Lines and their numbers; of one with more than `most` bytes the first of them, and no line break."""
    for number in count(1):
        line = stream.readline(most + len(_MARK) + 1)
        if not line:
            return
        yield number, line
        while line and not line.endswith(b"\n"):
            line = stream.readline(CHUNK_BYTES)


def _json_lines(lines: Iterable[tuple[int, bytes]], most: int) -> Iterator[Raw]:
    for number, line in lines:
        if len(line.rstrip(b"\r\n")) > most:
            yield number, too_large(most), len(line)
        elif line.strip():
            yield number, line, len(line)


def _json_record(line: bytes) -> Record | MalformedRecord:
    try:
        record = parse_json(line.rstrip().decode(), _DEEPEST)
    except json.JSONDecodeError as error:
        return MalformedRecord(f"not valid JSON ({error.msg}, column {error.colno})")
    except ValueError as error:  # of UTF-8, a number of thousands of digits, NaN, nesting, a key that comes twice
        return MalformedRecord(f"not valid JSON ({error})")
    return record if isinstance(record, dict) else MalformedRecord("not a JSON object")


def _text_blocks(lines: Iterable[tuple[int, bytes]], most: int) -> Iterator[Raw]:
    block: list[bytes] = []
    start, size = 1, 0
    for number, line in lines:
        if not line.strip():
            if block:
                yield start, b"".join(block), size
            block, size = [], 0
        elif size <= most:  # else the rest of a block that is too large
            start = start if block else number
            block.append(line)
            size += len(line)
            if size > most + len(b"\r\n"):
                yield start, too_large(most), size
                block = []
    if block:
        yield start, b"".join(block), size


def _text_record(block: bytes) -> Record | MalformedRecord:
    try:
        return {"text": block.decode().rstrip("\r\n")}
    except UnicodeDecodeError as error:
        return MalformedRecord(f"not valid UTF-8 ({error})")
