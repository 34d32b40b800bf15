"""Compose a story: draw numbers with whole results, and write the question and the worked answer.

A story is a setting and a plot (the kinds of its events in order) between an opening and an ending. Only validation
uses held-out plots, in every setting: training contains all parts of a validation story, but not in that order.
"""

import re
from collections.abc import Collection, Iterator
from functools import cache
from hashlib import sha256
from itertools import permutations
from typing import NamedTuple

from coe_megatron.corpus.templates.arithmetic import Calc, Problem, calc
from coe_megatron.corpus.templates.stories import people, places
from coe_megatron.corpus.templates.stories.frames import FRAMES, MOMENTS
from coe_megatron.corpus.templates.stories.kinds import ENDINGS, EVENTS, KINDS, OPENINGS, Kind, draw_numbers
from coe_megatron.corpus.templates.stories.settings import Setting
from coe_megatron.corpus.templates.words import RELATIVES, Draw
from coe_megatron.data.manifest import Split

Plot = tuple[str, ...]

SETTINGS: tuple[Setting, ...] = people.SETTINGS + places.SETTINGS
STEPS_OF_A_PLOT = (2, 2, 3, 3, 3, 3, 3, 4)  # number of steps of the events; one entry is drawn uniformly
MAX_STEPS = 3  # with more steps than this, opening and ending add none
HELD_OUT_FRACTION = 1 / 8
_EXCLUSIVE = ({"double", "halve"}, {"double", "triple"})  # no story has both
_MIN_RESULT = 2  # so that nouns are always plural
_TRIES = 20  # to draw the numbers of one event, before we draw another story
_CLAUSE = re.compile(r"\[(gets|gives) (.*?)\]")


class Beat(NamedTuple):
    """One opening, event or ending with its numbers by letter and its worked steps."""

    kind: str
    numbers: dict[str, int]
    steps: list[Calc]


def held_out(plot: Plot) -> bool:
    """Whether only validation uses this plot; a hash of its kinds decides."""
    return int.from_bytes(sha256(" ".join(plot).encode()).digest()[:8]) < HELD_OUT_FRACTION * 2**64


@cache
def plots(split: Split, kinds: frozenset[str], steps: int) -> tuple[Plot, ...]:
    """The plots of a split: two or more different events of these kinds, with `steps` steps in total."""
    return tuple(plot for plot in _all_plots(kinds, steps) if held_out(plot) == (split == "valid"))


def _all_plots(kinds: frozenset[str], steps: int) -> Iterator[Plot]:
    possible = [kind for kind in EVENTS if kind in kinds]
    for events in range(2, steps + 1):
        for plot in permutations(possible, events):
            if _steps(plot) == steps and not any(both.issubset(plot) for both in _EXCLUSIVE):
                yield plot


def draw_story(d: Draw, split: Split) -> Problem:
    """Draw a story with a plot of the split."""
    story = None
    while story is None:
        setting = d.choice(SETTINGS)
        story = tell(d, setting, d.choice(plots(split, setting.kinds, d.choice(STEPS_OF_A_PLOT))))
    return story


def tell(d: Draw, setting: Setting, plot: Plot) -> Problem | None:
    """Draw a story of this plot with a suitable opening and ending, or None if no suitable numbers are found."""
    opening = d.choice(_fitting(OPENINGS, setting, _steps(plot)))
    ending = d.choice(_fitting(ENDINGS, setting, _steps((opening, *plot))))
    beats = _work_out(d, setting, (opening, *plot, ending))
    return _word(d, setting, beats) if beats else None


def _steps(kinds: Collection[str]) -> int:
    return sum(len(KINDS[kind].steps) for kind in kinds)


def _fitting(choices: dict[str, Kind], setting: Setting, used: int) -> list[str]:
    """The openings or endings that a setting allows; those with steps only if they do not exceed MAX_STEPS."""
    possible = (name for name in choices if name in setting.kinds)
    return [name for name in possible if not _steps((name,)) or used + _steps((name,)) <= MAX_STEPS]


def _work_out(d: Draw, setting: Setting, kinds: Plot) -> list[Beat] | None:
    """Numbers and steps of each kind in turn, or None if no suitable numbers are found for one."""
    beats: list[Beat] = []
    count = first = 0
    for name in kinds:
        for _ in range(_TRIES):
            numbers = {"v": count, "f": first, **draw_numbers(d, KINDS[name], setting.sizes, count)}
            steps = _worked(KINDS[name], numbers)
            after = int(steps[-1]) if steps else numbers["v"]
            if steps is not None and (name in ENDINGS or setting.sizes.least <= after <= setting.sizes.most):
                break
        else:
            return None
        beats.append(Beat(name, numbers, steps))
        count, first = after, first or after
    return beats


def _worked(kind: Kind, numbers: dict[str, int]) -> list[Calc] | None:
    """The steps of a kind, or None if a result is not whole or is too small for a plural."""
    steps: list[Calc] = []
    for expression in kind.steps:
        step = calc(expression.format(**numbers, s=steps[-1] if steps else ""))
        if step.value < _MIN_RESULT or step.value.denominator != 1:
            return None
        steps.append(step)
    return steps


def _word(d: Draw, setting: Setting, beats: list[Beat]) -> Problem:
    """The question and the worked answer; the answer names the person once, then uses the pronoun."""
    frame, words = FRAMES[setting.frame], _words(d, setting)
    asked: list[str] = []
    lines: list[str] = []
    for beat, moment in zip(beats, ("", *d.some(MOMENTS, len(beats) - 2), ""), strict=True):
        known = words | {letter: str(value) for letter, value in beat.numbers.items()}
        text = d.choice(frame[beat.kind].asked)
        if beat.kind in OPENINGS:
            text = d.choice(setting.clauses["starts"]).replace("{count}", text)
        asked.append(_sentence(d, setting, moment + text, known))
        for step, wordings in zip(beat.steps, frame[beat.kind].lines, strict=True):
            he = words["he"] if lines else words["who"]
            lines.append(_sentence(d, setting, d.choice(wordings), known | {"he": he, "eq": step.eq}))
    last = [step for beat in beats for step in beat.steps][-1]
    return Problem(" ".join(asked), " ".join(lines), last)


def _words(d: Draw, setting: Setting) -> dict[str, str]:
    """The words of the setting and of the people in the story."""
    who, other = d.people(2)
    people_of_it = {"who": who.name, "he": who.he, "him": who.him, "his": who.his, "other": other.name}
    return {**setting.words, **people_of_it, "relative": d.choice(RELATIVES)}


def _sentence(d: Draw, setting: Setting, text: str, words: dict[str, str]) -> str:
    """Fill clauses and words into a wording, capitalize it and end it with a full stop."""
    text = _CLAUSE.sub(lambda found: d.choice(setting.clauses[found[1]]).replace("~", found[2]), text).format(**words)
    closed = text if text[-1] in ".?" else f"{text}."
    return closed[0].upper() + closed[1:]
