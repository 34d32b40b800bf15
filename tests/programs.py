"""Runs the project's programs as a user does, in processes of their own."""

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def python(*arguments: object, seconds: float = 120) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS` in the project's root."""
    return _run([sys.executable, *map(str, arguments)], seconds)


def torchrun(*arguments: object, seconds: float = 600) -> subprocess.CompletedProcess[str]:
    """`torchrun --nproc-per-node 2 ARGUMENTS` in the project's root."""
    return _run([*TORCHRUN, *map(str, arguments)], seconds)


def start_torchrun(*arguments: object) -> subprocess.Popen[bytes]:
    """The same without waiting; end it with `kill`."""
    command = [*TORCHRUN, *map(str, arguments)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, cwd=ROOT, env=_environment(), start_new_session=True, **quiet)


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to torchrun and its ranks at once; every rank leads a session of its own, hence found as a child."""
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=False
    )
    for pid in [process.pid, *map(int, listed.stdout.split())]:
        os.kill(pid, signal.SIGKILL)
    process.wait()


def _run(command: list[str], seconds: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, env=_environment(), capture_output=True, text=True, timeout=seconds, check=False
    )


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}
