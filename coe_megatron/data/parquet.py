"""Read the rows of Parquet files as records: only the columns that a template needs, a few rows at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from coe_megatron.data.records import InputError, MalformedRecord, Record, Templates, record_size, too_large
from coe_megatron.text import shortened

ROWS = 64  # in memory at once, each of up to the maximum record size


def parquet_rows(
    path: Path, templates: Templates, max_bytes: int
) -> Iterator[tuple[int, Record | MalformedRecord, int, int]]:
    """Yield for each row its number, the row, its approximate bytes, and about how many bytes of the file were read.

    A cell is text if it is stored as text or bytes and is valid UTF-8.

    Args:
        templates: only the columns that this file's template needs are read.
        max_bytes: limit for a cell; a row with a larger one is malformed.

    Raises:
        InputError: the file cannot be read, or a column is missing or duplicated.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            fields = templates.fitting(file.schema_arrow.names).fields
            _require_columns(path, file.schema_arrow.names, fields)
            size, count = path.stat().st_size, max(file.metadata.num_rows, 1)
            batches = file.iter_batches(batch_size=ROWS, columns=list(fields))
            for number, row in enumerate(
                (row for batch in batches for row in _rows(batch, fields, max_bytes)), start=1
            ):
                bytes_here = 0 if isinstance(row, MalformedRecord) else record_size(row)
                yield number, row, bytes_here, min(size, size * number // count)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:  # the latter for a column's name
        raise InputError(f"input {path} cannot be read: {shortened(str(error))}") from error


def _require_columns(path: Path, names: list[str], fields: tuple[str, ...]) -> None:
    if missing := [name for name in fields if name not in names]:
        raise InputError(f"input {path} has no column {missing[0]!r}; it has {shortened(', '.join(names))}")
    if twice := [name for name in fields if names.count(name) > 1]:
        raise InputError(f"input {path} has {names.count(twice[0])} columns {twice[0]!r}: rename all but one")


def _rows(batch: Any, fields: tuple[str, ...], max_bytes: int) -> Iterator[Record | MalformedRecord]:
    for row in zip(*(_cells(batch.column(name), name, max_bytes) for name in fields), strict=True):
        malformed = next((cell for cell in row if isinstance(cell, MalformedRecord)), None)
        yield malformed or dict(zip(fields, row, strict=True))


def _cells(column: Any, name: str, max_bytes: int) -> list[Any]:
    """For each row the text or number, None if it has none, or the error."""
    from pyarrow import ExtensionArray, compute, float64, large_binary, types

    if isinstance(column, ExtensionArray):
        column = column.storage
    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if types.is_floating(kind):
        return column.cast(float64()).to_pylist()
    if types.is_boolean(kind) or types.is_integer(kind) or types.is_null(kind):
        return column.to_pylist()
    if _is_text(kind):
        stored = column.cast(large_binary())
        sizes = compute.binary_length(stored).to_pylist()
        return [_text(cell, size, name, max_bytes) for cell, size in zip(stored, sizes, strict=True)]
    wrong = MalformedRecord(f"field {name!r} is {shortened(str(kind))}: it must be text or a number")
    return [wrong if present else None for present in column.is_valid().to_pylist()]


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    texts = types.is_string, types.is_large_string, types.is_string_view
    blobs = types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary
    return any(is_kind(kind) for is_kind in (*texts, *blobs))


def _text(cell: Any, size: int | None, name: str, max_bytes: int) -> str | MalformedRecord | None:
    """The text of a cell of bytes; Arrow does not check that a file's text columns are UTF-8."""
    if size is None:
        return None
    if size > max_bytes:
        return too_large(max_bytes)
    try:
        return cell.as_py().decode()
    except UnicodeDecodeError as error:
        return MalformedRecord(f"field {name!r} is not valid UTF-8 ({error})")
