"""JSON and YAML of any content: a value, or a ValueError of one line, in bounded time and memory."""

import json
import re

import pytest
import yaml

from coe_megatron.parsing import DEEPEST, MOST_NODES, check_yaml, parse_json


@pytest.mark.parametrize("depth", [DEEPEST + 1, 100, 2_000, 100_000, 1_000_000])
@pytest.mark.parametrize("ends", [("[", "]"), ('{"a":', "}")])
def test_json_nested_deep(depth: int, ends: tuple[str, str]) -> None:
    for text in (ends[0] * depth, ends[0] * depth + "1" + ends[1] * depth):
        with pytest.raises(ValueError, match=r"^[^\n]+$"):
            parse_json(text)


def test_json_nested_as_deep_as_it_may_be() -> None:
    text = "[" * DEEPEST + "]" * DEEPEST
    assert parse_json(text) == json.loads(text)
    assert parse_json("[" * 100 + "]" * 100, deepest=None) is not None


@pytest.mark.parametrize(
    "text", ["NaN", "[Infinity]", '{"a": -Infinity}', "", "{", "1 2", "9" * 5000, b"\xff", b'"\xff"']
)
def test_what_is_no_json(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        parse_json(text)


@pytest.mark.parametrize(
    ("numeral", "shown"),
    [
        ("1e400", "1e400"),
        ("-1e400", "-1e400"),
        ("9" * 400 + ".5", "9" * 37 + "…" + "9" * 10 + ".5"),
        ("1" + "0" * 30 + "e300", "1" + "0" * 30 + "e300"),
    ],
)
def test_a_numeral_that_overflows_is_no_number(numeral: str, shown: str) -> None:
    with pytest.raises(ValueError, match=rf"^{re.escape(shown)} is too large for a number$"):
        parse_json(f'{{"a": [{numeral}]}}')


def test_numerals_that_do_not_overflow_are_read_as_ever() -> None:
    text = "[1e308, -1.7976931348623157e308, 1e-400, 0.1, -0.0, 1E5, " + "9" * 400 + "]"
    assert repr(parse_json(text)) == repr(json.loads(text))


TENFOLD = "a0: &a0 [1,1,1,1,1,1,1,1,1,1]\n" + "\n".join(
    f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)
)
REFUSED = {
    "[" * 100_000: "nested more than",
    "{a: " * 40 + "1" + "}" * 40: "nested more than",
    "\n".join(" " * n + "a:" for n in range(100)): "nested more than",
    "- 1\n" * (MOST_NODES + 1): "more than 5,000",
    TENFOLD: "more than 5,000",
    "a: &a [*a]": "refers to itself",
    "a: *b": "refers to itself, or to nothing",
    "a: 010": "base 8",
    "a: -0_7": "base 8",
    "a: 1:30": "base 60",
    "a: 190:20:30.15": "base 60",
    "a: Yes": "truth value",
    "no: 1": "truth value",
    "[on, off]": "truth value",
    "a: 0x" + "f" * 10_000: "a number of 10,002 digits",
    "a: " + "9" * 10_000: "a number of 10,000 digits",
}  # fmt: skip


@pytest.mark.parametrize("text", REFUSED, ids=range(len(REFUSED)))
def test_yaml_that_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=REFUSED[text]) as error:
        check_yaml(text)
    assert len(str(error.value).splitlines()) == 1


def test_yaml_that_is_not() -> None:
    plain = (
        "a: 0\nb: 10\nc: 0x10\nd: 1_000\ne: true\nf: '010'\ng: \"yes\"\nh: 1e-3\ni: 0.5\nj: 12-30\nk: nope\nl: 0o17\n"
    )
    assert check_yaml(plain) == 1 + 2 * 12
    assert check_yaml(f"sha256: {'0123456789abcdef' * 4}") == 3
    assert check_yaml("a: &x {b: 1}\nc: *x\nd: *x\n") == 1 + 4 + 4 + 4
    with pytest.raises(yaml.YAMLError):
        check_yaml("a: [")
