"""Runs the project's programs as a user does, in processes of their own that never outlive their test."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from coe_megatron.run.metrics_log import read_metrics

ROOT = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


class Program(subprocess.Popen):
    """A program in the project's root; at the end of its `with` block nothing of it is left."""

    def __init__(self, command: list[str], **more: Any) -> None:
        super().__init__(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, **more)

    def __exit__(self, *details: Any) -> None:
        kill(self)
        super().__exit__(*details)


def python(*arguments: object, seconds: float = 120) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS` in the project's root."""
    return _run([sys.executable, *map(str, arguments)], seconds)


def torchrun(*arguments: object, ranks: int = 2, seconds: float = 600) -> subprocess.CompletedProcess[str]:
    """`torchrun --nproc-per-node RANKS ARGUMENTS` in the project's root."""
    return _run([*TORCHRUN, str(ranks), *map(str, arguments)], seconds)


def start_torchrun(*arguments: object) -> Program:
    """Two ranks without waiting: `with start_torchrun(...) as process`; `kill` ends it earlier."""
    command = [*TORCHRUN, "2", *map(str, arguments)]
    return Program(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to a program and all that it started; torchrun's ranks lead sessions of their own, hence by parent.

    Does nothing to a program that has ended.
    """
    if process.poll() is None:
        for pid in [process.pid, *_descendants(process.pid)]:  # found before the first dies: orphans have no parent
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def children(process: subprocess.Popen) -> list[int]:
    """The processes that a program has started itself: of torchrun the ranks."""
    return [child for child, parent in _parents().items() if parent == process.pid]


def wait_for_step(folder: Path, step: int, process: subprocess.Popen) -> None:
    """Until the run that a process makes in a folder has logged a step."""
    deadline = time.monotonic() + 300
    while not any(line["step"] >= step for line in read_metrics(folder / "metrics.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be stopped"
        time.sleep(0.02)


def losses(folder: Path) -> dict[int, float]:
    """A run's training losses by step; of a step that was trained twice, the second time's."""
    return {line["step"]: line["train_loss"] for line in read_metrics(folder / "metrics.jsonl") if line["step"]}


def _parents() -> dict[int, int]:
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    return dict(map(int, line.split()) for line in listed.splitlines())


def _descendants(pid: int) -> list[int]:
    parents, found = _parents(), [pid]
    for parent in found:  # grows on the way
        found += [child for child, its_parent in parents.items() if its_parent == parent]
    return found[1:]


def _run(command: list[str], seconds: float) -> subprocess.CompletedProcess[str]:
    with Program(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        out, err = process.communicate(timeout=seconds)
    return subprocess.CompletedProcess(command, process.returncode, out, err)
