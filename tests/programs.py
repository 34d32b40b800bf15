"""Runs the project's programs as a user does, in processes of their own that never outlive their test.

On CPU they are forked from one process for each worker that has imported torch, Megatron-Core and DeepSpeed once, where
a test does not ask for a fresh interpreter.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

from coe_megatron.launcher.preloaded import PICTURES, TRAINING, Popen, Preloaded, without_gpu
from coe_megatron.launcher.torchrun_supervisor import living_ranks
from coe_megatron.run.metrics_log import read_metrics

ROOT = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "coe_megatron.launcher.torchrun", "--standalone", "--nproc-per-node"]
PLAIN_TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


class Program(Popen):
    """A program in the project's root; at the end of its `with` block nothing of it is left."""

    def __init__(self, command: list[str], *, fresh: bool = False, **more: Any) -> None:
        start_from = None if fresh else preloaded()
        super().__init__(command, start_from, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, **more)

    def __exit__(self, *details: Any) -> None:
        kill(self)
        super().__exit__(*details)


@cache
def preloaded() -> Preloaded | None:
    """The process that programs are forked from, until this one ends."""
    return Preloaded((*TRAINING, *PICTURES)) if without_gpu() else None


def python(*arguments: object, seconds: float = 120, fresh: bool = False) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS` in the project's root."""
    return _run([sys.executable, *map(str, arguments)], seconds, fresh)


def torchrun(
    *arguments: object, ranks: int = 2, seconds: float = 600, fresh: bool = False
) -> subprocess.CompletedProcess[str]:
    """`torchrun --nproc-per-node RANKS ARGUMENTS` in the project's root; torch's own where it has to be fresh."""
    return _run([*(PLAIN_TORCHRUN if fresh else TORCHRUN), str(ranks), *map(str, arguments)], seconds, fresh)


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
    """The ranks that torchrun has started itself: its children that lead a session."""
    return [rank.pid for rank in living_ranks(process.pid)]


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


def _run(command: list[str], seconds: float, fresh: bool) -> subprocess.CompletedProcess[str]:
    with Program(command, fresh=fresh, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        out, err = process.communicate(timeout=seconds)
    return subprocess.CompletedProcess(command, process.returncode, out, err)
