"""Parse untrusted JSON and YAML in bounded time and memory.

Content that is too large, nested too deeply or ambiguous raises a ValueError of one line.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, Never

import yaml
from pydantic import ValidationError

from coe_megatron.errors import one_line
from coe_megatron.text import shortened

DEEPEST = 32  # levels; a config has five
MOST_NODES = 5_000  # of YAML: keys, values, lists and mappings, counted each time an alias repeats them
CONFIG_BYTES = 1 << 17
JSON_BYTES = 1 << 23
_SHOWN = 50  # columns of a value in a message
_TAGS = {None, "!", *(f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "seq", "map"))}
_EVENTS = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's loader is about twenty times faster
# Text that YAML 1.1 does not read as most users expect.
_OCTAL = re.compile(r"[-+]?0[0-7_]+")
_LONG_NUMBER = re.compile(r"[-+]?(0[bx][0-9a-f_]{64,}|[0-9_]{64,})", re.IGNORECASE)  # slow to parse
_BOOLEANS = re.compile(r"(yes|no|on|off)", re.IGNORECASE)
_NESTED_REFERENCE = re.compile(r"\$\{[^}]*\$\{")  # OmegaConf's parser takes quadratic time for them
_PLAIN = re.compile(r"([A-Za-z]|\.{0,2}/)[\w./-]*", re.ASCII)  # all YAML parsers read this as text
_WORDS = {"yes", "no", "on", "off", "y", "n", "true", "false", "null"}
_BASE_60 = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
_AMBIGUOUS = (
    (_BOOLEANS, "a truth value", "write true or false"),
    (_OCTAL, "a number in base 8", "remove the leading 0"),
    (_BASE_60, "a number in base 60", "write the number"),
)


def parse_json(content: bytes | str, deepest: int | None = DEEPEST) -> Any:
    """Parse strict JSON in UTF-8: no NaN, no infinite number, and no duplicate keys in an object.

    Args:
        deepest: maximum nesting depth; None for the limit of Python's parser (some hundreds).

    Raises:
        ValueError: it is not strict JSON, or is nested too deeply.
    """
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        value = json.loads(text, parse_float=_finite, parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 ({error.reason})") from None
    if deepest is not None and _deeper_than(value, deepest):
        raise ValueError(f"it is nested more than {deepest} levels deep")
    return value


def first_of(error: ValidationError) -> str:
    """The first problem that a validation found, in one line: location and message."""
    found = error.errors(include_url=False, include_context=False, include_input=False)[0]
    return one_line(f"{'.'.join(map(str, found['loc'])) or 'all of it'}: {found['msg']}")


def check_yaml(text: str) -> int:
    """Check YAML before it is parsed; returns its number of nodes.

    Raises:
        ValueError: it is nested too deeply, has too many nodes (including those that aliases repeat), nested
            references, text that YAML 1.1 reads as a number in base 8 or 60 or as true or false, or a tag without a
            JSON equivalent, such as !!binary.
        yaml.YAMLError: it is not YAML.
    """
    open_nodes: list[tuple[str | None, int]] = []  # anchor, nodes before it
    sizes: dict[str, int] = {}
    nodes = 0
    for event in yaml.parse(text, Loader=_EVENTS):
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            sizes |= {anchor: nodes - before} if anchor is not None else {}
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, nodes))
            nodes += 1
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ValueError(f"*{event.anchor} refers to itself, or to nothing")
            nodes += sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            nodes += 1
            sizes |= {event.anchor: 1} if event.anchor is not None else {}
            if _NESTED_REFERENCE.search(event.value):
                raise ValueError(f"{shortened(event.value, _SHOWN)} has a reference within a reference")
            if event.implicit[0]:
                _refuse_ambiguous(event.value)
        if (tag := getattr(event, "tag", None)) not in _TAGS:
            raise ValueError(f"it has the tag {str(tag).replace('tag:yaml.org,2002:', '!!')}: remove it")
        if len(open_nodes) > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} levels deep")
        if nodes > MOST_NODES:
            raise ValueError(f"it has more than {MOST_NODES:,} keys and values")
    return nodes


class _Dumper(yaml.SafeDumper):
    """Quotes all text except text that needs no quotes in any YAML parser."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        plain = _PLAIN.fullmatch(text) and text.lower() not in _WORDS
        return self.represent_scalar("tag:yaml.org,2002:str", text, None if plain else "'")


_Dumper.add_representer(str, _Dumper.represent_text)


def to_yaml(values: Any) -> str:
    """Plain values, mappings and lists as YAML that this module and OmegaConf parse to the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1 << 30)


def _refuse_ambiguous(scalar: str) -> None:
    if _LONG_NUMBER.fullmatch(scalar):
        raise ValueError(f"{shortened(scalar, _SHOWN)} is a number of {len(scalar):,} digits")
    for pattern, reading, remedy in _AMBIGUOUS:
        if pattern.fullmatch(scalar):
            shown = shortened(scalar, _SHOWN)
            raise ValueError(f"{shown} is {reading} to YAML 1.1: {remedy}, or quote the text")


def _refuse_constant(name: str) -> Never:
    raise ValueError(f"{name} is not valid JSON")


def _finite(numeral: str) -> float:
    """Refuse a number such as 1e400, which JSON's grammar allows: as a float it is infinite and cannot be written."""
    value = float(numeral)
    if not math.isfinite(value):
        raise ValueError(f"{shortened(numeral, _SHOWN)} is too large for a number")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
        raise ValueError(f"it has {shortened(twice, _SHOWN)!r} twice")
    return found


def _deeper_than(value: Any, most: int) -> bool:
    level = [value]
    for _ in range(most):
        level = [inner for each in level for inner in _inside(each)]
        if not level:
            return False
    return any(isinstance(each, dict | list) for each in level)


def _inside(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list):
        yield from value
