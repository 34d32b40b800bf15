"""Pretrains on several hosts without SLURM: starts torchrun on each of them through a remote shell.

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
from coe_megatron.launcher.hosts import MAX_SLOTS, Host, from_file, from_list, ranks_per_node
from coe_megatron.launcher.ssh_launcher import EXPORTED, RemoteCommands, command_string, exported, run_on_host
from coe_megatron.launcher.torchrun_supervisor import Requests
from coe_megatron.run.exit_status import ExitStatus
from coe_megatron.slurm.spare_nodes import bad_in

EPILOG = f"""All hosts need the same working folder, Python, config, data and output folder under the same paths, and a
remote shell that asks for no password. ~ is expanded to the home folder on this host. A host file has a line
`NAME slots=N` for each host; # begins a comment.

The command for a host is run as `REMOTE-SHELL HOST COMMAND`, and starts in the working folder. It inherits environment
variables whose names begin with
    {", ".join(EXPORTED)},
and those that --export names (other users of these hosts can see them). The rendezvous is on the first host, at a port
that is free there; gloo and NCCL use the interface of the route to it.

Each line of output begins with the host's name. The first Ctrl-C, SIGTERM or SIGHUP asks the ranks to stop: they finish
the current step and at most one more, then save. The second one ends them at once. When a host fails, the others end
within 30 seconds. If this program is killed, the ranks on all hosts save and stop.

--max-restarts restarts all ranks if one was killed, failed or hung. With --min-hosts the run continues on that many
hosts if other hosts are lost (the first one must survive) and if the remaining ranks can divide the batch. --check
checks every host first (check_nodes.py) and ends if one is bad; --check exclude starts without the bad ones.

exit status: that of the ranks, taken from the first failed host with a status other than 1: 0 done, 1 failed, 2 invalid
config or data, 3 stopped on request (SIGTERM, SIGHUP) and saved, 4 diverged, 5 not saved, 6 busy, 7 hung, 8 output
folder lost, 130 interrupted: stopped by Ctrl-C and saved, or ended at once by a second signal. one_host.py exits with 3
after the first Ctrl-C."""
_RENDEZVOUS = (
    "import sys; from coe_megatron.launcher.network import *; print(address_towards(sys.argv[1]), free_port())"
)
_MAX_PARALLEL_SHELLS = 64


@dataclass(frozen=True)
class Plan:
    """The hosts, the ranks per host and the options of a run."""

    hosts: list[Host]
    ranks: int
    options: argparse.Namespace

    @property
    def shell(self) -> list[str]:
        return remote_shell(self.options.remote_shell)

    def command(self, *program: str) -> str:
        """The command string for a remote shell: Python with these arguments, in this folder."""
        variables = exported(os.environ, self.options.export)
        return command_string([sys.executable, *program], Path.cwd(), variables)

    def rendezvous(self) -> tuple[str, int]:
        """Address and free port of the first host, as that host determines them.

        Raises:
            ConfigError: it does not answer, or the remote shell did not run the command.
        """
        peer = self.hosts[min(1, len(self.hosts) - 1)]
        answer = run_on_host(self.shell, self.hosts[0], self.command("-c", _RENDEZVOUS, peer.address)).split()
        if len(answer) < 2:
            raise ConfigError(f"host {self.hosts[0].name}: {self.shell[0]} did not run the command")
        return answer[-2], whole_number(f"host {self.hosts[0].name}: its port", answer[-1], 1, LARGEST_PORT)

    def require_reachable(self) -> None:
        """Check that all hosts answer.

        Raises:
            ConfigError: names the first one that does not.
        """
        with ThreadPoolExecutor(_MAX_PARALLEL_SHELLS) as pool:
            list(pool.map(lambda host: run_on_host(self.shell, host, "true"), self.hosts))

    def torchrun(self, address: str, port: int, run: str) -> dict[str, str]:
        """The command that starts the ranks of each host."""
        return {host.name: self._one_host(index, f"{address}:{port}", run) for index, host in enumerate(self.hosts)}

    def _one_host(self, index: int, endpoint: str, run: str) -> str:
        options, first = self.options, index == 0
        peer = self.hosts[min(1, len(self.hosts) - 1) if first else 0]
        # A network failure is handled by the ranks (`recovery.hang_after`): torchrun would give up after a minute.
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
        """The command for the node check on each host."""
        names = ",".join(host.address for host in self.hosts)
        output = as_argument(Path(load(self.options.config, self.options.overrides).output))
        return {
            host.name: self.command(
                *("-m", "coe_megatron.cli.check_nodes", "--output", output, "--nodes", names, "--name", host.address),
                *("--rendezvous", f"{address}:{port}", "--json"),
            )
            for host in self.hosts
        }


def make_parser() -> Parser:
    parser = Parser(prog=program_name("coe-multi-host", "multi_host.py"), description=__doc__, epilog=EPILOG)
    hosts = parser.add_mutually_exclusive_group(required=True)
    listed = "the hosts, separated by commas; the rendezvous is on the first one"
    hosts.add_argument("--hosts", metavar="A,B:SLOTS", help=listed)
    hosts.add_argument("--hostfile", type=user_path, metavar="FILE", help="the hosts, one per line: NAME slots=N")
    parser.add_argument("--ranks-per-node", metavar="N", help="ranks on each host (default: its slots, else 1)")
    parser.add_argument("--max-restarts", default="0", metavar="N", help="restarts after a failure (default: 0)")
    parser.add_argument("--min-hosts", metavar="N", help="continue on at least N hosts (default: all are required)")
    check = "check every host first, and stop if one is bad or exclude it"
    parser.add_argument("--check", choices=["stop", "exclude"], help=check)
    shell = "ssh -o BatchMode=yes -o ServerAliveInterval=30"
    parser.add_argument("--remote-shell", default=shell, metavar="COMMAND", help="default: %(default)s")
    parser.add_argument("--export", action="append", default=[], metavar="NAME", help="one more variable for all hosts")
    parser.add_argument(
        "--stop-file",
        type=user_path,
        metavar="FILE",
        help="for pretrain_coe.py: stop and save when this file exists; use a new name for each start",
    )
    parser.add_argument("--dry-run", action="store_true", help="print each host's command, and start nothing")
    parser.add_argument(
        "config", type=user_path, help="YAML file, or the name of a packaged config, such as quickstart.yaml"
    )
    parser.add_argument("overrides", nargs="*", default=[], help="key.sub=value, overrides the file")
    return parser


def make_plan(options: argparse.Namespace) -> Plan:
    """The plan for some options.

    Raises:
        ConfigError: they are invalid.
    """
    hosts = from_list(options.hosts) if options.hosts is not None else from_file(options.hostfile)
    given = options.ranks_per_node
    ranks = ranks_per_node(hosts, given and whole_number("--ranks-per-node", given, 1, MAX_SLOTS))
    options.max_restarts = whole_number("--max-restarts", options.max_restarts, 0, MOST_RANKS)
    if options.min_hosts is not None:
        options.min_hosts = whole_number("--min-hosts (at most the number of hosts)", options.min_hosts, 1, len(hosts))
    remote_shell(options.remote_shell)
    load(options.config, options.overrides, ranks * len(hosts))
    exported(os.environ, options.export)
    return Plan(hosts, ranks, options)


def remote_shell(text: str) -> list[str]:
    """The words of a command.

    Raises:
        ConfigError: it is empty, or a quotation is not closed.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"--remote-shell is {text!r}: {error}") from None
    if not words:
        raise ConfigError("--remote-shell is empty: it must be a command, such as ssh")
    return words


def main() -> int:
    parser = make_parser()
    options = parser.parse_intermixed_args()
    try:
        plan = make_plan(options)
        if options.dry_run:
            commands = plan.torchrun("ADDRESS", 0, "RUN").items()
            write_out("\n".join(shlex.join([*plan.shell, host, command]) for host, command in commands))
            return 0
        if options.check:
            plan = without_bad_hosts(plan)
        return run(plan)
    except ConfigError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return ExitStatus.INTERRUPTED


def without_bad_hosts(plan: Plan) -> Plan:
    """The plan without the hosts that a node check finds bad.

    Raises:
        ConfigError: a host is bad and `--check` is `stop`, no host is left, or the config does not fit those left.
    """
    while bad := check(plan):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in bad.items())
        if plan.options.check == "stop":
            raise ConfigError(f"bad hosts: {reasons}")
        hosts = [host for host in plan.hosts if host.address not in bad]
        if not hosts:
            raise ConfigError(f"all hosts are bad: {reasons}")
        print(one_line(f"excluded: {reasons}"), flush=True)
        load(plan.options.config, plan.options.overrides, plan.ranks * len(hosts))
        plan = Plan(hosts, plan.ranks, plan.options)
    return plan


def check(plan: Plan) -> dict[str, str]:
    """The bad hosts with the reasons."""
    try:
        address, port = plan.rendezvous()
    except ConfigError as error:
        return {plan.hosts[0].address: str(error)}
    commands = RemoteCommands(plan.shell, plan.check(address, port), len(plan.hosts), reporting=True)
    commands.wait()
    reports = [line for line in commands.lines[plan.hosts[0].name] if line.startswith("{")]
    bad = bad_in(reports[-1]) if reports else None
    return {plan.hosts[0].address: "its node check printed no report"} if bad is None else bad


def run(plan: Plan) -> int:
    """Train; returns the exit status."""
    if plan.options.min_hosts is None:
        plan.require_reachable()
    commands = plan.torchrun(*plan.rendezvous(), uuid.uuid4().hex)
    received, requests = list[int](), Requests()

    def handle(number: int, _: object) -> None:
        received.append(number)
        requests.more()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # under nohup, closing the terminal must not stop the run
            signal.signal(number, handle)
    status = RemoteCommands(plan.shell, commands, plan.options.min_hosts or len(plan.hosts)).wait(requests)
    return ExitStatus.INTERRUPTED if status == ExitStatus.STOPPED and signal.SIGINT in received else status


if __name__ == "__main__":
    sys.exit(main())
