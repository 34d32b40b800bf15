"""Commands on several hosts: a script that starts a shell here stands in for the remote one."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from coe_megatron.launcher import ssh_launcher
from coe_megatron.launcher.hosts import Host
from coe_megatron.launcher.ssh_launcher import RemoteCommands, command_string, exported, run_on_host
from coe_megatron.launcher.torchrun_supervisor import Requests
from coe_megatron.run.exit_status import ExitStatus

pytestmark = pytest.mark.thorough

WAITS = "read word; echo told $word; test $word = end && exit 130; exit 3"


@pytest.fixture
def shell(tmp_path: Path) -> list[str]:
    """`REMOTE HOST COMMAND`, as ssh has it."""
    script = tmp_path / "shell"
    script.write_text('#!/bin/sh\nexport HOST=$1\nexec sh -c "$2"\n')
    script.chmod(0o755)
    return [str(script)]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh_launcher, "_PEER_GRACE_SECONDS", 0.3)
    monkeypatch.setattr(ssh_launcher, "_POLL_SECONDS", 0.02)


def test_a_command_as_another_host_gets_it(shell: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "a folder"
    folder.mkdir()
    command = command_string(["sh", "-c", 'echo "$PWD $1 $SAID $HOST"', "-", "it's"], folder, {"SAID": "a $b"})
    assert run_on_host(shell, Host("h1"), command) == f"{folder} it's a $b h1\n"


def test_what_goes_along() -> None:
    environment = {"NCCL_DEBUG": "INFO", "GLOO_X": "1", "SECRET": "s", "MINE": "m", "PATH": "p"}
    assert exported(environment, ["MINE"]) == {"GLOO_X": "1", "MINE": "m", "NCCL_DEBUG": "INFO"}
    with pytest.raises(ValueError, match="--export is OTHER: there is no such variable"):
        exported(environment, ["OTHER"])


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("echo no route >&2; exit 255", "h1: .* ended with status 255: no route"),
        ("sleep 60", "h1: no answer .* in 1 s"),
    ],
)
def test_a_host_that_does_not_answer_is_named(command: str, says: str, shell: list[str]) -> None:
    with pytest.raises(ValueError, match=f"^host {says}$"):
        run_on_host(shell, Host("h1"), command, seconds=1)


def test_a_remote_shell_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="--remote-shell is 'nowhere/ssh -x': No such file"):
        run_on_host(["nowhere/ssh", "-x"], Host("h1"), "true")


def test_lines_begin_with_their_host(shell: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    commands = {"h1": "echo one; echo two >&2", "h2": "printf 'no end'"}
    assert RemoteCommands(shell, commands, needed=2).wait() == ExitStatus.DONE
    assert sorted(capfd.readouterr().out.splitlines()) == ["h1: one", "h1: two", "h2: no end"]


def test_the_first_host_that_fails_ends_the_others(shell: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert RemoteCommands(shell, {"h1": WAITS, "h2": "exit 4"}, needed=2).wait() == ExitStatus.DIVERGED
    out = capfd.readouterr().out
    assert "h2: ended with status 4\n" in out
    assert "h1: told end\n" in out


@pytest.mark.parametrize(
    ("commands", "needed", "status"),
    [
        (("exit 0", "exit 1"), 1, ExitStatus.DONE),  # one is enough
        (("exit 1", "exit 0"), 1, ExitStatus.FAILED),  # but not without the first, where the others meet
        (("exit 1", "sleep 0.1; exit 5"), 2, ExitStatus.NOT_SAVED),  # says more
        (("exit 255", "exit 0"), 2, ExitStatus.FAILED),  # the remote shell's own
        (("exit 1", WAITS), 2, ExitStatus.FAILED),  # that the second was told to end is not how it failed
    ],
)
def test_the_status_of_all(commands: tuple[str, str], needed: int, status: ExitStatus, shell: list[str]) -> None:
    named = {f"h{number}": command for number, command in enumerate(commands)}
    assert RemoteCommands(shell, named, needed).wait() == status


def test_what_a_signal_handler_asks_for_is_passed_on(shell: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    requests = Requests()
    running = RemoteCommands(shell, {"h1": WAITS, "h2": WAITS}, needed=2)
    before = signal.signal(signal.SIGUSR1, lambda *_: requests.more())
    try:
        threading.Timer(0.2, os.kill, args=(os.getpid(), signal.SIGUSR1)).start()
        assert running.wait(requests) == ExitStatus.STOPPED
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert capfd.readouterr().out.count("told stop") == 2


def test_asked_twice_all_are_told_to_end(shell: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    stays = "read first; read second; echo told $first $second; exit 130"
    requests = Requests()
    running = RemoteCommands(shell, {"h1": stays, "h2": stays}, needed=2)
    requests.more()
    threading.Timer(0.2, requests.more).start()
    assert running.wait(requests) == ExitStatus.INTERRUPTED
    assert capfd.readouterr().out.count("told stop end") == 2


def test_a_host_that_neither_answers_nor_ends_is_given_up(shell: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh_launcher, "_END_GRACE_SECONDS", 0.3)
    assert RemoteCommands(shell, {"h1": "exit 1", "h2": "exec sleep 600"}, needed=2).wait() == ExitStatus.FAILED


def test_who_reports_ends_it_for_all_and_its_lines_are_kept(shell: list[str]) -> None:
    running = RemoteCommands(shell, {"h1": "sleep 0.1; echo report; exit 1", "h2": WAITS}, needed=2, reporting=True)
    running.wait()
    assert running.lines["h1"] == ["report\n"]


def test_a_launcher_that_is_killed_is_noticed_elsewhere(shell: list[str], tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    launch = (
        "import sys\nfrom coe_megatron.launcher.ssh_launcher import RemoteCommands\n"
        f"RemoteCommands(sys.argv[1:], {{'h1': 'echo here; cat; touch {gone}'}}, needed=1).wait()\n"
    )
    launcher = subprocess.Popen([sys.executable, "-c", launch, *shell], stdout=subprocess.PIPE, env=dict(os.environ))
    assert launcher.stdout is not None
    assert launcher.stdout.readline() == b"h1: here\n"
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 60
    while not gone.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
