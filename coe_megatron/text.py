"""Text for a terminal: shortened to a width, or aligned in columns. Standard library only."""

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, zip_longest

from coe_megatron.errors import one_line

_MINUTE = 60
_UNITS = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))


def shortened(text: str, most: int = 200) -> str:
    """The text if it fits into `most` columns, otherwise its start and end with … in between.

    Wide characters take two columns. The time does not depend on the length of the text.
    """
    if len(text) <= most and sum(map(_columns, text)) <= most:
        return text
    tail = _prefix(text[: -most - 1 : -1], most // 4)[::-1]
    return f"{_prefix(text[:most], most - most // 4 - 1)}…{tail}"


def aligned(rows: Iterable[Sequence[str]], sides: str = "<>", between: str = "  ") -> list[str]:
    """The lines of a table whose columns are as wide as their widest cells; rows may have fewer cells.

    Args:
        sides: alignment of each column, `<` left or `>` right; the last one applies to all further columns.
        between: separator of cells.
    """
    columns = list(zip_longest(*rows, fillvalue=""))
    justify = {"<": str.ljust, ">": str.rjust}
    padded = [
        [justify[sides[min(number, len(sides) - 1)]](cell, max(map(len, column))) for cell in column]
        for number, column in enumerate(columns)
    ]
    return [between.join(cells).rstrip() for cells in zip(*padded, strict=True)]


def aligned_facts(rows: Mapping[str, object]) -> str:
    """A line for each name and its value."""
    return "\n".join(map(one_line, aligned([(name, str(value)) for name, value in rows.items()], "<")))


def duration(seconds: float) -> str:
    """A time with three digits: `12.3 ms`, `8.1 µs`, `2 s`; a minute and more as `format_duration` has it."""
    if seconds >= _MINUTE:
        return format_duration(seconds)
    seconds = float(f"{seconds:.3g}")
    unit, factor = next((each for each in _UNITS if seconds >= each[1]), _UNITS[-1])
    return f"{float(f'{seconds / factor:.3g}'):g} {unit}"


def format_duration(seconds: float) -> str:
    """Seconds as text, in h, min or s."""
    for unit, length in (("h", 60 * _MINUTE), ("min", _MINUTE)):
        if seconds >= length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.0f} s"


def _prefix(text: str, most: int) -> str:
    """The longest prefix that fits into `most` columns."""
    ends = accumulate(map(_columns, text))
    return "".join(character for character, end in zip(text, ends, strict=True) if end <= most)


def _columns(character: str) -> int:
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
