"""What can happen to a count in a story: the numbers that each kind draws, and its worked steps.

Legend, the same in every expression and wording:
    v  the count so far            f  the count at the start      s  the result of the step before
    n  a change                    d  a change on every day       k  how many days, or equal shares
    c  how many packs              m  the size of a pack          p  percent
    a, b  the fraction a/b         x  a difference of two counts  r  a price                         t  a target
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from coe_megatron.corpus.templates.words import Draw


class Sizes(NamedTuple):
    """Range of counts: they start at low, low + step, ... or high, and no event exceeds `most`."""

    low: int
    high: int
    step: int
    most: int

    @property
    def least(self) -> int:
        """The lower limit after any event, so that something remains for the next one."""
        return max(3, self.low // 5)


@dataclass(frozen=True)
class Kind:
    """One kind of opening, event or ending.

    Attributes:
        letters: the numbers it draws.
        steps: the expressions of its worked steps; the result of the last one is the new count.
    """

    letters: str
    steps: tuple[str, ...]


OPENINGS = {
    "count": Kind("v", ()),
    "packed": Kind("cm", ("{c} * {m}",)),
}
EVENTS = {
    "gain": Kind("n", ("{v} + {n}",)),
    "lose": Kind("n", ("{v} - {n}",)),
    "double": Kind("", ("{v} * 2",)),
    "triple": Kind("", ("{v} * 3",)),
    "halve": Kind("", ("{v} / 2",)),
    "share": Kind("k", ("{v} / {k}",)),
    "part": Kind("b", ("{v} / {b}", "{v} - {s}")),
    "fraction": Kind("ab", ("{v} * {a} / {b}", "{v} - {s}")),
    "percent": Kind("p", ("{v} * {p} / 100", "{v} - {s}")),
    "grow": Kind("p", ("{v} * {p} / 100", "{v} + {s}")),
    "packs": Kind("cm", ("{c} * {m}", "{v} + {s}")),
    "hand_out": Kind("cm", ("{c} * {m}", "{v} - {s}")),
    "daily": Kind("kd", ("{k} * {d}", "{v} + {s}")),
    "daily_loss": Kind("kd", ("{k} * {d}", "{v} - {s}")),
}
ENDINGS = {
    "now": Kind("", ()),
    "more": Kind("", ("{v} - {f}",)),
    "fewer": Kind("", ("{f} - {v}",)),
    "target": Kind("t", ("{t} - {v}",)),
    "boxes": Kind("m", ("{v} / {m}",)),
    "each": Kind("k", ("{v} / {k}",)),
    "price": Kind("r", ("{v} * {r}",)),
    "other": Kind("x", ("{v} + {x}",)),
    "together": Kind("x", ("{v} + {x}", "{v} + {s}")),
}
KINDS = OPENINGS | EVENTS | ENDINGS

_PERCENT = (10, 20, 25, 30, 40, 60, 75)
_FRACTIONS = ((2, 3), (3, 4), (2, 5), (3, 5), (4, 5), (5, 6))
_DRAWN: dict[str, Callable[[Draw, Sizes, int], int]] = {
    "v": lambda d, size, _: d.number(size.low, size.high, size.step),
    "n": lambda d, size, _: d.number(2 * size.step, size.high // 2, size.step),
    "d": lambda d, size, _: d.number(2 * size.step, size.high // 6 // size.step * size.step, size.step),
    "c": lambda d, _size, _: d.number(2, 6),
    "m": lambda d, size, _: d.number(3 * size.step, 12 * size.step, size.step),
    "k": lambda d, _size, _: d.number(2, 6),
    "p": lambda d, _size, _: d.choice(_PERCENT),
    "b": lambda d, _size, _: d.number(3, 6),
    "x": lambda d, size, _: d.number(2 * size.step, size.high // 2, size.step),
    "r": lambda d, _size, _: d.number(2, 5),
    "t": lambda d, size, v: v - v % 10 + d.number(1, 6) * 10 * min(size.step, 10),
}


def draw_numbers(d: Draw, kind: Kind, sizes: Sizes, count: int) -> dict[str, int]:
    """Draw the numbers of an opening, an event or an ending, by letter, given the current count."""
    if kind.letters == "ab":
        return dict(zip("ab", d.choice(_FRACTIONS), strict=True))
    return {letter: _DRAWN[letter](d, sizes, count) for letter in kind.letters}
