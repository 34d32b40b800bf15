"""Columns of a table for a terminal; what is cut is tested with the names of arms."""

from coe_megatron.text import aligned, aligned_facts, duration


def test_columns_are_as_wide_as_their_widest_cells() -> None:
    rows = [("name", "size", "note"), ("a", "1,000", "x"), ("long name", "7")]
    assert aligned(rows, "<><") == ["name        size  note", "a          1,000  x", "long name      7"]
    assert aligned(rows, ">", " | ")[1] == "        a | 1,000 |    x"
    assert aligned([], "<") == []


def test_facts_are_lines_whatever_they_hold() -> None:
    assert aligned_facts({"a": 1, "long": "two\nlines"}) == "a     1\nlong  two\\nlines"


def test_durations_have_the_unit_of_their_size() -> None:
    seconds = (0.0, 8.14e-6, 0.00526, 0.9996, 2, 1500)
    assert [duration(each) for each in seconds] == ["0 µs", "8.14 µs", "5.26 ms", "1 s", "2 s", "25.0 min"]
