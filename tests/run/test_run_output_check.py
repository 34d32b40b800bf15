"""An output folder that a run cannot have is refused in one line, before anything starts and for a dry run too."""

import json
import os
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
from programs import ROOT
from rights import as_nobody, private_folder

from coe_megatron.config import RunConfig, parse
from coe_megatron.errors import ConfigError
from coe_megatron.run.output_check import require_output

FILES = ("config.yaml", "run.json", "run.lock", "metrics.jsonl", "metrics.previous.jsonl", "loss.png", "wandb-id")
TEMPORARY = ("config.yaml.tmp", "run.json.tmp", "metrics.jsonl.tmp", "loss.png.tmp")
FOLDERS = ("tensorboard", "checkpoints", "index", "profile", "stacks", "wandb")
MAKE: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/full"),
    "a dangling link": lambda path: path.symlink_to("nowhere/at/all"),
    "a loop": lambda path: path.symlink_to(path),
}


def config(output: Path) -> RunConfig:
    """A run with all the parts that there are."""
    return parse(
        {
            "output": str(output),
            "data": {"samples": "packed"},
            "logging": {"wandb": True},
            "profile": {"first_step": 2},
        }
    )


def refusal(output: Path) -> str:
    with pytest.raises(ConfigError) as error:
        require_output(config(output))
    assert str(error.value).isprintable()
    return str(error.value)


@pytest.mark.parametrize("kind", [*MAKE, "the other kind"])
@pytest.mark.parametrize("part", [*FILES, *TEMPORARY, *FOLDERS])
def test_each_part_of_the_output_folder(part: str, kind: str, tmp_path: Path) -> None:
    other = Path.touch if part in FOLDERS else Path.mkdir
    MAKE.get(kind, other)(tmp_path / part)
    before = sorted(tmp_path.rglob("*"))
    assert refusal(tmp_path).startswith(f"{part} in output is {tmp_path / part}: ")
    assert sorted(tmp_path.rglob("*")) == before, "nothing is written"


def test_a_file_for_stacks_that_would_be_waited_for(tmp_path: Path) -> None:
    (tmp_path / "stacks").mkdir()
    os.mkfifo(tmp_path / "stacks" / "rank-00000.txt")
    assert "rank-00000.txt: it is a special file, where a file is needed" in refusal(tmp_path)


@pytest.mark.parametrize("kind", MAKE)
def test_the_folder_itself(kind: str, tmp_path: Path) -> None:
    MAKE[kind](tmp_path / "run")
    assert refusal(tmp_path / "run").startswith(f"output is {tmp_path / 'run'}: ")
    assert refusal(tmp_path / "run" / "below").startswith(f"output is {tmp_path / 'run'}")
    (tmp_path / "file").touch()
    assert "it is a file, where a folder is needed" in refusal(tmp_path / "file")


def test_names_that_no_file_system_takes(tmp_path: Path) -> None:
    assert "is too long for a name (at most 255 bytes)" in refusal(tmp_path / "new" / ("é" * 128))
    assert "file name too long" in refusal(tmp_path / ("n" * 256))
    assert refusal(tmp_path / "a\0b").startswith("output is ")


@pytest.mark.parametrize("part", ["", *FILES, *FOLDERS])
def test_without_rights(part: str) -> None:
    """A folder of somebody else that may be read, and a part of it that may not even be looked into."""
    with private_folder() as private, as_nobody():
        assert refusal(private / "d").startswith(f"output is {private / 'd'}: it cannot be used: permission denied")
    with private_folder() as private:
        folder = private.parent / "run"
        folder.mkdir()
        folder.chmod(0o777)
        path = folder / part
        if part:
            path.touch() if part in FILES else path.mkdir()
        path.chmod(0o555 if not part or part in FOLDERS else 0o444)
        with as_nobody():
            name = f"{part} in output" if part else "output"
            assert refusal(folder).startswith(f"{name} is {path}: it cannot be written: permission denied")


def test_what_a_run_has_left_is_no_obstacle(tmp_path: Path) -> None:
    require_output(config(tmp_path / "not" / "there" / "yet"))
    for name in FILES:
        (tmp_path / name).touch()
    for name in FOLDERS:
        (tmp_path / name).mkdir()
    (tmp_path / "wandb-id.tmp").mkdir()
    require_output(config(tmp_path))
    (tmp_path / "elsewhere").symlink_to(tmp_path)
    require_output(config(tmp_path / "elsewhere"))


def test_what_this_run_does_not_use_may_be_anything(tmp_path: Path) -> None:
    for name in ("tensorboard", "index", "profile", "wandb"):
        (tmp_path / name).touch()
    require_output(parse({"output": str(tmp_path), "logging": {"tensorboard": False}}))


def checkpoint(folder: Path, state: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(state if isinstance(state, str) else json.dumps(state))
    return folder


@pytest.mark.parametrize("name", ["best", "step-2-old", "step-00000002.bak", ".step-00000002.replaced", "step-٢"])
def test_checkpoints_under_other_names_are_not_begun_over(name: str, tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "checkpoints" / name, {"state": {"step": 2}})
    (tmp_path / "checkpoints" / "step-00000004.tmp").mkdir()
    assert refusal(tmp_path) == (
        f"output is {tmp_path}: it has no checkpoint step-N, but {path}; rename it back to step-00000002 to resume "
        "from it, or choose another output (training.warm_start starts from its weights)"
    )
    path.rename(path.with_name("step-00000002"))
    require_output(config(tmp_path))


@pytest.mark.parametrize("state", ["", "[" * 100_000, [], {"state": {"step": -1}}, {"state": {"step": "\x1b"}}, {}])
def test_the_way_back_is_told_as_far_as_it_is_known(state: object, tmp_path: Path) -> None:
    checkpoint(tmp_path / "checkpoints" / "best", state)
    (tmp_path / "checkpoints" / "archive.tar").touch()
    said = refusal(tmp_path)
    assert "but " + str(tmp_path / "checkpoints" / "archive.tar") + " and 1 more; rename it back to step-N, N" in said


@pytest.mark.parametrize("names", [(), ("step-00000004.tmp",), (".nfs0001", ".DS_Store", "lost+found")])
def test_what_is_no_checkpoint_is_no_obstacle(names: tuple[str, ...], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints").mkdir(exist_ok=True)
    require_output(config(tmp_path))


OURS = ("step-00000006", "step-6", "step-00000006.tmp", ".step-00000006.replaced", ".step-00000006.partial")


@pytest.mark.parametrize("kind", [*MAKE, "a file"])
@pytest.mark.parametrize("name", OURS)
def test_what_has_a_checkpoint_s_name_and_is_no_folder(name: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / name
    path.parent.mkdir()
    (path.parent / "step-00000004").mkdir()
    MAKE.get(kind, Path.touch)(path)
    said = refusal(tmp_path)
    assert said.startswith(f"{name} in output is {path}: it ") and said.endswith("; move it away")
    assert os.path.lexists(path)


@pytest.mark.parametrize("name", OURS)
def test_a_checkpoint_may_be_a_link_to_a_folder(name: str, tmp_path: Path) -> None:
    for folder in ("checkpoints/step-00000004", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "checkpoints" / name).symlink_to(tmp_path / "elsewhere")
    require_output(config(tmp_path))


@pytest.mark.parametrize("options", [["--dry-run"], []])
def test_the_program_says_it_before_torch_is_loaded(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / "run.json").mkdir()
    monkeypatch.setattr("sys.argv", ["launch/pretrain_coe.py"])
    main = runpy.run_path("launch/pretrain_coe.py")["main"]
    with pytest.raises(SystemExit) as ended:
        main(["configs/quickstart.yaml", "parallel.expert=1", f"output={tmp_path}", *options])
    line = f"run.json in output is {tmp_path / 'run.json'}: it is a folder, where a file is needed"
    assert (ended.value.code, capsys.readouterr()) == (2, ("", f"pretrain_coe.py: error: {line}\n"))
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_a_config_of_the_users_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"base: ../common.yaml\noutput: {tmp_path}\n")
    assert f"{tmp_path / 'config.yaml'} belongs to no run (run.json and checkpoints are missing)" in refusal(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    require_output(config(tmp_path))
    (tmp_path / "run.json").unlink()
    (tmp_path / "checkpoints" / "step-00000002").mkdir(parents=True)
    require_output(config(tmp_path))  # a run's own whose record is lost
