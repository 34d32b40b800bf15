"""A record that cannot be used is malformed, with file and place, whatever is wrong with it and whatever it costs."""

import gzip
import json
import lzma
import pickle
import tracemalloc

import pyarrow
import pytest
from data_documents import TEXT, documents

from coe_megatron.data import sources
from coe_megatron.data.records import InputError, MalformedRecord
from coe_megatron.data.sources import read_chunks

MARK = b"\xef\xbb\xbf"
PACKERS = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pyarrow.compress(content, "zstd", asbytes=True),
}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ('{"text": NaN}', "NaN is not valid JSON"),
        ('{"text": "a", "other": [{"deep": -Infinity}]}', "-Infinity is not valid JSON"),
        ('{"text": 1e999}', "not valid JSON (1e999 is too large for a number)"),
        ('{"text": ' + "7" * 5000 + "}", "not valid JSON (Exceeds the limit"),
        ('{"text": "a", "meta": ' + "[" * 257 + "]" * 257 + "}", "nested more than 256 levels deep"),
        ('{"text": "a", "meta": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deep"),
        ('{"text": "a", "meta": ' + '{"a":' * 100_000, "nested too deep"),
        ('{"text": "a", "text": "b"}', "it has 'text' twice"),
        ('{"text": "a", "meta": {"b": 1, "b": 1}}', "it has 'b' twice"),
        ('{"text": ["a"]}', "field 'text' is list"),
        ('{"text": {"a": 1}}', "field 'text' is dict"),
        ('{"text": true}', "field 'text' is bool"),
        ('{"text": null}', "field 'text' is NoneType"),
        ('{"text": "\\ud800"}', "half of a surrogate pair"),
        (b'{"text": "\xed\xa0\x80"}', "not valid JSON ('utf-8' codec"),
        (b'{"text": "\xff"}', "not valid JSON ('utf-8' codec"),
        ('{"text": "\\ufeff"}', "is empty"),
        ('"text"', "not a JSON object"),
        ('{"a\\nb": 1}', r"field 'text' is missing; the record has a\nb"),
    ],
)
def test_a_record_that_cannot_be_used_is_malformed(tmp_path, record, reason):
    line = record if isinstance(record, bytes) else record.encode()
    (tmp_path / "in.jsonl").write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": 2.5}\n')
    found = documents(tmp_path / "in.jsonl")
    assert (found["line 1"], found["line 3"]) == ("good", "2.5")
    assert found["line 2"].startswith("(") and reason in found["line 2"]
    assert len(found["line 2"]) < 400 and found["line 2"].isprintable()


def test_nesting_that_is_usual_is_no_mistake(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "a", "meta": ' + "[" * 100 + "]" * 100 + "}")
    assert documents(tmp_path / "in.jsonl") == {"line 1": "a"}


@pytest.mark.parametrize("packed", PACKERS)
def test_a_byte_order_mark_is_no_text(tmp_path, packed):
    lines, blocks = MARK + b'{"text": "a"}\n' * 2, b"a\nb\n\nc\n"
    written = {
        "in.jsonl": (lines, {"line 1": "a", "line 2": "a"}),
        "inner.jsonl": (b'{"text": "\xef\xbb\xbfa"}\n', {"line 1": "a"}),
        "blank.jsonl": (MARK + b'\n{"text": "a"}\n' + lines, {"line 2": "a", "line 3": "a", "line 4": "a"}),
        "in.txt": (MARK + blocks, {"line 1": "a\nb", "line 4": "c"}),
        "blank.md": (MARK + b"\n\n" + blocks, {"line 3": "a\nb", "line 6": "c"}),
        "joined.txt": (
            blocks + b"\n" + MARK + blocks,
            {"line 1": "a\nb", "line 4": "c", "line 6": "a\nb", "line 9": "c"},
        ),
    }
    for name, (content, expected) in written.items():
        path = tmp_path / f"{name}{packed}"
        path.write_bytes(PACKERS[packed](content))
        assert documents(path) == expected, name


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("name", ["in.jsonl", "in.txt.gz"])
def test_another_encoding_is_said_in_one_line(tmp_path, encoding, name):
    content = ("\ufeff" if encoding.endswith("be") else "") + '{"text": "a"}\n'
    (tmp_path / name).write_bytes(PACKERS[".gz" if name.endswith(".gz") else ""](content.encode(encoding)))
    with pytest.raises(InputError, match=rf"input .*{name} is {encoding[:6].upper()}: it must be UTF-8"):
        documents(tmp_path / name)


def test_a_record_may_be_as_large_as_the_limit_and_no_larger(tmp_path):
    largest, larger = (json.dumps({"text": "x" * size}) for size in (87, 88))
    assert len(largest) == 99
    lines = {"line 1": "a", "line 2": "x" * 87, "line 4": "b", "line 3": "(it has more than 99 bytes, the limit"}
    (tmp_path / "in.jsonl").write_text("\n".join(['{"text": "a"}', largest, larger, '{"text": "b"}', larger]))
    found = documents(tmp_path / "in.jsonl", 99)
    assert all(found[place].startswith(text) for place, text in lines.items())
    assert "--max-record-bytes" in found["line 3"] and found["line 5"] == found["line 3"]
    (tmp_path / "in.txt").write_text(f"a\n\n{'x' * 99}\n\n{'y' * 60}\n{'y' * 60}\n{'y' * 60}\n\n{'z' * 500}\n\nb")
    found = documents(tmp_path / "in.txt", 99)
    assert (found["line 1"], found["line 3"], found["line 11"]) == ("a", "x" * 99, "b")
    assert found["line 5"] == found["line 9"] and "more than 99 bytes" in found["line 5"]
    assert list(found) == ["line 1", "line 3", "line 5", "line 9", "line 11"]


def bomb(path, content):
    """A file of a few kilobytes that decompresses to 40 MB, between two good records."""
    whole = b'{"text": "a"}\n\n' + content * (40_000_000 // len(content)) + b'\n\n{"text": "b"}\n'
    path.write_bytes(PACKERS[path.suffix](whole))


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["in.jsonl.gz", "in.txt.gz", "lines.txt.gz", "in.jsonl.xz", "in.jsonl.zst"])
def test_a_line_that_never_ends_costs_no_memory(tmp_path, monkeypatch, name):
    monkeypatch.setattr(sources, "CHUNK_BYTES", 1 << 16)
    bomb(tmp_path / name, b"x" * 9999 + (b"\n" if "lines" in name else b"x"))
    tracemalloc.start()
    found = documents(tmp_path / name, 1 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [text[:13] for text in found.values()] == ["a", "(it has more ", "b"] or ".txt" in name
    assert sum("it has more than 1,048,576 bytes" in text for text in found.values()) == 1
    assert peak < 16_000_000  # of which xz has 8 MiB


def test_what_is_too_large_is_said_before_the_rest_of_it_is_read(tmp_path, monkeypatch):
    (tmp_path / "in.jsonl").write_bytes(b"x" * 1_000_000)
    monkeypatch.setattr(sources, "CHUNK_BYTES", 1000)
    first = next(read_chunks(tmp_path / "in.jsonl", TEXT, 2000))
    assert first.consumed < 100_000 and isinstance(first.payloads[0][1], MalformedRecord)


@pytest.mark.parametrize("packed", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[: len(whole) // 2],
        lambda whole: whole[:-4],
        lambda whole: whole[:9],
        lambda whole: b"nothing of the kind",
        lambda whole: bytes(len(whole)),
        lambda whole: whole[:40] + bytes(byte ^ 255 for byte in whole[40:80]) + whole[80:],
    ],
)
def test_a_damaged_compressed_file_is_one_line_that_names_it(tmp_path, packed, damage):
    lines = b"".join(b'{"text": "%d %x"}\n' % (number, number * 2654435761) for number in range(300))
    (tmp_path / f"in.jsonl{packed}").write_bytes(damage(PACKERS[packed](lines)))
    with pytest.raises(InputError, match=rf"^input .*in\.jsonl{packed} cannot be read: ") as caught:
        documents(tmp_path / f"in.jsonl{packed}")
    assert str(caught.value).isprintable()


def test_a_worker_can_hand_its_errors_back():
    for error in (InputError("a\nb"), MalformedRecord("a\nb")):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error) and str(again) == r"a\nb"
