"""The built-in corpus: right, natural, deterministic, and with validation templates that training never shows."""

import itertools
import operator
import random
import re
from fractions import Fraction
from typing import get_args

import pytest

from coe_megatron.corpus.templates.arithmetic import Problem, calc
from coe_megatron.corpus.templates.stories import telling
from coe_megatron.corpus.templates.stories.kinds import EVENTS
from coe_megatron.corpus.templates.stories.telling import SETTINGS, draw_story, held_out, plots, tell
from coe_megatron.corpus.templates.words import Draw
from coe_megatron.corpus.word_problems import FAMILIES, HELD_OUT, STORY_PERCENT, generate, templates
from coe_megatron.data.manifest import Split

pytestmark = pytest.mark.thorough

NUMBER = r"\d+(?:\.\d+)?"
EQUATION = re.compile(rf"([\d(][\d.\s()*/+-]*?) = ({NUMBER})")
ENDING = re.compile(rf"The answer is ({NUMBER})\.$")
COMMON_KNOWLEDGE = {
    "1",
    "2",
    "3",
    "4",
    "5",
    "10",
    "12",
    "25",
    "60",
    "100",
    "1000",
}  # sides, cents, dozens, minutes, percent
APPLY = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
SPLITS = get_args(Split)
STORY = Problem("A story?", "So 1 + 1 = 2.", calc("1 + 1"))
ALL = {**templates("train"), **templates("valid")}


def evaluate(text: str) -> Fraction:
    """A small recursive-descent evaluator of its own: sums of products of numbers and parentheses."""
    tokens = re.findall(rf"{NUMBER}|[-+*/()]", text)

    def atom() -> Fraction:
        token = tokens.pop(0)
        if token != "(":
            return Fraction(token)
        value = chain(lambda: chain(atom, "*/"), "+-")
        assert tokens.pop(0) == ")"
        return value

    def chain(part, signs: str) -> Fraction:
        value = part()
        while tokens and tokens[0] in signs:
            value = APPLY[tokens.pop(0)](value, part())
        return value

    value = chain(lambda: chain(atom, "*/"), "+-")
    assert not tokens, f"{text!r} leaves {tokens}"
    return value


def drawn(name: str, count: int):
    draw = Draw(random.Random(name))
    return [ALL[name](draw) for _ in range(count)]


def test_the_evaluator_of_this_test_knows_precedence():
    assert evaluate("2 * (3 + 4) - 8 / 4") == 12
    assert evaluate("7 - 3 - 4") == 0


def check_equations(problem):
    """Every equation is right, and one of them gives the answer."""
    equations = EQUATION.findall(problem.reasoning)
    assert 2 <= len(equations) <= 6, problem.reasoning
    assert problem.reasoning.count(" = ") == len(equations), problem.reasoning
    for left, right in equations:
        assert evaluate(left) == Fraction(right), f"{left} = {right}"
    assert str(problem.answer) in {right for _, right in equations}


def check_steps(problem):
    """Steps start from the question and lead on to the answer."""
    steps = [(re.findall(NUMBER, left), right) for left, right in EQUATION.findall(problem.reasoning)]
    known = COMMON_KNOWLEDGE | set(re.findall(NUMBER, problem.question))
    for place, (used, result) in enumerate(steps):
        assert known.issuperset(used), f"{used} come from nowhere: {problem}"
        known.add(result)
        later = [number for numbers, _ in steps[place + 1 :] for number in numbers]
        assert not later or result in later, f"{result} is never used: {problem}"
    assert steps[-1][1] == str(problem.answer)


def check_sentences(problem):
    """The sentences are whole, with plurals and articles where they belong."""
    text = f"{problem.question} {problem.reasoning}"
    assert problem.question.endswith("?") and problem.reasoning.endswith(".")
    assert text[0].isupper() or text[0].isdigit()
    assert not re.search(r"  | [,.?]|[.?] [a-z]|\{|\}|[\[\]~|]|<|None", text), text
    assert not re.search(r"(?<![\d./])1 (?!has|is)[a-z]+s\b", text), f"a plural after 1: {text}"
    assert not re.search(r"(?<![\d./])(?!1 )\d+ (hour|day|dollar|point|basket|liter|pear)\b", text), text
    assert not re.search(r"\ba [aeiou]|\ban [^aeiouh]", text), f"a wrong article: {text}"
    assert not re.search(r"= 0(?![\d.])|= -", text), f"nothing is left over: {text}"


@pytest.mark.parametrize("check", [check_equations, check_steps, check_sentences])
@pytest.mark.parametrize("name", ALL)
def test_problems_of_templates(name, check):
    for problem in drawn(name, 60):
        check(problem)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_stories_of_every_setting_with_each_of_its_events(setting):
    draw = Draw(random.Random(setting.name))
    for event in sorted(setting.kinds & EVENTS.keys()):
        choices = [plot for split in SPLITS for steps in (2, 3, 4) for plot in plots(split, setting.kinds, steps)]
        stories = [tell(draw, setting, draw.choice([plot for plot in choices if event in plot])) for _ in range(15)]
        assert any(stories), f"no numbers are found for {event}"
        for story in filter(None, stories):
            check_equations(story)
            check_steps(story)
            check_sentences(story)


def test_counts_of_stories_are_whole_and_positive():
    draw = Draw(random.Random(0))
    for split in SPLITS:
        for _ in range(500):
            numbers = re.findall(NUMBER, draw_story(draw, split).reasoning)
            assert all(number.isdigit() and int(number) > 0 for number in numbers)


def test_training_never_tells_a_story_of_a_held_out_plot_in_any_setting(monkeypatch):
    told = {split: set() for split in SPLITS}
    seen = {split: set() for split in SPLITS}
    for split in SPLITS:

        def spy(draw, setting, plot, split=split):
            told[split].add(plot)
            seen[split].update((setting.name, kind) for kind in plot)
            return tell(draw, setting, plot)

        monkeypatch.setattr(telling, "tell", spy)
        list(generate(split, 6000, 0))
    assert not any(held_out(plot) for plot in told["train"]) and all(held_out(plot) for plot in told["valid"])
    assert told["train"].isdisjoint(told["valid"]) and len(told["train"]) > 500 and len(told["valid"]) > 80
    assert seen["valid"] <= seen["train"], "all parts of a validation story are known from training"


def test_every_plot_belongs_to_one_split_and_an_eighth_of_them_is_held_out():
    kinds = frozenset(EVENTS)
    train, valid = ({plot for steps in (2, 3, 4) for plot in plots(split, kinds, steps)} for split in SPLITS)
    assert train.isdisjoint(valid) and 0.1 < len(valid) / len(train | valid) < 0.15
    assert all(2 <= len(plot) <= 4 and len(set(plot)) == len(plot) for plot in train | valid)


def test_the_share_of_stories_is_as_announced(monkeypatch):
    monkeypatch.setattr("coe_megatron.corpus.word_problems.draw_story", lambda draw, split: STORY)
    for split in SPLITS:
        stories = sum(problem["query"] == STORY.question for problem in generate(split, 2000, 0))
        assert stories / 20 == pytest.approx(STORY_PERCENT, abs=3)


def test_there_are_many_templates_in_many_families():
    assert len(ALL) >= 60 and len(FAMILIES) >= 8


def test_validation_holds_templates_that_training_never_shows():
    assert templates("train").keys().isdisjoint(templates("valid"))
    assert set(templates("valid")) == HELD_OUT
    assert set(templates("train").values()).isdisjoint(templates("valid").values())


def test_a_response_ends_in_its_number():
    for problem in itertools.chain(generate("train", 200, 5), generate("valid", 200, 5)):
        assert problem.keys() == {"query", "response"}
        reasoning, _, _ = problem["response"].rpartition(" The answer is")
        assert ENDING.search(problem["response"])[1] in reasoning


def test_the_same_seed_gives_the_same_problems_and_a_longer_run_begins_with_the_shorter():
    assert list(generate("train", 50, 3)) == list(generate("train", 80, 3))[:50]
    assert list(generate("train", 50, 3)) != list(generate("train", 50, 4))


def test_nearly_all_problems_differ():
    queries = [problem["query"] for problem in generate("train", 5000, 0)]
    assert len(set(queries)) > 0.99 * len(queries)


@pytest.mark.parametrize(("split", "count", "named"), [("test", 1, "'test'"), ("train", -1, "-1")])
def test_a_wrong_argument_is_named(split, count, named):
    with pytest.raises(ValueError, match=named):
        generate(split, count, 0)
