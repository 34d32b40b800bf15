"""A run's folder is one process's at a time, and free again however that process ends."""

import errno
import fcntl
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from programs import Program

from coe_megatron.config import RunConfig
from coe_megatron.errors import ConfigError
from coe_megatron.run import folder, lock

pytestmark = pytest.mark.thorough

HOLD = """
import sys, time
from pathlib import Path
from coe_megatron.run import lock as folder_lock
lock = folder_lock.take(Path(sys.argv[1]))
print("holds it", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Program]:
    """A process that has locked `tmp_path`."""
    with Program([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "holds it\n"
        yield process


def test_a_second_process_is_refused_until_the_first_is_killed(holder: Program, tmp_path: Path) -> None:
    assert lock.is_held(tmp_path)
    with pytest.raises(ConfigError) as raised:
        lock.take(tmp_path)
    assert str(raised.value) == (
        f"output is {tmp_path}: another run has locked it, process {holder.pid} on {platform.node()}; "
        "wait until it ends, stop it, or choose another output"
    )
    holder.kill()
    holder.wait()
    assert lock.is_held(tmp_path) is False
    lock.take(tmp_path).close()


def test_a_refused_run_changes_no_file_of_the_first(tmp_path: Path) -> None:
    with folder.begin(RunConfig(output=str(tmp_path))):
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.raises(ConfigError, match=f"process {os.getpid()} on "):
            folder.begin(RunConfig(output=str(tmp_path)))
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with folder.begin(RunConfig(output=str(tmp_path))):
        pass


def test_a_lock_whose_file_was_deleted_counts_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its holder withdrew between our opening and our locking: who comes next would lock another file."""
    lock_file, flock = tmp_path / lock.NAME, fcntl.flock

    def withdrawn_meanwhile(file: object, operation: int) -> None:
        monkeypatch.undo()
        lock_file.unlink()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", withdrawn_meanwhile)
    with lock.take(tmp_path):
        assert lock_file.exists() and lock.is_held(tmp_path)


def test_without_locks_a_run_goes_on_unguarded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(file: object, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with lock.take(tmp_path):
        assert lock.is_held(tmp_path) is None
    assert capsys.readouterr().err.startswith(f"{tmp_path} has no file locks: ")
