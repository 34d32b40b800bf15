"""launch/multi_host.py and one_host.py: mistakes in one line, and the commands that hosts would get."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
from programs import ROOT, Program

from coe_megatron.run.exit_status import ExitStatus

pytestmark = pytest.mark.thorough

CONFIG = "configs/quickstart.yaml"
DOWN = """sh -c 'test "$0" != down || { echo "no route to host $0" >&2; exit 255; }'"""


def launch(program: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"launch/{program}", *arguments]
    own = {name: text for name, text in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    environment = {**own, **variables}  # without what DeepSpeed, in an earlier test, has set
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((CONFIG,), "one of the arguments --hosts --hostfile is required"),
        (("--hosts", "a,a", CONFIG), "--hosts is 'a,a': a is given twice"),
        (("--hostfile", "nowhere", CONFIG), "--hostfile is nowhere: there is no such file"),
        (("--hosts=--", CONFIG), "argument --hosts: -- is not a value"),
        (("--hosts", "a@b@c", CONFIG), "'a@b@c' is not a host name"),
        (("--hosts", "a:" + "9" * 5000, CONFIG), "it must be a whole number from 1 to 4096"),
        (("--hosts", "a,b", "--remote-shell", "'", CONFIG), "No closing quotation"),
        (("--hosts", "a,b", "--remote-shell", "true", CONFIG), "host a: true did not run the command"),
        (("--hosts", "a:2,b:4", CONFIG), "slots differ (a=2, b=4)"),
        (
            ("--hosts", "a", "--ranks-per-node", "0", CONFIG),
            "--ranks-per-node is '0': it must be a whole number from 1",
        ),
        (("--hosts", "a:1,b", "--hots", CONFIG), "unrecognized arguments: --hots"),
        (("--hosts", "a,b,c", CONFIG), "parallel"),  # EP 2 does not go with three ranks
        (("--hosts", "a,b", CONFIG, "model.layers=2"), "model.layers"),
        (
            ("--hosts", "a,b", "--max-restarts", "-1", CONFIG),
            "--max-restarts is '-1': it must be a whole number from 0",
        ),
        (
            ("--hosts", "a,b", "--min-hosts", "3", CONFIG),
            "--min-hosts (at most the number of hosts) is '3': it must be a whole number from 1 to 2",
        ),
        (("--hosts", "a,b", ""), "argument config: the path is empty"),
        (("--hosts", "a,b", "--stop-file", "", CONFIG), "argument --stop-file: the path is empty"),
        (("--hosts", "a,b", "~no-such-user/o.yaml"), "~no-such-user/o.yaml: there is no such user here"),
        (("--hosts", "a,b", "--export", "NONE_SUCH", CONFIG), "--export is NONE_SUCH: there is no such variable"),
        (("--hosts", "a,b", "--remote-shell", "nowhere/ssh", CONFIG), "--remote-shell is 'nowhere/ssh': No such file"),
        (("--hosts", "a,b", "--remote-shell", "false", CONFIG), "host a: false ended with status 1: no output"),
        (
            ("--hosts", "a,down", "--remote-shell", DOWN, CONFIG),
            "host down: sh ended with status 255: no route to host down",
        ),
    ],
)
def test_a_mistake_is_one_line(arguments: tuple[str, ...], says: str) -> None:
    done = launch("multi_host.py", *arguments)
    assert (done.returncode, done.stdout) == (ExitStatus.MISTAKE, "")
    assert re.fullmatch(r"multi_host\.py: error: .*\n", done.stderr)
    assert says in done.stderr


def test_a_dry_run_shows_each_hosts_command() -> None:
    options = ("--hosts", "x@a:2,b:2", "--min-hosts", "1", "--max-restarts", "3", "--stop-file", "s", "--dry-run")
    done = launch("multi_host.py", *options, CONFIG, "training.global_batch=64", NCCL_DEBUG="INFO", SECRET="s")
    assert done.returncode == 0, done.stderr
    first, second = (shlex.split(line) for line in done.stdout.splitlines())
    assert first[0] == "ssh"
    assert [words[-2] for words in (first, second)] == ["x@a", "b"]
    said = shlex.split(second[-1])
    assert said[:2] == ["cd", str(ROOT)]
    assert "NCCL_DEBUG=INFO" in said and "SECRET=s" not in said
    ours, torchrun = said[said.index("coe_megatron.cli.one_host") : said.index("--")], said[said.index("--") :]
    assert ours[1:] == ["--watch-stdin", "--towards", "a", "--max-restarts", "3"]
    assert torchrun[1:5] == ["--nnodes", "1:2", "--nproc-per-node", "2"]
    assert "is_host=0,read_timeout=3600" in torchrun
    assert torchrun[-6:] == ["-m", "coe_megatron.cli.pretrain", CONFIG, "training.global_batch=64", "--stop-file", "s"]
    said = shlex.split(first[-1])
    assert said[said.index("--towards") + 1] == "b"
    assert "is_host=1,read_timeout=3600" in said


def test_a_home_is_this_hosts_and_handed_on_as_a_path(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_bytes((ROOT / CONFIG).read_bytes())
    options = ("--hosts", "a", "--ranks-per-node", "2", "--stop-file", "~/stop", "--dry-run", "~/tiny.yaml")
    done = launch("multi_host.py", *options, HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    said = shlex.split(shlex.split(done.stdout)[-1])
    assert said[-3:] == [f"{tmp_path}/tiny.yaml", "--stop-file", f"{tmp_path}/stop"]


def test_a_name_that_looks_like_a_home_or_an_option_stays_one(tmp_path: Path) -> None:
    for name in ("~tiny.yaml", "-tiny.yaml"):
        (tmp_path / name).write_bytes((ROOT / CONFIG).read_bytes())
        options = ("--hosts", "a", "--ranks-per-node", "2", "--stop-file", "./~stop", "--dry-run", f"./{name}")
        command = [sys.executable, ROOT / "launch/multi_host.py", *options]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert shlex.split(shlex.split(done.stdout)[-1])[-3:] == [f"./{name}", "--stop-file", "./~stop"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "the following arguments are required: ARGUMENT"),
        (("--max-restarts", "-1", "--", "x.py"), "--max-restarts is '-1': it must be a whole number from 0"),
        (("--towards", "no.such.host.invalid", "--", "x.py"), "host 'no.such.host.invalid' cannot be reached"),
    ],
)
def test_a_mistake_on_one_host_is_one_line(arguments: tuple[str, ...], says: str) -> None:
    done = launch("one_host.py", *arguments)
    assert done.returncode == ExitStatus.MISTAKE
    assert re.fullmatch(r"one_host\.py: error: .*\n", done.stderr)
    assert says in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--output", "o"), "--name is missing: without srun and torchrun"),
        (("--output", "o", "--nodes", "a,b", "--name", "c"), "--name is c: it must be one of --nodes, a,b"),
        (("--output", "o", "--nodes", "a,a", "--name", "a"), "--nodes is a,a: a name is given twice"),
        (
            ("--output", "o", "--nodes", "a", "--name", "a", "--rendezvous", "x"),
            "--rendezvous is x: it must be ADDRESS:PORT",
        ),
        (
            ("--output", "o", "--nodes", "a", "--name", "a", "--report", "no/r"),
            "the folder of --report is no: there is no",
        ),
        (("--output", "o", "--nodes", "a", "--name", "a", "--report", "launch"), "--report is launch: it is a folder"),
        (
            ("--output", "o", "--nodes", "a,,b", "--name", "a"),
            "--nodes is 'a,,b': it must be names separated by commas",
        ),
        (("--output", "o", "--nodes", "a", "--name", "a", "--rendezvous", "a:65536"), "with a port from 1 to 65535"),
        (("--output", "o", "--timeout", "nan"), "argument --timeout: 'nan' must be a number from 0"),
        (("--output", "o", "--slow", "0"), "argument --slow: '0' must be above 0"),
        (("--output", "~no-such-user/o"), "~no-such-user/o: there is no such user here"),
    ],
)
def test_a_mistake_in_a_node_check_is_one_line(arguments: tuple[str, ...], says: str) -> None:
    done = launch("check_nodes.py", *arguments)
    assert done.returncode == ExitStatus.MISTAKE
    assert re.fullmatch(r"check_nodes\.py: error: .*\n", done.stderr)
    assert says in done.stderr


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"SLURM_NODEID": "0"}, "SLURM_NODEID is set, but SLURM_JOB_NODELIST is not"),
        ({"SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "n["}, "SLURM_JOB_NODELIST is n["),
        ({"GROUP_RANK": "0"}, "GROUP_RANK is set, but GROUP_WORLD_SIZE is not"),
        ({"GROUP_RANK": "x", "GROUP_WORLD_SIZE": "1"}, "GROUP_RANK is 'x': it must be a whole number"),
        ({"SLURM_LOCALID": "x"}, "SLURM_LOCALID is 'x': it must be a whole number"),
    ],
)
def test_a_node_check_with_variables_in_part_is_one_line(variables: dict[str, str], says: str) -> None:
    done = launch("check_nodes.py", "--output", "o", **variables)
    assert done.returncode == ExitStatus.MISTAKE
    assert re.fullmatch(r"check_nodes\.py: error: .*\n", done.stderr) and says in done.stderr


def test_a_variable_of_torchruns_is_named() -> None:
    done = launch("one_host.py", "--", "x.py", PET_MAX_RESTARTS="many")
    assert (done.returncode, done.stdout) == (ExitStatus.MISTAKE, "")
    assert done.stderr.startswith("one_host.py: error: PET_MAX_RESTARTS is 'many': it must be a whole number from 0")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--nproc-per-node", "many", "setup.py"), "setup.py: there is no such file"),
        (("--nproc-per-node", "many", "launch/status.py"), "Unsupported nproc_per_node value: many"),
        (("--nnodes", "1:2:3", "launch/status.py"), 'nnodes=1:2:3 is not in "MIN:MAX" format'),
    ],
)
@pytest.mark.run
def test_what_torchrun_does_not_take_is_one_line(arguments: tuple[str, ...], says: str) -> None:
    done = launch("one_host.py", "--", *arguments)
    said = [line for line in done.stderr.splitlines() if line.startswith("torchrun: error: ")]
    assert len(said) == 1 and says in said[0] and "Traceback" not in done.stderr
    assert done.returncode == ExitStatus.MISTAKE


def test_a_variable_that_torchrun_cannot_read_is_named() -> None:
    done = launch("one_host.py", "--", "--nproc-per-node", "1", "launch/status.py", PET_NNODES="abc")
    assert done.returncode == ExitStatus.MISTAKE
    assert "(PET_NNODES is 'abc')" in done.stderr and "Traceback" not in done.stderr


# A rank that fails at its first start and diverges at its second.
RANK = """
import os, sys
sys.path.insert(0, os.getcwd())
from coe_megatron.run.exit_status import write_error_file
status = {0: 1, 1: 4}[int(os.environ["TORCHELASTIC_RESTART_COUNT"])]
write_error_file(status, "so it is", environment=os.environ)
sys.exit(status)
"""


@pytest.mark.run
def test_torchrun_restarts_what_failed_but_not_what_diverged(tmp_path: Path) -> None:
    rank = tmp_path / "rank.py"
    rank.write_text(RANK)
    variables = {"PET_MAX_RESTARTS": "5", "PET_NNODES": "1", "PET_NPROC_PER_NODE": "1", "OMP_NUM_THREADS": "1"}
    done = launch("one_host.py", "--", "--standalone", str(rank), **variables)
    assert done.returncode == ExitStatus.DIVERGED, done.stderr
    assert "one_host.py: ended with status 4 (DIVERGED), rank 0: so it is\n" in done.stderr


# A rank that hangs up the program above torchrun, and is asked to stop if that minds.
HANGS_UP = """
import os, psutil, signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(3))
psutil.Process().parents()[1].send_signal(signal.SIGHUP)
time.sleep(2)
"""


@pytest.mark.slow
@pytest.mark.run
def test_under_nohup_a_terminal_that_is_closed_ends_nothing(tmp_path: Path) -> None:
    rank = tmp_path / "rank.py"
    rank.write_text(HANGS_UP)
    command = [sys.executable, "launch/one_host.py", "--", "--standalone", "--nproc-per-node", "1", str(rank)]
    ended = {
        action: subprocess.run(
            command,
            cwd=ROOT,
            capture_output=True,
            timeout=120,
            preexec_fn=partial(signal.signal, signal.SIGHUP, action),  # these tests too may run under nohup
        ).returncode
        for action in (signal.SIG_IGN, signal.SIG_DFL)
    }
    assert ended[signal.SIG_IGN] == ExitStatus.DONE != ended[signal.SIG_DFL]


# A rank that takes its time to save when torchrun, its parent, has ended.
SAVES = """
import signal, sys, time
from pathlib import Path
from coe_megatron.training.signals import stop_with_parent
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(5), Path(sys.argv[1], "saved").touch(), sys.exit(3)))
stop_with_parent()
Path(sys.argv[1], "began").touch()
time.sleep(200)
"""


@pytest.mark.run
def test_ranks_of_a_launcher_that_was_killed_save_without_torchruns_time_limit(tmp_path: Path) -> None:
    """Torchrun is gone at once, so that it does not kill them 30 seconds later."""
    rank = tmp_path / "rank.py"
    rank.write_text(SAVES)
    command = [sys.executable, "launch/one_host.py", "--", "--nproc-per-node", "1", str(rank), str(tmp_path)]
    with Program(command) as launcher:
        deadline = time.monotonic() + 120
        while not (tmp_path / "began").exists():
            assert launcher.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        (torchrun,) = psutil.Process(launcher.pid).children()
        ranks = torchrun.children()
        launcher.kill()
        psutil.wait_procs([torchrun], timeout=30)
        assert not torchrun.is_running() and ranks and not (tmp_path / "saved").exists()
        psutil.wait_procs(ranks, timeout=60)
    assert (tmp_path / "saved").exists()


# A remote shell that answers with the rendezvous address, and whose ranks wait for a request of the launcher.
REMOTE = """#!/bin/sh
case "$2" in
*coe_megatron.cli.one_host*) echo here; read word; echo "told $word"; test "$word" = stop && exit 3; exit 1 ;;
*) echo 127.0.0.1 1 ;;
esac
"""


@pytest.mark.run
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 3), (signal.SIGINT, 130)])
def test_a_signal_to_the_launcher_asks_all_hosts_to_stop(number: signal.Signals, status: int, tmp_path: Path) -> None:
    shell = tmp_path / "shell"
    shell.write_text(REMOTE)
    shell.chmod(0o755)
    options = ("--hosts", "a,b", "--remote-shell", str(shell), CONFIG)
    with Program([sys.executable, "launch/multi_host.py", *options], stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        assert sorted(launcher.stdout.readline() for _ in range(2)) == ["a: here\n", "b: here\n"]
        launcher.send_signal(number)
        said = launcher.stdout.read()
        assert (launcher.wait(timeout=60), said.count("told stop")) == (status, 2)
