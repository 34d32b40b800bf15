"""launch/prepare_data.py in this process: what is wrong with a path or an option is one line and exit status 2, what is
wrong with an input one line and 1; nothing stays behind."""

import json
import os
import runpy
import sys
from pathlib import Path

import pytest

from coe_megatron.data.tokenizer import train_tokenizer

PROGRAM = Path(__file__).parents[2] / "launch" / "prepare_data.py"
LINES = "".join(json.dumps({"text": f"some words of document {number} here"}) + "\n" for number in range(300))


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """The program in a folder with in.jsonl: its exit status and its last line on stderr."""
    (tmp_path / "in.jsonl").write_text(LINES)
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["prepare_data.py", *map(str, arguments), "--workers", "1"])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(PROGRAM), run_name="__main__")
        said = capsys.readouterr().err.splitlines()
        return ended.value.code, said[-1] if said else ""

    return call


def prepared(*changes, **options):
    asked = {"input": "in.jsonl", "vocab-size": 300, "output": "out"} | options
    given = [word for name, value in asked.items() if value is not None for word in (f"--{name}", value)]
    return [*given, *changes]


PLACES = {
    "n" * 256 + ".jsonl": "too long",
    "nothing.jsonl": "there is no such file",
    "folder.jsonl": "it is a folder",
    "fifo.jsonl": "it is a special file, where a file is needed",
    "zero.jsonl": "it is a special file, where a file is needed",
    "dangling.jsonl": "it is a dangling link to nowhere",
    "loop.jsonl": "too many levels of symbolic links",
    "in.jsonl/below.jsonl": "not a directory",
    "~nobody.at.all/in.jsonl": "there is no such user",
    "in.what": "its name must end in .jsonl",
}


def make_places(folder):
    (folder / "folder.jsonl").mkdir()
    os.mkfifo(folder / "fifo.jsonl")
    for name, target in (("zero", "/dev/zero"), ("dangling", "nowhere"), ("loop", "loop.jsonl")):
        (folder / f"{name}.jsonl").symlink_to(target)
    (folder / "in.what").touch()


@pytest.mark.parametrize("path", PLACES)
@pytest.mark.parametrize("option", ["input", "valid", "tokenizer"])
def test_a_path_that_cannot_be_read_is_named_with_its_option(run, tmp_path, option, path):
    if (option, path) == ("tokenizer", "in.what"):
        path, expected = "in.jsonl", "it is not a SentencePiece model"
    else:
        expected = PLACES[path]
    make_places(tmp_path)
    status, said = run(*prepared(**{option: path}))
    assert status == 2
    assert expected in said, said
    assert f"--{option} is " in said or f"argument --{option}" in said or "unknown format" in said, said
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("n" * 256, "too long"),
        ("n" * 250, "the hidden folder beside --output is"),
        ("in.jsonl", "it is a file, where a folder is needed"),
        ("in.jsonl/below", "not a directory"),
        ("fifo", "it is a special file"),
        ("dangling", "it is a dangling link to nowhere"),
        ("loop", "too many levels"),
        ("busy", "the hidden folder beside --output is"),
        ("full", "it is not empty"),
        ("/", "name a new folder"),
        ("/proc/nothing", "--output is /proc/"),
        ("", "argument --output"),
    ],
)
def test_an_output_that_cannot_be_made_is_named(run, tmp_path, path, reason):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / ".busy.partial").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    status, said = run(*prepared(output=path))
    assert (status, said.count("--output")) == (2, 1) and reason in said, said


def test_a_home_is_meant_by_a_tilde(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "in.jsonl").rename(tmp_path / "home" / "in.jsonl")
    assert run(*prepared(input="~/in.jsonl", output="~/out"))[0] == 0
    assert (tmp_path / "home" / "out" / "manifest.json").is_file()
    assert run(*prepared(input="~/in.jsonl", output="~/two", tokenizer="~/out/tokenizer.model"))[0] == 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"vocab-size": 262}, "--vocab-size is 262: the characters of the text require at least 2"),
        ({"vocab-size": 5000}, "--vocab-size is 5000: the text allows at most "),
        ({"vocab-size": 1 << 31}, "--vocab-size is 2147483648: it must be at least 261, and at most 2147483647"),
        ({"max-record-bytes": 0}, "--max-record-bytes is 0: it must be at least 1, and at most"),
        ({"max-record-bytes": 10**30}, f"--max-record-bytes is {10**30}: it must be at least 1, and at most"),
        ({"builtin": 10**400, "input": None}, "it must be at least 1, and at most"),
        ({"valid-fraction": "nan"}, "--valid-fraction is nan"),
        ({"seed": "9" * 5000}, "argument --seed: invalid int value"),
    ],
)
def test_an_option_that_does_not_suit_is_named_with_what_would(run, options, reason):
    status, said = run(*prepared(**options))
    assert status == 2 and reason in said and "character_coverage" not in said
    assert not Path("out").exists() and not list(Path().glob(".*"))


def test_a_model_of_other_special_ids_serves(run, tmp_path):
    train_tokenizer([line["text"] for line in map(json.loads, LINES.splitlines())], 300, tmp_path / "ours.model")
    assert run(*prepared(tokenizer="ours.model", **{"vocab-size": None}))[0] == 0
    assert run(*prepared(tokenizer="ours.model", output="two", **{"vocab-size": 299})) == (
        2,
        "prepare_data.py: error: --vocab-size is 299: ours.model has 300 pieces",
    )


@pytest.mark.parametrize(
    ("record", "place"),
    [
        ('{"text": ' + "[" * 300 + "]" * 300 + "}", "line 301: not valid JSON"),
        ('{"text": NaN}', "line 301: not valid JSON"),
        ('{"text": "%s"}' % ("x" * 1100), "line 301: it has more than 1,000 bytes"),
    ],
)
def test_a_malformed_record_is_one_line_or_skipped(run, tmp_path, record, place):
    (tmp_path / "in.jsonl").write_text(f"{LINES}{record}\n")
    limit = {"max-record-bytes": 1000}
    status, said = run(*prepared(**limit))
    assert status == 1 and f"in.jsonl, {place}" in said and said.endswith("(--skip-malformed would skip it)")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]
    status, said = run(*prepared("--skip-malformed", **limit))
    assert status == 0 and json.loads(Path("out/manifest.json").read_text())["malformed"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out"]


def test_a_damaged_input_is_status_1(run, tmp_path):
    (tmp_path / "in.jsonl.gz").write_bytes(b"nothing of the kind")
    status, said = run(*prepared(input="in.jsonl.gz"))
    assert (status, said.startswith("prepare_data.py: error: input in.jsonl.gz cannot be read: ")) == (1, True)


@pytest.mark.parametrize(
    ("error", "stays"), [(OSError(28, "No space left on device"), True), (TypeError("a bug of ours"), False)]
)
def test_what_a_rerun_can_go_on_with_stays_and_nothing_else(run, tmp_path, monkeypatch, error, stays):
    def fail(*_):
        raise error

    for name, left in (("train_tokenizer", False), ("join", stays)):
        with monkeypatch.context() as patch:
            patch.setattr(f"coe_megatron.data.prepare.{name}", fail)
            if stays:
                assert run(*prepared()) == (1, "prepare_data.py: error: [Errno 28] No space left on device")
            else:
                with pytest.raises(TypeError):
                    run(*prepared())
        assert (tmp_path / ".out.partial").exists() == left
    if stays:
        (chunk,) = (tmp_path / ".out.partial" / "chunks").iterdir()
        chunk.write_bytes(b"damaged")
        with monkeypatch.context() as patch:  # damaged after it was looked at
            patch.setattr("coe_megatron.data.prepare._is_usable", lambda *_: True)
            status, said = run(*prepared())
        assert status == 1 and "000000.npz is damaged" in said
    assert run(*prepared())[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out"]
