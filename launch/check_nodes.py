"""Looks at nodes before a run: devices, memory, disk, clocks, and how fast they talk to each other.

srun --ntasks-per-node 1 python launch/check_nodes.py --output runs/mine --report check.json
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Never

from coe_megatron.cluster import network
from coe_megatron.config.arguments import Parser

EPILOG = """One process a node takes part; of several on a node all but the first end at once. Who is who comes from
srun's or torchrun's variables, or, when they are started in another way, from --nodes and --name. They meet at the
first node.

A node is bad when it does not answer, when memory, disk or clock are beyond a limit, when --output cannot be written,
when it has other devices than most, or when it talks slowly even with the better of its two neighbours in the list
(beyond two nodes; of two the slow one cannot be told, so give --bandwidth). --report has {"nodes": {NAME: {...}},
"bad": {NAME: REASON}, "together": {...}}, with GB/s of 1e9 bytes: all-to-all by what leaves a node, all-reduce by twice
the message's part that does.

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
AT_MOST = 20  # times --timeout: then a process that hangs in spite of all time limits is ended


def parser() -> Parser:
    made = Parser(prog="check_nodes.py", description=__doc__, epilog=EPILOG)
    made.add_argument("--output", type=Path, required=True, metavar="DIR", help="the run's folder, to be written to")
    made.add_argument("--report", type=Path, metavar="FILE", help="what was found, as JSON, written by the first node")
    made.add_argument("--json", action="store_true", help="print the report as JSON in one line after the table")
    made.add_argument(
        "--nodes", metavar="A,B,...", help="the names of all nodes (default: as srun or torchrun have it)"
    )
    made.add_argument("--name", help="which of --nodes this is")
    meet = f"a free port of the first node (default: its name and {_PORT}; under torchrun its own)"
    made.add_argument("--meet", metavar="ADDRESS:PORT", help=meet)
    for name, about in LIMITS.items():
        made.add_argument(f"--{name}", type=float, metavar="NUMBER", help=about)
    return made


def names_and_index(nodes: str | None, name: str | None, environment: Mapping[str, str]) -> tuple[tuple[str, ...], int]:
    """All nodes' names and which one this is: as said, else as SLURM or torchrun have it.

    Raises:
        ValueError: they do not say it.
    """
    names = tuple(nodes.split(",")) if nodes else ()
    if len(set(names)) < len(names):
        raise ValueError(f"--nodes is {nodes}: a name stands there twice")
    if name is not None:
        if name not in names:
            raise ValueError(f"--name is {name}: it must be one of --nodes, {nodes}")
        return names, names.index(name)
    if "SLURM_NODEID" in environment:
        names = names or _expanded(environment.get("SLURM_STEP_NODELIST", environment["SLURM_JOB_NODELIST"]))
        index, count = int(environment["SLURM_NODEID"]), len(names)
    elif "GROUP_RANK" in environment:
        index, count = int(environment["GROUP_RANK"]), int(environment["GROUP_WORLD_SIZE"])
        names = names or tuple(f"node-{number}" for number in range(count))
    else:
        raise ValueError("--name is missing: without srun and torchrun, --nodes and --name say which node this is")
    if not index < len(names) == count:
        raise ValueError(f"--nodes is {nodes}: it must name all nodes, of which this is number {index}")
    return names, index


def _expanded(nodes: str) -> tuple[str, ...]:
    """node[1-3] as SLURM writes it -> node1, node2, node3."""
    done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    return tuple(done.stdout.split())


def meeting(said: str | None, first: str, environment: Mapping[str, str]) -> tuple[str, int]:
    """Address and port; ValueError if they are none."""
    if said is None and "TORCHELASTIC_RUN_ID" in environment:
        return environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    if said is None:
        return first, _PORT
    address, _, port = said.rpartition(":")
    if not address or not port.isdecimal():
        raise ValueError(f"--meet is {said}: it must be ADDRESS:PORT")
    return address, int(port)


def use_interface(names: tuple[str, ...], index: int, address: str) -> None:
    """Let gloo and NCCL talk through the interface that leads to the first node (of that, to any other)."""
    for other in (address,) if index else names[1:]:
        with suppress(ValueError):
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
    if os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) != "0":
        return 0
    chosen = {field: getattr(options, field.replace("-", "_")) for field in LIMITS}
    try:
        names, index = names_and_index(options.nodes, options.name, os.environ)
        address, port = meeting(options.meet, names[0], os.environ)
        if options.report and not options.report.parent.is_dir():
            raise ValueError(f"--report is {options.report}: there is no folder {options.report.parent}")
    except ValueError as error:
        program.error(str(error))
    use_interface(names, index, address)
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"  # so that a collective that does not end raises
    from coe_megatron.cluster.node_check import Limits, Place, check  # torch takes seconds

    limits = Limits(**{name.replace("-", "_"): value for name, value in chosen.items() if value is not None})
    served = options.meet is None and "TORCHELASTIC_RUN_ID" in os.environ
    last = f"{program.prog}: {names[index]}: no end after {AT_MOST * limits.timeout:g} s"
    threading.Timer(AT_MOST * limits.timeout, leave, args=(1, last)).start()
    try:
        report = check(Place(index, names, address, port, served), options.output, limits)
    except TimeoutError as error:
        leave(1, f"{program.prog}: {names[index]}: {error}")
    if report is None:
        leave(0)
    if options.report:
        options.report.write_text(json.dumps(report.as_dict(), indent=2))
    print(report.table(), flush=True)
    if options.json:
        print(json.dumps(report.as_dict()), flush=True)
    leave(1 if report.bad else 0)


if __name__ == "__main__":
    sys.exit(main())
