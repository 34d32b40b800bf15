"""The built-in corpus: an endless, seeded sequence of worked math word problems.

Most are stories composed of parts (`templates.stories`); the others come from individually written templates.
Validation uses story plots (kinds of events in order) and templates that training never sees. Held-out plots measure
whether the model understands known parts in a new order; held-out templates, which are harder, measure whether it
understands new wording. Both splits have the same fraction of stories. Every equation in a response is evaluated from
its own text; each response ends in "The answer is N.".
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

STORY_PERCENT = 80  # of the problems, in both splits
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
    """The individually written templates of a split, by id ("family.name"); no id is in both splits.

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
    """Yield `count` problems; with the same seed, a longer sequence starts with the shorter one.

    Args:
        split: "train", or "valid" for the held-out plots and templates.
        count: number of problems, at least 0.
        seed: any integer; the two splits are independent of each other.

    Yields:
        {"query": question, "response": worked answer that ends in "The answer is N."}.

    Raises:
        ValueError: `split` or `count` is not valid.
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
