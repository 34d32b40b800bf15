"""Text for a terminal: cut to a width, or aligned in columns. Standard library only."""

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, zip_longest

from coe_megatron.errors import one_line


def shortened(text: str, most: int = 200) -> str:
    """Text as it is if it fits into so many columns, else its ends with … between; wide characters take two columns."""
    if sum(map(_columns, text)) <= most:
        return text
    tail = _fitting(reversed(text), most // 4)[::-1]
    return f"{_fitting(text, most - most // 4 - 1)}…{tail}"


def aligned(rows: Iterable[Sequence[str]], sides: str = "<>", between: str = "  ") -> list[str]:
    """The lines of a table whose columns are as wide as their widest cells; a row may lack cells at its end.

    Args:
        sides: `<` for a column that is flush left, `>` for one that is flush right; the last counts for all others.
        between: two cells of a line.
    """
    columns = list(zip_longest(*rows, fillvalue=""))
    flush = {"<": str.ljust, ">": str.rjust}
    padded = [
        [flush[sides[min(number, len(sides) - 1)]](cell, max(map(len, column))) for cell in column]
        for number, column in enumerate(columns)
    ]
    return [between.join(cells).rstrip() for cells in zip(*padded, strict=True)]


def aligned_facts(rows: Mapping[str, object]) -> str:
    """A line for each name and what it stands for."""
    return "\n".join(map(one_line, aligned([(name, str(value)) for name, value in rows.items()], "<")))


def _fitting(text: Iterable[str], most: int) -> str:
    """What of a text's beginning has room."""
    ends = accumulate(map(_columns, text := list(text)))
    return "".join(character for character, end in zip(text, ends, strict=True) if end <= most)


def _columns(character: str) -> int:
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
