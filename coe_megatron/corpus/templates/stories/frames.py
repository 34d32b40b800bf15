"""How stories word each kind of opening, event and ending, for the four frames a setting can belong to.

    OWNED    somebody has things                    "Maya has 24 marbles."
    MONEY    somebody has dollars                   "Ben has $40 in his savings jar."
    PLACES   things come to a place and leave it    "There are 24 passengers on a bus."
    AMOUNTS  a place holds so much of a stuff       "A tank holds 60 liters of water."

A table has one entry per kind: wording in the question => wording of its first step in the answer => of its second.
"|" separates alternatives, one of which is drawn. Braces hold the letters of `kinds`, the words of a setting, or {eq},
the equation of the step. "[gets ...]" and "[gives ...]" become a clause of the setting about the bracketed text.
"<name>" is the entry of that name in `_SHARED`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

MOMENTS = ("", "", "Then ", "Later ", "Next ", "After that ")


@dataclass(frozen=True)
class Wording:
    """The wordings of one kind.

    Attributes:
        asked: alternatives in the question.
        lines: for each step, alternatives in the answer.
    """

    asked: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]


Frame = Mapping[str, Wording]

_SHARED = {
    "daily": "[gets {d} {things}] {at} each of the next {k} {day}s | [gets {d} {things}] {k} {day}s in a row | "
    "[gets {d} {things}] {at} each of {k} {day}s",
    "daily_loss": "[gives {d} {things}] {at} each of the next {k} {day}s | [gives {d} {things}] {k} {day}s in a row | "
    "[gives {d} {things}] {at} each of {k} {day}s",
    "in_a_row": "{k} {day}s make {eq}. | in {k} {day}s that is {eq} {things}.",
    "packed": "{c} {boxes} of {m} make {eq}. | in {c} {boxes} there are {eq} {things}.",
    "twice": "twice {v} is {eq}. | doubled, that makes {eq} {things}.",
    "thrice": "3 times {v} is {eq}. | tripled, that makes {eq} {things}.",
    "half": "half of {v} is {eq}. | that leaves {eq} {things}.",
    "part": "1/{b} of {v} is {eq}. | 1/{b} of {v} {things} is {eq} {things}.",
    "fraction": "{a}/{b} of {v} is {eq}. | {a}/{b} of {v} {things} is {eq} {things}.",
    "percent": "{p}% of {v} is {eq}. | {p}% of {v} {things} is {eq} {things}.",
    "more": "that is {eq} more than at the start. | the difference is {eq} {things}.",
    "fewer": "that is {eq} fewer than at the start. | the difference is {eq} {things}.",
    "has": "now {he} has {eq} {things}. | that makes {eq} {things}. | {he} now has {eq} {things}.",
    "keeps": "{he} has {eq} {things} left. | that leaves {eq} {things}. | {he} keeps {eq} {things}.",
    "now": "now there are {eq} {things}. | that makes {eq} {things}. | there are now {eq} {things}.",
    "left": "that leaves {eq} {things}. | {eq} {things} are left. | there are {eq} {things} left.",
    "boxes": "that takes {eq} {boxes}. | they fill {eq} {boxes}.",
    "missing": "{eq} {things} are missing. | that takes {eq} more {things}.",
    "dollars": "that brings {eq} dollars. | altogether that makes {eq} dollars.",
    "each": "each of them gets {eq} {things}. | for each child there are {eq} {things}.",
    "other": "{other} has {eq} {things}. | then {other} has {eq} {things}.",
    "both": "together they have {eq} {things}. | in total that is {eq} {things}.",
}

_OWNED = """
count: {v} {things}
packed: {c} {boxes} of {m} {things} => <packed>
gain: [gets {n} more {things}] | [gets another {n} {things}] | [gets {n} {things}] => <has>
lose: [gives {n} {things}] | [gives {n} of {his} {things}] | [gives {n} of the {things}] => <keeps>
double: the number of {his} {things} doubles | {he} manages to double the number of {his} {things} |
    {he} doubles the number of {his} {things} => <twice>
triple: the number of {his} {things} triples | {he} manages to triple the number of {his} {things} |
    {he} triples the number of {his} {things} => <thrice>
halve: [gives half of {his} {things}] | [gives half of all {his} {things}] | [gives half of the {things} {he} has]
    => <half>
share: {he} sorts {his} {things} into {k} equal piles and keeps only one pile |
    {he} splits {his} {things} into {k} equal shares and keeps only one share |
    {he} makes {k} equal piles of {his} {things} and gives all but one pile away
    => each pile has {eq} {things}. | one of {k} equal parts is {eq} {things}.
part: [gives 1/{b} of {his} {things}] | [gives 1/{b} of all {his} {things}] |
    [gives 1/{b} of the {things} {he} has] => <part> => <keeps>
fraction: [gives {a}/{b} of {his} {things}] | [gives {a}/{b} of all {his} {things}] |
    [gives {a}/{b} of the {things} {he} has]
    => <fraction> => <keeps>
percent: [gives {p}% of {his} {things}] | [gives {p}% of all {his} {things}] |
    [gives {p}% of the {things} {he} has] => <percent> => <keeps>
packs: [gets {c} {boxes} of {m} {things}] | [gets {c} {boxes} of {m} {things} each] |
    [gets {c} more {boxes} of {m} {things}] => <packed> => <has>
hand_out: {he} gives {m} {things} to each of {c} friends | {c} friends of {who} get {m} {things} each from {him} |
    each of {c} neighbors gets {m} {things} from {him}
    => the {c} of them get {eq} {things}. | in all, {eq} {things} are given away. => <keeps>
daily: <daily> => <in_a_row> => <has>
daily_loss: <daily_loss> => <in_a_row> => <keeps>
now: how many {things} does {who} have now? | how many {things} does {who} have in the end? |
    with how many {things} does {who} end up?
more: how many more {things} than at the start does {who} have now? |
    by how many has the number of {his} {things} grown since the start? => <more>
fewer: how many fewer {things} than at the start does {who} have now? |
    by how many has the number of {his} {things} fallen since the start? => <fewer>
target: {he} would like to have {t} {things}. How many are still missing? |
    how many more {things} does {who} need to have {t}? |
    how many are missing until {who} has {t} {things}? => <missing>
boxes: {he} packs all of {his} {things} into {boxes} of {m}. How many {boxes} does {he} need? |
    {boxes} that hold {m} {things} each are filled with all of {his} {things}. How many {boxes} does {who} fill?
    => <boxes>
each: {he} shares {his} {things} equally among {k} children. How many {things} does each child get? |
    {k} children share {his} {things} equally. How many {things} does each of them get? => <each>
price: {he} sells all of {his} {things} for ${r} each. How many dollars does {he} get? |
    a buyer pays ${r} for each of {his} {things}. How many dollars does {who} get? => <dollars>
other: {other} has {x} more {things} than {who} now. How many {things} does {other} have? |
    now {other} has {x} {things} more than {who}. How many {things} does {other} have? => <other>
together: {other} has {x} more {things} than {who} now. How many {things} do they have together? |
    now {other} has {x} {things} more than {who}. How many {things} do both of them have in total? => <other> => <both>
"""

_MONEY = """
count: ${v}
gain: [gets ${n}] | [gets another ${n}] | [gets ${n} more] => <has>
lose: [gives ${n}] | [gives ${n} of the money] | [gives ${n} of {his} money] => <keeps>
double: {his} money doubles | {he} gets as much again from {his} {relative} | {he} doubles {his} money => <twice>
halve: [gives half of {his} money] | [gives half of all {his} money] | [gives half of the money {he} has] => <half>
part: [gives 1/{b} of {his} money] | [gives 1/{b} of all {his} money] | [gives 1/{b} of the money {he} has]
    => <part> => <keeps>
fraction: [gives {a}/{b} of {his} money] | [gives {a}/{b} of all {his} money] |
    [gives {a}/{b} of the money {he} has] => <fraction> => <keeps>
percent: [gives {p}% of {his} money] | [gives {p}% of all {his} money] | [gives {p}% of the money {he} has]
    => <percent> => <keeps>
grow: {his} money grows by {p}% | {he} gets {p}% more from {his} {relative} | {his} {relative} adds {p}% to {his} money
    => <percent> => <has>
packs: {he} works {c} hours for ${m} an hour | {he} sells {c} old books for ${m} each |
    {c} neighbors pay {him} ${m} each for help in the garden
    => that brings {eq} {things}. | {he} gets {eq} {things} for that. => <has>
hand_out: {he} buys {c} {goods} for ${m} each | {he} pays ${m} for each of {c} {goods} |
    {he} buys {c} {goods} that cost ${m} each
    => the {goods} cost {eq} {things}. | {he} pays {eq} {things}. => <keeps>
daily: [gets ${d}] {at} each of the next {k} {day}s | [gets ${d}] {k} {day}s in a row |
    [gets ${d}] {at} each of {k} {day}s => <in_a_row> => <has>
daily_loss: [gives ${d}] {at} each of the next {k} {day}s | [gives ${d}] {k} {day}s in a row |
    [gives ${d}] {at} each of {k} {day}s => <in_a_row> => <keeps>
now: how many {things} does {who} have now? | how many {things} does {who} have in the end? |
    how much money does {who} have in the end?
more: how many more {things} than at the start does {who} have now? |
    by how many {things} has {his} money grown since the start?
    => that is {eq} {things} more than at the start. | since the start it has grown by {eq} {things}.
fewer: how many fewer {things} than at the start does {who} have now? |
    how many {things} less than at the start does {who} have?
    => that is {eq} {things} less than at the start. | the difference is {eq} {things}.
target: {he} wants a {gadget} that costs ${t}. How many {things} are still missing? |
    how many more {things} does {who} need for a {gadget} that costs ${t}? => <missing>
each: {he} shares {his} money equally among {k} children. How many {things} does each child get? |
    {k} children share {his} money equally. How many {things} does each of them get? => <each>
other: {other} has ${x} more than {who} now. How many {things} does {other} have? |
    now {other} has {x} {things} more than {who}. How much money does {other} have? => <other>
together: {other} has ${x} more than {who} now. How many {things} do they have together? |
    now {other} has {x} {things} more than {who}. How much money do both of them have in total? => <other> => <both>
"""

_HERE = """
daily: <daily> => <in_a_row> => <now>
daily_loss: <daily_loss> => <in_a_row> => <left>
other: {at_place} a second {place} there are {x} more {things}. How many {things} are {at_place} the second {place}? |
    there are {x} more {things} {at_place} a second {place}. How many {things} does the second {place} have?
    => {at_place} the second {place} there are {eq} {things}. | the second {place} has {eq} {things}.
together: {at_place} a second {place} there are {x} more {things}. How many {things} do both places have together? |
    there are {x} more {things} {at_place} a second {place}. How many {things} is that in all?
    => {at_place} the second {place} there are {eq} {things}. | the second {place} has {eq} {things}.
    => together that is {eq} {things}. | in total that is {eq} {things}.
"""

_PLACES = """
count: {v} {things}
packed: {c} {boxes} of {m} {things} => <packed>
gain: [gets {n} more {things}] | [gets another {n} {things}] | [gets {n} {things}] => <now>
lose: [gives {n} {things}] | [gives {n} of the {things}] | [gives {n} of the {things} {here}] => <left>
double: the number of {things} doubles | the number of {things} becomes twice as large => <twice>
halve: [gives half of the {things}] | [gives half of all the {things}] | [gives half of all {things} {here}] => <half>
part: [gives 1/{b} of the {things}] | [gives 1/{b} of all the {things}] | [gives 1/{b} of all {things} {here}]
    => <part> => <left>
fraction: [gives {a}/{b} of the {things}] | [gives {a}/{b} of all the {things}] | [gives {a}/{b} of all {things} {here}]
    => <fraction> => <left>
percent: [gives {p}% of the {things}] | [gives {p}% of all the {things}] | [gives {p}% of all {things} {here}]
    => <percent> => <left>
grow: the number of {things} grows by {p}% | the number of {things} rises by {p}% => <percent> => <now>
packs: [gets {c} {boxes} of {m} {things}] | [gets {c} {boxes} of {m} {things} each] |
    [gets {c} more {boxes} of {m} {things}] => <packed> => <now>
hand_out: [gives {c} {boxes} of {m} {things}] | [gives {c} {boxes} of {m} {things} each] => <packed> => <left>
now: how many {things} are {here} now? | how many {things} are there now? | how many {things} are there in the end?
more: how many more {things} than at the start are {here} now? |
    by how many has the number of {things} grown since the start? => <more>
fewer: how many fewer {things} than at the start are {here} now? |
    by how many has the number of {things} fallen since the start? => <fewer>
target: how many more {things} does it take until there are {t} {here}? |
    how many more {things} would bring the number to {t}? => <missing>
boxes: {split} {boxes} of {m}. How many {boxes} are there? | {split} {boxes} of {m} {things} each. How many {boxes} is
    that? => that makes {eq} {boxes}. | there are {eq} {boxes}.
"""

_AMOUNTS = """
count: {v} {things} of {stuff}
packed: {c} {boxes} of {m} {things} of {stuff} => <packed>
gain: [gets {n} more {things}] | [gets another {n} {things}] | [gets {n} {things} of {stuff}] => <now>
lose: [gives {n} {things}] | [gives {n} {things} of {stuff}] | [gives {n} {things} of the {stuff}] => <left>
double: the amount of {stuff} doubles | the amount of {stuff} becomes twice as large => <twice>
halve: [gives half of the {stuff}] | [gives half of all the {stuff}] | [gives half of the {stuff} {here}] => <half>
part: [gives 1/{b} of the {stuff}] | [gives 1/{b} of all the {stuff}] | [gives 1/{b} of the {stuff} {here}]
    => <part> => <left>
fraction: [gives {a}/{b} of the {stuff}] | [gives {a}/{b} of all the {stuff}] | [gives {a}/{b} of the {stuff} {here}]
    => <fraction> => <left>
percent: [gives {p}% of the {stuff}] | [gives {p}% of all the {stuff}] | [gives {p}% of the {stuff} {here}]
    => <percent> => <left>
grow: the amount of {stuff} grows by {p}% | the amount of {stuff} rises by {p}% => <percent> => <now>
packs: [gets {c} {boxes} of {m} {things}] | [gets {c} {boxes} of {m} {things} each] |
    [gets {c} more {boxes} of {m} {things}] => <packed> => <now>
hand_out: [gives {c} {boxes} of {m} {things}] | [gives {c} {boxes} of {m} {things} each] => <packed> => <left>
now: how many {things} are {here} now? | how many {things} of {stuff} are there now? |
    how many {things} of {stuff} are there in the end?
more: how many more {things} than at the start are {here} now? |
    by how many {things} has the amount of {stuff} grown since the start? => <more>
fewer: how many fewer {things} than at the start are {here} now? |
    by how many {things} has the amount of {stuff} fallen since the start? => <fewer>
target: there is room for {t} {things} {here}. How many more {things} fit in? |
    how many more {things} does it take until there are {t} {here}? => <missing>
boxes: {split} {boxes} of {m} {things}. How many {boxes} are there? |
    {split} {boxes} of {m} {things} each. How many {boxes} is that?
    => that makes {eq} {boxes}. | there are {eq} {boxes}.
price: all of the {stuff} is sold for ${r} a {unit}. How many dollars is that? |
    at ${r} a {unit}, how many dollars is all of the {stuff} worth? => <dollars>
"""


def _frame(table: str) -> Frame:
    """Parse a table; an entry starts with its kind and continues on indented lines."""
    entries = (entry.partition(":") for entry in re.split(r"\n+(?=\w)", table.strip()))
    return {kind: _wording(" ".join(text.split())) for kind, _, text in entries}


def _wording(text: str) -> Wording:
    text = re.sub(r"<(\w+)>", lambda shared: _SHARED[shared[1]], text)
    asked, *lines = (tuple(part.split(" | ")) for part in text.split(" => "))
    return Wording(asked, tuple(lines))


FRAMES: dict[str, Frame] = {
    "owned": _frame(_OWNED),
    "money": _frame(_MONEY),
    "places": _frame(_HERE + _PLACES),
    "amounts": _frame(_HERE + _AMOUNTS),
}
