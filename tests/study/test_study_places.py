"""Paths of a study that cannot be used: one line that names the path, from every command, before anything is done."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from study_made_up import leave

from coe_megatron.files import as_argument
from coe_megatron.study.plan.arms import Run, Study, make_study
from coe_megatron.study.plan.study_file import read_study
from coe_megatron.study.run.paths import config_of, log_of, write_config

pytestmark = pytest.mark.thorough

Write = Callable[..., Path]
Program = Callable[..., tuple[int, str, str]]
COMMANDS = ("plan", "run", "submit", "status", "report")


def study(file: Path) -> Study:
    return make_study(read_study(file))


def run_of(file: Path) -> Run:
    return study(file).runs[0]


def a_file(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("x")


def a_link(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to("nowhere")


def a_pipe(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)


def a_folder(path: Path) -> None:
    path.mkdir(parents=True)


@pytest.mark.parametrize("command", ["plan", "status"])
@pytest.mark.parametrize(
    ("place", "made", "said"),
    [
        (lambda run: Path(run.config.output).parents[1], a_file, "output is "),
        (lambda run: Path(run.config.output).parents[1], a_link, "it is a dangling link to "),
        (lambda run: Path(run.config.output).parent, a_file, "the folder of arm moe-4-8_prenorm is "),
        (lambda run: Path(run.config.output), a_pipe, "the folder of arm moe-4-8_prenorm, seed 1 is "),
        (config_of, a_folder, "the config of arm moe-4-8_prenorm, seed 1 is "),
        (log_of, a_pipe, "the log of arm moe-4-8_prenorm, seed 1 is "),
    ],
)
def test_what_is_in_the_way_is_named(
    study_file: Write,
    tmp_path: Path,
    study_program: Program,
    command: str,
    place: Callable[[Run], Path],
    made: Callable[[Path], None],
    said: str,
) -> None:
    file = study_file(output=str(tmp_path / "out"))
    made(place(run_of(file)))
    status, out, err = study_program(command, file)
    assert (status, out, err.count("\n")) == (2, "", 1) and said in err


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["n" * 256, "a/" * 2500])
def test_an_output_that_is_too_long(study_file: Write, study_program: Program, command: str, name: str) -> None:
    status, out, err = study_program(command, study_file(output=name))
    assert (status, out, err.count("\n")) == (2, "", 1) and err.startswith("coe-study: error: output ")


@pytest.mark.parametrize("command", ["plan", "report"])
@pytest.mark.parametrize("made", [None, a_folder, a_link, a_pipe])
def test_a_study_that_is_no_file(
    tmp_path: Path, study_program: Program, command: str, made: Callable[[Path], None] | None
) -> None:
    if made is not None:
        made(tmp_path / "study.yaml")
    status, out, err = study_program(command, tmp_path / "study.yaml")
    assert (status, out, err.count("\n")) == (2, "", 1) and f"is {tmp_path}/study.yaml: " in err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may do everything")
@pytest.mark.parametrize("command", ["plan", "run", "submit"])
def test_what_may_not_be_written(study_file: Write, tmp_path: Path, study_program: Program, command: str) -> None:
    file = study_file(output=str(tmp_path / "out"))
    (tmp_path / "out").mkdir(mode=0o500)
    status, _, err = study_program(command, file)
    assert (status, err.count("\n")) == (2, 1) and f"output is {tmp_path}/out: it cannot be written" in err


def test_who_only_reads_needs_no_right_to_write(
    study_file: Write, tmp_path: Path, study_program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = study_file(output=str(tmp_path / "out"))
    leave(run_of(file))
    may = os.access
    monkeypatch.setattr(os, "access", lambda path, mode, **more: not mode & os.W_OK and may(path, mode, **more))
    assert study_program("status", file)[0] == 0
    status, _, err = study_program("plan", file)
    assert status == 2 and "it cannot be written" in err


def test_home_is_meant_by_its_sign(
    study_file: Write, tmp_path: Path, study_program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    study_file(output="~/out", base="~/base.yaml")
    status, out, _ = study_program("report", "~/study.yaml", "--to", "~/there")
    assert status == 0 and out.splitlines()[0] == f"{tmp_path}/there/results.csv"
    assert study(tmp_path / "study.yaml").settings.output == f"{tmp_path}/out"


@pytest.mark.parametrize("made", [a_file, a_link, a_pipe])
def test_a_place_for_the_report_that_is_none(
    study_file: Write, tmp_path: Path, study_program: Program, made: Callable[[Path], None]
) -> None:
    made(tmp_path / "there")
    status, out, err = study_program("report", study_file(output=str(tmp_path / "out")), "--to", tmp_path / "there")
    assert (status, out, err.count("\n")) == (2, "", 1) and f"the report's folder is {tmp_path}/there: " in err


@pytest.mark.parametrize("made", [a_folder, a_pipe])
@pytest.mark.parametrize("name", ["report.md", "results.csv"])
def test_a_file_of_the_report_that_is_none(
    study_file: Write, tmp_path: Path, study_program: Program, name: str, made: Callable[[Path], None]
) -> None:
    made(tmp_path / "there" / name)
    status, out, err = study_program("report", study_file(output=str(tmp_path / "out")), "--to", tmp_path / "there")
    assert (status, out, err.count("\n")) == (2, "", 1) and f"a file of the report is {tmp_path}/there/{name}: " in err


@pytest.mark.parametrize("made", [a_link, a_pipe, a_file])
def test_what_an_earlier_attempt_left_beside_a_file_holds_nothing_up(
    study_file: Write, tmp_path: Path, study_program: Program, made: Callable[[Path], None]
) -> None:
    file = study_file(output=str(tmp_path / "out"))
    made(tmp_path / "there" / "results.csv.tmp")
    assert study_program("report", file, "--to", tmp_path / "there")[0] == 0
    assert "report.md" in os.listdir(tmp_path / "there") and not list((tmp_path / "there").glob("*.tmp"))
    made(Path(f"{config_of(run_of(file))}.tmp"))
    assert write_config(run_of(file)).is_file()


def test_a_folder_beside_what_is_to_be_written_is_named_first(
    study_file: Write, tmp_path: Path, study_program: Program
) -> None:
    file = study_file(output=str(tmp_path / "out"))
    a_folder(tmp_path / "there" / "report.md.tmp")
    status, out, err = study_program("report", file, "--to", tmp_path / "there")
    assert (status, out, err.count("\n")) == (2, "", 1) and "the folder report.md.tmp is in the way" in err
    a_folder(Path(f"{config_of(run_of(file))}.tmp"))
    status, out, err = study_program("plan", file)
    assert (status, out, err.count("\n")) == (2, "", 1) and "the folder seed-1.yaml.tmp is in the way" in err


def test_an_earlier_report_may_hold_any_bytes(study_file: Write, tmp_path: Path, study_program: Program) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "report.md").write_bytes(b"\xff](mine.svg)")
    assert study_program("report", study_file(output=str(tmp_path / "out")), "--to", tmp_path / "there")[0] == 0


@pytest.mark.parametrize("output", ["-x", "./~x", "a b", "$(touch x)", "a'b"])
def test_configs_are_no_options(
    study_file: Write, tmp_path: Path, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    written = as_argument(write_config(run_of(study_file(output=output))))
    assert written[0] not in "-~" and Path(written).is_file()
    assert Path(written).resolve().is_relative_to(tmp_path)
