"""The built-in corpus: worked math word problems of our own, endless and the same for the same seed.

Most are stories put together from parts (`templates.stories`); the others come from templates written one by one.
Validation tells stories whose plots (the kinds of events, in their order) training never tells in any setting, and
uses templates that training never shows. The first measures whether known parts are understood in a new order; the
second, harder, whether anything helps with wording never seen. Both splits have equal shares of the two.
Every equation in a response is evaluated from its own text; each response ends in "The answer is N.".
"""

import random
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import get_args

from coe_megatron.corpus.templates import daily, money, parts, people, shapes, shopping, travel, work
from coe_megatron.corpus.templates.arithmetic import Problem
from coe_megatron.corpus.templates.stories.telling import draw_story
from coe_megatron.corpus.templates.words import Draw
from coe_megatron.data.manifest import Split

Template = Callable[[Draw], Problem]

STORY_PERCENT = 80  # of the problems of either split
FAMILIES: tuple[ModuleType, ...] = (daily, money, parts, people, shapes, shopping, travel, work)
HELD_OUT = frozenset(
    {
        "daily.recipe_for_more",
        "money.boxes_given_away",
        "money.seats_in_a_hall",
        "parts.bill_with_tip",
        "parts.slices_eaten",
        "people.half_as_many",
        "people.age_years_from_now",
        "shapes.cubes_in_a_box",
        "shopping.two_kinds_of_goods",
        "travel.two_legs",
        "work.handmade_orders",
    }
)


def templates(split: Split) -> dict[str, Template]:
    """The templates written one by one of one split, by id ("family.name"); no id stands in both splits.

    Raises:
        ValueError: there is no such split.
    """
    if split not in get_args(Split):
        raise ValueError(f"split is {split!r}: it must be one of {', '.join(get_args(Split))}")
    named = {
        f"{family.__name__.rpartition('.')[2]}.{template.__name__}": template
        for family in FAMILIES
        for template in family.TEMPLATES
    }
    return {name: named[name] for name in sorted(named) if (name in HELD_OUT) == (split == "valid")}


def generate(split: Split, count: int, seed: int) -> Iterator[dict[str, str]]:
    """Yield `count` problems; a longer run with the same seed begins with the shorter one.

    Args:
        split: "train", or "valid" for the held-out plots and templates.
        count: how many problems, at least 0.
        seed: any integer; the two splits draw independently of each other.

    Yields:
        {"query": question, "response": worked answer that ends in "The answer is N."}.

    Raises:
        ValueError: `split` or `count` is no valid value.
    """
    if count < 0:
        raise ValueError(f"count is {count}: it must be at least 0")
    return _problems(split, list(templates(split).values()), count, random.Random(f"{split} {seed}"))


def _problems(split: Split, choices: list[Template], count: int, source: random.Random) -> Iterator[dict[str, str]]:
    draw = Draw(source)
    for _ in range(count):
        is_story = draw.number(1, 100) <= STORY_PERCENT
        problem = draw_story(draw, split) if is_story else draw.choice(choices)(draw)
        yield {"query": problem.question, "response": f"{problem.reasoning} The answer is {problem.answer}."}
