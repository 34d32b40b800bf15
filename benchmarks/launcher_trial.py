"""Compares launchers with the guarantees of one_host.py and multi_host.py; docs/experiments.md has the results.

    python benchmarks/launcher_trial.py [--ft ft_launcher] [--only LAUNCHER] [--hold SECONDS]

Each launcher starts two ranks without torch, which save for --hold seconds when asked to stop (longer than the 30 that
torchrun and DeepSpeed allow); then they are disturbed in several ways. A remote shell that runs its command on this
host replaces ssh; DeepSpeed needs pdsh for several hosts. Remaining processes are killed by id.
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from coe_megatron.cli.arguments import Parser, write_out

RANK = """
import os, signal, sys, time
from pathlib import Path
from coe_megatron.run.exit_status import write_error_file

folder, how, rank = Path(os.environ["TRIAL_FOLDER"]), os.environ["TRIAL_HOW"], os.environ["RANK"]
stops = []
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, lambda *_: stops.append(1))
if "TORCHELASTIC_RUN_ID" in os.environ:
    from coe_megatron.training.signals import stop_with_parent
    stop_with_parent()
print(f"rank {rank} speaks", flush=True)
(folder / f"rank-{rank}-{os.getpid()}").touch()

def end(status):
    write_error_file(status, "planned", environment=os.environ)
    sys.exit(status)

if how == "fail":  # rank 1 diverges, rank 0 loses its peer
    time.sleep(3 if rank == "1" else 4)
    end(4 if rank == "1" else 1)
if how == "mistake":
    end(2)
while not stops:
    time.sleep(0.1)
until = time.monotonic() + float(os.environ["TRIAL_HOLD"])
while time.monotonic() < until:
    time.sleep(0.1)
(folder / f"saved-{rank}").touch()
end(3)
"""
# As ssh, takes HOST COMMAND after options; the command outlives it, with its stdin closed.
SHELL = """#!{python}
import os, psutil, subprocess, sys, threading
from pathlib import Path
words = sys.argv[1:]
while words[0].startswith("-"):
    words = words[2 if words[0] in ("-o", "-l", "-p") else 1 :]
host, command = words[0], " ".join(words[1:])
if host == "127.0.0.3":
    sys.exit("ssh: connect to host 127.0.0.3 port 22: Connection refused")
pid = Path(os.environ["TRIAL_FOLDER"], "on-" + host)
if "pkill" in command:  # DeepSpeed kills by a pattern, which could match other processes; we kill by id
    for process in psutil.Process(int(pid.read_text())).children():
        if "deepspeed.launcher.launch" in process.cmdline():
            process.terminate()
    sys.exit(0)
command = command.replace("-m coe_megatron.cli.pretrain", "{rank}")
there = subprocess.Popen(["sh", "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
pid.write_text(str(there.pid))

def relay():
    for line in sys.stdin.buffer:
        there.stdin.write(line)
        there.stdin.flush()
    there.stdin.close()

threading.Thread(target=relay, daemon=True).start()
for line in there.stdout:
    sys.stdout.buffer.write(line)
    sys.stdout.buffer.flush()
os._exit(there.wait() % 256)  # the thread waits for stdin
"""
HOSTS = ("127.0.0.1", "127.0.0.2")
START, END = 300, 200  # limits in seconds for start and end


class Trial:
    """One run of a launcher, in its own folder."""

    def __init__(self, command: list[str], how: str, hold: float, path: Path) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=f"{how}-", dir=path))
        own = {"TRIAL_FOLDER": str(self.folder), "TRIAL_HOW": how, "TRIAL_HOLD": str(hold), "OMP_NUM_THREADS": "1"}
        environment = {**os.environ, **own, "PATH": f"{path}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
        self.output = self.folder / "output"
        with self.output.open("w") as output:
            self.launcher = psutil.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
        self.seen: set[psutil.Process] = set()

    def ranks(self) -> list[psutil.Process]:
        """The processes of ranks that are alive."""
        found = []
        for path in self.folder.glob("rank-*"):
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(int(path.name.rpartition("-")[2]))
                if process.status() != psutil.STATUS_ZOMBIE and process.create_time() < path.stat().st_mtime + 1:
                    found.append(process)
        return found

    def starts(self) -> int:
        return len(list(self.folder.glob("rank-*")))

    def wait_for_ranks(self) -> None:
        deadline = time.monotonic() + START
        while self.starts() < len(HOSTS):
            if self.launcher.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no ranks: {self.output.read_text()[-2000:]}")
            time.sleep(0.2)
        self.seen = set(self.launcher.children(recursive=True)) | set(self.ranks())
        time.sleep(1)

    def wait(self) -> str:
        """The exit status, and the numbers of ranks that had saved and that were alive when the launcher ended."""
        began = time.monotonic()
        try:
            status = str(self.launcher.wait(timeout=END))
        except psutil.TimeoutExpired:
            status = f"none in {END} s"
        took = time.monotonic() - began
        saved = len(list(self.folder.glob("saved-*")))
        result = f"status {status} after {took:.0f} s, {saved} of 2 saved"
        if not self.ranks():
            return result
        result += f", {len(self.ranks())} ranks alive then"
        psutil.wait_procs(self.seen, timeout=90)
        saved = len(list(self.folder.glob("saved-*")))
        return f"{result}, {len(self.ranks())} 90 s later or less, and {saved} of 2 saved"

    def clear(self) -> None:
        """Kill all processes that were started, by id."""
        left = self.seen | set(self.ranks())
        with suppress(psutil.NoSuchProcess):
            left |= {self.launcher, *self.launcher.children(recursive=True)}
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def own_status(trial: Trial) -> str:
    return trial.wait()


def one_signal(trial: Trial) -> str:
    trial.wait_for_ranks()
    trial.launcher.send_signal(signal.SIGTERM)
    return trial.wait()


def ctrl_c(trial: Trial) -> str:
    """Send SIGINT to the process group, as a terminal does."""
    trial.wait_for_ranks()
    os.killpg(trial.launcher.pid, signal.SIGINT)
    return trial.wait()


def killed(trial: Trial) -> str:
    trial.wait_for_ranks()
    trial.launcher.kill()
    _, left = psutil.wait_procs(trial.seen, timeout=90)
    saved = len(list(trial.folder.glob("saved-*")))
    return f"90 s later {len(trial.ranks())} ranks and {len(left)} processes in all alive, {saved} of 2 saved"


def restarts(trial: Trial) -> str:
    status = trial.wait().partition(" after")[0]
    return f"{trial.starts()} ranks started, {status}"


def ports(trial: Trial) -> str:
    trial.wait_for_ranks()
    listening = set()
    for process in {trial.launcher, *trial.seen} - set(trial.ranks()):
        with suppress(psutil.NoSuchProcess):
            found = process.net_connections("tcp")
            listening |= {one.laddr.ip for one in found if one.status == psutil.CONN_LISTEN}
    lines = [line for line in trial.output.read_text().splitlines() if "speaks" in line]
    return f"listens at {sorted(listening) or 'none'}; output is {sorted(lines)}"


def unreachable(trial: Trial) -> str:
    status = trial.wait().partition(" after")[0]
    lines = trial.output.read_text().splitlines()
    return f"{status}, {len(lines)} lines, the last: {lines[-1] if lines else ''}"


SCENES: dict[str, tuple[str, Callable[[Trial], str]]] = {
    "own status (4 by rank 1, then 1 by rank 0)": ("fail", own_status),
    "SIGTERM to the launcher": ("save", one_signal),
    "Ctrl-C": ("save", ctrl_c),
    "kill -9 of the launcher": ("save", killed),
    "a mistake (2) with 2 restarts allowed": ("mistake", restarts),
    "ports and output": ("save", ports),
    "a host that cannot be reached": ("save", unreachable),
}


def launchers(ft: str | None, path: Path) -> dict[str, Callable[[str], list[str]]]:
    """Each launcher's command for a scene."""
    rank, python = str(path / "rank.py"), sys.executable
    elastic = ["--nproc-per-node=2", rank]
    hostfile = {True: path / "hosts", False: path / "hosts-with-one-down"}
    hostfile[True].write_text("".join(f"{host} slots=1\n" for host in HOSTS))
    hostfile[False].write_text("127.0.0.1 slots=1\n127.0.0.3 slots=1\n")

    def restarted(scene: str) -> list[str]:
        return ["--max-restarts=2"] if "mistake" in scene else []

    def deepspeed_hosts(scene: str) -> list[str]:
        hosts = f"--hostfile={hostfile['reached' not in scene]}"
        return ["deepspeed", hosts, "--master_addr=127.0.0.1", "--no_local_rank", rank]

    def ours_hosts(scene: str) -> list[str]:
        hosts = ["--hostfile", str(hostfile["reached" not in scene]), *restarted(scene)]
        return [python, "-m", "coe_megatron.cli.multi_host", *hosts, f"--remote-shell={path}/ssh", "quickstart.yaml"]

    found: dict[str, Callable[[str], list[str]]] = {
        "torchrun": lambda scene: [python, "-m", "torch.distributed.run", "--standalone", *restarted(scene), *elastic],
        "deepspeed": lambda _scene: ["deepspeed", "--num_gpus=2", "--no_local_rank", rank],
        "one_host": lambda scene: [python, "-m", "coe_megatron.cli.one_host", *restarted(scene), "--", *elastic],
        "deepspeed, two hosts": deepspeed_hosts,
        "multi_host, two hosts": ours_hosts,
    }
    if ft is not None:
        options = [ft, "--standalone", "--ignore-missing-fault-tol-cfg"]
        found["ft_launcher"] = lambda scene: [*options, *restarted(scene), *elastic]
        found["ft_launcher --term-timeout 600"] = lambda scene: [
            *(*options, "--term-timeout=600", "--workers-stop-timeout=600"),
            *(*restarted(scene), *elastic),
        ]
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="launcher_trial.py", description=__doc__)
    parser.add_argument("--ft", metavar="PROGRAM", help="nvidia-resiliency-ext's ft_launcher")
    parser.add_argument("--only", metavar="LAUNCHER", help="run only this launcher")
    parser.add_argument("--scene", metavar="TEXT", default="", help="run only scenes whose name contains this")
    parser.add_argument("--hold", type=float, default=45, help="duration of a save in seconds (default: 45)")
    options: argparse.Namespace = parser.parse_args(arguments)
    path = Path(tempfile.mkdtemp(prefix="trial-"))
    (path / "rank.py").write_text(RANK)
    (path / "ssh").write_text(SHELL.format(python=sys.executable, rank=path / "rank.py"))
    (path / "ssh").chmod(0o755)
    for name, command in launchers(options.ft, path).items():
        if options.only not in (None, name):
            continue
        for scene, (how, look) in SCENES.items():
            if options.scene not in scene or ("reached" in scene and "hosts" not in name):
                continue
            trial = Trial(command(scene), how, options.hold, path)
            try:
                found = look(trial)
            except RuntimeError as error:
                found = str(error)
            finally:
                trial.clear()
            write_out(f"{name} | {scene} | {found}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
