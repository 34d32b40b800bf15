"""Records and what makes documents of them: templates, and the errors of records and files that give none."""

import math
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from coe_megatron.errors import ConfigError, one_line
from coe_megatron.text import shortened

BYTE_ORDER_MARK = "\ufeff"  # no text, wherever a file, a record or a field begins

Record = Mapping[str, Any]


class InputError(ValueError):
    """What an input file holds cannot be prepared; one line that names the file."""

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text))


class MalformedRecord(ValueError):
    """A line, row or block that gives no document; the message says what is wrong with it."""

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text))


@dataclass(frozen=True)
class Template:
    """How a record becomes a document: literal text and field names in braces, such as "{question} {answer}".

    A name in braces is a field's plain name; {{ and }} are braces themselves.

    Raises:
        ConfigError: the text has no fields, or its braces make no sense.
    """

    text: str

    def __post_init__(self) -> None:
        if not self.fields:
            raise ConfigError(f"template {self.text!r} names no field: write at least one in braces, such as {{text}}")

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """The names in braces, each once, in their order."""
        return tuple(dict.fromkeys(name for _, name in self._parts if name is not None))

    def render(self, record: Record) -> str:
        """The document of a record.

        Raises:
            MalformedRecord: a field is missing, or is neither text nor a finite number, or the document is empty.
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
            raise ConfigError(f"template {self.text!r} is not valid: {error}") from error
        for _, name, specification, conversion in parts:
            if name is not None and (not name or specification or conversion):
                raise ConfigError(
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


def record_size(record: Record) -> int:
    """About how much text a record has that is parsed already."""
    return sum(len(str(value)) for value in record.values())


def too_large(most: int) -> MalformedRecord:
    """What a record of more than `most` bytes is."""
    return MalformedRecord(f"it has more than {most:,} bytes, as --max-record-bytes allows")


def _text_of(record: Record, name: str) -> str:
    if name not in record:
        raise MalformedRecord(f"field {name!r} is missing; there is {shortened(', '.join(record)) or 'nothing'}")
    value = record[name]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise MalformedRecord(f"field {name!r} is {type(value).__name__}: it must be text or a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise MalformedRecord(f"field {name!r} is {value}: it must be text or a finite number")
    return str(value).lstrip(BYTE_ORDER_MARK)
