"""Preparation: every kind of input comes back as written, a broken one is named, and half a folder never shows."""

import gzip
import json
import lzma
import math
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from coe_megatron.data import prepare as prepare_module
from coe_megatron.data.corpus import generate
from coe_megatron.data.manifest import DATA_FILES, MANIFEST, Manifest
from coe_megatron.data.prepare import PrepareSettings, prepare
from coe_megatron.data.sources import Template
from coe_megatron.data.tokenizer import Tokenizer, train_tokenizer

PROGRAM = Path(__file__).parents[2] / "launch" / "prepare_data.py"
RECORDS = list(generate("train", 60, 2))
TEXTS = [f"{record['query']}\n{record['response']}" for record in RECORDS]
JSONL = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
TEMPLATE = "{query}\n{response}"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tokenizer.model"
    train_tokenizer(TEXTS, 500, path)
    return path


@pytest.fixture
def settings(tmp_path, model):
    """Sixty documents, ten of them again for validation; a test replaces what it is about."""
    (tmp_path / "in.jsonl").write_bytes(JSONL)
    (tmp_path / "valid.jsonl").write_bytes(b"".join(JSONL.splitlines(keepends=True)[:10]))
    return PrepareSettings(
        output=tmp_path / "out",
        inputs=(tmp_path / "in.jsonl",),
        valid_inputs=(tmp_path / "valid.jsonl",),
        tokenizer=model,
        template=TEMPLATE,
    )


def decoded(folder, split):
    tokenizer, data = Tokenizer(folder / "tokenizer.model"), IndexedDataset(str(folder / split))
    assert all(data[i][-1] == tokenizer.eos_id for i in range(len(data)))
    return [tokenizer.decode(data[i].tolist()) for i in range(len(data))]


def write_parquet(path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{**record, "other": 1} for record in RECORDS]), path)


WRITERS = {
    "in.jsonl": lambda path: path.write_bytes(JSONL),
    "in.jsonl.gz": lambda path: path.write_bytes(gzip.compress(JSONL)),
    "in.ndjson.xz": lambda path: path.write_bytes(lzma.compress(JSONL)),
    "in.parquet": write_parquet,
    "in.txt": lambda path: path.write_text("\n\n".join(TEXTS) + "\n"),
    "in.txt.xz": lambda path: path.write_bytes(lzma.compress(("\n \n\n" + "\n\n\n".join(TEXTS)).encode())),
}


@pytest.mark.parametrize("name", WRITERS)
def test_documents_come_back_as_they_were_written(settings, tmp_path, name):
    WRITERS[name](tmp_path / name)
    WRITERS[name](tmp_path / f"valid_{name}")
    template = "{text}" if ".txt" in name else TEMPLATE
    paths = {"inputs": (tmp_path / name,), "valid_inputs": (tmp_path / f"valid_{name}",)}
    prepare(replace(settings, template=template, **paths))
    assert decoded(settings.output, "train") == TEXTS
    assert decoded(settings.output, "valid") == TEXTS


def test_the_manifest_says_what_is_there(settings):
    manifest = prepare(settings)
    assert Manifest.read(settings.output) == manifest
    manifest.verify(settings.output)
    data = IndexedDataset(str(settings.output / "train"))
    counts = Counter(int(token) for i in range(len(data)) for token in data[i])
    train, total = manifest.splits["train"], sum(counts.values())
    assert (train.documents, train.tokens) == (60, total) and manifest.splits["valid"].documents == 10
    assert train.bytes == sum(len(text.encode()) for text in TEXTS)
    assert train.bytes_per_token == train.bytes / total
    entropy = -sum(n / total * math.log(n / total) for n in counts.values())
    assert train.unigram_entropy_nats == pytest.approx(entropy, rel=1e-12)
    assert (manifest.token_dtype, data.index.dtype.__name__) == ("uint16", "uint16")
    assert sorted(path.name for path in settings.output.iterdir()) == sorted([*DATA_FILES, MANIFEST])


def test_equal_settings_give_equal_folders(settings, tmp_path):
    trained = replace(settings, tokenizer=None, vocab_size=450)
    for name in ("one", "two"):
        prepare(replace(trained, output=tmp_path / name))
    for name in (*DATA_FILES, MANIFEST):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_a_share_is_held_out_by_content(settings):
    manifest = prepare(replace(settings, valid_inputs=(), valid_fraction=0.3))
    train, valid = decoded(settings.output, "train"), decoded(settings.output, "valid")
    assert sorted(train + valid) == sorted(TEXTS) and 8 <= len(valid) <= 30
    assert manifest.splits["valid"].documents == len(valid)
    prepare(replace(settings, valid_inputs=(), valid_fraction=0.3, seed=1, overwrite=True))
    assert decoded(settings.output, "valid") != valid


def test_the_tokenizer_never_sees_validation(settings, tmp_path):
    prepare(replace(settings, tokenizer=None, vocab_size=450))
    expected = train_tokenizer(TEXTS, 450, tmp_path / "expected.model")
    assert Tokenizer(settings.output / "tokenizer.model").sha256 == expected.sha256


def test_the_builtin_corpus_brings_its_own_validation(settings):
    manifest = prepare(
        replace(settings, inputs=(), valid_inputs=(), builtin=60, template=None, valid_fraction=0.1, seed=2)
    )
    assert (manifest.splits["train"].documents, manifest.splits["valid"].documents) == (60, 6)
    first, held_out = RECORDS[0], next(generate("valid", 1, 2))
    assert decoded(settings.output, "train")[0] == f"query : {first['query']} response : {first['response']}"
    assert decoded(settings.output, "valid")[0] == f"query : {held_out['query']} response : {held_out['response']}"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"query": "a", "response": ', "not valid JSON"),
        (b'["a"]', "not a JSON object"),
        (b'{"query": "a"}', "field 'response' is missing; there is query"),
        (b'{"query": "a", "response": null}', "field 'response' is NoneType"),
        (b'{"query": " ", "response": ""}', "empty"),
        (b'{"query": "a", "response": "\xff"}', "not valid JSON"),
        (b'{"query": "a", "response": "\\ud800"}', "surrogate"),
    ],
)
def test_a_malformed_line_is_named_and_can_be_skipped(settings, line, reason):
    settings.inputs[0].write_bytes(JSONL[: JSONL.index(b"\n") + 1] + b"\n" + line + b"\n" + JSONL)
    with pytest.raises(ValueError, match=reason) as caught:
        prepare(settings)
    assert "in.jsonl, line 3: " in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=re.escape(str(caught.value))):
        prepare(replace(settings, tokenizer=None, vocab_size=450))
    assert not settings.output.exists()
    manifest = prepare(replace(settings, skip_malformed=True))
    assert manifest.malformed == 1 and manifest.splits["train"].documents == 61


def test_text_that_is_no_utf8_names_its_line(settings, tmp_path):
    (tmp_path / "in.txt").write_bytes(b"good\n\n\nbad \xff\nblock\n")
    with pytest.raises(ValueError, match=r"in\.txt, line 4: not valid UTF-8"):
        prepare(replace(settings, inputs=(tmp_path / "in.txt",), template="{text}"))


@pytest.mark.parametrize("name", ["in.jsonl.gz", "in.jsonl.xz", "in.parquet"])
def test_a_truncated_file_is_named(settings, tmp_path, name):
    whole = tmp_path / "whole.parquet"
    write_parquet(whole)
    content = {"gz": gzip.compress(JSONL), "xz": lzma.compress(JSONL), "parquet": whole.read_bytes()}
    (tmp_path / name).write_bytes(content[name.rpartition(".")[2]][:-100])
    with pytest.raises(ValueError, match=f"{name} cannot be read: "):
        prepare(replace(settings, inputs=(tmp_path / name,)))


def test_a_missing_column_is_named(settings, tmp_path):
    write_parquet(tmp_path / "in.parquet")
    with pytest.raises(ValueError, match=r"no column 'answer'; there is query, response, other"):
        prepare(replace(settings, inputs=(tmp_path / "in.parquet",), template="{answer}"))


@pytest.mark.parametrize("when", ["train_tokenizer", "_write_splits", "_describe", "_move_into_place"])
def test_an_interrupted_preparation_leaves_nothing(settings, tmp_path, monkeypatch, when):
    def interrupted(*_):
        raise KeyboardInterrupt

    before = sorted(tmp_path.iterdir())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare_module, when, interrupted)
        prepare(replace(settings, tokenizer=None, vocab_size=450))
    assert sorted(tmp_path.iterdir()) == before


def test_an_interrupted_replacement_keeps_the_old_data(settings, monkeypatch):
    manifest = prepare(settings)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare_module, "_describe", interrupted)
        prepare(replace(settings, overwrite=True))
    assert Manifest.read(settings.output) == manifest


def test_an_output_is_replaced_only_when_asked_and_only_if_ours(settings):
    prepare(settings)
    with pytest.raises(ValueError, match="is not empty"):
        prepare(settings)
    assert prepare(replace(settings, template="{query}", overwrite=True)).template == "{query}"
    (settings.output / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"thesis\.tex, which no preparation wrote"):
        prepare(replace(settings, overwrite=True))
    assert sorted(settings.output.parent.glob(".*")) == []


def test_an_empty_folder_may_be_the_output(settings):
    settings.output.mkdir()
    prepare(settings)
    assert Manifest.read(settings.output)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"builtin": 5}, "exactly one of input and builtin"),
        ({"inputs": ()}, "exactly one of input and builtin"),
        ({"tokenizer": None}, "vocab-size is missing"),
        ({"vocab_size": 100}, "vocab-size is 100: it must be at least 261"),
        ({"valid_fraction": 1.5}, "valid-fraction is 1.5"),
        ({"seed": -1}, "seed is -1"),
        ({"template": "no field"}, "names no field"),
        ({"template": "{a!r}"}, "plain name"),
        ({"template": "{a"}, "not valid"),
        ({"inputs": (), "builtin": 5}, "validation problems of its own"),
        ({"inputs": (), "builtin": 5, "valid_inputs": (), "template": "{text}"}, "query and response"),
    ],
)
def test_a_wrong_setting_is_named(settings, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(settings, **changes)


def test_what_only_the_files_can_tell_is_named(settings):
    with pytest.raises(ValueError, match=r"vocab-size is 400: .*has 500 pieces"):
        prepare(replace(settings, vocab_size=400))
    with pytest.raises(ValueError, match="valid split is empty"):
        prepare(replace(settings, valid_inputs=(), valid_fraction=1e-9))
    assert not settings.output.exists()


def test_a_template_takes_names_as_they_are():
    template = Template("{{{a.b}}}: {my field}")
    assert template.fields == ("a.b", "my field")
    assert template.render({"a.b": "x", "my field": 2.5}) == "{x}: 2.5"


def run(*arguments):
    return subprocess.run([sys.executable, PROGRAM, *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.run
def test_the_program_prepares_and_reports(settings):
    done = run(
        *("--input", *settings.inputs, "--valid", *settings.valid_inputs, "--output", settings.output),
        *("--tokenizer", settings.tokenizer, "--template", r"{query}\n{response}"),
    )
    assert done.returncode == 0, done.stderr
    assert "train: 60 documents" in done.stdout and "encoding" in done.stderr
    assert decoded(settings.output, "train") == TEXTS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "none.jsonl", "--vocab-size", "300"], "input none.jsonl is not a file"),
        (["--builtin", "10", "--vocab-size", "12"], "vocab-size is 12"),
        (["--builtin", "ten", "--vocab-size", "300"], "invalid int value: 'ten'"),
        (["--input", str(PROGRAM), "--vocab-size", "300"], "unknown kind: its name must end in .jsonl"),
    ],
)
def test_a_bad_argument_is_one_line_before_anything_heavy(tmp_path, arguments, message):
    watched = (
        f"import sys, runpy; sys.argv = ['prepare_data.py', *{[*arguments, '--output', str(tmp_path / 'out')]!r}]\n"
    )
    watched += f"try: runpy.run_path({str(PROGRAM)!r}, run_name='__main__')\n"
    watched += "finally: assert not {'torch', 'pyarrow', 'sentencepiece'} & set(sys.modules), 'heavy'"
    done = subprocess.run([sys.executable, "-c", watched], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_help_tells_files_and_exit_status():
    told = run("--help")
    assert told.returncode == 0 and "blank lines separate documents" in told.stdout and "exit status" in told.stdout
