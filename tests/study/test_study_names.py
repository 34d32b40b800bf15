"""Labels are data: names of folders, lists, what is shown of long ones."""

import pytest

from coe_megatron.study.plan.names import (
    arm_name,
    joined,
    listed,
    looks_like,
    quoted,
    row_label,
    slug,
    title,
)
from coe_megatron.text import shortened


@pytest.mark.parametrize(
    ("label", "name"),
    [("MoE(8/64) L4", "moe-8-64-l4"), ("iteration_norm", "iteration-norm"), ("1e-3", "1e-3"), ("../x", "x"), ("$", "")],
)
def test_slugs(label: str, name: str) -> None:
    assert slug(label) == name


def test_names_of_arms_are_their_own_whatever_is_taken() -> None:
    assert arm_name(["MoE(8/64)", "prenorm"], ()) == "moe-8-64_prenorm"
    assert arm_name(["a b"], {"a-b"}) == "a-b-" + arm_name(["a b"], {"a-b"})[4:] != arm_name(["a/b"], {"a-b"})
    first = arm_name(["x" * 300], ())
    assert len(first) == 120 and first == arm_name(["x" * 300], ()) != arm_name(["x" * 301], ())
    second = arm_name(["x" * 300], {first})
    assert second not in {first} and second.startswith(first)
    assert arm_name(["$", "a"], ()).startswith("a-") and arm_name(["$"], ()).startswith("arm-")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("MoE(8/64)", "MoE(8/64)"),
        ("a, b", '"a, b"'),
        ('say "x"', '"say ""x"""'),
        ("", '""'),
        ("a\nb", "a\\nb"),
        ("$x$ y", '"$x$ y"'),
    ],
)
def test_members_of_a_list_are_quoted_where_they_could_be_several(text: str, shown: str) -> None:
    assert quoted(text) == shown


def test_lists_cannot_be_misread_and_have_an_end() -> None:
    assert listed(["a, b", "c"]) == '"a, b", c' != listed(["a", "b, c"])
    assert listed(map(str, range(50))).endswith("18, 19 and 30 more") and len(listed(["n" * 300])) == 100
    assert joined({"x": "a b", "y": "c"}) != joined({"x": "a", "y": "b c"})
    assert title({"x": 'a, "b"'}) == 'a, "b"' and title({"x": "a b", "y": "c"}) == '"a b" c'
    assert row_label(["a", "b, c"]) != row_label(["a, b", "c"]) and row_label([8, [0, 1]]) == "8, [0, 1]"
    assert row_label(["a, b"]) == "a, b" and row_label([1, 4]) == "1, 4"


def test_what_looks_alike() -> None:
    assert looks_like("é") == looks_like("e\u0301") and looks_like("a  b ") == looks_like("a b")
    assert looks_like("a\u200bb") != looks_like("ab")


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("abcdefghijkl", "abcdefghijkl"),
        ("abcdefghijklm", "abcdefgh…klm"),
        ("漢" * 6, "漢" * 6),
        ("漢" * 7, "漢漢漢漢…漢"),
    ],
)
def test_long_text_keeps_both_ends(text: str, short: str) -> None:
    assert shortened(text, 12) == short
