"""Which rank failed first, from what ranks and torchrun leave behind."""

import json
import os
import sys
from pathlib import Path

import pytest
from programs import Program

from coe_megatron.run.exit_status import ExitStatus
from coe_megatron.slurm.failures import find_failures, outcome

DIES = """
import os, signal, sys, time
if os.environ["RANK"] == "1":
    print("the last words", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.{signal}) if "{signal}" != "none" else os._exit(9)
time.sleep(60)
"""


def leave(attempt: Path, rank: int, text: str = "", **error: object) -> Path:
    """What a rank of its own node leaves behind with torchrun; no error where none is given."""
    folder = attempt / f"ranks/node-{rank}/12-0_x/attempt_0/0"
    folder.mkdir(parents=True)
    (folder / "stderr.log").write_text(text)
    if error:
        extra = {"rank": rank, "host": f"host-{rank}", "time": error["time"]}
        message = {"message": error["message"], "errorCode": error["status"], "extraInfo": extra}
        (folder / "error.json").write_text(json.dumps({"message": message}))
    return folder


def test_the_first_by_time_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    leave(tmp_path, 0, "reset\n", message="Connection closed by peer", status=1, time=105.5)
    folder = leave(tmp_path, 1, "".join(f"line {n}\n" for n in range(99)), message="CUDA error", status=1, time=105.25)
    leave(tmp_path, 2)
    found = find_failures(tmp_path)
    assert [failure.rank for failure in found] == [1, 0]
    first, second, *lines = found[0].describe().splitlines()
    assert (first, second) == ("rank 1 on host-1: CUDA error", f"the end of {folder / 'stderr.log'}:")
    assert lines[-1] == "    line 98" and len(lines) == 12
    assert outcome(found, 1) is ExitStatus.FAILED


@pytest.mark.parametrize("status", [2, 3, 4, 5, 6])
def test_what_a_rank_has_said_wholly_needs_no_log(status: int, tmp_path: Path) -> None:
    leave(tmp_path, 0, "much\n", message="one line", status=status, time=1.0)
    found = find_failures(tmp_path)
    assert found[0].describe() == "rank 0 on host-0: one line"
    assert outcome(found, 1) == status


def test_all_ranks_done_is_the_word_of_what_started_them(tmp_path: Path) -> None:
    assert outcome([], 0) is ExitStatus.DONE
    assert outcome([], 137) is ExitStatus.FAILED


def test_a_rank_of_its_own_task_that_was_killed_comes_before_those_who_noticed(tmp_path: Path) -> None:
    leave(tmp_path, 0, message="Connection closed by peer", status=1, time=1000.0)
    for rank, status, moment in ((0, 1, 1000.5), (1, 137, 1000.25), (2, 0, 900.0)):
        folder = tmp_path / f"ranks/node-{rank}/0"
        folder.mkdir(parents=True)
        ended = {"rank": rank, "status": status, "time": moment, "host": f"n{rank}"}
        (folder / "ended.json").write_text(json.dumps(ended))
    found = find_failures(tmp_path)
    assert [(failure.rank, failure.killed) for failure in found] == [(1, "SIGKILL"), (0, None)]
    assert found[0].describe().startswith("rank 1 on n1: was killed by SIGKILL (by the kernel when memory")


def test_a_rank_that_was_killed_long_after_the_first_error_is_not_the_first(tmp_path: Path) -> None:
    leave(tmp_path, 0, message="out of memory", status=1, time=1000.0)
    (tmp_path / "ranks/node-1/0").mkdir(parents=True)
    (tmp_path / "ranks/node-1/0/ended.json").write_text('{"rank": 1, "status": 137, "time": 1060.0, "host": "n1"}')
    assert [failure.rank for failure in find_failures(tmp_path)] == [0, 1]


def test_what_says_more_than_failed_decides(tmp_path: Path) -> None:
    leave(tmp_path, 0, message="Connection closed by peer", status=1, time=9.0)
    leave(tmp_path, 1, message="the loss has diverged", status=4, time=9.5)
    assert outcome(find_failures(tmp_path), 1) is ExitStatus.DIVERGED


FOREIGN = ["", "{", "[]", "1", '{"message": "Traceback"}', '{"message": {"errorCode": 77}}', '{"rank": 1}']
FOREIGN += ['{"message": {"extraInfo": {"timestamp": "now"}}}', '{"rank": "a", "status": 1, "time": 1, "host": "h"}']


@pytest.mark.parametrize("name", ["error.json", "ended.json"])
@pytest.mark.parametrize("text", FOREIGN)
def test_a_file_that_is_not_ours_breaks_nothing(text: str, name: str, tmp_path: Path) -> None:
    leave(tmp_path, 3)
    (tmp_path / "ranks/node-3/12-0_x/attempt_0/0" / name).write_text(text)
    assert all(failure.status is ExitStatus.FAILED for failure in find_failures(tmp_path))


@pytest.mark.run
@pytest.mark.parametrize(
    ("signal", "said"), [("SIGKILL", "was killed by SIGKILL ("), ("none", "ended with status 9 and no error message")]
)
def test_torchruns_report_tells_of_a_rank_without_a_word(signal: str, said: str, tmp_path: Path) -> None:
    """Torchrun itself, as coe_megatron/cli/slurm_task.py starts it: its report must stay readable for us."""
    program = tmp_path / "dies.py"
    program.write_text(DIES.format(signal=signal))
    options = ["--standalone", "--nproc-per-node=2", "--redirects=3", f"--log-dir={tmp_path}/ranks/node-0"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, str(program)]
    with (tmp_path / "node-0.log").open("w") as log, Program(command, stdout=log, stderr=log) as process:
        assert process.wait(timeout=120) == 1
    (failure,) = find_failures(tmp_path)
    assert failure.rank == 1 and failure.message.startswith(said)
    assert failure.log is not None and "    the last words" in failure.describe()
    assert abs(failure.time - os.stat(tmp_path / "node-0.log").st_mtime) < 60
