"""Labels are data: what folders, messages, tables and figures make of whatever text a study file has for an arm."""

import hashlib
import json
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from coe_megatron.errors import one_line
from coe_megatron.text import shortened

_LONGEST_NAME = 120  # characters of a folder's name; a file system takes 255 bytes
_LONGEST_SHOWN = 100  # characters of a label in a message
_MOST_LISTED = 20  # names in a message
_DIGITS = (10, 20, 64)  # of a digest in a name, as many as tell it from others


def text_of(value: Any) -> str:
    """A label, or a value that is one, as YAML has it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def row_label(values: Iterable[Any]) -> str:
    """The label of values that belong together; text that could be taken for several values is quoted."""
    values = list(values)
    if len(values) == 1:
        return text_of(values[0])
    return ", ".join(json.dumps(each) if _reads_as_more(each) else text_of(each) for each in values)


def slug(label: str) -> str:
    """A label as a part of a file's name: `MoE(8/64)` becomes `moe-8-64`; empty if it has no letter and no digit."""
    return re.sub(r"[^a-z0-9.+]+", "-", label.lower()).strip("-.")


def arm_name(labels: Sequence[str], taken: Collection[str]) -> str:
    """The name of an arm's folder: the slugs of its labels.

    Where they are too long, empty, or taken by another arm, the name ends with a digest of the labels.
    """
    slugs = list(map(slug, labels))
    name = "_".join(slugs)
    if all(slugs) and len(name) <= _LONGEST_NAME and name not in taken:
        return name
    digest = hashlib.sha256(json.dumps(list(labels)).encode()).hexdigest()
    begin = name[: _LONGEST_NAME - _DIGITS[0] - 1].strip("-._") or "arm"
    return next(each for each in (f"{begin}-{digest[:digits]}" for digits in _DIGITS) if each not in taken)


def looks_like(label: str) -> str:
    """What two labels share that a reader cannot tell apart."""
    return unicodedata.normalize("NFC", " ".join(one_line(label).split()))


def quoted(text: str) -> str:
    """Text on one line as a member of a list; in quotes (doubled inside) where it could be read as several members."""
    text = one_line(text)
    return text if text and not re.search(r'[\s,;"]', text) else '"' + text.replace('"', '""') + '"'


def listed(names: Iterable[str]) -> str:
    """Names one after the other for a message, no more than a person reads."""
    names = list(names)
    shown = ", ".join(quoted(shortened(name, _LONGEST_SHOWN)) for name in names[:_MOST_LISTED])
    return shown + (f" and {len(names) - _MOST_LISTED:,} more" if len(names) > _MOST_LISTED else "")


def joined(labels: Mapping[str, str]) -> str:
    """The labels of an arm as one member of a list."""
    return " ".join(map(quoted, labels.values()))


def title(labels: Mapping[str, str]) -> str:
    """The labels of an arm where it stands alone, as in a table's cell: a single one is as it is."""
    return one_line(next(iter(labels.values()))) if len(labels) == 1 else joined(labels)


def _reads_as_more(value: Any) -> bool:
    return isinstance(value, str) and (value != value.strip() or bool(re.search(r'[,"\[{]', value)) or not value)
