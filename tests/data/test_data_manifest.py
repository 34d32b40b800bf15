"""Manifests: whatever stands in one, it is read, or refused in one line, within bounds of time and memory."""

import copy
import json
import os
import resource
import time
from pathlib import Path

import pytest

from coe_megatron.data.manifest import DATA_FILES, INDEX_BYTES, INDEX_HEADER_BYTES, MANIFEST, FileSummary, Manifest
from coe_megatron.errors import ConfigError

DOCUMENTS, TOKENS = 3, 20
VALUES = [
    None,
    True,
    -1,
    0.5,
    10**400,
    -(10**400),
    1 << 70,
    "text",
    "",
    [],
    [[1]],
    {},
    {"documents": 1},
    [1] * 1000,
]


@pytest.fixture
def folder(tmp_path):
    """A folder that is whole, as far as sizes and the tokenizer's checksum go."""
    for split in ("train", "valid"):
        (tmp_path / f"{split}.bin").write_bytes(bytes(2 * TOKENS))
        (tmp_path / f"{split}.idx").write_bytes(bytes(INDEX_HEADER_BYTES + INDEX_BYTES * DOCUMENTS))
    (tmp_path / "tokenizer.model").write_bytes(b"a model")
    split = {"documents": DOCUMENTS, "tokens": TOKENS, "bytes": 90, "unigram_entropy_nats": 2.5, "bytes_per_token": 4.5}
    files = {name: vars(FileSummary.of(tmp_path / name)) for name in DATA_FILES}
    content = {
        **{"format": "coe_megatron.data", "version": 2, "vocab_size": 500, "token_dtype": "uint16"},
        **{"tokenizer_sha256": files["tokenizer.model"]["sha256"], "template": ["{text}"], "seed": 0, "malformed": 0},
        **{"source": {"input": ["a"]}, "splits": {"train": split, "valid": split}, "files": files},
    }
    (tmp_path / MANIFEST).write_text(json.dumps(content))
    return tmp_path


def places(value, above=()):
    """Every place in nested JSON, as a path of keys."""
    if above:
        yield above
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*above, key))


def changed(content, place, value):
    """With another value at one place; the deletion of the place where the value is `places` itself."""
    content = copy.deepcopy(content)
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    if value is places:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return content


def refused(folder):
    with pytest.raises(ConfigError) as caught:
        Manifest.read(folder, "data.path")
    said = str(caught.value)
    assert said.isprintable() and len(said) < 600 and said.startswith(("data.path: ", "data.path is ")), said
    return said


def test_any_value_at_any_place_is_read_or_refused_in_one_line(folder):
    content = json.loads((folder / MANIFEST).read_text())
    Manifest.read(folder)
    taken = set()
    for place in places(content):
        for value in (*VALUES, places, float("nan"), float("inf")):
            (folder / MANIFEST).write_text(json.dumps(changed(content, place, value)))
            try:
                Manifest.read(folder)
                taken.add((".".join(place), str(value)[:9]))
            except ConfigError as error:
                assert str(error).isprintable() and len(str(error)) < 600
    free = {"seed", "source", "source.input", "template", "splits.train.unigram_entropy_nats"}
    free |= {"splits.valid.unigram_entropy_nats", "splits.train.bytes_per_token", "splits.valid.bytes_per_token"}
    assert {place for place, _ in taken} == free
    assert not {place for place, value in taken if value in ("nan", "inf", "True", "-1", "None")} - {"source.input"}


@pytest.mark.parametrize("place", [(), ("splits",), ("splits", "train"), ("files",), ("files", "train.bin")])
def test_an_unknown_key_is_named(folder, place):
    content = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(changed(content, (*place, "new\nkey" * 99), 1)))
    assert f"{'.'.join(place) or 'it'} has the unknown key 'new\\nkeynew" in refused(folder)


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        (("vocab_size",), 70_000, "token_dtype is uint16, which does not fit vocab_size 70000"),
        (("token_dtype",), "int32", "token_dtype is int32, which does not fit vocab_size 500"),
        (("token_dtype",), "float64", "token_dtype: Input should be 'uint16' or 'int32'"),
        (("tokenizer_sha256",), "0" * 64, "tokenizer_sha256 differs from that of tokenizer.model"),
        (("splits", "train", "tokens"), 21, "train.bin has 40 bytes, but its number of tokens requires 42"),
        (("splits", "valid", "documents"), 4, "valid.idx has 102 bytes, but its number of documents requires 122"),
        (("version",), 3, "it is format 'coe_megatron.data', version 3"),
        (("format",), ["x"] * 9999, "it is format ['x', 'x'"),
    ],
)
def test_numbers_that_contradict_each_other_are_named(folder, place, value, reason):
    content = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(changed(content, place, value)))
    assert f"{folder / MANIFEST} is not a manifest of format coe_megatron.data, version 2: {reason}" in refused(folder)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda content: b"", "is not a manifest"),
        (lambda content: b"[" * 100_000, "nested too deep"),
        (lambda content: b'{"a":' * 100_000, "nested too deep"),
        (lambda content: b"[" * 100 + b"]" * 100, "nested more than 32 levels deep"),
        (lambda content: content.replace(b'"seed": 0', b'"seed": 0, "seed": 1'), "'seed' twice"),
        (lambda content: content.replace(b'"seed": 0', b'"seed": ' + b"9" * 5000), "Exceeds the limit"),
        (lambda content: content.decode().encode("utf-16"), "not UTF-8"),
        (lambda content: bytes(5 << 20), "more than 4,194,304 bytes"),
        (lambda content: b"[" + b"{}," * (1 << 20) + b"{}]", "it is not a JSON object"),
        (lambda content: content.replace(b'["{text}"]', b"[" + b"1," * 1_900_000 + b"1]"), "template.0: "),
        (lambda content: b"{" + b",".join(b'"%d":1' % n for n in range(300_000)) + b"}", "it is format None"),
    ],
)
def test_what_is_no_manifest_is_refused_soon(folder, write, reason):
    content = (folder / MANIFEST).read_bytes()
    (folder / MANIFEST).write_bytes(write(content))
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    assert reason in refused(folder)
    assert time.process_time() - began < 2
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 220_000
    )  # KiB, beside some 80 MB of the program


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.unlink(), "is missing|not prepared data"),
        (lambda path: (path.unlink(), path.mkdir()), "it is a folder, where a file is needed"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "it is a special file, where a file is needed"),
        (lambda path: (path.unlink(), path.symlink_to("/dev/zero")), "it is a special file, where a file is needed"),
        (lambda path: (path.unlink(), path.symlink_to("nowhere")), "it is a dangling link to nowhere"),
        (lambda path: (path.unlink(), path.symlink_to(path.name)), "it cannot be used: too many levels of symbolic"),
    ],
)
@pytest.mark.parametrize("name", [MANIFEST, "tokenizer.model", "train.bin", "valid.idx"])
def test_whatever_is_where_a_file_should_be(folder, name, damage, reason):
    damage(folder / name)
    said = refused(folder)
    assert any(part in said for part in reason.split("|")) and name in said


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("n" * 256, "file name too long"),
        ("file", "it is a file, where a folder is needed"),
        ("file/below", "not a directory"),
        ("link", "it is a dangling link to nowhere"),
        ("nul\0", "it is not a valid path"),
        ("empty", "is not prepared data: it has no manifest.json (launch/prepare_data.py creates one)"),
        ("nothing", "is not prepared data"),
    ],
)
def test_whatever_is_where_the_folder_should_be(tmp_path, path, reason):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    assert reason in refused(Path(f"{tmp_path}/{path}"))
