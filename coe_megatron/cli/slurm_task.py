"""The task that srun starts for pretrain.sbatch: torchrun on each node, or each rank by itself (COE_LAUNCH=tasks).

It takes the arguments of pretrain_coe.py, and the environment of pretrain.sbatch with SLURM's variables of the task.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from coe_megatron.slurm.tasks import rank_variables, torchrun_options

NEEDED = (
    *("COE_ATTEMPT", "COE_LAUNCH", "COE_NODES", "COE_RANKS_PER_NODE", "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID"),
    *("SLURM_NODEID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURMD_NODENAME"),
)
_PROGRAM = "coe_megatron.cli.pretrain"
_RANK_0 = b"[default0]:"  # torchrun's prefix


def main(arguments: list[str] | None = None) -> int:
    """Start torchrun or a rank and wait for it; returns its exit status."""
    if missing := [name for name in NEEDED if not os.environ.get(name)]:
        print(f"slurm_task: error: {missing[0]} is not set: pretrain.sbatch and srun set it", file=sys.stderr)
        return 2
    attempt, node = Path(os.environ["COE_ATTEMPT"]), int(os.environ["SLURM_NODEID"])
    stop = attempt / "stop"
    # SLURM sends TERM and USR1 to this task; with cgroups, not to its children. The ranks see the stop file instead.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: stop.touch())
    if int(os.environ["COE_NODES"]) > 1:
        _use_interface_towards(os.environ["COE_NEIGHBOUR" if node == 0 else "MASTER_ADDR"])
    program = ["-m", _PROGRAM, "--stop-file", str(stop), *(sys.argv[1:] if arguments is None else arguments)]
    return (_torchrun if os.environ["COE_LAUNCH"] == "torchrun" else _rank)(attempt, node, program)


def _use_interface_towards(neighbour: str) -> None:
    from coe_megatron.errors import ConfigError  # late: the signal handlers must be set before slow imports
    from coe_megatron.launcher import network

    try:
        network.use_interface_towards(neighbour, os.environ)
    except ConfigError as error:  # gloo and NCCL choose an interface themselves
        print(error, file=sys.stderr)


def _torchrun(attempt: Path, node: int, program: list[str]) -> int:
    """Run torchrun on this node; the job's log shows the output of rank 0, but not torchrun's own."""
    command = [sys.executable, "-m", "coe_megatron.launcher.torchrun", *torchrun_options(os.environ, attempt), *program]
    with (attempt / f"node-{node}.log").open("wb") as log:
        if node:
            return _status(_start(command, log, subprocess.STDOUT).wait())
        process = _start(command, subprocess.PIPE, subprocess.STDOUT)
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            log.flush()
            if line.startswith(_RANK_0):
                _write(line.removeprefix(_RANK_0).removeprefix(b" "), sys.stdout.buffer)
        return _status(process.wait())


def _rank(attempt: Path, node: int, program: list[str]) -> int:
    """Run one rank; the job's log shows all output of rank 0."""
    env = os.environ
    folder = attempt / "ranks" / f"node-{node}" / env["SLURM_LOCALID"]
    folder.mkdir(parents=True, exist_ok=True)
    env |= rank_variables(env, folder)
    command = [sys.executable, *program]
    with (folder / "stdout.log").open("wb") as out, (folder / "stderr.log").open("wb") as err:
        if env["RANK"] != "0":
            status = _status(_start(command, out, err).wait())
        else:
            process = _start(command, subprocess.PIPE, subprocess.PIPE)
            streams = ((process.stdout, out, sys.stdout.buffer), (process.stderr, err, sys.stderr.buffer))
            copies = [threading.Thread(target=_copy, args=stream, daemon=True) for stream in streams]
            for copy in copies:
                copy.start()
            status = _status(process.wait())
            for copy in copies:
                copy.join(timeout=10)  # a child of the rank may hold the other end open
    ended = {"rank": int(env["RANK"]), "status": status, "time": time.time(), "host": env["SLURMD_NODENAME"]}
    (folder / "ended.json").write_text(json.dumps(ended))
    return status


def _start(command: list[str], out: BinaryIO | int, err: BinaryIO | int) -> subprocess.Popen[bytes]:
    """Start a process that ignores SLURM's signals: 30 s after a TERM torchrun would kill its ranks, even in a save."""
    return subprocess.Popen(command, stdout=out, stderr=err, preexec_fn=_ignore_signals)


def _ignore_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _copy(source: BinaryIO, file: BinaryIO, out: BinaryIO) -> None:
    """Copy lines to a log file and to the job's log."""
    for line in source:
        file.write(line)
        file.flush()
        _write(line, out)


def _write(line: bytes, out: BinaryIO) -> None:
    with suppress(OSError):  # srun has ended
        out.write(line)
        out.flush()


def _status(code: int) -> int:
    """The exit status as shells report it: 128 plus the signal's number for a process that was killed."""
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
