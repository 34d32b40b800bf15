"""Looks at nodes before a run: devices, memory, disk, clocks, and how fast they talk to each other.

srun --ntasks-per-node 1 python launch/check_nodes.py --output runs/mine --report check.json
"""

import argparse
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Never

from coe_megatron.cli.arguments import Parser, program_name, write_out
from coe_megatron.distributed.environment import LARGEST_PORT, MOST_RANKS, DistributedEnv, whole_number
from coe_megatron.errors import ConfigError
from coe_megatron.files import problem, require_folder, require_replaceable, user_path, write_atomically
from coe_megatron.launcher import network

EPILOG = """One process a node takes part; of several on a node all but the first end at once. Who is who comes from
srun's or torchrun's variables, or, when they are started in another way, from --nodes and --name. They meet at the
first node.

A node is bad when it does not answer, when memory, disk or clock are beyond a limit, when --output cannot be written,
when it has other devices than most, or when it talks slowly even with the better of its two neighbours in the list
(with only two nodes, the check cannot tell which one is slow, so give --bandwidth). --report has
{"nodes": {NAME: {...}}, "bad": {NAME: REASON}, "all_nodes": {...}}, with GB/s of 1e9 bytes: all-to-all by what leaves a
node, all-reduce by twice the message's part that does.

exit status: 0 all nodes are good, 1 at least one is bad (at nodes but the first: the first does not answer), 2 a bad
argument."""
LIMITS = {
    "timeout": "seconds for each part of the check",
    "memory": "GiB of host memory that must be free",
    "device-memory": "GiB that must be free on every device",
    "disk": "GiB that must be free for the output folder",
    "skew": "seconds that a clock may differ from the first node's",
    "slow": "times slower than the median node that a node may be",
    "bandwidth": "GB/s that every node must reach",
}
_PORT = 29477
_LARGEST_LIMIT, _ABOVE_0 = 1e6, ("timeout", "slow")
AT_MOST = 20  # times --timeout: then a process that hangs in spite of all time limits is ended


def parser() -> Parser:
    made = Parser(prog=program_name("coe-check-nodes", "check_nodes.py"), description=__doc__, epilog=EPILOG)
    made.add_argument(
        "--output", type=user_path, required=True, metavar="DIR", help="the run's folder, to be written to"
    )
    made.add_argument(
        "--report", type=user_path, metavar="FILE", help="what was found, as JSON, written by the first node"
    )
    made.add_argument("--json", action="store_true", help="print the report as JSON in one line after the table")
    made.add_argument(
        "--nodes", metavar="A,B,...", help="the names of all nodes (default: as srun or torchrun have it)"
    )
    made.add_argument("--name", help="which of --nodes this is")
    meet = f"a free port of the first node (default: its name and {_PORT}; under torchrun its own)"
    made.add_argument("--meet", metavar="ADDRESS:PORT", help=meet)
    for name, about in LIMITS.items():
        made.add_argument(f"--{name}", type=above_0 if name in _ABOVE_0 else limit, metavar="NUMBER", help=about)
    return made


def limit(text: str) -> float:
    """A number of at least 0, and not beyond what a clock can wait for."""
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= _LARGEST_LIMIT:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number from 0 to {_LARGEST_LIMIT:g}")
    return value


def above_0(text: str) -> float:
    """The same, without 0."""
    if (value := limit(text)) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be above 0")
    return value


def names_and_index(nodes: str | None, name: str | None, environment: Mapping[str, str]) -> tuple[tuple[str, ...], int]:
    """All nodes' names and which one this is: as said, else as SLURM or torchrun have it.

    Raises:
        ConfigError: they do not say it, or not as a whole.
    """
    names = () if nodes is None else tuple(nodes.split(","))
    if not all(name.strip() for name in names):
        raise ConfigError(f"--nodes is {nodes!r}: it must be names by comma")
    if len(set(names)) < len(names):
        raise ConfigError(f"--nodes is {nodes}: a name stands there twice")
    if name is not None:
        if name not in names:
            raise ConfigError(f"--name is {name}: it must be one of --nodes, {nodes}")
        return names, names.index(name)
    if "SLURM_NODEID" in environment:
        names = names or _expanded(environment)
        index, count = whole_number("SLURM_NODEID", environment["SLURM_NODEID"], 0, MOST_RANKS), len(names)
    elif "GROUP_RANK" in environment:
        if "GROUP_WORLD_SIZE" not in environment:
            raise ConfigError("GROUP_RANK is set, but GROUP_WORLD_SIZE is not: torchrun sets both")
        index = whole_number("GROUP_RANK", environment["GROUP_RANK"], 0, MOST_RANKS)
        count = whole_number("GROUP_WORLD_SIZE", environment["GROUP_WORLD_SIZE"], 1, MOST_RANKS)
        names = names or tuple(f"node-{number}" for number in range(count))
    else:
        raise ConfigError("--name is missing: without srun and torchrun, --nodes and --name say which node this is")
    if not index < len(names) == count:
        said = f"--nodes is {nodes}" if nodes else "the environment names " + (",".join(names) or "no node")
        raise ConfigError(f"{said}: all nodes must be named, and this is number {index} counted from 0")
    return names, index


def _expanded(environment: Mapping[str, str]) -> tuple[str, ...]:
    """node[1-3] as SLURM writes it -> node1, node2, node3."""
    name = "SLURM_STEP_NODELIST" if "SLURM_STEP_NODELIST" in environment else "SLURM_JOB_NODELIST"
    nodes = environment.get(name, "")
    if not nodes:
        raise ConfigError(f"SLURM_NODEID is set, but {name} is not: srun sets both")
    try:
        done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"{name} is {nodes}: scontrol does not answer ({error}); give --nodes and --name") from None
    if done.returncode != 0 or not done.stdout.split():
        raise ConfigError(f"{name} is {nodes}: scontrol knows no such nodes; give --nodes and --name")
    return tuple(done.stdout.split())


def meeting(said: str | None, first: str, environment: Mapping[str, str]) -> tuple[str, int, bool]:
    """Address and port, and whether torchrun serves a store there; ConfigError if they are none."""
    if said is None:
        env = DistributedEnv.from_environment(environment)
        return (env.master_addr, env.master_port, env.agent_store) if env.master_addr else (first, _PORT, False)
    address, _, port = said.rpartition(":")
    try:
        number = whole_number("the port", port, 1, LARGEST_PORT)
    except ConfigError:
        number = 0
    if not (address and number):
        raise ConfigError(f"--meet is {said}: it must be ADDRESS:PORT, with a port from 1 to {LARGEST_PORT}")
    return address, number, False


def use_interface(names: tuple[str, ...], index: int, address: str) -> None:
    """Let gloo and NCCL talk through the interface that leads to the first node (of that, to any other)."""
    for other in (address,) if index else names[1:]:
        with suppress(ConfigError):
            network.use_interface_towards(other, os.environ)
            return


def leave(status: int, message: str = "") -> Never:
    """End without waiting for threads that hang in a dead file system, or in a network library."""
    print(message, end="\n" if message else "", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main() -> int:
    program = parser()
    options = program.parse_args()
    chosen = {field: getattr(options, field.replace("-", "_")) for field in LIMITS}
    try:
        local = next((name for name in ("LOCAL_RANK", "SLURM_LOCALID") if name in os.environ), None)
        if local is not None and whole_number(local, os.environ[local], 0, MOST_RANKS) != 0:
            return 0
        names, index = names_and_index(options.nodes, options.name, os.environ)
        address, port, served = meeting(options.meet, names[0], os.environ)
        if options.report and index == 0:
            require_folder(options.report.parent, "the folder of --report")
            require_replaceable(options.report, "--report")
    except ConfigError as error:
        program.error(str(error))
    use_interface(names, index, address)
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"  # so that a collective that does not end raises
    from coe_megatron.launcher.node_check import Limits, NodeEnv, check  # torch takes seconds

    limits = Limits(**{name.replace("-", "_"): value for name, value in chosen.items() if value is not None})
    last = f"{program.prog}: {names[index]}: no end after {AT_MOST * limits.timeout:g} s"
    threading.Timer(AT_MOST * limits.timeout, leave, args=(1, last)).start()
    try:
        report = check(NodeEnv(index, names, address, port, served), options.output, limits)
    except TimeoutError as error:
        leave(1, f"{program.prog}: {names[index]}: {error}")
    if report is None:
        leave(0)
    if options.report:
        try:
            write_atomically(options.report, json.dumps(report.as_dict(), indent=2))
        except OSError as error:
            leave(1, f"{program.prog}: error: {problem(options.report, '--report', error)}")
    try:
        write_out(report.table())
        if options.json:
            write_out(json.dumps(report.as_dict()))
    except SystemExit:
        leave(1)
    leave(1 if report.bad else 0)


if __name__ == "__main__":
    sys.exit(main())
