"""What srun starts for pretrain.sbatch: on each node torchrun, or as a task of its own each rank (COE_LAUNCH=tasks).

The arguments are those of pretrain_coe.py; the environment is pretrain.sbatch's, with SLURM's variables of the task.
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

NEEDED = (
    *("COE_ATTEMPT", "COE_LAUNCH", "COE_NODES", "COE_RANKS_PER_NODE", "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID"),
    *("SLURM_NODEID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURMD_NODENAME"),
)
_PROGRAM = "coe_megatron.cli.pretrain"
_RANK_0 = b"[default0]:"  # torchrun's prefix


def main(arguments: list[str] | None = None) -> int:
    """Start what this task is, wait for it; returns its exit status."""
    if missing := [name for name in NEEDED if not os.environ.get(name)]:
        print(f"slurm_task: error: {missing[0]} is not set: pretrain.sbatch and srun set it", file=sys.stderr)
        return 2
    attempt, node = Path(os.environ["COE_ATTEMPT"]), int(os.environ["SLURM_NODEID"])
    stop = attempt / "stop"
    # SLURM sends TERM and USR1 to its tasks, with cgroups to nobody below them. The ranks learn of it by the stop file.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: stop.touch())
    if int(os.environ["COE_NODES"]) > 1:
        _use_interface_towards(os.environ["COE_NEIGHBOUR" if node == 0 else "MASTER_ADDR"])
    program = ["-m", _PROGRAM, "--stop-file", str(stop), *(sys.argv[1:] if arguments is None else arguments)]
    return (_torchrun if os.environ["COE_LAUNCH"] == "torchrun" else _rank)(attempt, node, program)


def _use_interface_towards(neighbour: str) -> None:
    from coe_megatron.errors import ConfigError  # late: a signal may come in the meantime
    from coe_megatron.launcher import network

    try:
        network.use_interface_towards(neighbour, os.environ)
    except ConfigError as error:  # gloo and NCCL choose by themselves
        print(error, file=sys.stderr)


def _torchrun(attempt: Path, node: int, program: list[str]) -> int:
    """Of this node; the job's log shows rank 0, without torchrun's words."""
    of = os.environ
    options = [
        *(f"--nnodes={of['COE_NODES']}", f"--node-rank={node}", f"--nproc-per-node={of['COE_RANKS_PER_NODE']}"),
        *(
            "--max-restarts=0",
            "--rdzv-backend=static",
            f"--rdzv-id={of['SLURM_JOB_ID']}-{of.get('SLURM_RESTART_COUNT', 0)}",
        ),
        *(f"--master-addr={of['MASTER_ADDR']}", f"--master-port={of['MASTER_PORT']}"),
        *(f"--log-dir={attempt}/ranks/node-{node}", "--redirects=3", "--signals-to-handle=SIGINT"),
        *(("--tee=0:3",) if node == 0 else ()),
    ]
    command = [sys.executable, "-m", "coe_megatron.launcher.torchrun", *options, *program]
    with (attempt / f"node-{node}.log").open("wb") as log:
        if node:
            return _status(_start(command, log, subprocess.STDOUT).wait())
        process = _start(command, subprocess.PIPE, subprocess.STDOUT)
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            log.flush()
            if line.startswith(_RANK_0):
                _say(line.removeprefix(_RANK_0).removeprefix(b" "), sys.stdout.buffer)
        return _status(process.wait())


def _rank(attempt: Path, node: int, program: list[str]) -> int:
    """One rank; of the first the job's log has all."""
    of = os.environ
    folder = attempt / "ranks" / f"node-{node}" / of["SLURM_LOCALID"]
    folder.mkdir(parents=True, exist_ok=True)
    of |= {
        "RANK": of["SLURM_PROCID"],
        "WORLD_SIZE": of["SLURM_STEP_NUM_TASKS"],
        "GROUP_RANK": str(node),
        "LOCAL_RANK": of["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": of["COE_RANKS_PER_NODE"],
        "OMP_NUM_THREADS": of.get("OMP_NUM_THREADS") or of.get("SLURM_CPUS_PER_TASK") or "1",
        "TORCHELASTIC_ERROR_FILE": str(folder / "error.json"),
    }
    command = [sys.executable, *program]
    with (folder / "stdout.log").open("wb") as out, (folder / "stderr.log").open("wb") as err:
        if of["RANK"] != "0":
            status = _status(_start(command, out, err).wait())
        else:
            process = _start(command, subprocess.PIPE, subprocess.PIPE)
            both = ((process.stdout, out, sys.stdout.buffer), (process.stderr, err, sys.stderr.buffer))
            copies = [threading.Thread(target=_copy, args=each, daemon=True) for each in both]
            for copy in copies:
                copy.start()
            status = _status(process.wait())
            for copy in copies:
                copy.join(timeout=10)  # a process of the rank's may hold the other end open
    ended = {"rank": int(of["RANK"]), "status": status, "time": time.time(), "host": of["SLURMD_NODENAME"]}
    (folder / "ended.json").write_text(json.dumps(ended))
    return status


def _start(command: list[str], out: BinaryIO | int, err: BinaryIO | int) -> subprocess.Popen[bytes]:
    """Deaf to what SLURM sends: torchrun would kill its ranks 30 seconds after a TERM, and they go on and save."""
    return subprocess.Popen(command, stdout=out, stderr=err, preexec_fn=_ignore)


def _ignore() -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _copy(source: BinaryIO, file: BinaryIO, shown: BinaryIO) -> None:
    for line in source:
        file.write(line)
        file.flush()
        _say(line, shown)


def _say(line: bytes, out: BinaryIO) -> None:
    with suppress(OSError):  # srun is gone
        out.write(line)
        out.flush()


def _status(code: int) -> int:
    """As a shell has it: 128 and the number of the signal that has killed a process."""
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
