"""The words of the built-in corpus and how they are drawn: names with pronouns, nouns with plurals."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import gcd
from typing import TypeVar

from coe_megatron.corpus.templates.arithmetic import Calc, number

T = TypeVar("T")


@dataclass(frozen=True)
class Person:
    """A name with its pronouns; printing a person prints the name."""

    name: str
    he: str
    him: str
    his: str

    def __str__(self) -> str:
        return self.name

    @property
    def He(self) -> str:
        """The pronoun at the start of a sentence."""
        return self.he.capitalize()

    @property
    def His(self) -> str:
        """The possessive at the start of a sentence."""
        return self.his.capitalize()


@dataclass(frozen=True)
class Noun:
    """A thing that can be counted; printing it prints the plural."""

    one: str
    many: str

    def __str__(self) -> str:
        return self.many

    @property
    def a(self) -> str:
        """The singular with its article: "an apple"."""
        return f"{'an' if self.one[0] in 'aeiou' else 'a'} {self.one}"

    def of(self, count: int | Fraction | Calc) -> str:
        """The counted noun: "1 apple", "7 apples", "2.5 liters"."""
        value = count.value if isinstance(count, Calc) else Fraction(count)
        return f"{number(value)} {self.one if value == 1 else self.many}"

    def eq(self, step: Calc) -> str:
        """The equation of a step with its counted result: "4 * 3 = 12 apples"."""
        return f"{step.expression} = {self.of(step)}"


def nouns(text: str) -> tuple[Noun, ...]:
    """Nouns from a list such as "apple, box/boxes": the plural adds an s unless it is given."""
    pairs = (entry.strip().partition("/") for entry in text.split(","))
    return tuple(Noun(one, many or f"{one}s") for one, _, many in pairs)


def times(count: int) -> str:
    """How often: "twice", "3 times"."""
    return "twice" if count == 2 else f"{count} times"


def names(text: str) -> tuple[str, ...]:
    """The words of a text, in order."""
    return tuple(text.split())


WOMEN = names(
    "Aisha Amara Anna Beatriz Chloe Clara Daria Elena Emma Fatima Freya Grace Hana Ines Ingrid Jasmine Julia Kavya "
    "Keiko Lara Leila Lucy Maria Maya Mei Mina Nadia Naomi Nina Nora Olivia Paula Priya Rosa Ruth Sara Sofia Tara "
    "Tess Uma Valentina Wanda Yara Yasmin Zoe"
)
MEN = names(
    "Aaron Ahmed Akira Ali Amir Andre Ben Carlos Chen Daniel David Dmitri Diego Elias Emeka Erik Felix Finn George "
    "Hassan Hugo Ivan Jamal James Jonas Juan Karim Kofi Leo Lukas Marco Mateo Milan Nikhil Noah Omar Oscar Pablo "
    "Ravi Samuel Tariq Theo Tomas Victor Yusuf"
)
GOODS = nouns(
    "notebook, scarf/scarves, mug, plant pot, puzzle, T-shirt, cushion, lamp, kite, board game, candle, backpack, "
    "umbrella, picture frame, water bottle, phone case, towel, poster, wallet, belt, basketball, jigsaw, blanket"
)
SMALL_THINGS = nouns(
    "sticker, marble, seashell, button, postcard, stamp, bead, trading card, badge, toy car, coin, bottle cap, "
    "key ring, crayon, comic book, magnet, pebble, feather, ribbon, eraser"
)
FRUIT = nouns(
    "apple, orange, pear, mango/mangoes, peach/peaches, lemon, plum, banana, kiwi, fig, apricot, lime, nectarine, "
    "pomegranate"
)
BAKED = nouns(
    "muffin, cookie, bagel, cupcake, brownie, pretzel, croissant, scone, doughnut, bread roll, waffle, cinnamon bun, "
    "apple pie, egg tart"
)
SCHOOL_GOODS = nouns("pencil, pen, ruler, folder, marker, glue stick, sketchbook, paintbrush/paintbrushes, sharpener")
BEADED = nouns(
    "bracelet, necklace, lantern, paper crane, greeting card, candle, clay bowl, paper flower, keychain, "
    "wooden spoon, birdhouse, toy boat, soap bar, woolen hat"
)
CITIES = names(
    "Oakdale Riverton Brookfield Milltown Ashford Greenville Lakeside Hillcrest Fairview Westport Norwood Elmhurst "
    "Stonebridge Clearwater Maplewood Easton Harborview Pinecrest Redfield Silverton"
)
DOLLAR, HOUR, DAY, YEAR, POINT = nouns("dollar, hour, day, year, point")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
RELATIVES = ("sister", "brother", "cousin", "neighbor", "best friend", "classmate")


class Draw:
    """Draws the parts of one problem from a random source, the only randomness of a template."""

    def __init__(self, source: random.Random) -> None:
        self._source = source

    def number(self, low: int, high: int, step: int = 1) -> int:
        """A whole number of low, low + step, ... up to and including high."""
        return self._source.randrange(low, high + 1, step)

    def choice(self, options: Sequence[T]) -> T:
        """One of the options."""
        return self._source.choice(options)

    def some(self, options: Sequence[T], count: int) -> list[T]:
        """`count` different options."""
        return self._source.sample(options, count)

    def fraction(self, lowest: int = 1) -> tuple[int, int]:
        """Numerator (at least `lowest`) and denominator of a proper fraction in lowest terms."""
        pairs = [(a, b) for b in range(2, 7) for a in range(lowest, b) if gcd(a, b) == 1]
        return self._source.choice(pairs)

    def person(self) -> Person:
        """Somebody."""
        return self.people(1)[0]

    def people(self, count: int) -> list[Person]:
        """`count` people of different names."""
        return [_person(name) for name in self._source.sample(WOMEN + MEN, count)]


def _person(name: str) -> Person:
    return Person(name, "she", "her", "her") if name in WOMEN else Person(name, "he", "him", "his")
