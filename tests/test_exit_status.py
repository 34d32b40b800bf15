"""What a rank leaves behind for torchrun and for a scheduler."""

import json
import os
import time
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from coe_megatron.run.exit_status import ExitStatus, RankError, read_error_file, write_error_file


def test_torchrun_reads_the_file_as_its_own(tmp_path: Path) -> None:
    file = tmp_path / "error.json"
    before = time.time()
    of_rank_3 = {"TORCHELASTIC_ERROR_FILE": str(file), "RANK": "3", "WORLD_SIZE": "4"}
    write_error_file(ExitStatus.HUNG, "it hangs", environment=of_rank_3)
    failure = ProcessFailure(local_rank=1, pid=1, exitcode=7, error_file=str(file))
    assert failure.message["message"] == "it hangs" and int(before) <= failure.timestamp <= time.time()
    written = json.loads(file.read_text())["message"]
    assert written["errorCode"] == 7 and written["extraInfo"]["rank"] == 3
    assert before <= written["extraInfo"]["time"] <= time.time()
    assert [path.name for path in tmp_path.iterdir()] == ["error.json"]


def test_without_torchrun_or_a_folder_nothing_is_written_and_nothing_is_raised(tmp_path: Path) -> None:
    write_error_file(1, "x", environment={})
    write_error_file(1, "x", environment={"TORCHELASTIC_ERROR_FILE": str(tmp_path / "none" / "error.json")})
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_beside_the_file_holds_nothing_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "error.json.tmp")
    write_error_file(1, "x", environment={"TORCHELASTIC_ERROR_FILE": str(tmp_path / "error.json")})
    assert [path.name for path in tmp_path.iterdir()] == ["error.json"]


def test_a_time_that_no_clock_shows_is_no_word_of_ours(tmp_path: Path) -> None:
    file = tmp_path / "3" / "error.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"message": {"message": "it hangs", "extraInfo": {"time": 10**400}}}))
    os.utime(file, (7, 7))
    assert read_error_file(file) == RankError(3, "unknown host", 7, ExitStatus.FAILED, "")
    file.write_text(file.read_text().replace("1" + "0" * 400, "1e400"))
    assert read_error_file(file) is None


def test_what_may_be_started_again() -> None:
    assert [status.name for status in ExitStatus if status.retryable] == ["FAILED", "STOPPED", "BUSY", "HUNG"]
