"""Names of arms from their labels, which can be any text, for folders, messages, tables and figures."""

import hashlib
import json
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from coe_megatron.errors import one_line
from coe_megatron.text import shortened

_MAX_NAME = 120  # characters of a folder's name; file systems allow 255 bytes
_MAX_SHOWN = 100  # characters of a label in a message
_MAX_LISTED = 20  # names in a message
_DIGITS = (10, 20, 64)  # of a digest in a name; the first number that makes it unique is used


def text_of(value: Any) -> str:
    """A label, or a value used as one, as in YAML."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def row_label(values: Iterable[Any]) -> str:
    """The label of a tuple of values; text that could be read as several values is quoted."""
    values = list(values)
    if len(values) == 1:
        return text_of(values[0])
    return ", ".join(json.dumps(each) if _reads_as_more(each) else text_of(each) for each in values)


def slug(label: str) -> str:
    """A label as part of a file name: `MoE(8/64)` becomes `moe-8-64`; empty if it has no letters or digits."""
    return re.sub(r"[^a-z0-9.+]+", "-", label.lower()).strip("-.")


def arm_name(labels: Sequence[str], used: Collection[str]) -> str:
    """The name of an arm's folder: the slugs of its labels.

    If they are too long, empty, or used by another arm, the name ends with a digest of the labels.
    """
    slugs = list(map(slug, labels))
    name = "_".join(slugs)
    if all(slugs) and len(name) <= _MAX_NAME and name not in used:
        return name
    digest = hashlib.sha256(json.dumps(list(labels)).encode()).hexdigest()
    begin = name[: _MAX_NAME - _DIGITS[0] - 1].strip("-._") or "arm"
    return next(each for each in (f"{begin}-{digest[:digits]}" for digits in _DIGITS) if each not in used)


def looks_like(label: str) -> str:
    """Normal form of a label; labels with the same form look the same."""
    return unicodedata.normalize("NFC", " ".join(one_line(label).split()))


def quoted(text: str) -> str:
    """Text on one line as a list item, quoted (with quotes inside doubled) if it could be read as several items."""
    text = one_line(text)
    return text if text and not re.search(r'[\s,;"]', text) else '"' + text.replace('"', '""') + '"'


def listed(names: Iterable[str]) -> str:
    """A list of names for a message, limited in number and length."""
    names = list(names)
    shown = ", ".join(quoted(shortened(name, _MAX_SHOWN)) for name in names[:_MAX_LISTED])
    return shown + (f" and {len(names) - _MAX_LISTED:,} more" if len(names) > _MAX_LISTED else "")


def joined(labels: Mapping[str, str]) -> str:
    """The labels of an arm as one list item."""
    return " ".join(map(quoted, labels.values()))


def title(labels: Mapping[str, str]) -> str:
    """The labels of an arm as a title, such as in a table cell; a single label is not quoted."""
    return one_line(next(iter(labels.values()))) if len(labels) == 1 else joined(labels)


def _reads_as_more(value: Any) -> bool:
    return isinstance(value, str) and (value != value.strip() or bool(re.search(r'[,"\[{]', value)) or not value)
