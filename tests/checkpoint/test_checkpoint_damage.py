"""What is not as it was saved is named, skipped and kept; what would run code when it is read is never read."""

import builtins
import io
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed import DeepSpeedEngine
from engine_build import make_engine, take_steps
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from coe_megatron.checkpoint import listing, save_load
from coe_megatron.checkpoint.integrity import MANIFEST, write_manifest
from coe_megatron.checkpoint.names import name_of, step_of
from coe_megatron.checkpoint.storage import Reader
from coe_megatron.errors import ConfigError

pytestmark = pytest.mark.thorough


@pytest.fixture
def engine(single_rank: None) -> DeepSpeedEngine:
    engine = make_engine(8, layers=1)
    take_steps(engine, 0, 1)
    return engine


@pytest.fixture
def run(engine: DeepSpeedEngine, tmp_path: Path) -> Path:
    """Two checkpoints."""
    for step in (1, 2):
        save_load.save(tmp_path, step, engine, {"step": step}, keep=9)
    return tmp_path


def test_a_byte_changed_or_a_file_cut_is_always_found(
    engine: DeepSpeedEngine, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = run / name_of(2)
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    names = {str(path.relative_to(newest)) for path in files}
    assert names >= {MANIFEST, "state.json", "random/00000.pt", "tensors/.metadata", "tensors/__0_0.distcp"}
    for path in files:
        whole = path.read_bytes()
        for number, damaged in enumerate(damages(whole)):
            path.write_bytes(damaged)
            assert save_load.load_latest(run, engine) == {"step": 1}, (path, number)
            said = capsys.readouterr().err
            assert said.startswith(f"checkpoint {newest} is skipped: ") and path.name in said, said
            assert said.count("\n") == 1 and path.read_bytes() == damaged
        path.unlink()
        assert save_load.load_latest(run, engine) == {"step": 1}
        assert f"{path.relative_to(newest)} is missing" in capsys.readouterr().err
        path.write_bytes(whole)
    assert save_load.load_latest(run, engine) == {"step": 2} and not capsys.readouterr().err


def damages(whole: bytes) -> Iterator[bytes]:
    for place in (0, len(whole) // 2, len(whole) - 1):
        yield whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
    for kept in (0, len(whole) // 2, len(whole) - 1):
        yield whole[:kept]


def test_no_byte_of_the_manifest_can_change(run: Path) -> None:
    """Also a blank for a line break, which JSON would not mind."""
    path = run / name_of(2) / MANIFEST
    whole = path.read_bytes()
    for place in range(len(whole)):
        for other in (whole[place] ^ 1, ord(" "), ord("\n"), ord("\r"), ord("0")):
            if other != whole[place]:
                path.write_bytes(whole[:place] + bytes([other]) + whole[place + 1 :])
                assert listing.problem(path.parent), place


def test_a_run_without_a_whole_checkpoint_does_not_begin_anew(
    engine: DeepSpeedEngine, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / name_of(1) / MANIFEST).unlink()
    (run / name_of(2) / "state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"complete, the most recent is step-00000002: state.json has 2") as raised:
        save_load.load_latest(run, engine)
    assert "choose another output, or delete that folder to start from scratch" in str(raised.value)
    assert "\n" not in str(raised.value) and len(listing.newest_first(run)) == 2
    with pytest.raises(ValueError, match=r"no checkpoint in .* is complete, the most recent is step-00000002"):
        save_load.load_weights(run, engine)


def test_a_run_that_never_finished_a_save_begins_anew(
    engine: DeepSpeedEngine, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run / name_of(1))
    (run / name_of(2)).rename(run / "step-00000002.tmp")
    assert save_load.load_latest(run, engine) is None
    skipped, said = capsys.readouterr().err.splitlines()
    assert "step-00000002.tmp is skipped: its save was not finished" in skipped
    assert said == f"no save in {run} was finished: the run starts from scratch"


class Malicious:
    """Unpickling it calls `function(*arguments)`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple:
        return self._call


def test_a_list_of_tensors_that_runs_code_is_refused_unread(
    engine: DeepSpeedEngine, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest, proof = run / name_of(2), tmp_path / "proof"
    forge(newest, "tensors/.metadata", pickle.dumps(Malicious(builtins.exec, f"open({str(proof)!r}, 'w')")))
    assert save_load.load_latest(run, engine) == {"step": 1}
    reason = "tensors/.metadata needs builtins.exec, which no tensor index needs"
    assert capsys.readouterr().err == f"checkpoint {newest} is skipped: {reason}\n"
    with pytest.raises(ValueError, match=r"is not complete: tensors/.metadata needs builtins.exec"):
        save_load.load_weights(newest, engine)
    assert not proof.exists()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda found: found.state_dict_metadata.update(weight=BytesStorageMetadata()), "needs torch.distributed"),
        (lambda found: setattr(found, "planner_data", Malicious(print, "read")), "needs builtins.print"),
        (lambda found: move(found, "../../secret"), "needs the file ../../secret"),
        (lambda found: setattr(found, "storage_data", None), "is not a tensor index"),
    ],
    ids=["bytes", "class", "path", "nothing"],
)
def test_a_list_with_more_than_tensors_is_refused(
    spoil: Any, said: str, engine: DeepSpeedEngine, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = run / name_of(2)
    found = Reader(newest / "tensors").read_metadata()
    spoil(found)
    forge(newest, "tensors/.metadata", pickle.dumps(found))
    assert save_load.load_latest(run, engine) == {"step": 1}
    assert capsys.readouterr().err.startswith(f"checkpoint {newest} is skipped: tensors/.metadata {said}")


def move(found: Metadata, path: str) -> None:
    for place in found.storage_data.values():
        place.relative_path = path


def test_a_tensor_that_runs_code_is_refused(
    engine: DeepSpeedEngine, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the place of every part, and as long as the longest."""
    proof, newest = tmp_path / "proof", run / name_of(2)
    found, payload = Reader(newest / "tensors").read_metadata(), io.BytesIO()
    longest = max(place.length for place in found.storage_data.values())
    torch.save([Malicious(builtins.exec, f"open({str(proof)!r}, 'w')"), "x" * longest], payload)
    for place in found.storage_data.values():
        place.offset, place.length = 0, len(payload.getvalue())
    (newest / "tensors" / "__0_0.distcp").write_bytes(payload.getvalue())
    forge(newest, "tensors/.metadata", pickle.dumps(found))
    assert save_load.load_latest(run, engine) == {"step": 1}
    assert re.search(r"__0_0\.distcp: a part of \S+ is damaged: it needs __builtin__\.exec", capsys.readouterr().err)
    assert not proof.exists()


def test_states_of_generators_that_run_code_are_refused(
    engine: DeepSpeedEngine, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    proof, newest = tmp_path / "proof", run / name_of(2)
    content = io.BytesIO()
    torch.save(Malicious(builtins.exec, f"open({str(proof)!r}, 'w')"), content)
    forge(newest, "random/00000.pt", content.getvalue())
    assert save_load.load_latest(run, engine) == {"step": 1}
    assert "random/00000.pt is damaged: it needs __builtin__.exec" in capsys.readouterr().err
    assert not proof.exists()


def test_a_checkpoint_without_the_moments_it_tells_of_is_of_another_model(engine: DeepSpeedEngine, run: Path) -> None:
    """Its weights alone are taken all the same."""
    newest = run / name_of(2)
    found = Reader(newest / "tensors").read_metadata()
    key = "optimizer.exp_avg.output_layer.weight"
    del found.state_dict_metadata[key]
    found.storage_data = {index: place for index, place in found.storage_data.items() if index.fqn != key}
    forge(newest, "tensors/.metadata", pickle.dumps(found))
    with pytest.raises(ConfigError, match=rf"is of another model: {key} is missing in the checkpoint and"):
        save_load.load_latest(run, engine)
    assert save_load.load_weights(run, engine)[1] == {"step": 2}


def forge(checkpoint: Path, name: str, content: bytes) -> None:
    (checkpoint / name).write_bytes(content)
    (checkpoint / MANIFEST).unlink()
    write_manifest(checkpoint)
    assert name in json.loads((checkpoint / MANIFEST).read_text())["files"]


@pytest.mark.parametrize("interrupted", ["rename", "rmtree"])
def test_a_checkpoint_that_is_replaced_is_there_whenever_it_is_interrupted(
    interrupted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Ctrl-C while the new one gets the name, and while the old one is deleted."""
    old, new = tmp_path / name_of(1), tmp_path / f"{name_of(1)}.tmp"
    for folder in (old, new):
        folder.mkdir()
        (folder / MANIFEST).write_text(folder.name)

    def interrupt(*paths: Path, **_: object) -> None:
        if paths[0] == new or (interrupted == "rmtree" and paths[0].exists()):
            raise KeyboardInterrupt
        if interrupted == "rename":
            os.replace(*paths)

    monkeypatch.setattr(listing.os if interrupted == "rename" else shutil, interrupted, interrupt)
    with pytest.raises(KeyboardInterrupt):
        listing.publish(new, old)
    assert (old / MANIFEST).read_text() == (old.name if interrupted == "rename" else new.name)


def outside(path: Path) -> None:
    """A link to a folder that is not the run's."""
    run = next(place.parent for place in path.parents if place.name == "checkpoints")
    (run / "outside" / MANIFEST).mkdir(parents=True, exist_ok=True)
    path.symlink_to(run / "outside")


NO_FOLDERS: dict[str, Callable[[Path], Any]] = {
    "a file": Path.touch,
    "a pipe": os.mkfifo,  # that is never opened: nobody writes into it
    "a dangling link": lambda path: path.symlink_to("nowhere"),
    "a link to a folder": outside,
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", NO_FOLDERS)
def test_what_is_no_folder_is_not_in_the_way_of_checkpoints(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever put it there while the run went on: a checkpoint gets its name, older ones go, and it goes with them."""
    checkpoints = tmp_path / "checkpoints"
    for step in (1, 3):
        (checkpoints / name_of(step)).mkdir(parents=True)
        (checkpoints / name_of(step) / MANIFEST).touch()
    for name in (name_of(2), name_of(5), f"{name_of(4)}.tmp", f"{name_of(9)}.tmp"):
        NO_FOLDERS[kind](checkpoints / name)
    partial, final = checkpoints / f"{name_of(4)}.tmp", checkpoints / name_of(4)
    save_load._make_empty(partial)
    for path in (final, checkpoints / f".{final.name}.replaced", partial / "other"):
        NO_FOLDERS[kind](path)
    (partial / MANIFEST).touch()
    listing.publish(partial, final)
    save_load._prune(checkpoints, 4, keep=1, milestones=())
    listing.delete_between(checkpoints, 5, 5)
    assert os.listdir(checkpoints) == [final.name] and (final / MANIFEST).is_file()
    assert kind != "a link to a folder" or os.listdir(tmp_path / "outside") == [MANIFEST]
    assert capsys.readouterr().err == ""


def test_an_old_checkpoint_that_cannot_be_deleted_is_said_and_no_save_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2, 3):
        (tmp_path / name_of(step)).mkdir()
        (tmp_path / name_of(step) / MANIFEST).touch()

    def refuse(path: Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    save_load._prune(tmp_path, 3, keep=1, milestones=())
    said = [f"checkpoint {tmp_path / name_of(step)} could not be deleted: [Errno 13]" for step in (2, 1)]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith(start) for line, start in zip(lines, said, strict=True))


def test_checkpoints_that_were_passed_over_are_not_counted(tmp_path: Path) -> None:
    """A run goes on from step 6, having found 8 damaged, and saves 9: two whole ones stay, and what was damaged."""
    for step in (4, 6, 8, 9):
        (tmp_path / name_of(step)).mkdir()
        (tmp_path / name_of(step) / MANIFEST).touch()
    assert listing.steps_after(tmp_path, 6) == {8, 9}
    save_load._prune(tmp_path, 9, keep=2, milestones={8})
    assert [step_of(path) for path in listing.newest_first(tmp_path)] == [9, 8, 6]
