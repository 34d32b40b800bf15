"""A real SLURM on one machine: munged, slurmctld and several slurmd, all in one folder."""

import os
import pwd
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

_DAEMONS = ("munged", "slurmctld", "slurmd")

# Requeueing, preemption by partition and several jobs on a node as on a usual cluster; what it waits for is shorter.
# cred_expire: a requeued job waits until its old credential has expired, by default two minutes.
# linuxproc: no cgroups are needed. Signals then reach every process of a step, not its tasks alone as with cgroups.
_CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5,socket={munge}
CryptoType=crypto/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=30
UnkillableStepTimeout=60
ReturnToService=0
SlurmdTimeout=300
SlurmdParameters=config_overrides
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SwitchType=switch/none
{nodes}
PartitionName=usual Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
"""


def missing() -> str | None:
    """Why there can be no cluster on this machine; None if there can."""
    if os.geteuid() != 0:
        return "slurmd and munged are started as root, and this is another user"
    lacking = [name for name in (*_DAEMONS, "sbatch") if shutil.which(name) is None]
    return f"{', '.join(lacking)} not found: install slurmctld, slurmd, slurm-client and munge" if lacking else None


@dataclass(frozen=True)
class Cluster:
    """A SLURM that runs, and its tools."""

    folder: Path
    nodes: Sequence[str]

    def run(
        self, *command: object, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """One of SLURM's tools, or a program that calls them."""
        plain = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "COE_"))}
        environment = {**plain, "SLURM_CONF": str(self.folder / "slurm.conf"), "OMP_NUM_THREADS": "1", **(env or {})}
        words = [str(word) for word in command]
        return subprocess.run(words, env=environment, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)

    def ask(self, *command: object) -> str:
        """What one of SLURM's tools answers."""
        done = self.run(*command)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What SLURM knows of a job, such as JobState, Restarts, ExitCode and NodeList."""
        return dict(word.partition("=")[::2] for word in self.ask("scontrol", "show", "job", number, "-o").split())

    def wait(self, number: str, seconds: float, *states: str) -> dict[str, str]:
        """Wait until a job has one of some states, without any until it has ended for good."""
        over = states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE")
        found: dict[str, str] = {}

        def reached() -> bool:
            found.update(self.job(number))
            return found["JobState"] in over

        wait_for(reached, seconds, lambda: f"job {number} to be {' or '.join(over)}: {found}")
        return found


def wait_for(what: Callable[[], bool], seconds: float, told: Callable[[], str]) -> None:
    """Ask again and again until it is so.

    Raises:
        TimeoutError: it was not so in time.
    """
    end = time.monotonic() + seconds
    while not what():
        if time.monotonic() > end:
            raise TimeoutError(f"{seconds} seconds were not enough for {told()}")
        time.sleep(0.2)


@contextmanager
def cluster(folder: Path, size: int, cpus: int) -> Iterator[Cluster]:
    """A SLURM with `size` nodes of `cpus` processors each (there need not be as many), in an empty folder."""
    nodes = [f"n{number}" for number in range(1, size + 1)]
    port, *ports = _free_ports(size + 1)
    lines = [
        f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.1 Port={own} CPUs={cpus} RealMemory=1000"
        for node, own in zip(nodes, ports, strict=True)
    ]
    config = folder / "slurm.conf"
    (folder / "state").mkdir()
    with ExitStack() as stack:
        munge = stack.enter_context(_munged(folder / "munged.out"))
        values = {"host": socket.gethostname(), "port": port, "folder": folder, "munge": munge}
        config.write_text(_CONFIG.format(**values, nodes="\n".join(lines)))
        stack.enter_context(_daemon(folder / "slurmctld.out", ["slurmctld", "-D", "-f", str(config)]))
        for node in nodes:
            stack.enter_context(_daemon(folder / f"slurmd-{node}.out", ["slurmd", "-D", "-f", str(config), "-N", node]))
        made = Cluster(folder, nodes)

        def idle() -> bool:
            return made.run("sinfo", "-h", "-N", "-p", "usual", "-o", "%t").stdout.split() == ["idle"] * size

        wait_for(idle, 60, lambda: f"idle nodes; the logs lie in {folder}")
        try:
            yield made
        finally:
            _end_jobs(made)


def _end_jobs(made: Cluster) -> None:
    """Before the daemons, whose jobs would outlive them."""

    def over() -> bool:
        jobs = made.run("squeue", "--noheader", "--format=%A").stdout.split()
        if jobs:
            made.run("scancel", *jobs)
        return not jobs

    wait_for(over, 90, lambda: "the end of all jobs")


@contextmanager
def _munged(log: Path) -> Iterator[Path]:
    """A munged of our own, and its socket, in a folder that its user may enter, unlike those of pytest."""
    user = pwd.getpwnam("munge")
    with TemporaryDirectory(prefix="munge") as name:
        folder = Path(name)
        folder.chmod(0o755)
        key = folder / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        for path in (folder, key):
            os.chown(path, user.pw_uid, user.pw_gid)
        files = [f"--{kind}-file={folder / kind}" for kind in ("log", "pid", "seed")]
        command = ["munged", "--foreground", f"--socket={folder / 'socket'}", f"--key-file={key}", *files]
        with _daemon(log, command, user=user.pw_uid, group=user.pw_gid, extra_groups=[]):
            wait_for((folder / "socket").exists, 20, lambda: f"munged: {log.read_text()}")
            yield folder / "socket"


@contextmanager
def _daemon(log: Path, command: list[str], **more: Any) -> Iterator[None]:
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd="/", **more)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_ports(count: int) -> list[int]:
    """Ports that are free; slurmd and slurmctld take numbers, and no socket that is open already."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("", 0))
        return [one.getsockname()[1] for one in sockets]
