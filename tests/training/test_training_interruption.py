"""What asks a run to stop, and what happens when it is asked twice."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coe_megatron.run.exit_status import ExitStatus
from coe_megatron.training.signals import Interruption


@pytest.fixture
def listen() -> Iterator[Callable[..., Interruption]]:
    made = []

    def make(stop_file: Path | None = None) -> Interruption:
        made.append(Interruption(stop_file))
        return made[-1]

    yield make
    for interruption in made:
        interruption.forget()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_warning_may_come_several_times(number: int, listen: Callable[..., Interruption]) -> None:
    interruption = listen()
    assert interruption.asked() == ExitStatus.DONE
    for _ in range(3):
        os.kill(os.getpid(), number)
        assert interruption.asked() == ExitStatus.STOPPED


def test_the_keyboard_counts_from_the_beginning_of_the_run_and_wins(listen: Callable[..., Interruption]) -> None:
    interruption = listen()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    interruption.also_keyboard()
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
    assert interruption.asked() == ExitStatus.INTERRUPTED
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_signals_go_back_to_whom_they_belonged() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    interruption = Interruption()
    interruption.also_keyboard()
    assert all(signal.getsignal(number) != handler for number, handler in zip(numbers, before, strict=True))
    interruption.forget()
    assert [signal.getsignal(number) for number in numbers] == before


def test_the_stop_file_is_looked_for_once_a_second(
    listen: Callable[..., Interruption], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    interruption = listen(tmp_path / "later" / "stop")  # in a folder that somebody may make yet
    assert interruption.asked() == ExitStatus.DONE
    (tmp_path / "later").mkdir()
    (tmp_path / "later" / "stop").touch()
    assert interruption.asked() == ExitStatus.DONE
    now += 1.1
    assert interruption.asked() == ExitStatus.STOPPED


def test_a_folder_that_cannot_be_read_ends_no_run(listen: Callable[..., Interruption], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert listen(tmp_path / "file" / "stop").asked() == ExitStatus.DONE
