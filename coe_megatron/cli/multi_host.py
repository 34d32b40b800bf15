"""Pretraining on several hosts without SLURM: torchrun on each of them through a remote shell.

%(prog)s --hosts node-1:8,node-2:8 CONFIG.yaml [key.sub=value ...]
"""

import argparse
import os
import shlex
import signal
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from coe_megatron.cli.arguments import Parser, program_name, write_out
from coe_megatron.config import load
from coe_megatron.distributed.environment import LARGEST_PORT, MOST_RANKS, whole_number
from coe_megatron.errors import ConfigError, one_line
from coe_megatron.files import as_argument, user_path
from coe_megatron.launcher.hosts import MOST_SLOTS, Host, from_file, from_list, ranks_per_node
from coe_megatron.launcher.ssh_launcher import EXPORTED, RemoteCommands, command_string, exported, run_on_host
from coe_megatron.launcher.torchrun_supervisor import Requests
from coe_megatron.run.exit_status import ExitStatus
from coe_megatron.slurm.spare_nodes import bad_in

EPILOG = f"""The hosts need the same working folder, Python, config, data and output folder under the same paths, and a
remote shell that asks for no password. ~ is the home on this host, and is handed on as the path that it stands for. A
host file has a line `NAME slots=N` for each host; # begins a comment.

Started from the working folder, a command runs on each host as `REMOTE-SHELL HOST COMMAND`. Of the environment go along
what begins with {", ".join(EXPORTED)}, and what --export names (visible to others on these hosts).
The ranks meet at the first host, at a port that is free there; gloo and NCCL use the interface that leads to it.

Each line of output begins with the host's name. Ctrl-C stops the ranks after the step at hand, with a checkpoint; a
second one ends them at once. When a host fails the others end within half a minute, and if this program is killed the
ranks elsewhere save and stop. --max-restarts starts all ranks again when one was killed, failed or hung; with
--min-hosts they go on with that many hosts when others, but not the first, are lost, if these can divide the batch.

--check looks at every host before the start (check_nodes.py does it) and ends if one is bad; with --check exclude the
run begins without those.

exit status: that of the ranks, by the first host to fail that says more than "failed": 0 done, 1 failed, 2 a mistake,
3 stopped and saved, 4 diverged, 5 not saved, 6 busy, 7 hung, 130 interrupted from the keyboard."""
_MEETING = "import sys; from coe_megatron.launcher.network import *; print(address_towards(sys.argv[1]), free_port())"

_ASKED_AT_ONCE = 64


@dataclass(frozen=True)
class Plan:
    """What runs where."""

    hosts: list[Host]
    ranks: int
    options: argparse.Namespace

    @property
    def shell(self) -> list[str]:
        return remote_shell(self.options.remote_shell)

    def command(self, *program: str) -> str:
        """As a remote shell takes it: Python with these arguments, in this folder."""
        variables = exported(os.environ, self.options.export)
        return command_string([sys.executable, *program], Path.cwd(), variables)

    def meeting(self) -> tuple[str, int]:
        """Address and free port of the first host, as it says itself."""
        peer = self.hosts[min(1, len(self.hosts) - 1)]
        said = run_on_host(self.shell, self.hosts[0], self.command("-c", _MEETING, peer.address)).split()
        if len(said) < 2:
            raise ConfigError(f"host {self.hosts[0].name}: {self.shell[0]} has not run the command that it was given")
        return said[-2], whole_number(f"host {self.hosts[0].name}: its port", said[-1], 1, LARGEST_PORT)

    def reach(self) -> None:
        """That all hosts answer; ConfigError names the first that does not."""
        with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
            list(pool.map(lambda host: run_on_host(self.shell, host, "true"), self.hosts))

    def torchrun(self, address: str, port: int, run: str) -> dict[str, str]:
        """The command of each host that starts its ranks."""
        return {host.name: self._one_host(index, f"{address}:{port}", run) for index, host in enumerate(self.hosts)}

    def _one_host(self, index: int, endpoint: str, run: str) -> str:
        options, first = self.options, index == 0
        peer = self.hosts[min(1, len(self.hosts) - 1) if first else 0]
        # A cut cable is for the ranks to judge (`recovery.hang_after`): torchrun would give up after a minute.
        conf = f"is_host={int(first)},read_timeout=3600"
        hosts = len(self.hosts) if options.min_hosts is None else f"{options.min_hosts}:{len(self.hosts)}"
        return self.command(
            *("-m", "coe_megatron.cli.one_host", "--watch-stdin", "--towards", peer.address),
            *("--max-restarts", str(options.max_restarts), "--"),
            *("--nnodes", str(hosts), "--nproc-per-node", str(self.ranks)),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", run, "--rdzv-conf", conf),
            *("-m", "coe_megatron.cli.pretrain", as_argument(options.config), *options.overrides),
            *(("--stop-file", as_argument(options.stop_file)) if options.stop_file else ()),
        )

    def check(self, address: str, port: int) -> dict[str, str]:
        """The command of each host that takes part in the node check."""
        names = ",".join(host.address for host in self.hosts)
        output = as_argument(Path(load(self.options.config, self.options.overrides).output))
        return {
            host.name: self.command(
                *("-m", "coe_megatron.cli.check_nodes", "--output", output, "--nodes", names, "--name", host.address),
                *("--meet", f"{address}:{port}", "--json"),
            )
            for host in self.hosts
        }


def parser() -> Parser:
    made = Parser(prog=program_name("coe-multi-host", "multi_host.py"), description=__doc__, epilog=EPILOG)
    hosts = made.add_mutually_exclusive_group(required=True)
    hosts.add_argument("--hosts", metavar="A,B:SLOTS", help="the hosts, by comma; the first one leads")
    hosts.add_argument("--hostfile", type=user_path, metavar="FILE", help="the hosts, one a line: NAME slots=N")
    made.add_argument("--ranks-per-node", metavar="N", help="ranks on each host (default: its slots, else 1)")
    made.add_argument("--max-restarts", default="0", metavar="N", help="starts after a failure (default: 0)")
    made.add_argument("--min-hosts", metavar="N", help="go on with so many (default: all are needed)")
    check = "look at every host first, and stop at a bad one or exclude it"
    made.add_argument("--check", choices=["stop", "exclude"], help=check)
    shell = "ssh -o BatchMode=yes -o ServerAliveInterval=30"
    made.add_argument("--remote-shell", default=shell, metavar="COMMAND", help="default: %(default)s")
    made.add_argument("--export", action="append", default=[], metavar="NAME", help="one more variable for all hosts")
    made.add_argument(
        "--stop-file",
        type=user_path,
        metavar="FILE",
        help="for pretrain_coe.py: stop and save when this file appears",
    )
    made.add_argument("--dry-run", action="store_true", help="print each host's command; nothing is started")
    made.add_argument(
        "config", type=user_path, help="YAML file, or the name of a packaged config, such as quickstart.yaml"
    )
    made.add_argument("overrides", nargs="*", default=[], help="key.sub=value, which wins over the file")
    return made


def plan(options: argparse.Namespace) -> Plan:
    """The plan that the arguments describe; ConfigError if there is none."""
    hosts = from_list(options.hosts) if options.hosts is not None else from_file(options.hostfile)
    asked = options.ranks_per_node
    ranks = ranks_per_node(hosts, asked and whole_number("--ranks-per-node", asked, 1, MOST_SLOTS))
    options.max_restarts = whole_number("--max-restarts", options.max_restarts, 0, MOST_RANKS)
    if options.min_hosts is not None:
        options.min_hosts = whole_number("--min-hosts (there are so many hosts)", options.min_hosts, 1, len(hosts))
    remote_shell(options.remote_shell)
    load(options.config, options.overrides, ranks * len(hosts))
    exported(os.environ, options.export)
    return Plan(hosts, ranks, options)


def remote_shell(text: str) -> list[str]:
    """The words of a command; ConfigError if it has none, or a quotation without an end."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"--remote-shell is {text!r}: {error}") from None
    if not words:
        raise ConfigError("--remote-shell is empty: it must be a command, such as ssh")
    return words


def main() -> int:
    program = parser()
    options = program.parse_intermixed_args()
    try:
        made = plan(options)
        if options.dry_run:
            commands = made.torchrun("ADDRESS", 0, "RUN").items()
            write_out("\n".join(shlex.join([*made.shell, host, command]) for host, command in commands))
            return 0
        if options.check:
            made = checked(made)
        return run(made)
    except ConfigError as error:
        program.error(str(error))
    except KeyboardInterrupt:
        return ExitStatus.INTERRUPTED


def checked(made: Plan) -> Plan:
    """The plan without the hosts that a node check finds bad.

    Raises:
        ConfigError: one is bad and not to be excluded, none is left, or the config does not fit those that are.
    """
    while bad := check(made):
        told = "; ".join(f"{name}: {reason}" for name, reason in bad.items())
        if made.options.check == "stop":
            raise ConfigError(f"bad hosts: {told}")
        hosts = [host for host in made.hosts if host.address not in bad]
        if not hosts:
            raise ConfigError(f"no host is left: {told}")
        print(one_line(f"excluded: {told}"), flush=True)
        load(made.options.config, made.options.overrides, made.ranks * len(hosts))
        made = Plan(hosts, made.ranks, made.options)
    return made


def check(made: Plan) -> dict[str, str]:
    """The bad hosts with the reasons."""
    try:
        address, port = made.meeting()
    except ConfigError as error:
        return {made.hosts[0].address: str(error)}
    commands = RemoteCommands(made.shell, made.check(address, port), len(made.hosts), reporting=True)
    commands.wait()
    reports = [line for line in commands.lines[made.hosts[0].name] if line.startswith("{")]
    bad = bad_in(reports[-1]) if reports else None
    return {made.hosts[0].address: "its node check has not reported"} if bad is None else bad


def run(made: Plan) -> int:
    """Train; returns the exit status."""
    if made.options.min_hosts is None:
        made.reach()
    commands = made.torchrun(*made.meeting(), uuid.uuid4().hex)
    asked, requests = list[int](), Requests()

    def note(number: int, _: object) -> None:
        asked.append(number)
        requests.more()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # under nohup a terminal that is closed is none of its business
            signal.signal(number, note)
    status = RemoteCommands(made.shell, commands, made.options.min_hosts or len(made.hosts)).wait(requests)
    return ExitStatus.INTERRUPTED if status == ExitStatus.STOPPED and signal.SIGINT in asked else status


if __name__ == "__main__":
    sys.exit(main())
