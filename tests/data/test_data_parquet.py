"""Parquet: cells of any type become text or a malformed record with its row; ambiguous columns are refused."""

import random
from decimal import Decimal

import pyarrow
import pyarrow.parquet
import pytest
from data_documents import documents

from coe_megatron.data.records import InputError


def write(path, *columns, names=("text",), **options):
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(list(columns), names=list(names)), path, **options)
    return path


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.binary(), pyarrow.large_binary(), "dictionary"])
def test_bytes_that_are_no_utf8_are_malformed(tmp_path, kind):
    stored = pyarrow.array([b"good", b"bad \xff", b"\xef\xbb\xbfmarked"], pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), len(stored), stored.buffers())  # trusted to be text
    column = text.dictionary_encode() if kind == "dictionary" else text if kind == pyarrow.string() else stored
    found = documents(write(tmp_path / "in.parquet", column))
    assert (found["row 1"], found["row 3"]) == ("good", "marked")
    assert found["row 2"].startswith("(field 'text' is not valid UTF-8 ('utf-8' codec can't decode byte 0xff")


@pytest.mark.parametrize("kind", [pyarrow.float16(), pyarrow.float32(), pyarrow.float64()])
def test_nan_and_infinity_are_no_text(tmp_path, kind):
    values = [1.5, float("nan"), float("-inf"), None]
    found = documents(write(tmp_path / "in.parquet", pyarrow.array(values, pyarrow.float64()).cast(kind)))
    assert found["row 1"] == "1.5" and "is NoneType" in found["row 4"]
    assert [found[f"row {row}"] for row in (2, 3)] == [
        f"(field 'text' is {value}: it must be text or a finite number)" for value in ("nan", "-inf")
    ]


@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array([["a"], None]),
        pyarrow.array([{"text": "a"}, None]),
        pyarrow.array([True, None]),
        pyarrow.array([Decimal("1.5"), None]),
        pyarrow.array([0, None], pyarrow.timestamp("ns")),
    ],
)
def test_what_is_neither_text_nor_a_number_is_malformed(tmp_path, column):
    found = documents(write(tmp_path / "in.parquet", column))
    assert all(said.startswith("(field 'text' is ") for said in found.values()) and len(found) == 2


def test_integers_views_and_null_columns(tmp_path):
    assert documents(write(tmp_path / "a.parquet", pyarrow.array([7], pyarrow.uint64()))) == {"row 1": "7"}
    view = pyarrow.array(["a"], pyarrow.string_view())
    assert documents(write(tmp_path / "b.parquet", view)) == {"row 1": "a"}
    assert "NoneType" in documents(write(tmp_path / "c.parquet", pyarrow.nulls(1)))["row 1"]


def test_two_columns_of_the_wanted_name_are_refused(tmp_path):
    texts = pyarrow.array(["a"])
    write(tmp_path / "twice.parquet", texts, texts, texts, names=["text", "other", "text"])
    with pytest.raises(InputError, match=r"twice\.parquet has 2 columns 'text': rename all but one$"):
        documents(tmp_path / "twice.parquet")
    write(tmp_path / "others.parquet", texts, texts, texts, names=["text", "other", "other"])
    assert documents(tmp_path / "others.parquet") == {"row 1": "a"}
    nested = pyarrow.StructArray.from_arrays([texts, texts], names=["text", "text"])
    assert "is struct<" in documents(write(tmp_path / "nested.parquet", nested))["row 1"]
    write(tmp_path / "dotted.parquet", texts, pyarrow.array(["b"]), names=["text", "text.raw"])
    assert documents(tmp_path / "dotted.parquet") == {"row 1": "a"}


def test_a_cell_beyond_the_limit_is_malformed(tmp_path):
    """Also where one copy in the file stands for many."""
    column = pyarrow.array(["a", "x" * 100, "x" * 101] + ["y" * 500] * 200)
    found = documents(write(tmp_path / "in.parquet", column), 100)
    assert (found["row 1"], found["row 2"]) == ("a", "x" * 100)
    assert sum("more than 100 bytes" in said for said in found.values()) == 201


def test_rows_are_counted_over_batches_and_row_groups(tmp_path):
    column = pyarrow.array([str(number) for number in range(1000)])
    found = documents(write(tmp_path / "in.parquet", column, row_group_size=70))
    assert found == {f"row {number + 1}": str(number) for number in range(1000)}


@pytest.mark.parametrize(
    "content", [b"", b"PAR1", b'{"text": "a"}\n' * 9, bytes(500), b"PARE" + bytes(90) + b"PARE", b"PAR1" + b"\xff" * 90]
)
def test_what_is_no_parquet_is_one_line(tmp_path, content):
    (tmp_path / "in.parquet").write_bytes(content)
    with pytest.raises(InputError, match=r"^input .*in\.parquet cannot be read: ") as caught:
        documents(tmp_path / "in.parquet")
    assert str(caught.value).isprintable()


def test_a_file_without_rows_has_no_documents(tmp_path):
    assert documents(write(tmp_path / "in.parquet", pyarrow.array([], pyarrow.string()))) == {}


def test_damage_is_one_line_or_goes_unnoticed_and_is_never_an_error_of_ours(tmp_path):
    whole = write(tmp_path / "in.parquet", pyarrow.array([f"word {row % 7}" for row in range(200)])).read_bytes()
    dice, refused = random.Random(1), 0
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[dice.randrange(len(whole))] = dice.randrange(256)
        (tmp_path / "in.parquet").write_bytes(damaged)
        try:
            documents(tmp_path / "in.parquet")
        except InputError as error:
            assert str(error).isprintable() and len(str(error)) < 600
            refused += 1
    assert refused > 50
