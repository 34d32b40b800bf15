"""Worked arithmetic: an equation is evaluated from the text that is shown, so it cannot be wrong."""

import ast
import operator
from dataclasses import dataclass
from fractions import Fraction

_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


@dataclass(frozen=True)
class Calc:
    """One worked step. Formatted, it is its result: `f"{calc}"` is "12".

    Attributes:
        expression: the left side as shown, such as "4 * 3".
        value: its exact value.
    """

    expression: str
    value: Fraction

    def __str__(self) -> str:
        return number(self.value)

    def __int__(self) -> int:
        assert self.value.denominator == 1, f"{self.eq} is not a whole number"
        return int(self.value)

    @property
    def eq(self) -> str:
        """The complete equation, such as "4 * 3 = 12"."""
        return f"{self.expression} = {self}"


@dataclass(frozen=True)
class Problem:
    """A question, its worked reasoning, and the last step, whose result is the answer."""

    question: str
    reasoning: str
    answer: Calc


def calc(expression: str) -> Calc:
    """Evaluate an expression of numbers, + - * / and parentheses exactly.

    Raises:
        AssertionError: it contains anything else or divides by zero, which is a mistake in the template.
    """
    return Calc(expression, _evaluate(ast.parse(expression, mode="eval").body))


def part_of(whole: int | Calc, a: int, b: int) -> Calc:
    """a/b of a whole, in the usual form: "60 / 4" for a quarter, "60 * 3 / 4" for three quarters."""
    return calc(f"{whole} / {b}" if a == 1 else f"{whole} * {a} / {b}")


def number(value: int | Fraction) -> str:
    """A whole number or a decimal of at most two places; templates must not produce any other."""
    cents = Fraction(value) * 100
    assert cents.denominator == 1, f"{value} has more than two decimals"
    return f"{float(value):.2f}".rstrip("0").rstrip(".")


def dollars(value: int | Fraction) -> str:
    """An amount of money as written in a shop: "$4" or "$4.50"."""
    return f"${number(value)}" if Fraction(value).denominator == 1 else f"${float(value):.2f}"


def _evaluate(node: ast.expr) -> Fraction:
    if isinstance(node, ast.BinOp):
        operation = _OPERATORS[type(node.op)]
        return operation(_evaluate(node.left), _evaluate(node.right))
    assert isinstance(node, ast.Constant), f"{ast.unparse(node)} is not a number"
    return Fraction(str(node.value))
