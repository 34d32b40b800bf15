"""The rows of Parquet files as records: the columns that a template needs, a few rows at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from coe_megatron.data.records import InputError, MalformedRecord, Record, Templates, record_size, too_large
from coe_megatron.text import shortened

ROWS = 64  # in memory at once, each as large as a record may be


def parquet_rows(
    path: Path, templates: Templates, most: int
) -> Iterator[tuple[int, Record | MalformedRecord, int, int]]:
    """Yield the number of each row, the row, about its bytes, and about how many of the file were read up to it.

    Text is what is stored as text or as bytes, if it is UTF-8.

    Args:
        templates: only the columns are read that the one for this file needs.
        most: bytes of a cell; a row with a larger one is malformed.

    Raises:
        InputError: the file cannot be read, or a column is missing or there twice.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            fields = templates.fitting(file.schema_arrow.names).fields
            _require_columns(path, file.schema_arrow.names, fields)
            size, count = path.stat().st_size, max(file.metadata.num_rows, 1)
            batches = file.iter_batches(batch_size=ROWS, columns=list(fields))
            for number, row in enumerate((row for batch in batches for row in _rows(batch, fields, most)), start=1):
                bytes_here = 0 if isinstance(row, MalformedRecord) else record_size(row)
                yield number, row, bytes_here, min(size, size * number // count)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:  # the latter of a column's name
        raise InputError(f"input {path} cannot be read: {shortened(str(error))}") from error


def _require_columns(path: Path, names: list[str], fields: tuple[str, ...]) -> None:
    if missing := [name for name in fields if name not in names]:
        raise InputError(f"input {path} has no column {missing[0]!r}; there is {shortened(', '.join(names))}")
    if twice := [name for name in fields if names.count(name) > 1]:
        raise InputError(f"input {path} has {names.count(twice[0])} columns {twice[0]!r}: rename all but one")


def _rows(batch: Any, fields: tuple[str, ...], most: int) -> Iterator[Record | MalformedRecord]:
    for row in zip(*(_cells(batch.column(name), name, most) for name in fields), strict=True):
        malformed = next((cell for cell in row if isinstance(cell, MalformedRecord)), None)
        yield malformed or dict(zip(fields, row, strict=True))


def _cells(column: Any, name: str, most: int) -> list[Any]:
    """Of each row the text or number, None where there is none, or what is wrong with it."""
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
        return [_text(cell, size, name, most) for cell, size in zip(stored, sizes, strict=True)]
    wrong = MalformedRecord(f"field {name!r} is {shortened(str(kind))}: it must be text or a number")
    return [wrong if present else None for present in column.is_valid().to_pylist()]


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    texts = types.is_string, types.is_large_string, types.is_string_view
    blobs = types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary
    return any(is_kind(kind) for is_kind in (*texts, *blobs))


def _text(cell: Any, size: int | None, name: str, most: int) -> str | MalformedRecord | None:
    """Of a cell of bytes; Arrow does not look whether what a file calls text is UTF-8."""
    if size is None:
        return None
    if size > most:
        return too_large(most)
    try:
        return cell.as_py().decode()
    except UnicodeDecodeError as error:
        return MalformedRecord(f"field {name!r} is not valid UTF-8 ({error})")
