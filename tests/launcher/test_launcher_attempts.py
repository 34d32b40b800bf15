"""Whether a job goes on: by how the attempt ended, and by whether attempts lead to newer checkpoints."""

import json
import os
from pathlib import Path

import pytest
from programs import python

from coe_megatron.cli.estimates import best_save_interval
from coe_megatron.config import load
from coe_megatron.run.exit_status import ExitStatus
from coe_megatron.slurm.requeue import AttemptRefused, Attempts, latest_step

pytestmark = pytest.mark.thorough

PROGRAM = "coe_megatron.cli.slurm_job"


def save(output: Path, step: int, unfinished: str = "") -> None:
    (output / "checkpoints" / f"step-{step:08d}{unfinished}").mkdir(parents=True)


@pytest.mark.parametrize("status", ExitStatus)
def test_the_status_decides(status: ExitStatus, tmp_path: Path) -> None:
    attempts = Attempts(tmp_path / "logs", limit=3)
    attempts.begin("7", tmp_path / "run")
    decision = attempts.end(status)
    assert decision.requeue == status.retryable
    assert decision.reason and "\n" not in decision.reason


def test_attempts_without_a_newer_checkpoint_come_to_an_end(tmp_path: Path) -> None:
    """Two requeues without progress are allowed: three attempts; each newer checkpoint begins the count anew."""
    output, decisions = tmp_path / "run", []
    for saved in (None, None, 10, None, None, None):
        attempts = Attempts(tmp_path / "logs", limit=2)
        folder = attempts.begin("7", output)
        if saved:
            save(output, saved)
        decisions.append(attempts.end(ExitStatus.STOPPED))
    assert folder == tmp_path / "logs" / "attempt-5" and folder.is_dir()
    assert [decision.requeue for decision in decisions] == [True, True, True, True, True, False]
    assert decisions[-1].reason == (
        "3 attempts in a row without progress, COE_MAX_REQUEUES allows 2 requeues: "
        f"the most recent checkpoint in {output} is still that of step 10"
    )


def test_attempts_that_never_ended_count_too(tmp_path: Path) -> None:
    """Their nodes went down, and SLURM queued the job again by itself."""
    for _ in range(2):
        Attempts(tmp_path, limit=1).begin("7", tmp_path / "run")
    with pytest.raises(AttemptRefused, match=r"2 attempts in a row .* does not exist yet") as raised:
        Attempts(tmp_path, limit=1).begin("7", tmp_path / "run")
    assert raised.value.status is ExitStatus.FAILED
    save(tmp_path / "run", 4)
    assert Attempts(tmp_path, limit=1).begin("7", tmp_path / "run") == tmp_path / "attempt-2"


def test_checkpoints_of_another_run_in_the_folder_are_no_progress(tmp_path: Path) -> None:
    """A job that was submitted twice would otherwise be queued again for as long as the other one trains."""
    decisions = []
    for step in (10, 20, 30):
        attempts = Attempts(tmp_path / "logs", limit=2)
        attempts.begin("7", tmp_path / "run")
        save(tmp_path / "run", step)
        decisions.append(attempts.end(ExitStatus.BUSY))
    assert [decision.requeue for decision in decisions] == [True, True, False]
    assert decisions[-1].reason.endswith(f"allows 2 requeues: another run has locked {tmp_path / 'run'}")


def test_a_chain_whose_run_ended_for_good_does_not_begin_again(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path, limit=3)
    attempts.begin("7", tmp_path / "run")
    attempts.end(ExitStatus.DIVERGED)
    with pytest.raises(AttemptRefused, match="job 7 of this chain has ended for good: the loss has diverged") as raised:
        Attempts(tmp_path, limit=3).begin("8", tmp_path / "run")
    assert raised.value.status is ExitStatus.DIVERGED
    Attempts(tmp_path, limit=3).begin(
        "7", tmp_path / "run"
    )  # a person queues the same job again, having changed things


BEGUN = '"job": "7", "began": "2026", "output": "o"'
DAMAGED = ["", "{}{", '{"job": 7}', '[{"job": "7"}]', "[7]", "\0\0", "[" * 100_000, f'[{{{BEGUN}, "step": "x"}}]']


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_file_is_set_aside_and_the_count_begins_again(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert Attempts(tmp_path, limit=3).begin("7", tmp_path / "run").name == "attempt-0"
    path = tmp_path / "attempts.json"
    path.write_text(text)
    assert Attempts(tmp_path, limit=3).begin("7", tmp_path / "run").name == "attempt-1", "no folder is used twice"
    assert [attempt["job"] for attempt in json.loads(path.read_text())] == ["7"]
    assert (tmp_path / "attempts.json.damaged").read_text() == text
    said = capsys.readouterr().err
    assert said.startswith(f"{path} is damaged (") and said.count("\n") == 1


@pytest.mark.parametrize("status", [ExitStatus.STOPPED, ExitStatus.DIVERGED])
def test_an_attempt_whose_beginning_was_lost_ends_by_its_status(status: ExitStatus, tmp_path: Path) -> None:
    Attempts(tmp_path, limit=3).begin("7", tmp_path / "run")
    (tmp_path / "attempts.json").write_text("{")
    assert Attempts(tmp_path, limit=3).end(status).requeue == status.retryable


def test_what_is_no_file_is_a_mistake(begin: list[str], tmp_path: Path) -> None:
    path = tmp_path / "it's $(here)" / "attempts.json"
    path.parent.mkdir()
    os.mkfifo(path)
    done = python(*begin, "configs/quickstart.yaml")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert f"attempts.json is {path}: it is a special file" in done.stderr


def test_only_finished_checkpoints_are_progress(tmp_path: Path) -> None:
    assert latest_step(tmp_path) == 0
    save(tmp_path, 10)
    save(tmp_path, 30, unfinished=".tmp")
    (tmp_path / "checkpoints" / ".step-00000040.replaced").mkdir()
    assert latest_step(tmp_path) == 10


@pytest.fixture
def begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "4")
    return ["-m", PROGRAM, "begin", "--logs", str(tmp_path / "it's $(here)"), "--nodes", "a b"]


def test_the_program_begins_and_ends_an_attempt(begin: list[str], tmp_path: Path) -> None:
    settings = ["configs/quickstart.yaml", f"output={tmp_path}/a 'run'"]
    begun = python(*begin, "--", *settings)
    folder = tmp_path / "it's $(here)" / "attempt-0"
    assert (begun.returncode, begun.stderr) == (0, "")
    told = dict(line.split("=", 1) for line in begun.stdout.splitlines())
    assert (told["COE_ATTEMPT"], told["COE_OUTPUT"]) == (str(folder), f"{tmp_path}/a 'run'")
    assert (told["COE_NODES"], told["COE_RANKS_PER_NODE"], told["COE_LAUNCH"]) == ("2", "1", "torchrun")
    error = {"message": "stopped", "errorCode": 3, "extraInfo": {"rank": 0, "host": "a", "time": 1.5}}
    (folder / "ranks/node-0/0").mkdir(parents=True)
    (folder / "ranks/node-0/0/error.json").write_text(json.dumps({"message": error}))
    ended = python(*begin[:2], "end", *begin[3:5], "--attempt", folder, "--status", 1)
    assert (ended.returncode, ended.stdout) == (3, "requeue\n")
    assert ended.stderr.startswith("STOPPED: rank 0 on a: stopped\n")
    (noted,) = json.loads((folder.parent / "attempts.json").read_text())
    assert (noted["job"], noted["output"], noted["status"]) == ("7", f"{tmp_path}/a 'run'", 3)
    assert python(*begin[:2], "end", *begin[3:5], "--attempt", folder, "--status", 0).stdout == "end\n"


@pytest.mark.parametrize(
    ("settings", "environment", "said"),
    [
        ([""], "3", "argument config: the path is empty"),
        (["~no-such-user/o.yaml"], "3", "argument config: ~no-such-user/o.yaml: there is no such user here"),
        (["nowhere.yaml"], "3", "the config file is nowhere.yaml: there is no such file"),
        (["configs/quickstart.yaml", "moe.topk=0"], "3", "moe.topk is 0: it "),
        (["configs/quickstart.yaml", "parallel.expert=4"], "3", "parallel.expert is 4: "),
        (["configs/quickstart.yaml"], "many", "COE_MAX_REQUEUES is 'many': it must be a whole number from 0"),
    ],
)
def test_a_mistake_is_one_line_and_no_attempt(
    settings: list[str], environment: str, said: str, begin: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COE_MAX_REQUEUES", environment)
    done = python(*begin, "--", *settings)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(("pretrain.sbatch: error: ", "pretrain.sbatch begin: error: "))
    assert f" error: {said}" in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("logs", "attempt", "said"),
    [
        (".", ".", "--logs is .: no attempt has started there"),
        (".", "nowhere", "--attempt is nowhere: there is no such folder"),
        ("/dev/null", ".", "--logs is /dev/null: it is a special file, where a folder is needed"),
        ("x" * 300, ".", "--logs is xxx"),
    ],
)
def test_a_folder_that_is_none_is_one_line(logs: str, attempt: str, said: str) -> None:
    done = python("-m", PROGRAM, "end", "--logs", logs, "--attempt", attempt, "--status", 1)
    last = done.stderr.splitlines()[-1]
    assert (done.returncode, done.stdout) == (2, "") and last.startswith(f"pretrain.sbatch: error: {said}")


def test_torch_is_not_imported() -> None:
    code = "import sys, coe_megatron.slurm.requeue, coe_megatron.slurm.failures; sys.exit('torch' in sys.modules)"
    assert python("-c", code).returncode == 0


@pytest.mark.parametrize("machine", ["h100", "", "x100"])
def test_a_job_saves_at_the_interval_that_is_best_on_its_machine(
    machine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"COE_MACHINE": machine, "COE_RANKS_PER_NODE": "8", "COE_SPARE_NODES": "1", "SLURM_CPUS_ON_NODE": "64"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    nodes = " ".join(f"n{number}" for number in range(9))
    done = python("-m", PROGRAM, "begin", "--logs", tmp_path / "logs", "--nodes", nodes, "64-gpus.yaml")
    if machine == "x100":
        assert done.returncode == 2 and "error: COE_MACHINE x100: it must be a machine file, or one of" in done.stderr
        assert not list(tmp_path.iterdir())
        return
    assert done.returncode == 0, done.stderr
    best = best_save_interval(load("64-gpus.yaml", world_size=64), machine, 64, 1) if machine else ""
    assert f"COE_SAVE_EVERY={best}\n" in done.stdout
    assert done.stderr == (f"a checkpoint every {best:,} steps, the best interval on h100\n" if machine else "")
