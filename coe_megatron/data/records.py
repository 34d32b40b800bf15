"""Records, the templates that turn them into documents, and the errors of malformed records and files."""

import math
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from coe_megatron.errors import ConfigError, one_line
from coe_megatron.text import shortened

BYTE_ORDER_MARK = "\ufeff"  # not part of the text at the start of a file, a record or a field

Record = Mapping[str, Any]


class InputError(ValueError):
    """An input file cannot be prepared; one line that names the file."""

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text))


class MalformedRecord(ValueError):
    """A line, row or block that gives no document; the message says why."""

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text))


@dataclass(frozen=True)
class Template:
    """How a record becomes a document: literal text and field names in braces, such as "{question} {answer}".

    Braces hold the plain name of a field; {{ and }} are literal braces.

    Raises:
        ConfigError: the text has no fields, or its braces are not valid.
    """

    text: str

    def __post_init__(self) -> None:
        if not self.fields:
            raise ConfigError(f"template {self.text!r} names no field: write at least one in braces, such as {{text}}")

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """The names in braces, in order, without duplicates."""
        return tuple(dict.fromkeys(name for _, name in self._parts if name is not None))

    def render(self, record: Record) -> str:
        """The document of a record.

        Raises:
            MalformedRecord: a field is missing, is neither text nor a finite number, or the document is empty.
        """
        pieces = (literal + ("" if name is None else _text_of(record, name)) for literal, name in self._parts)
        document = "".join(pieces)
        if not document or document.isspace():
            raise MalformedRecord(f"the document of {self.text!r} is empty")
        try:
            document.encode()
        except UnicodeEncodeError:
            raise MalformedRecord("half of a surrogate pair is not a character") from None
        return document

    @cached_property
    def _parts(self) -> list[tuple[str, str | None]]:
        try:
            parts = list(string.Formatter().parse(self.text))
        except ValueError as error:
            raise ConfigError(f"template {self.text!r} is not valid: {error}") from error
        for _, name, specification, conversion in parts:
            if name is not None and (not name or specification or conversion):
                raise ConfigError(
                    f"template {self.text!r} is not valid: braces hold a field's plain name, as in {{text}}"
                )
        return [(literal, name) for literal, name, _, _ in parts]


@dataclass(frozen=True)
class Templates:
    """Templates for several kinds of records: each record uses the first template whose fields it has."""

    choices: tuple[Template, ...]

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Templates":
        """Make templates from their texts."""
        return cls(tuple(map(Template, texts)))

    def fitting(self, names: Iterable[str]) -> Template:
        """The first template whose fields are all present; if there is none, the first template."""
        present = set(names)
        return next((choice for choice in self.choices if present.issuperset(choice.fields)), self.choices[0])

    def render(self, record: Record) -> str:
        """The document of a record.

        Raises:
            MalformedRecord: no template fits, or as `Template.render`.
        """
        return self.fitting(record).render(record)


def record_size(record: Record) -> int:
    """Approximate characters of a parsed record."""
    return sum(len(str(value)) for value in record.values())


def too_large(max_bytes: int) -> MalformedRecord:
    """The error for a record of more than `max_bytes` bytes."""
    return MalformedRecord(f"it has more than {max_bytes:,} bytes, the limit of --max-record-bytes")


def _text_of(record: Record, name: str) -> str:
    if name not in record:
        raise MalformedRecord(
            f"field {name!r} is missing; the record has {shortened(', '.join(record)) or 'no fields'}"
        )
    value = record[name]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise MalformedRecord(f"field {name!r} is {type(value).__name__}: it must be text or a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise MalformedRecord(f"field {name!r} is {value}: it must be text or a finite number")
    return str(value).lstrip(BYTE_ORDER_MARK)
