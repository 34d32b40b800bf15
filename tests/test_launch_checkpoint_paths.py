"""launch/checkpoint.py, within this process: any path, damaged checkpoints, and their exit statuses."""

import os
import runpy
from pathlib import Path

import pytest
from checkpoint_build import make_checkpoint
from programs import ROOT
from rights import as_nobody, private_folder

from coe_megatron.checkpoint import listing
from coe_megatron.checkpoint.names import name_of

LONG = "x" * 300


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run with two checkpoints; beside it things that are none. The paths in tests begin there."""
    for step in (1, 2):
        make_checkpoint(tmp_path / "run" / "checkpoints", step)
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    os.symlink("nowhere", tmp_path / "dangling")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / "run"


def program(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit status of `checkpoint.py ARGUMENTS`."""
    monkeypatch.setattr("sys.argv", ["checkpoint.py", *map(str, arguments)])
    try:
        return runpy.run_path(str(ROOT / "launch/checkpoint.py"))["main"]()
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code


NO_FOLDER = {
    "file": "it is a file, where a folder is needed",
    "pipe": "it is a special file, where a folder is needed",
    "/dev/null": "it is a special file, where a folder is needed",
    "dangling": "it is a dangling link to nowhere",
    "missing": "there is no such folder",
    LONG: "file name too long",
    "file/below": "not a directory",
    "\x1b[31m\n": "there is no such folder",
}


@pytest.mark.parametrize("command", ["inspect", "verify", "reshard", "average", "upcycle"])
def test_a_source_that_is_no_folder_is_one_line(
    command: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for source, said in NO_FOLDER.items():
        out = {"reshard": ["out"], "average": ["run", "out"], "upcycle": ["out", "--iterations", 2]}.get(command, [])
        assert program(monkeypatch, command, source, *out) == 2
        require_line(capsys, "DIR is ", said)
    assert not Path("out").exists()


def require_line(capsys: pytest.CaptureFixture[str], *said: str) -> None:
    """On stderr alone."""
    shown = capsys.readouterr()
    assert shown.err.startswith("checkpoint.py: error: ") and shown.err.count("\n") == 1 and shown.out == "", shown
    assert shown.err[:-1].isprintable() and all(words in shown.err for words in said), shown.err


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]], ids=["", "overwrite"])
@pytest.mark.parametrize("command", [["reshard", "run"], ["average", "run", "--last", "2"]], ids=lambda each: each[0])
def test_a_place_where_nothing_can_be_written_is_one_line(
    command: list[str],
    overwrite: list[str],
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = sorted(Path.cwd().rglob("*"))
    for out, said in {**NO_FOLDER, "x" * 250: "is too long for a name (at most 245 bytes)"}.items():
        if said != "there is no such folder":
            assert program(monkeypatch, *command[:2], out, *command[2:], *overwrite) == 2
            require_line(capsys, "OUT is ", said)
    for out in ("empty", "run"):
        assert program(monkeypatch, *command[:2], out, *command[2:], *overwrite) == 2
        require_line(capsys, "is not a checkpoint and will not be" if overwrite else "exists: name another folder")
    assert sorted(Path.cwd().rglob("*")) == before


def test_without_rights_it_is_one_line(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with private_folder() as private, as_nobody():
        assert program(monkeypatch, "verify", private / "d") == 2
        require_line(capsys, "DIR is ", "permission denied")
        assert program(monkeypatch, "reshard", private.parent, private / "out") == 2
        require_line(capsys, "OUT is ", "permission denied")
        assert program(monkeypatch, "average", private.parent, private.parent, private.parent / "out") == 2
        require_line(capsys, "OUT is ", "permission denied")


def test_a_tilde_is_the_users_home(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program(monkeypatch, "reshard", "~/run", "~/out", "--weights-only") == 0
    assert capsys.readouterr().out == f"written: {run.parent / 'out'}\n"
    assert program(monkeypatch, "inspect", "~/out") == 0


def test_statuses_of_a_damaged_checkpoint(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """1 from `verify`, which names it on stdout; 2 from what cannot be done; a run's older one is used."""
    newest, older = (run / "checkpoints" / name_of(step) for step in (2, 1))
    (newest / "random" / "\x1b[31m").symlink_to("/etc/passwd")
    trouble = "it holds random/\\x1b[31m, which complete.json does not list"
    assert program(monkeypatch, "verify", "run") == 1
    shown = capsys.readouterr()
    assert shown.err == ""
    name, other = (f"run/checkpoints/{name_of(step)}" for step in (2, 1))
    assert shown.out == f"{name}: {trouble}\n{other}: complete\n"
    for command in (["inspect"], ["reshard", "out"], ["average", other, "out"]):
        assert program(monkeypatch, command[0], newest, *command[1:]) == 2
        require_line(capsys, trouble)
    assert program(monkeypatch, "reshard", "run", "out") == 0
    assert capsys.readouterr().err.count("\n") == 1 and listing.problem(Path("out")) is None
    assert Path("out/state.json").read_text() == (older / "state.json").read_text()
