"""What asks a run to stop, and what happens when it is asked twice."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coe_megatron.run.exit_status import ExitStatus
from coe_megatron.training.signals import StopRequest


@pytest.fixture
def listen() -> Iterator[Callable[..., StopRequest]]:
    made = []

    def make(stop_file: Path | None = None) -> StopRequest:
        made.append(StopRequest(stop_file))
        return made[-1]

    yield make
    for interruption in made:
        interruption.restore_handlers()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_warning_may_come_several_times(number: int, listen: Callable[..., StopRequest]) -> None:
    interruption = listen()
    assert interruption.status() == ExitStatus.DONE
    for _ in range(3):
        os.kill(os.getpid(), number)
        assert interruption.status() == ExitStatus.STOPPED


def test_the_keyboard_counts_from_the_beginning_of_the_run_and_wins(listen: Callable[..., StopRequest]) -> None:
    interruption = listen()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    interruption.handle_sigint()
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
    assert interruption.status() == ExitStatus.INTERRUPTED
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_signals_go_back_to_whom_they_belonged() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    interruption = StopRequest()
    interruption.handle_sigint()
    assert all(signal.getsignal(number) != handler for number, handler in zip(numbers, before, strict=True))
    interruption.restore_handlers()
    assert [signal.getsignal(number) for number in numbers] == before


def test_the_stop_file_is_looked_for_once_a_second(
    listen: Callable[..., StopRequest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    interruption = listen(tmp_path / "later" / "stop")  # in a folder that somebody may make yet
    assert interruption.status() == ExitStatus.DONE
    (tmp_path / "later").mkdir()
    (tmp_path / "later" / "stop").touch()
    assert interruption.status() == ExitStatus.DONE
    now += 1.1
    assert interruption.status() == ExitStatus.STOPPED


def test_a_folder_that_cannot_be_read_ends_no_run(listen: Callable[..., StopRequest], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert listen(tmp_path / "file" / "stop").status() == ExitStatus.DONE
