"""The built-in corpus: right, natural, deterministic, and with validation templates that training never shows."""

import itertools
import operator
import random
import re
from fractions import Fraction

import pytest

from coe_megatron.data.corpus import FAMILIES, HELD_OUT, generate, templates
from coe_megatron.data.templates.words import Draw

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


@pytest.mark.parametrize("name", ALL)
def test_every_equation_is_right_and_leads_to_the_answer(name):
    for problem in drawn(name, 60):
        equations = EQUATION.findall(problem.reasoning)
        assert 2 <= len(equations) <= 6, problem.reasoning
        assert problem.reasoning.count(" = ") == len(equations), problem.reasoning
        for left, right in equations:
            assert evaluate(left) == Fraction(right), f"{left} = {right}"
        assert str(problem.answer) in {right for _, right in equations}


@pytest.mark.parametrize("name", ALL)
def test_steps_start_from_the_question_and_lead_on_to_the_answer(name):
    for problem in drawn(name, 60):
        steps = [(re.findall(NUMBER, left), right) for left, right in EQUATION.findall(problem.reasoning)]
        known = COMMON_KNOWLEDGE | set(re.findall(NUMBER, problem.question))
        for place, (used, result) in enumerate(steps):
            assert known.issuperset(used), f"{used} come from nowhere: {problem}"
            known.add(result)
            later = [number for numbers, _ in steps[place + 1 :] for number in numbers]
            assert not later or result in later, f"{result} is never used: {problem}"
        assert steps[-1][1] == str(problem.answer)


@pytest.mark.parametrize("name", ALL)
def test_the_sentences_are_whole(name):
    for problem in drawn(name, 60):
        text = f"{problem.question} {problem.reasoning}"
        assert problem.question.endswith("?") and problem.reasoning.endswith(".")
        assert text[0].isupper() or text[0].isdigit()
        assert not re.search(r"  | [,.?]|\{|\}|<|None", text), text
        assert not re.search(r"(?<![\d./])1 (?!has|is)[a-z]+s\b", text), f"a plural after 1: {text}"
        assert not re.search(r"(?<![\d./])(?!1 )\d+ (hour|day|dollar|point|basket|liter|pear)\b", text), text
        assert not re.search(r"\ba [aeiou]|\ban [^aeiouh]", text), f"a wrong article: {text}"
        assert not re.search(r"= 0(?![\d.])|= -", text), f"nothing is left over: {text}"


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
