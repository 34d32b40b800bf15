"""A process that makes no progress ends by itself and says where it stood."""

import subprocess
import sys
from pathlib import Path

import pytest
from programs import ROOT

pytestmark = pytest.mark.thorough

PROGRAM = """
import ctypes, os, signal, subprocess, sys, time
from pathlib import Path
from coe_megatron.training import watchdog as hang_watch

hang_watch._SECONDS_FOR_OTHERS = 0.2
hang_watch._INTERPRETER_FACTOR = 4
how, folder = sys.argv[1], Path(sys.argv[2])

def stands_here(seconds):
    (ctypes.PyDLL(None).sleep if how == "holding the lock" else time.sleep)(seconds)

def is_suspended():
    subprocess.Popen(["sh", "-c", f"sleep 1; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(0.2)

def last_word(status, line):
    print(int(status), line)
    sys.stdout.flush()

with hang_watch.HangDetector(folder, 3, None if how == "unwatched" else 0.5, last_word) as watch:
    for step in range(3):
        watch.heartbeat(f"step {step}")
        time.sleep(0.3)
    if how == "suspended":
        is_suspended()
    elif how != "in time":
        stands_here(1 if how == "unwatched" else 60)
time.sleep(1)
"""


def run(how: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, how, str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)


def test_the_stacks_are_written_and_the_status_says_so(tmp_path: Path) -> None:
    done = run("asleep", tmp_path / "stacks")
    stacks = (tmp_path / "stacks" / "rank-00003.txt").read_text()
    assert done.returncode == 7 and "in stands_here" in stacks and "no progress in 0.5 s at step 2" in stacks
    assert done.stdout.startswith("7 rank 3 on ") and done.stdout[2:] == done.stderr
    assert done.stderr.endswith(f"the stacks of its threads are in {tmp_path}/stacks/rank-00003.txt\n")


def test_stacks_that_cannot_be_written_go_to_stderr(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run("asleep", tmp_path / "file")
    assert done.returncode == 7 and "in stands_here" in done.stderr and "cannot be written: " in done.stderr


def test_a_process_in_which_no_thread_can_run_ends_as_well(tmp_path: Path) -> None:
    done = run("holding the lock", tmp_path)
    assert done.returncode == 1 and "in stands_here" in done.stderr and list(tmp_path.iterdir()) == []


def test_progress_a_wait_without_limit_suspension_and_the_end_are_no_hang(tmp_path: Path) -> None:
    for how in ("in time", "unwatched", "suspended"):
        done = run(how, tmp_path)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
