"""A run whose checkpoints are whole goes on, whatever is left of its other files, and a finished one is left alone."""

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from attempts import attempt, small
from programs import Program, wait_for_step

from coe_megatron.checkpoint import listing
from coe_megatron.config import RunConfig, dump
from coe_megatron.files import set_aside
from coe_megatron.run.exit_status import ExitStatus
from coe_megatron.run.folder import OutputLost, check_same_run
from coe_megatron.run.loss_plot import is_complete_png
from coe_megatron.run.metrics_log import read_metrics

pytestmark = pytest.mark.thorough

RECORDS = ("run.json", "config.yaml", "metrics.jsonl", "loss.png")
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "torn": lambda content: content[: len(content) // 2] + b"\n",
    "NULs": lambda content: bytes(len(content)),
    "NULs in the middle": lambda content: content[:30] + bytes(300) + content[330:],
    "foreign": lambda content: b"\x89PNG\r\n\x1a\n\xff\xfe",
    "of another shape": lambda content: b"[1, {}]\n",
    "values of other types": lambda content: b'{"attempts": 7, "model": {"seq_length": []}, "step": null}\n',
    "nested deep": lambda content: b"[" * 100_000 + b"\n",
}


def run_config(data: Path, output: Path, steps: int = 4, **more: Any) -> RunConfig:
    config = small(data, output, steps=steps, **{"save_every": 2, "evaluate_every": 2, **more})
    data_settings = replace(config.data, samples="packed")
    return replace(config, data=data_settings, logging=replace(config.logging, tensorboard=True))


@pytest.fixture(scope="module")
def whole(megatron_groups: None, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    attempt(run_config(prepared, folder))
    return folder


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "run")


def said_by(action: Callable[[], object]) -> list[str]:
    """Its lines on stderr. Not by capsys, which closes a stream that DeepSpeed's logger holds on to."""
    with contextlib.redirect_stderr(io.StringIO()) as stream:
        action()
    return stream.getvalue().splitlines()


def contents(folder: Path) -> dict[str, str]:
    files = {path for path in folder.rglob("*") if path.is_file() and path.name != "run.lock"}
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def losses(folder: Path) -> list[tuple]:
    names = ("step", "tokens", "train_loss", "valid_loss")
    return [tuple(line.get(name) for name in names) for line in read_metrics(folder / "metrics.jsonl")]


def damage(path: Path, how: str) -> bytes:
    path.write_bytes(content := DAMAGES[how](path.read_bytes()))
    return content


@pytest.mark.parametrize(
    "how", ["torn", *(pytest.param(how, marks=pytest.mark.slow) for how in DAMAGES if how != "torn")]
)
def test_a_run_goes_on_whatever_its_records_hold(
    how: str, single_rank: None, run: Path, whole: Path, prepared: Path
) -> None:
    """From step 2 of 4: with the losses of the run whose records were whole, and the damaged files kept aside."""
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    (index,) = (path.parent for path in (run / "index").glob("train-*/complete.json"))
    arrays = sorted(index.glob("*sample_index.npy")) + sorted(run.glob("tensorboard/*"))
    kept = {run / name: damage(run / name, how) for name in RECORDS[:3]}
    for path in arrays:
        damage(path, how)
    said = said_by(lambda: attempt(run_config(prepared, run)))
    for path, content in kept.items():
        aside, lines = path.with_name(f"{path.name}.damaged"), [line for line in said if line.startswith(f"{path} ")]
        nothing = (path.name, how) in NO_DAMAGE
        assert len(lines) == (not nothing) == aside.exists() and all(line.isprintable() for line in lines)
        assert nothing or aside.read_bytes() == content
    assert index.with_name(f"{index.name}.damaged").is_dir()
    assert losses(run)[-2:] == losses(whole)[-2:]
    attempts = json.loads((run / "run.json").read_text())["attempts"]
    assert [each["outcome"] for each in attempts] == ["finished"] and is_complete_png(run / "loss.png")
    before = contents(run)
    assert not [line for line in said_by(lambda: attempt(run_config(prepared, run))) if "damaged" in line]
    assert contents(run) == before


NO_DAMAGE = {("metrics.jsonl", "empty")}  # what a run has before its first step


@pytest.mark.parametrize("name", RECORDS)
def test_of_a_finished_run_what_is_damaged_is_made_anew_and_nothing_else(
    name: str, single_rank: None, run: Path, prepared: Path
) -> None:
    before = contents(run)
    content = damage(run / name, "NULs in the middle")
    said = said_by(lambda: attempt(run_config(prepared, run)))
    after = contents(run)
    assert (run / f"{name}.damaged").read_bytes() == content
    told = [line for line in said if line.startswith(str(run))]
    assert len(told) == 1 and told[0].startswith(f"{run / name} ")
    differing = {each for each in after if after[each] != before.get(each)} - {f"{name}.damaged"}
    also = {"loss.png", "config.yaml"} if name == "run.json" else set()  # a run that is not known to have finished
    assert differing <= {name, *also} and before.keys() | {f"{name}.damaged"} == after.keys()


@pytest.mark.parametrize("more", [{}, {"log_every": 3, "evaluate_every": 4, "keep_checkpoints": 1, "micro_batch": 4}])
def test_a_finished_run_is_left_as_it_is(more: dict[str, int], single_rank: None, run: Path, prepared: Path) -> None:
    before = contents(run)
    attempt(run_config(prepared, run, **more))
    assert contents(run) == before


def test_a_finished_run_whose_last_checkpoint_is_damaged_goes_on(single_rank: None, run: Path, prepared: Path) -> None:
    (run / "checkpoints" / "step-00000004" / "state.json").write_text("{}")
    attempt(run_config(prepared, run))
    attempts = json.loads((run / "run.json").read_text())["attempts"]
    assert [each["outcome"] for each in attempts] == ["finished", "finished"]


@pytest.mark.timeout(120)
def test_what_is_put_among_checkpoints_while_a_run_goes_on_costs_none(
    single_rank: None, prepared: Path, tmp_path: Path
) -> None:
    """Pipes and a file with the names of an old checkpoint and of the next one: nobody writes into the pipes."""
    checkpoints = tmp_path / "checkpoints"

    def act(_: object, step: int) -> None:
        if step == 3:
            (checkpoints / "step-00000001").touch()
            for name in ("step-00000004", "step-00000004.tmp", ".step-00000004.replaced"):
                os.mkfifo(checkpoints / name)

    attempt(run_config(prepared, tmp_path, keep_checkpoints=1), act)
    assert os.listdir(checkpoints) == ["step-00000004"] and listing.problem(checkpoints / "step-00000004") is None


@pytest.mark.parametrize(
    ("how", "when"),
    [("removed", 1), ("another in its place", 2)]
    + [pytest.param(*case, marks=pytest.mark.slow) for case in [("removed", 4), ("moved", 2), ("moved", 4)]],
)
def test_an_output_that_is_gone_ends_the_run_and_nothing_is_made_in_its_place(
    how: str, when: int, single_rank: None, prepared: Path, tmp_path: Path
) -> None:
    """Before a step that is logged (1), also saved (2), and the last one (4)."""
    run = tmp_path / "run"

    def act(_: object, step: int) -> None:
        if step == when:
            shutil.rmtree(run) if how == "removed" else run.rename(tmp_path / "moved")
            if how == "another in its place":
                run.mkdir()

    def be_refused() -> None:
        with pytest.raises(OutputLost, match=f"^output is {run}: it was removed or moved during the run"):
            attempt(run_config(prepared, run), act)

    assert not [line for line in said_by(be_refused) if "cannot" in line or "could not" in line]
    assert not run.exists() or not list(run.iterdir())
    if how == "moved":
        (tmp_path / "moved").rename(run)
        attempt(run_config(prepared, run))
        assert [line[0] for line in losses(run)] == [0, 1, 2, 3, 4]


def test_an_output_that_is_gone_at_the_very_end_is_no_key_error(
    single_rank: None, run: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from coe_megatron.training.loop import Pretraining

    trained = Pretraining.run
    monkeypatch.setattr(Pretraining, "run", lambda self: (trained(self), shutil.rmtree(run)))
    with pytest.raises(OutputLost):
        attempt(run_config(prepared, run, steps=5))
    assert not run.exists()


@pytest.mark.slow
@pytest.mark.run
def test_all_ranks_end_when_the_output_is_gone(config: Path, prepared: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = (f"data.path={prepared}", f"output={run}", "training.steps=3000", "training.save_every=1000")
    launcher = (sys.executable, "launch/one_host.py", "--", "--standalone", "--nproc-per-node", "2")
    command = [*launcher, "launch/pretrain_coe.py", str(config), *settings]
    with Program(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        wait_for_step(run, 3, process)
        run.rename(tmp_path / "moved")
        _, said = process.communicate(timeout=120)
    assert process.returncode == ExitStatus.OUTPUT_LOST and not run.exists(), said
    line = f"output is {run}: it was removed or moved during the run"
    own = [each for each in said.splitlines() if each.startswith(line)]
    assert len(own) == 1, "one rank says it"
    assert re.search(
        rf"^one_host.py: ended with status 8 \(OUTPUT_LOST\), rank \d: {re.escape(line)}", said, re.MULTILINE
    )
    assert "KeyError" not in said and said.count("Traceback") <= 1, "but torchrun's own of a rank that has failed"


def test_a_name_aside_is_free_and_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for number in range(3):
        (tmp_path / "a\nb").write_text(str(number))
        set_aside(tmp_path / "a\nb", "is damaged")
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == {"a\nb.damaged": "0", "a\nb.damaged-2": "1", "a\nb.damaged-3": "2"}
    assert capsys.readouterr().err.count("\n") == 3


def test_the_beginning_of_a_config_is_no_config(tmp_path: Path) -> None:
    """It has the defaults for what is missing, and would be taken for another run's."""
    config = run_config(tmp_path, tmp_path)
    whole = dump(config)
    (tmp_path / "config.yaml").write_text(whole)
    assert check_same_run(tmp_path, config, 512) == ""
    (tmp_path / "config.yaml").write_text(whole[: whole.index("\n  samples:") + 1])
    assert "could not be compared" in check_same_run(tmp_path, config, 512)
