"""Hypothesis strategies of damaged files: JSON and YAML changed by their structure, and bytes changed as such."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from typing import Any

import yaml
from fuzz_bounds import Content, Link
from hypothesis import strategies as st

Dump = Callable[[Any], bytes]
Place = int  # of 2^16, scaled to what there is: shrinking leads to the beginning
PLACES = st.integers(0, (1 << 16) - 1)
NUMBERS = [0, 1, 2, 3, -1, 7, 64, 255, 2**31, 2**63, -(2**63) - 1, 10**24, 10**400]
NUMBERS += [0.0, -0.0, 0.5, 1.5, 1e-300, 1e308, math.inf, -math.inf, math.nan]
TEXTS = [
    "",
    " ",
    "a",
    "\0",
    "\n",
    "a\nb",
    "\r",
    "\x1b[31m",
    "\u2028",
    "\u202e",
    "\ufeff",
    "é",
    "🙂",
    "\ud800",
    "k" * 5000,
]
TEXTS += ["~", "~nouser", "~/x", ".", "..", "/", "/dev/zero", "/dev/null", "/proc/self/mem", "a/" * 3000, "n" * 300]
TEXTS += ["${", "${x}", "${oc.env:HOME}", "${oc.env:NOT_SET}", "${model.topk}", "${.a}", "???", "{}", "%s", "$x^2$"]
TEXTS += ["NaN", "null", "true", "yes", "010", "1_000", "12:30:00", "2020-01-01", "1e400", "=cmd()", "<b>", "-", "--"]


def deep(levels: int) -> Any:
    """Lists in lists."""
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


def _dumped(dumper: Any, value: Any) -> bytes:
    try:
        return dumper(value).encode()
    except UnicodeEncodeError:
        return json.dumps(value).encode()


def yaml_dump(value: Any) -> bytes:
    """As YAML; where YAML has no characters for it, as JSON, which is YAML too."""
    return _dumped(lambda it: yaml.dump(it, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper)), value)


def json_dump(value: Any) -> bytes:
    """As JSON, with NaN and Infinity; lone surrogates are escaped."""
    return _dumped(json.dumps, value)


def json_indented(value: Any) -> bytes:
    """The same over several lines."""
    return _dumped(lambda it: json.dumps(it, indent=1), value)


def json_lines(value: Any) -> bytes:
    """Each value of a list as a line of JSON."""
    return b"".join(json_dump(line) + b"\n" for line in (value if isinstance(value, list) else [value]))


ODD_VALUES = [*NUMBERS, *TEXTS, None, True, False, [], {}, [[]], {"a": 1}, {"": None}, {"a": {"b": {}}}, {1: 2}]
ODD_VALUES += [deep(40), deep(200), [0] * 1000, [1, "a", None], {str(key): key for key in range(300)}, [{}], [math.nan]]
ANYTHING = st.one_of(st.sampled_from(ODD_VALUES), st.integers(-2, 300), st.floats(-1, 10), st.text(max_size=4))
_NUMBERS, _TEXTS = st.sampled_from(NUMBERS), st.sampled_from(TEXTS)
_TREE_OPERATIONS = ("like",) * 4 + ("nudge",) * 2 + ("any", "swap", "delete", "insert", "rename", "wrap", "repeat")
TREE_CHANGES = st.tuples(st.sampled_from(_TREE_OPERATIONS), PLACES, PLACES, ANYTHING)
LINKS = [Link(to) for to in ("/dev/zero", "/dev/null", ".", "nowhere", "/etc/passwd", "/")]
LINKS += [Link("../" * above + name) for above in (1, 2, 3, 4) for name in ("pipe", "secret")]
TOKENS = [text.encode("utf-8", "surrogatepass") for text in TEXTS]
TOKENS += [b"[" * 3000, b'{"a":' * 3000, b"- " * 3000, b"1" * 5000, b"\xff", b"\xff\xfe", b"\\ud800", b"&a [*a]", b"*a"]
TOKENS += [
    b"a: &a [1,1,1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]\nd: [*c,*c,*c,*c]\n"
]
TOKENS += [
    b"<<: *a\n",
    b"!!python/object:os.system ls",
    b"!!binary x",
    b"? ",
    b"|\n",
    b"---\n",
    b"...\n",
    b"%TAG ! x\n",
]
TOKENS += [b"#", b":", b",", b'"', b"'", b"{", b"}", b"[", b"]", b"\t", b"0", b"9" * 20, b"-", b"e9", b"."]
_BYTE_OPERATIONS = ("flip", "insert", "delete", "double", "cut", "line out", "line twice", "move")
BYTE_CHANGES = st.tuples(st.sampled_from(_BYTE_OPERATIONS), PLACES, PLACES, st.sampled_from(TOKENS))


def rarely(rare: st.SearchStrategy[Any], common: st.SearchStrategy[Any], one_in: int = 20) -> st.SearchStrategy[Any]:
    """One of two, by weight; `one_of` counts an alternative once, however often it is given."""
    return st.integers(1, one_in).flatmap(lambda drawn: rare if drawn == one_in else common)


def file_or_not(contents: st.SearchStrategy[bytes]) -> st.SearchStrategy[Content]:
    """A file's content, or rarely nothing, or a link."""
    return rarely(st.one_of(st.none(), st.sampled_from(LINKS)), contents, 8)


@st.composite
def trees(draw: st.DrawFn, seeds: Sequence[Any]) -> Any:
    """One of some values, changed in up to three places."""
    box = [deepcopy(draw(st.sampled_from(seeds)))]
    for operation, place, other, value in draw(st.lists(TREE_CHANGES, max_size=3)):
        _change(box, operation, place, other, value)
    return box[0]


@st.composite
def damaged(draw: st.DrawFn, contents: st.SearchStrategy[bytes]) -> bytes:
    """Bytes, two times in three as they are, else changed in up to three places."""
    content = draw(contents)
    if draw(st.sampled_from((False, False, True))):
        for change in draw(st.lists(BYTE_CHANGES, min_size=1, max_size=3)):
            content = _changed(content, *change)
    return content


def files(texts: Sequence[bytes], values: Sequence[Any], dumps: Sequence[Dump]) -> st.SearchStrategy[bytes]:
    """Contents of a file: of a value that is changed and written by one of `dumps`, or of a text; then damaged."""
    changed = st.tuples(trees(values), st.sampled_from(dumps)).map(lambda drawn: drawn[1](drawn[0]))
    return damaged(rarely(st.sampled_from(texts), changed, 3))


def scaled(place: Place, size: int) -> int:
    """A place among so many."""
    return place * size >> 16


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every list and mapping in a value, with every key or index of it."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def _change(box: list[Any], operation: str, place: Place, other: Place, value: Any) -> None:
    found = list(places(box))
    inside, key = found[scaled(place, len(found))]
    there, its_key = found[scaled(other, len(found))]
    match operation:
        case "like":
            inside[key] = _like(inside[key], other, value)
        case "nudge":
            inside[key] = _nudged(inside[key], other)
        case "any":
            inside[key] = deepcopy(value)
        case "swap":
            inside[key] = deepcopy(there[its_key])
        case "delete" if inside is not box:
            del inside[key]
        case "insert" if isinstance(inside[key], dict):
            inside[key][value if isinstance(value, str) else its_key] = deepcopy(there[its_key])
        case "insert" if isinstance(inside[key], list):
            inside[key].append(deepcopy(value))
        case "rename" if isinstance(inside, dict):
            inside[value if isinstance(value, str | int | bool | None) else str(its_key)] = inside.pop(key)
        case "wrap":
            inside[key] = [inside[key]] if other % 2 else {"a": inside[key]}
        case "repeat":
            _repeat(inside[key], 1 << other % 8)


def _like(value: Any, other: Place, drawn: Any) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return NUMBERS[scaled(other, len(NUMBERS))]
    if isinstance(value, str):
        return TEXTS[scaled(other, len(TEXTS))]
    return deepcopy(drawn) if isinstance(drawn, type(value)) else value


def _nudged(value: Any, other: Place) -> Any:
    """Nearly the same."""
    if isinstance(value, bool) or value is None:
        return int(bool(value))
    if isinstance(value, int | float):
        few = abs(value) < 1e300  # else there is no float of it; NaN is none either
        return [value + 1, value - 1, -value, value * 2, *([value / 3, float(value)] if few else [])][
            other % (6 if few else 4)
        ]
    if isinstance(value, str):
        return [value[:-1], value + " ", value.upper(), value + TEXTS[other % len(TEXTS)], value * 2][other % 5]
    return value


def _repeat(value: Any, times: int) -> None:
    """What is in a list or a mapping so many times, within reason."""
    if isinstance(value, list) and len(value) * times < 3000:
        value *= times
    elif isinstance(value, dict) and len(value) * times < 3000:
        value |= {f"{key}{number}": deepcopy(inner) for key, inner in value.items() for number in range(times)}


def _changed(content: bytes, operation: str, place: Place, other: Place, token: bytes) -> bytes:
    start, end = sorted((scaled(place, len(content) + 1), scaled(other, len(content) + 1)))
    before, between, after = content[:start], content[start:end], content[end:]
    match operation:
        case "flip":
            return before + bytes(byte ^ 1 << other % 8 for byte in content[start : start + 1]) + content[start + 1 :]
        case "insert":
            return before + token + content[start:]
        case "delete":
            return before + content[start + 1 + other % 8 :]
        case "double":
            return before + between * 2 + after
        case "cut":
            return before
        case "move":
            return between + before + after
    lines = content.splitlines(keepends=True)
    at = scaled(place, len(lines) + 1)
    return b"".join(lines[:at] + lines[at : at + 1] * (2 if operation == "line twice" else 0) + lines[at + 1 :])
