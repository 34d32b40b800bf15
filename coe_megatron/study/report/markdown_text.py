"""Parts of Markdown documents: tables, numbers, and text of a user that must not be read as Markdown."""

import re
from collections.abc import Sequence

from coe_megatron.errors import one_line


def escaped(text: str) -> str:
    """Text of a user on one line, escaped for Markdown and HTML.

    We use character references, which all dialects of Markdown support; GitHub's also has formulas and strikethrough.
    """
    return re.sub(r"[&<>\\`*\[\]|~$#{}]|(?<!\w)_|_(?!\w)", lambda found: f"&#{ord(found[0])};", one_line(text))


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """A table; the first columns hold texts, the others numbers, which are aligned right."""
    lines = [columns, ["---"] * texts + ["---:"] * (len(columns) - texts), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def counted(things: Sequence[object], name: str) -> str:
    """Such as `3 arms`."""
    return f"{len(things)} {name}{'s' * (len(things) != 1)}"


def number(value: float | None, form: str) -> str:
    """A number in a format, or `-`."""
    return "-" if value is None else format(value, form)


def p_value(value: float | None) -> str:
    """A p-value, or `-`."""
    return "&lt; 0.001" if value is not None and value < 0.001 else number(value, ".3f")


def interval(ends: tuple[float, float] | None, form: str) -> str:
    """Such as `-0.1 to +0.2`, or `-`."""
    return "-" if ends is None else f"{ends[0]:{form}} to {ends[1]:{form}}"
