"""Preparation: every kind of input comes back as written, a broken one is named, and half a folder never shows."""

import gzip
import io
import json
import lzma
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from coe_megatron.corpus.word_problems import generate
from coe_megatron.data import prepare as prepare_module
from coe_megatron.data import sources
from coe_megatron.data.encode import encode_chunk
from coe_megatron.data.manifest import DATA_FILES, MANIFEST, Manifest
from coe_megatron.data.prepare import prepare, resumable_progress
from coe_megatron.data.prepare_settings import PrepareSettings
from coe_megatron.data.records import Template
from coe_megatron.data.tokenizer import Tokenizer, train_tokenizer
from coe_megatron.errors import ConfigError

pytestmark = pytest.mark.thorough

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
        template=(TEMPLATE,),
    )


def decoded(folder, split):
    tokenizer, data = Tokenizer(folder / "tokenizer.model"), IndexedDataset(str(folder / split))
    assert all(data[i][-1] == tokenizer.eos_id for i in range(len(data)))
    return [tokenizer.decode(data[i].tolist()) for i in range(len(data))]


def write_parquet(path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{**record, "other": 1} for record in RECORDS]), path)


def zst(content):
    """Two frames, as parallel compressors and `cat` make them."""
    half = len(content) // 2
    return b"".join(pyarrow.compress(part, "zstd", asbytes=True) for part in (content[:half], content[half:]))


WRITERS = {
    "in.jsonl": lambda path: path.write_bytes(JSONL),
    "in.jsonl.gz": lambda path: path.write_bytes(gzip.compress(JSONL)),
    "in.ndjson.xz": lambda path: path.write_bytes(lzma.compress(JSONL)),
    "in.jsonl.zst": lambda path: path.write_bytes(zst(JSONL)),
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
    prepare(replace(settings, template=(template,), **paths))
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
        replace(settings, inputs=(), valid_inputs=(), builtin=60, template=(), valid_fraction=0.1, seed=2)
    )
    assert (manifest.splits["train"].documents, manifest.splits["valid"].documents) == (60, 6)
    first, held_out = RECORDS[0], next(generate("valid", 1, 2))
    assert decoded(settings.output, "train")[0] == f"query : {first['query']} response : {first['response']}"
    assert decoded(settings.output, "valid")[0] == f"query : {held_out['query']} response : {held_out['response']}"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"query": "a", "response": ', r"not valid JSON \(Expecting value, column 27\)"),
        (b'["a"]', "not a JSON object"),
        (b'{"query": "a"}', "field 'response' is missing; the record has query"),
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


@pytest.mark.parametrize("vocabulary", [{}, {"tokenizer": None, "vocab_size": 450}])
def test_where_all_records_are_malformed_the_first_is_named(settings, vocabulary):
    mistyped = replace(settings, template=("{answer}",), skip_malformed=True, **vocabulary)
    first = (
        r"records are malformed, the first: .*in\.jsonl, line 1: "
        "field 'answer' is missing; the record has query, response"
    )
    with pytest.raises(ValueError, match=f"^all 70 {first}"):
        prepare(mistyped)
    settings.valid_inputs[0].write_text('{"answer": "a"}\n')
    with pytest.raises(ValueError, match=f"^the train split is empty and 60 {first}"):
        prepare(mistyped)


def test_a_file_cannot_be_both_training_and_validation(settings, tmp_path):
    (tmp_path / "link.jsonl").symlink_to(settings.inputs[0])
    with pytest.raises(ValueError, match=r"--valid names .*link\.jsonl, as --input does"):
        prepare(replace(settings, valid_inputs=(*settings.valid_inputs, tmp_path / "link.jsonl")))


def test_text_that_is_no_utf8_names_its_line(settings, tmp_path):
    (tmp_path / "in.txt").write_bytes(b"good\n\n\nbad \xff\nblock\n")
    with pytest.raises(ValueError, match=r"in\.txt, line 4: not valid UTF-8"):
        prepare(replace(settings, inputs=(tmp_path / "in.txt",), template=("{text}",)))


@pytest.mark.parametrize("name", ["in.jsonl.gz", "in.jsonl.xz", "in.jsonl.zst", "in.parquet"])
def test_a_truncated_file_is_named(settings, tmp_path, name):
    whole = tmp_path / "whole.parquet"
    write_parquet(whole)
    content = {"gz": gzip.compress(JSONL), "xz": lzma.compress(JSONL), "zst": zst(JSONL), "parquet": whole.read_bytes()}
    (tmp_path / name).write_bytes(content[name.rpartition(".")[2]][:-100])
    with pytest.raises(ValueError, match=f"{name} cannot be read: "):
        prepare(replace(settings, inputs=(tmp_path / name,)))


def test_a_missing_column_is_named(settings, tmp_path):
    write_parquet(tmp_path / "in.parquet")
    with pytest.raises(ValueError, match=r"no column 'answer'; it has query, response, other"):
        prepare(replace(settings, inputs=(tmp_path / "in.parquet",), template=("{answer}",)))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def small_chunks(monkeypatch):
    """So that sixty records are many chunks; workers of their own would not see it, and need not."""
    monkeypatch.setattr(sources, "CHUNK_BYTES", 2000)


def interrupted(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("when", ["train_tokenizer", "encode_chunk", "join", "_describe", "Staging.publish"])
def test_an_interrupted_preparation_never_looks_whole_and_goes_on(settings, monkeypatch, small_chunks, when):
    settings = replace(settings, tokenizer=None, vocab_size=450)
    undisturbed = prepare(replace(settings, output=settings.output.with_name("undisturbed")))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(f"coe_megatron.data.prepare.{when}", interrupted)
        prepare(settings)
    assert not settings.output.exists()
    assert bool(resumable_progress(settings.output)) == (when != "train_tokenizer")
    assert prepare(settings) == undisturbed
    assert contents(settings.output) == contents(settings.output.with_name("undisturbed"))
    assert not list(settings.output.parent.glob(".*"))


class StopsAfter:
    """encode_chunk, interrupted after so many chunks; counts them."""

    def __init__(self, chunks):
        self.left, self.done = chunks, 0

    def __call__(self, *arguments):
        if not self.left:
            raise KeyboardInterrupt
        self.left, self.done = self.left - 1, self.done + 1
        return encode_chunk(*arguments)


def test_whole_chunks_and_the_tokenizer_are_kept(settings, monkeypatch, small_chunks, capsys):
    settings = replace(settings, tokenizer=None, vocab_size=450)
    encode, trained = StopsAfter(3), []
    monkeypatch.setattr(prepare_module, "encode_chunk", encode)
    monkeypatch.setattr(
        prepare_module, "train_tokenizer", lambda *arguments: trained.append(train_tokenizer(*arguments))
    )
    with pytest.raises(KeyboardInterrupt):
        prepare(settings)
    encode.left = 1000
    prepare(settings, progress=True)
    assert "resuming: the tokenizer and 3 chunks" in capsys.readouterr().err
    again = StopsAfter(1000)
    monkeypatch.setattr(prepare_module, "encode_chunk", again)
    prepare(replace(settings, overwrite=True), progress=True)
    assert "training a tokenizer of 450 pieces ...\n" in capsys.readouterr().err
    assert encode.done == again.done > 6 and len(trained) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda settings: replace(settings, template=("{query}",)),
        lambda settings: replace(settings, seed=1),
        lambda settings: replace(settings, skip_malformed=True),
        lambda settings: settings.inputs[0].write_bytes(JSONL[: JSONL.index(b"\n") + 1] * 2) and settings,
        lambda settings: os.utime(settings.inputs[0], ns=(0, 0)) or settings,
    ],
)
def test_another_job_starts_anew(settings, monkeypatch, small_chunks, change):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare_module, "encode_chunk", StopsAfter(3))
        prepare(settings)
    (partial,) = settings.output.parent.glob(".out.partial")
    kept = {path: path.stat().st_ino for path in partial.glob("chunks/*.npz")}
    assert len(kept) == 3
    changed = change(settings)
    encode = StopsAfter(1000)
    monkeypatch.setattr(prepare_module, "encode_chunk", encode)
    prepare(changed)
    expected = StopsAfter(1000)
    monkeypatch.setattr(prepare_module, "encode_chunk", expected)
    prepare(replace(changed, output=settings.output.with_name("undisturbed")))
    assert encode.done == expected.done
    assert contents(settings.output) == contents(settings.output.with_name("undisturbed"))


@pytest.fixture
def stopped(settings, monkeypatch, small_chunks):
    """The hidden folder of a preparation that was interrupted after three chunks."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare_module, "encode_chunk", StopsAfter(3))
        prepare(settings)
    return settings.output.with_name(".out.partial")


def with_arrays(**changes):
    """Of a chunk's content the same with other arrays; None for no such array."""

    def change(content):
        arrays = dict(np.load(io.BytesIO(content))) | changes
        changed = io.BytesIO()
        np.savez(changed, **{name: array for name, array in arrays.items() if array is not None})
        return changed.getvalue()

    return change


def an_array(_):
    file = io.BytesIO()
    np.save(file, np.arange(3))
    return file.getvalue()


def compressed(content):
    file = io.BytesIO()
    np.savez_compressed(file, **{name: np.zeros_like(array) for name, array in np.load(io.BytesIO(content)).items()})
    return file.getvalue()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: b"", "No data left in file"),
        (lambda content: content[:-30], "is not a zip file"),
        (an_array, "it is a single array"),
        (compressed, "it is compressed"),
        (with_arrays(malformed=None), "malformed is missing or unexpected"),
        (with_arrays(more=np.int64(1)), "more is missing or unexpected"),
        (with_arrays(malformed=np.arange(3)), "malformed is not a count"),
        (with_arrays(malformed=np.float64(1)), "malformed is not a count"),
        (with_arrays(train_bytes=np.int64(-1)), "train_bytes is not a count"),
        (with_arrays(train_tokens=np.array([499, 500], np.uint16)), "train_lengths are not the lengths"),
        (
            with_arrays(train_tokens=np.array([500], np.uint16), train_lengths=np.array([1])),
            "train_tokens contains 500, but the tokenizer has 500 pieces",
        ),
        (with_arrays(train_tokens=np.array([1.5])), "train_tokens is a 1-dimensional array of float64"),
        (with_arrays(train_tokens=np.zeros((2, 2), np.uint16)), "train_tokens is a 2-dimensional array of uint16"),
        (with_arrays(train_tokens=np.array([None])), "Object arrays cannot be loaded"),
        (with_arrays(train_lengths=np.array([10**9])), "train_lengths are not the lengths"),
        (
            with_arrays(train_tokens=np.zeros(8, np.uint16), train_lengths=np.array([-5, 13])),
            "train_lengths are not the lengths",
        ),
        (
            with_arrays(train_tokens=np.zeros(8, np.uint16), train_lengths=np.array([0, 8])),
            "train_lengths are not the lengths",
        ),
        (with_arrays(train_lengths=np.array([1.0])), "train_lengths is a 1-dimensional array of float64"),
    ],
)
def test_a_chunk_that_no_preparation_wrote_is_made_anew(settings, stopped, capsys, change, reason):
    chunk = stopped / "chunks" / "000000.npz"
    chunk.write_bytes(change(chunk.read_bytes()))
    prepare(settings, progress=True)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "encoding it again" in line]
    assert f"{chunk} is damaged (" in line and reason in line, line
    assert decoded(settings.output, "train") == TEXTS and decoded(settings.output, "valid") == TEXTS[:10]


def a_link(path):
    path.symlink_to("/nowhere/at/all")


def a_folder(path):
    (path / "with").mkdir(parents=True)


@pytest.mark.parametrize("made", [os.mkfifo, a_link, a_folder])
@pytest.mark.parametrize(
    "name",
    [
        *("chunks/000000.npz", "chunks/000003.npz.tmp", "chunks", "job.json", "job.json.tmp"),
        *("tokenizer.model", "tokenizer.model.partial", "tokenizer.sha256", "complete", "replaced"),
    ],
)
def test_what_is_no_file_of_ours_in_the_hidden_folder_holds_nothing_up(settings, stopped, name, made):
    path = stopped / name
    if path.is_dir():
        path.rename(settings.output.with_name("old"))
    path.unlink(missing_ok=True)
    made(path)
    if name == "chunks/000003.npz.tmp" and made is a_folder:
        with pytest.raises(IsADirectoryError, match="is in the way, remove it"):
            prepare(settings)
        path.joinpath("with").rmdir()
        path.rmdir()
    prepare(settings)
    assert decoded(settings.output, "train") == TEXTS and decoded(settings.output, "valid") == TEXTS[:10]
    assert not list(settings.output.parent.glob(".*"))


def test_another_tokenizer_in_the_hidden_folder_begins_anew(settings, stopped, capsys):
    train_tokenizer(TEXTS, 400, stopped / "tokenizer.model")
    prepare(settings, progress=True)
    said = capsys.readouterr().err
    assert (
        f"starting over: {stopped}/tokenizer.model has changed since it was written\n" in said
        and "resuming" not in said
    )
    assert (settings.output / "tokenizer.model").read_bytes() == settings.tokenizer.read_bytes()
    assert decoded(settings.output, "train") == TEXTS


@pytest.mark.parametrize("made", [os.mkfifo, a_link, a_folder])
def test_a_lock_that_is_none_is_named_and_stays(settings, stopped, made):
    (stopped / "lock").unlink()
    made(stopped / "lock")
    with pytest.raises(ConfigError, match=r"\.out\.partial/lock: the lock must be a plain file: remove it"):
        prepare(settings)
    assert os.path.lexists(stopped / "lock") and len(list(stopped.glob("chunks/*.npz"))) == 3


def test_a_hidden_folder_elsewhere_is_refused(settings, stopped):
    stopped.rename(stopped.with_name("elsewhere"))
    stopped.symlink_to("elsewhere")
    with pytest.raises(ConfigError, match=r"the hidden folder beside --output is .*: it is a symbolic link"):
        prepare(settings)
    assert len(list(stopped.glob("chunks/*.npz"))) == 3


def test_a_mistake_leaves_nothing_behind(settings, tmp_path):
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"field .answer. is missing"):
        prepare(replace(settings, template=("{answer}",)))
    assert sorted(tmp_path.iterdir()) == before


def test_an_interrupted_replacement_keeps_the_old_data(settings, monkeypatch):
    manifest = prepare(settings)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare_module, "_describe", interrupted)
        prepare(replace(settings, overwrite=True))
    assert Manifest.read(settings.output) == manifest


def test_one_preparation_at_a_time(settings, monkeypatch, small_chunks):
    def meanwhile(*arguments):
        with pytest.raises(ValueError, match="another process is preparing it"):
            prepare(settings)
        return encode_chunk(*arguments)

    monkeypatch.setattr(prepare_module, "encode_chunk", meanwhile)
    assert prepare(settings).splits["train"].documents == 60


@pytest.mark.run
def test_workers_change_nothing(settings, tmp_path):
    """Three chunks, so that three workers have one each."""
    settings.inputs[0].write_bytes(JSONL * (9_000_000 // len(JSONL)))
    for workers in (1, 3):
        prepare(replace(settings, output=tmp_path / f"by_{workers}", workers=workers))
    assert contents(tmp_path / "by_1") == contents(tmp_path / "by_3")


@pytest.mark.run
def test_a_worker_names_the_malformed_line(settings):
    settings.inputs[0].write_bytes(JSONL * (5_000_000 // len(JSONL)) + b"{\n")
    line = settings.inputs[0].read_bytes().count(b"\n")
    with pytest.raises(ValueError, match=rf"in\.jsonl, line {line}: not valid JSON"):
        prepare(replace(settings, workers=2))
    assert not list(settings.output.parent.glob(".*"))


@pytest.fixture
def slow(settings):
    """Arguments of a preparation that takes a while, with chunks enough to be interrupted between them."""
    settings.inputs[0].write_bytes(JSONL * (24_000_000 // len(JSONL)))
    return [
        *("--input", settings.inputs[0], "--valid", settings.valid_inputs[0], "--output", settings.output),
        *("--tokenizer", settings.tokenizer, "--template", r"{query}\n{response}", "--workers", 2),
    ]


def start(arguments):
    """The program as the leader of a group of processes, when two of its chunks are there."""
    output = Path(arguments[arguments.index("--output") + 1])
    command = [sys.executable, PROGRAM, *map(str, arguments)]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    chunks = output.with_name(f".{output.name}.partial") / "chunks"
    while len(list(chunks.glob("*.npz"))) < 2:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    return process


def workers_of(process):
    listed = subprocess.run(["ps", "-Aww", "-o", "pid=,pgid=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(maxsplit=2) for line in listed.splitlines()]
    return [int(pid) for pid, group, command in rows if int(group) == process.pid and "spawn_main" in command]


def gone(process):
    """Waits until no process of the group is left."""
    while workers_of(process):
        time.sleep(0.05)
    return True


@pytest.mark.slow
@pytest.mark.run
def test_killed_in_the_middle_it_goes_on_to_the_same_bytes(settings, slow):
    process = start(slow)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not settings.output.exists() and list(settings.output.parent.glob(".out.partial/chunks/*.npz"))
    done = run(*slow)
    assert done.returncode == 0 and "resuming: the tokenizer and " in done.stderr
    undisturbed = settings.output.with_name("undisturbed")
    prepare(replace(settings, output=undisturbed))
    assert contents(settings.output) == contents(undisturbed)
    assert not list(settings.output.parent.glob(".*"))


@pytest.mark.slow
@pytest.mark.run
@pytest.mark.parametrize(
    ("strike", "status", "message"),
    [
        (lambda process: os.killpg(process.pid, signal.SIGINT), 130, "the same command resumes: the tokenizer and "),
        (lambda process: os.kill(workers_of(process)[0], signal.SIGKILL), 1, "error: a worker process was killed"),
        (lambda process: process.kill(), -9, ""),
    ],
)
def test_an_end_is_clean(settings, slow, strike, status, message):
    process = start(slow)
    strike(process)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == status and message in said.splitlines()[-1]
    assert "Traceback" not in said and gone(process)
    assert not settings.output.exists() and list(settings.output.parent.glob(".out.partial/chunks/*.npz"))


def test_an_output_is_replaced_only_when_asked_and_only_if_ours(settings):
    prepare(settings)
    with pytest.raises(ValueError, match="is not empty"):
        prepare(settings)
    assert prepare(replace(settings, template=("{query}",), overwrite=True)).template == ["{query}"]
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
        ({"builtin": 5}, "exactly one of --input and --builtin"),
        ({"inputs": ()}, "exactly one of --input and --builtin"),
        ({"tokenizer": None}, "--vocab-size is missing"),
        ({"vocab_size": 100}, "--vocab-size is 100: it must be at least 261"),
        ({"valid_fraction": 1.5}, "--valid-fraction is 1.5"),
        ({"seed": -1}, "--seed is -1"),
        ({"workers": 0}, "--workers is 0"),
        ({"workers": 99999999999}, "--workers is 99999999999: it must be at least 1, and at most 1024"),
        ({"template": ("no field",)}, "names no field"),
        ({"template": ("{a!r}",)}, "plain name"),
        ({"template": ("{a",)}, "not valid"),
        ({"inputs": (), "builtin": 5}, "the built-in corpus has its own validation problems"),
        ({"inputs": (), "builtin": 5, "valid_inputs": (), "template": ("{text}",)}, "query and response"),
    ],
)
def test_a_wrong_setting_is_named(settings, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(settings, **changes)


def test_what_only_the_files_can_tell_is_named(settings):
    with pytest.raises(ValueError, match=r"--vocab-size is 400: .*has 500 pieces"):
        prepare(replace(settings, vocab_size=400))
    with pytest.raises(ValueError, match="valid split is empty"):
        prepare(replace(settings, valid_inputs=(), valid_fraction=1e-9))
    assert not settings.output.exists()


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_each_record_takes_the_first_template_that_fits(settings, tmp_path, ending):
    """Two corpora of different fields share a folder, and so a tokenizer."""
    (tmp_path / "text.jsonl").write_text('{"title": "t", "text": "a text"}\n')
    WRITERS[f"in.{ending}"](tmp_path / f"in.{ending}")
    inputs = (tmp_path / f"in.{ending}", tmp_path / "text.jsonl")
    manifest = prepare(replace(settings, inputs=inputs, template=("{text}", TEMPLATE)))
    assert decoded(settings.output, "train") == [*TEXTS, "a text"]
    assert manifest.template == ["{text}", TEMPLATE]
    with pytest.raises(ValueError, match=r"text\.jsonl, line 1: field 'other' is missing; the record has title, text"):
        prepare(replace(settings, inputs=inputs[1:], template=("{other}", TEMPLATE), overwrite=True))


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
        (["--input", "none.jsonl", "--vocab-size", "300"], "--input is none.jsonl: there is no such file"),
        (["--builtin", "10", "--vocab-size", "12"], "--vocab-size is 12"),
        (["--builtin", "ten", "--vocab-size", "300"], "invalid int value: 'ten'"),
        (["--input", str(PROGRAM), "--vocab-size", "300"], "unknown format: its name must end in .jsonl"),
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
