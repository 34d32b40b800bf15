"""Torchrun watched: its ranks' status, a stop that saves, and no process left; scripts stand in for torchrun."""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from coe_megatron.launcher import torchrun_supervisor
from coe_megatron.launcher.torchrun_supervisor import Report, Requests, catches, read_reports, root_cause, supervise
from coe_megatron.run.exit_status import ExitStatus

pytestmark = pytest.mark.thorough

# A rank that notes SIGUSR1 and then saves for a second; its one argument is where.
RANK = """
import signal, sys, time
asked = []
signal.signal(signal.SIGUSR1, lambda *_: asked.append(1))
open(sys.argv[1] + ".ready", "w").close()
while not asked:
    time.sleep(0.02)
time.sleep(0.5)
open(sys.argv[1], "w").close()
sys.exit(3)
"""
# Torchrun with one such rank, whose failure it reports by a status of 1.
TORCHRUN = f"""
import subprocess, sys
rank = subprocess.Popen([sys.executable, "-c", {RANK!r}, sys.argv[1]], start_new_session=True)
sys.exit(min(rank.wait(), 1))
"""
# Torchrun that waits for a peer that it has lost, while its rank has long ended.
STUCK = """
import subprocess, sys, time
subprocess.Popen(["true"])
time.sleep(600)
"""


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    folder = tmp_path / "logs"
    folder.mkdir()
    return folder


@pytest.fixture(autouse=True)
def adopt_nobody(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process goes on testing: it stays no reaper of orphans, and other tests' processes are not its to end."""
    before = set(psutil.Process().children(recursive=True))
    monkeypatch.setattr(torchrun_supervisor, "_POLL_SECONDS", 0.02)
    yield
    torchrun_supervisor.adopt_orphans(False)
    assert set(psutil.Process().children(recursive=True)) <= before


def leave(logs: Path, rank: int, status: int, when: float = 0, attempt: int = 0) -> None:
    """A rank's error file, where torchrun has it."""
    file = logs / "run_x" / f"attempt_{attempt}" / str(rank) / "error.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    extra = {"py_callstack": "", "timestamp": str(int(when)), "time": when, "rank": rank, "host": "h"}
    message = {"message": f"rank {rank} says {status}", "errorCode": status, "extraInfo": extra}
    file.write_text(json.dumps({"message": message}))


def python(code: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", code, *map(str, arguments)]


def test_the_first_report_that_says_more_than_failed_counts_and_only_of_the_last_attempt(logs: Path) -> None:
    leave(logs, 0, ExitStatus.HUNG, attempt=0)
    leave(logs, 0, ExitStatus.FAILED, when=1, attempt=1)
    leave(logs, 1, ExitStatus.NOT_SAVED, when=3, attempt=1)
    leave(logs, 2, ExitStatus.STOPPED, when=4, attempt=1)
    cause = root_cause(read_reports(logs))
    assert cause == Report(1, 1, 3.0, ExitStatus.NOT_SAVED, "rank 1 says 5")


def test_what_torch_itself_wrote_counts_as_failed_and_half_a_file_as_nothing(logs: Path) -> None:
    leave(logs, 1, 99, when=1)
    for rank, text in ((0, '{"mess'), (2, '{"message": "Traceback"}')):
        (logs / "run_x" / "attempt_0" / str(rank)).mkdir(parents=True)
        (logs / "run_x" / "attempt_0" / str(rank) / "error.json").write_text(text)
    found = [(report.rank, report.status) for report in read_reports(logs)]
    assert sorted(found) == [(1, ExitStatus.FAILED), (2, ExitStatus.FAILED)]
    assert root_cause([]) is None


@pytest.mark.parametrize(
    ("code", "left", "status"),
    [
        ("", [], ExitStatus.DONE),
        ("import sys; sys.exit(1)", [], ExitStatus.FAILED),
        ("import sys; sys.exit(1)", [ExitStatus.DIVERGED], ExitStatus.DIVERGED),
        ("", [ExitStatus.HUNG], ExitStatus.DONE),  # it was started again, and came to its end
    ],
)
def test_the_status_is_that_of_the_ranks(code: str, left: list[ExitStatus], status: ExitStatus, logs: Path) -> None:
    for rank, own in enumerate(left):
        leave(logs, rank, own)
    assert supervise(python(code), os.environ, logs, 1, Requests())[0] == status


def after(seconds: float, act: Callable[[], object]) -> None:
    threading.Timer(seconds, act).start()


def test_a_request_to_stop_reaches_the_ranks_which_save(logs: Path, tmp_path: Path) -> None:
    saved, requests = tmp_path / "saved", Requests()

    def ask() -> None:
        while not saved.with_suffix(".ready").exists():
            time.sleep(0.02)
        requests.more()

    threading.Thread(target=ask).start()
    leave(logs, 0, ExitStatus.STOPPED)
    assert supervise(python(TORCHRUN, saved), os.environ, logs, 0, requests)[0] == ExitStatus.STOPPED
    assert saved.exists()


def test_a_rank_is_not_signalled_before_it_can_take_it(logs: Path, tmp_path: Path) -> None:
    requests = Requests()
    requests.stop.set()
    late = TORCHRUN.replace("import signal, sys, time", "import signal, sys, time; time.sleep(0.5)")
    leave(logs, 0, ExitStatus.STOPPED)
    status, _ = supervise(python(f"import time\n{late}", tmp_path / "saved"), os.environ, logs, 0, requests)
    assert status == ExitStatus.STOPPED


def test_before_there_are_ranks_a_stop_ends_torchrun(logs: Path) -> None:
    requests = Requests()
    requests.stop.set()
    assert supervise(python("import time; time.sleep(600)"), os.environ, logs, 0, requests) == (
        ExitStatus.STOPPED,
        None,
    )


def test_asked_twice_all_end_at_once(logs: Path, tmp_path: Path) -> None:
    requests = Requests()
    requests.more()
    requests.more()
    began = time.monotonic()
    status, _ = supervise(python(TORCHRUN, tmp_path / "saved"), os.environ, logs, 0, requests)
    assert status == ExitStatus.INTERRUPTED
    assert time.monotonic() - began < 60  # and not the minutes that torchrun's patience may take


@pytest.mark.parametrize(
    ("status", "max_restarts"), [(ExitStatus.HUNG, 0), (ExitStatus.MISTAKE, 3), (ExitStatus.STOPPED, 1)]
)
def test_torchrun_that_has_nothing_to_wait_for_is_ended(
    status: ExitStatus, max_restarts: int, logs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchrun_supervisor, "_TORCHRUN_END_SECONDS", 0.2)
    leave(logs, 0, status)
    assert supervise(python(STUCK), os.environ, logs, max_restarts, Requests())[0] == status


def test_torchrun_may_start_again_what_failed(logs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchrun_supervisor, "_TORCHRUN_END_SECONDS", 0.0)
    leave(logs, 0, ExitStatus.FAILED)
    command = python("import time; time.sleep(0.5)")
    assert supervise(command, os.environ, logs, 1, Requests())[0] == ExitStatus.DONE


def test_what_a_process_catches() -> None:
    before = signal.signal(signal.SIGUSR2, lambda *_: None)
    try:
        assert catches(os.getpid(), signal.SIGUSR2)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert not catches(os.getpid(), signal.SIGUSR2)
    assert not catches(2**22 + 1, signal.SIGUSR2)


def test_a_process_that_no_signal_ends_is_named_and_not_waited_for(
    logs: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As one in uninterruptible sleep, which no test can have: here the signal is lost."""
    monkeypatch.setattr(torchrun_supervisor, "_KILL_SECONDS", 0.1)
    code = "import subprocess; print(subprocess.Popen(['sleep', '600'], stdout=2).pid, flush=True)"
    with monkeypatch.context() as lost:
        lost.setattr(psutil.Process, "kill", lambda _: None)
        assert supervise(python(code), os.environ, logs, 0, Requests())[0] == ExitStatus.DONE
    out, said = capfd.readouterr()
    assert said == f"these processes did not end after SIGKILL: {int(out)} (sleep, sleeping)\n"
    psutil.Process(int(out)).kill()
    os.waitpid(int(out), 0)
