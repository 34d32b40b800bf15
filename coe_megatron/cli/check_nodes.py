"""Checks nodes before a run: devices, memory, disk, clocks, and bandwidth and latency between nodes.

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

EPILOG = """One process per node takes part; if a node has several processes, all but the first exit at once. The names
of the nodes come from srun's or torchrun's variables, or, without srun and torchrun, from --nodes and --name. The
rendezvous is on the first node.

A node is bad if it does not answer, if free memory, free disk space or its clock is beyond a limit, if --output cannot
be written, if its devices differ from those of most nodes, or if it is slow even with the faster of its two neighbours
in the list (with only two nodes, the check cannot tell which one is slow, so give --bandwidth). --report contains
{"nodes": {NAME: {...}}, "bad": {NAME: REASON}, "all_nodes": {...}}. Bandwidths are in GB/s (1e9 bytes). For an
all-to-all they count the bytes that leave a node, (N - 1) / N of a message with N nodes; for an all-reduce, twice that.
"latency" is the seconds that an all-to-all of a few bytes takes. `parallel.network` of a run names the report.

exit status: 0 all nodes are good, 1 at least one is bad (on other nodes than the first: the first does not answer),
2 an invalid argument."""
LIMITS = {
    "timeout": "seconds for each part of the check",
    "memory": "GiB of host memory that must be free",
    "device-memory": "GiB that must be free on every device",
    "disk": "GiB that must be free in the output folder",
    "skew": "largest difference in seconds between a node's clock and the first node's",
    "slow": "how many times slower than the median node a node may be",
    "bandwidth": "GB/s that every node must reach",
}
_PORT = 29477
_LARGEST_LIMIT, _ABOVE_0 = 1e6, ("timeout", "slow")
_MAX_TIMEOUTS = 20  # times --timeout: then the process exits even if something hangs in spite of all timeouts


def make_parser() -> Parser:
    parser = Parser(prog=program_name("coe-check-nodes", "check_nodes.py"), description=__doc__, epilog=EPILOG)
    parser.add_argument("--output", type=user_path, required=True, metavar="DIR", help="the run's output folder")
    parser.add_argument("--report", type=user_path, metavar="FILE", help="JSON report, written by the first node")
    parser.add_argument("--json", action="store_true", help="print the report as one line of JSON after the table")
    parser.add_argument(
        "--nodes", metavar="A,B,...", help="the names of all nodes (default: from srun's or torchrun's variables)"
    )
    parser.add_argument("--name", help="the name of this node, one of --nodes")
    rendezvous = f"the first node and a free port there (default: torchrun's rendezvous, else its name and {_PORT})"
    parser.add_argument("--rendezvous", metavar="ADDRESS:PORT", help=rendezvous)
    for name, about in LIMITS.items():
        parser.add_argument(f"--{name}", type=above_0 if name in _ABOVE_0 else limit, metavar="NUMBER", help=about)
    return parser


def limit(text: str) -> float:
    """A number from 0 to the longest time that a clock can wait for."""
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= _LARGEST_LIMIT:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number from 0 to {_LARGEST_LIMIT:g}")
    return value


def above_0(text: str) -> float:
    """A `limit` that is not 0."""
    if (value := limit(text)) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be above 0")
    return value


def names_and_index(nodes: str | None, name: str | None, environment: Mapping[str, str]) -> tuple[tuple[str, ...], int]:
    """The names of all nodes and the index of this one: from the options, else from SLURM's or torchrun's variables.

    Raises:
        ConfigError: these are missing, incomplete or contradictory.
    """
    names = () if nodes is None else tuple(nodes.split(","))
    if not all(name.strip() for name in names):
        raise ConfigError(f"--nodes is {nodes!r}: it must be names separated by commas")
    if len(set(names)) < len(names):
        raise ConfigError(f"--nodes is {nodes}: a name is given twice; name each node once")
    if name is not None:
        if name not in names:
            raise ConfigError(f"--name is {name}: it must be one of --nodes, {nodes}")
        return names, names.index(name)
    if "SLURM_NODEID" in environment:
        names = names or _slurm_nodes(environment)
        index, count = whole_number("SLURM_NODEID", environment["SLURM_NODEID"], 0, MOST_RANKS), len(names)
    elif "GROUP_RANK" in environment:
        if "GROUP_WORLD_SIZE" not in environment:
            raise ConfigError("GROUP_RANK is set, but GROUP_WORLD_SIZE is not: torchrun sets both")
        index = whole_number("GROUP_RANK", environment["GROUP_RANK"], 0, MOST_RANKS)
        count = whole_number("GROUP_WORLD_SIZE", environment["GROUP_WORLD_SIZE"], 1, MOST_RANKS)
        names = names or tuple(f"node-{number}" for number in range(count))
    else:
        raise ConfigError("--name is missing: without srun and torchrun, give --nodes and --name")
    if not index < len(names) == count:
        given = f"--nodes is {nodes}" if nodes else "the environment names " + (",".join(names) or "no node")
        raise ConfigError(f"{given}: it must name all nodes; this node has index {index}, counted from 0")
    return names, index


def _slurm_nodes(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The nodes of SLURM's list: node[1-3] becomes node1, node2, node3."""
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


def rendezvous_address(given: str | None, first: str, environment: Mapping[str, str]) -> tuple[str, int, bool]:
    """Address and port of the rendezvous, and whether torchrun's agent hosts its store.

    Args:
        given: ADDRESS:PORT; None takes torchrun's, else the default port of the node `first`.

    Raises:
        ConfigError: they are invalid.
    """
    if given is None:
        env = DistributedEnv.from_environment(environment)
        return (env.master_addr, env.master_port, env.agent_store) if env.master_addr else (first, _PORT, False)
    address, _, port = given.rpartition(":")
    try:
        number = whole_number("the port", port, 1, LARGEST_PORT)
    except ConfigError:
        number = 0
    if not (address and number):
        raise ConfigError(f"--rendezvous is {given}: it must be ADDRESS:PORT, with a port from 1 to {LARGEST_PORT}")
    return address, number, False


def use_interface(names: tuple[str, ...], index: int, address: str) -> None:
    """Make gloo and NCCL use the interface of the route to the first node; on the first node, to any other."""
    for other in (address,) if index else names[1:]:
        with suppress(ConfigError):
            network.use_interface_towards(other, os.environ)
            return


def exit_now(status: int, message: str = "") -> Never:
    """Exit without waiting for threads that hang in a dead file system or a network library."""
    print(message, end="\n" if message else "", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main() -> int:
    parser = make_parser()
    options = parser.parse_args()
    given = {field: getattr(options, field.replace("-", "_")) for field in LIMITS}
    try:
        local = next((name for name in ("LOCAL_RANK", "SLURM_LOCALID") if name in os.environ), None)
        if local is not None and whole_number(local, os.environ[local], 0, MOST_RANKS) != 0:
            return 0
        names, index = names_and_index(options.nodes, options.name, os.environ)
        address, port, agent_store = rendezvous_address(options.rendezvous, names[0], os.environ)
        if options.report and index == 0:
            require_folder(options.report.parent, "the folder of --report")
            require_replaceable(options.report, "--report")
    except ConfigError as error:
        parser.error(str(error))
    use_interface(names, index, address)
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"  # a collective that hangs raises an error
    from coe_megatron.launcher.node_check import Limits, NodeEnv, check  # torch takes seconds

    limits = Limits(**{name.replace("-", "_"): value for name, value in given.items() if value is not None})
    deadline = _MAX_TIMEOUTS * limits.timeout
    late = f"{parser.prog}: {names[index]}: the check did not finish within {deadline:g} s"
    threading.Timer(deadline, exit_now, args=(1, late)).start()
    try:
        report = check(NodeEnv(index, names, address, port, agent_store), options.output, limits)
    except TimeoutError as error:
        exit_now(1, f"{parser.prog}: {names[index]}: {error}")
    if report is None:
        exit_now(0)
    if options.report:
        try:
            write_atomically(options.report, json.dumps(report.as_dict(), indent=2))
        except OSError as error:
            exit_now(1, f"{parser.prog}: error: {problem(options.report, '--report', error)}")
    try:
        write_out(report.table())
        if options.json:
            write_out(json.dumps(report.as_dict()))
    except SystemExit:
        exit_now(1)
    exit_now(1 if report.bad else 0)


if __name__ == "__main__":
    sys.exit(main())
