"""Whole runs that are warned, that hang, and that lose a rank: all ranks end, soon, and say why."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from programs import ROOT, TORCHRUN, Program, children, python, torchrun, wait_for_step

from coe_megatron.run.metrics_log import read_metrics

pytestmark = [pytest.mark.run, pytest.mark.timeout(600)]

# The program with one rank that stops making progress in the midst of its fourth step.
HANGS = """
import os, runpy, sys, time
from coe_megatron.training.loop import Pretraining

trained = Pretraining._train_step

def train_step(self, step):
    while step == 3 and os.environ["RANK"] == "1":
        time.sleep(1)
    return trained(self, step)

Pretraining._train_step = train_step
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def command(config: Path, prepared: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """torchrun with logs a rank, for a run of many steps into the test's folder."""

    def make(*changes: str, program: str = "launch/pretrain_coe.py") -> list[str]:
        logs = ("--log-dir", tmp_path / "logs", "--redirects", "3")
        settings = (f"data.path={prepared}", f"output={tmp_path / 'run'}", "training.steps=5000")
        arguments = (*TORCHRUN, 2, *logs, program, config, *settings, *changes)
        return [str(argument) for argument in arguments]

    return make


def errors(logs: Path) -> dict[int, tuple[int, str]]:
    """By rank what it left for torchrun: exit status and line."""
    messages = [json.loads(path.read_text())["message"] for path in logs.rglob("error.json")]
    return {found["extraInfo"]["rank"]: (found["errorCode"], found["message"]) for found in messages}


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.mark.slow
def test_a_stop_file_ends_a_run_without_torchrun_and_it_goes_on(
    command: Callable[..., list[str]], config: Path, prepared: Path, tmp_path: Path
) -> None:
    stop = tmp_path / "stop here"
    with Program([*command("training.save_every=5000"), "--stop-file", str(stop)]) as process:
        wait_for_step(tmp_path / "run", 3, process)
        stop.touch()
        process.wait(timeout=60)
    (saved,) = checkpoints(tmp_path / "run")
    step = int(saved.removeprefix("step-"))
    line = f"stopped after step {step} of 5000; the same command resumes from the most recent checkpoint"
    assert errors(tmp_path / "logs") == {0: (3, line), 1: (3, line)}
    settings = (f"data.path={prepared}", f"output={tmp_path / 'run'}", f"training.steps={step + 2}")
    done = torchrun("launch/pretrain_coe.py", config, *settings)
    assert done.returncode == 0 and f"resumed at step {step}" in done.stderr, done.stderr


@pytest.mark.slow
def test_a_warning_before_the_first_step_is_not_lost(config: Path, prepared: Path, tmp_path: Path) -> None:
    settings = (f"data.path={prepared}", f"output={tmp_path / 'run'}", "parallel.expert=1", "training.steps=500")
    command = [sys.executable, "launch/pretrain_coe.py", str(config), *settings]
    with Program(command) as process:
        while not (tmp_path / "run" / "run.json").exists():  # the model is not built yet
            assert process.poll() is None
            time.sleep(0.02)
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
            process.send_signal(number)
        assert process.wait(timeout=60) == 3
    assert checkpoints(tmp_path / "run") == ["step-00000001"]


@pytest.mark.slow
def test_a_hang_of_one_rank_ends_all_with_their_stacks(command: Callable[..., list[str]], tmp_path: Path) -> None:
    (tmp_path / "hangs.py").write_text(HANGS)
    hanging = command("recovery.hang_after=8", program=str(tmp_path / "hangs.py"))
    hanging.insert(hanging.index(str(tmp_path / "hangs.py")) + 1, str(ROOT / "launch" / "pretrain_coe.py"))
    with Program(hanging) as process:
        wait_for_step(tmp_path / "run", 3, process)
        began = time.monotonic()
        assert process.wait(timeout=60) != 0
        seconds = time.monotonic() - began
    stacks = {path.name: path.read_text() for path in (tmp_path / "run" / "stacks").iterdir()}
    assert sorted(stacks) == ["rank-00000.txt", "rank-00001.txt"]
    assert "distributed_c10d.py" in stacks["rank-00000.txt"] and "line 9 in train_step" in stacks["rank-00001.txt"]
    found = errors(tmp_path / "logs")
    assert {rank: status for rank, (status, _) in found.items()} == {0: 7, 1: 7}
    assert all("no progress in 8 s at step 4; the stacks of" in line for _, line in found.values())
    assert seconds > 8


@pytest.mark.slow
def test_a_killed_rank_ends_the_others_and_nothing_is_lost(
    command: Callable[..., list[str]], config: Path, prepared: Path, finished: Path, tmp_path: Path
) -> None:
    """Torchrun starts them again, and the run comes to the losses of the one that nothing disturbed."""
    restarts = command("training.steps=12")
    restarts[restarts.index("--log-dir") : 0] = ["--max-restarts", "1"]
    with Program(restarts) as process:
        wait_for_step(tmp_path / "run", 6, process)
        os.kill(max(children(process)), signal.SIGKILL)
        assert process.wait(timeout=120) == 0
    found, truth = (
        [
            (line["step"], line.get("train_loss"), line.get("valid_loss"))
            for line in read_metrics(folder / "metrics.jsonl")
        ]
        for folder in (tmp_path / "run", finished)
    )
    assert found == truth
    outcomes = [attempt["outcome"] for attempt in json.loads((tmp_path / "run" / "run.json").read_text())["attempts"]]
    assert len(outcomes) == 2 and outcomes[-1] == "finished"


@pytest.mark.slow
def test_without_torchrun_the_ranks_save_and_end(command: Callable[..., list[str]], tmp_path: Path) -> None:
    with Program(command("training.save_every=5000")) as process:
        wait_for_step(tmp_path / "run", 3, process)
        ranks = children(process)
        process.kill()
        deadline = time.monotonic() + 60
        while any(Path(f"/proc/{rank}").exists() for rank in ranks):
            assert time.monotonic() < deadline, "a rank has outlived torchrun"
            time.sleep(0.1)
    assert len(ranks) == 2 and len(checkpoints(tmp_path / "run")) == 1
    assert {status for status, _ in errors(tmp_path / "logs").values()} == {3}


@pytest.mark.slow
def test_status_3_is_also_what_a_single_process_ends_with(config: Path, prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "stop").touch()
    settings = (f"data.path={prepared}", f"output={tmp_path / 'run'}", "parallel.expert=1")
    done = python("launch/pretrain_coe.py", config, *settings, "--stop-file", tmp_path / "stop")
    assert done.returncode == 3 and "stopped after step 1 of 12" in done.stderr and "Traceback" not in done.stderr
