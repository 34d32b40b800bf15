"""The setting of a story, and constructors for each frame; `people` and `places` list the settings.

In a clause, "~" is replaced by what comes or goes: "~ get off", "{he} loses ~". Braces hold the words of the person in
the story (who, he, him, his, relative) and of the setting; "|" separates alternatives.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from coe_megatron.corpus.templates.stories.frames import FRAMES
from coe_megatron.corpus.templates.stories.kinds import Sizes

FEW, SOME, MANY = Sizes(12, 48, 1, 240), Sizes(20, 90, 1, 480), Sizes(60, 300, 10, 1500)


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        name: its name.
        frame: name of its frame.
        sizes: range of its counts.
        clauses: "starts" (around "{count}"), "gets" and "gives" (around "~"), each with its alternatives.
        words: values for the braces of the frame.
        kinds: the openings, events and endings that make sense here.
    """

    name: str
    frame: str
    sizes: Sizes
    clauses: Mapping[str, tuple[str, ...]]
    words: Mapping[str, str]
    kinds: frozenset[str]


def _setting(
    frame: str, name: str, sizes: Sizes, starts: str, gets: str, gives: str, *, without: str = "", **words: str
) -> Setting:
    clauses = {"starts": starts, "gets": gets, "gives": gives}
    return Setting(
        name,
        frame,
        sizes,
        {kind: tuple(text.split(" | ")) for kind, text in clauses.items()},
        {"things": name, "at": "on", "day": "day"} | words,
        frozenset(FRAMES[frame].keys() - set(without.split())),
    )


def owned(things: str, boxes: str, sizes: Sizes, starts: str, gets: str, gives: str, **words: str) -> Setting:
    """A setting where somebody has things, packed in boxes; `words` adds values for the braces."""
    return _setting("owned", things, sizes, starts, gets, gives, boxes=boxes, **words)


def money(name: str, starts: str, gets: str, gives: str, **words: str) -> Setting:
    """A setting where somebody has dollars."""
    return _setting("money", name, Sizes(40, 200, 5, 900), starts, gets, gives, **{"things": "dollars", **words})


def place(
    where: str, things: str, boxes: str, sizes: Sizes, starts: str, gets: str, gives: str, **words: str
) -> Setting:
    """A setting where things come to a place and leave it, some in boxes."""
    at_place = words.pop("at_place", "in")
    words = {"split": f"all the {things} are split into", **words}
    here = {"place": where, "at_place": at_place, "here": f"{at_place} the {where}"}
    return _setting(
        "places",
        f"{things} {at_place} the {where}",
        sizes,
        starts,
        gets,
        gives,
        things=things,
        boxes=boxes,
        **here,
        **words,
    )


def amount(
    where: str, stuff: str, unit: str, boxes: str, sizes: Sizes, starts: str, gets: str, gives: str, **words: str
) -> Setting:
    """A setting where a place holds an amount of a stuff in units, some in boxes."""
    at_place = words.pop("at_place", "in")
    words = {"split": f"all of the {stuff} is put into", **words}
    here = {"place": where, "at_place": at_place, "here": f"{at_place} the {where}"}
    units = {"stuff": stuff, "unit": unit, "things": f"{unit}s", "boxes": boxes}
    return _setting("amounts", f"{stuff} {at_place} the {where}", sizes, starts, gets, gives, **here, **units, **words)
