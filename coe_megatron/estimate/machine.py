"""Machine files: how fast a node computes, moves and sends, measured or from data sheets.

A machine file is YAML; `base` names another one to inherit from. Those in `coe_megatron/machines` are found by their
name alone (`h100`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from math import exp, log
from pathlib import Path
from typing import Annotated

from pydantic import Field

from coe_megatron.config.load import parse_as, plain, read
from coe_megatron.config.settings import Count, Index, NonNegative, Positive
from coe_megatron.errors import ConfigError

_FOLDER = Path(__file__).parents[1] / "machines"


@dataclass(frozen=True)
class Way:
    """One kind of collective on one kind of link.

    Attributes:
        start: seconds of one that sends nothing, between two ranks.
        hop: seconds for each further rank; of a ring across nodes, for each further node.
        bandwidth: bytes per second: inside a node those that a rank sends, or all ranks of a node if they share its
            cores; across nodes those that a network adapter sends.
    """

    start: NonNegative
    hop: NonNegative
    bandwidth: Positive


@dataclass(frozen=True)
class Link:
    """Between the ranks of a node, or between nodes.

    Attributes:
        all_to_all: every rank sends a part to every other one.
        ring: all-reduce, reduce-scatter and all-gather.
        point_to_point: one rank sends to another one.
    """

    all_to_all: Way
    ring: Way
    point_to_point: Way


@dataclass(frozen=True)
class Rates:
    """FLOP/s of matrix products, by rows and width; between two measured shapes by their logarithms.

    Attributes:
        rows: of the left matrix; in grouped products those of one expert.
        widths: of the weights, the geometric mean of their two sizes.
        rates: for each number of rows, the FLOP/s at each width.
    """

    rows: Annotated[list[Positive], Field(min_length=1)]
    widths: Annotated[list[Positive], Field(min_length=1)]
    rates: Annotated[list[list[Positive]], Field(min_length=1)]

    def at(self, rows: float, width: float) -> float:
        """FLOP/s; beyond the measured shapes those of the nearest one, but fewer rows take as long as the fewest."""
        across = [between(self.widths, each, width) for each in self.rates]
        return between(self.rows, across, rows) * min(1.0, rows / self.rows[0])


@dataclass(frozen=True)
class Arithmetic:
    """Matrix products in one precision.

    Attributes:
        peak: FLOP/s of the data sheet, dense; null if unknown.
        products: ordinary products, one rank on a core or device.
        grouped: products of rows sorted by expert with the matrices of several experts.
    """

    peak: Positive | None
    products: Rates
    grouped: Rates


@dataclass(frozen=True)
class Memory:
    """Memory of a device.

    Attributes:
        bytes: bytes that an operation reads and writes.
        rates: bytes per second of elementwise operations of these sizes.
        capacity: bytes available to a run; null if other programs share it.
    """

    bytes: Annotated[list[Positive], Field(min_length=1)]
    rates: Annotated[list[Positive], Field(min_length=1)]
    capacity: Positive | None

    def seconds(self, moved: float, operations: float = 1) -> float:
        """Of moving so many bytes in equal operations."""
        return moved / between(self.bytes, self.rates, moved / operations) if moved else 0.0


@dataclass(frozen=True)
class Host:
    """What the processors of a node do for a rank.

    Attributes:
        operation: seconds to start an operation.
        step: seconds of a step that depend neither on the model nor on the batch: the loop's and the engine's own.
        is_asynchronous: whether the device works meanwhile.
        wait: seconds until the host has a number from the device and the device its next operation.
        transfer: bytes per second between host and device memory.
        update: bytes per second that an optimizer in host memory reads and writes.
    """

    operation: NonNegative
    step: NonNegative
    is_asynchronous: bool
    wait: NonNegative
    transfer: Positive
    update: Positive


@dataclass(frozen=True)
class Disk:
    """The file system of checkpoints, in bytes per second of all nodes together.

    Attributes:
        write, read: bytes per second.
    """

    write: Positive
    read: Positive


@dataclass(frozen=True)
class Failures:
    """How often nodes fail, and what a failure costs, in seconds.

    Attributes:
        between_failures: mean time between failures of one node.
        between_preemptions: mean time between preemptions of the job; null for none.
        notice: until a failure is noticed.
        requeue: until the job starts again, if it has its nodes.
        start: from the start of the processes to the first step, without reading the checkpoint.
        warm_up: what the first steps take longer than others.
        repair: until a node that failed can be used again.
        spare_nodes: nodes beyond those that the run needs.
        elastic: whether the run goes on with fewer nodes if no spare is left, at a speed in proportion.
    """

    between_failures: Positive
    between_preemptions: Positive | None
    notice: NonNegative
    requeue: NonNegative
    start: NonNegative
    warm_up: NonNegative
    repair: NonNegative
    spare_nodes: Index
    elastic: bool


@dataclass(frozen=True)
class Machine:
    """A kind of node, and the network between such nodes.

    Attributes:
        description: one line.
        measured: the date and host of the measurement; null if all numbers are from data sheets or assumed.
        device: part of the device's name in CUDA; `cpu` for processor cores.
        ranks_per_node: devices of a node.
        cores: if ranks share the cores of a node, up to how many ranks all numbers hold: more slow each other down, and
            work hides nothing unless there are fewer; null if each rank has a device of its own.
        adapters: network adapters of a node.
        price: of a device per hour, in any currency; null if unknown.
        bf16, fp32: matrix products.
        memory, host, disk: of a node.
        failures: of nodes, and what they cost.
        inside, across: links inside a node and between nodes; `across` is null if none was measured.
    """

    description: str
    measured: str | None
    device: str
    ranks_per_node: Count
    cores: Positive | None
    adapters: Count
    price: Positive | None
    bf16: Arithmetic
    fp32: Arithmetic
    memory: Memory
    host: Host
    disk: Disk
    failures: Failures
    inside: Link
    across: Link | None

    @cached_property
    def name(self) -> str:
        """Its description, and whether it was measured."""
        return f"{self.description} ({'measured ' + self.measured if self.measured else 'data sheets, not measured'})"

    def slowdown(self, ranks: int) -> float:
        """How many times slower a rank is when so many work on a node, because they share its cores."""
        return max(1.0, ranks / self.cores) if self.cores else 1.0

    def arithmetic(self, precision: str) -> Arithmetic:
        """Of `bf16` or `fp32`."""
        return self.bf16 if precision == "bf16" else self.fp32


def between(places: Sequence[float], values: Sequence[float], place: float) -> float:
    """A value between those at increasing places, linear in logarithms; the nearest one beyond the first and last."""
    if place <= places[0]:
        return values[0]
    for number in range(1, len(places)):
        if place <= places[number]:
            low, high = places[number - 1], places[number]
            part = log(place / low) / log(high / low)
            return exp((1 - part) * log(values[number - 1]) + part * log(values[number]))
    return values[-1]


def machine(name: str) -> Machine:
    """The machine of a file, or of a packaged file by its name alone.

    Raises:
        ConfigError: there is none, or a key, its type or its value is wrong; one line.
    """
    packaged = _FOLDER / f"{name}.yaml"
    is_name = "/" not in name and not name.endswith(".yaml")
    if is_name and not packaged.is_file():
        raise ConfigError(f"{name}: it must be a machine file, or one of {', '.join(machines())}")
    path = packaged if is_name else Path(name)
    found = parse_as(Machine, plain(read(path), str(path)))
    for key, places, values in _lists(found):
        if list(places) != sorted(set(places)):
            raise ConfigError(f"{key} of {path} is {list(places)}: its numbers must increase")
        if len(places) != len(values):
            raise ConfigError(f"{key} of {path} has {len(places)} numbers: there are {len(values)} rates for them")
    return found


def machines() -> list[str]:
    """The names of the packaged machine files."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


@cache
def machine_of_device(name: str) -> Machine | None:
    """The packaged machine with these devices; None if there is none.

    Args:
        name: as CUDA names a device, or `cpu` with anything after it.
    """
    found = [each for each in map(machine, machines()) if name.startswith(each.device) or _is_in_cuda(each, name)]
    return max(found, key=lambda each: len(each.device), default=None)  # the first one has the faster network


def _is_in_cuda(found: Machine, name: str) -> bool:
    return found.cores is None and found.device in name


def _lists(found: Machine) -> list[tuple[str, Sequence[float], Sequence[object]]]:
    lists: list[tuple[str, Sequence[float], Sequence[object]]] = [
        ("memory.bytes", found.memory.bytes, found.memory.rates)
    ]
    for precision in ("bf16", "fp32"):
        for kind in ("products", "grouped"):
            rates: Rates = getattr(getattr(found, precision), kind)
            lists.append((f"{precision}.{kind}.rows", rates.rows, rates.rates))
            lists += [(f"{precision}.{kind}.widths", rates.widths, each) for each in rates.rates]
    return lists
