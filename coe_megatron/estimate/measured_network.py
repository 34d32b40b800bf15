"""What the node check (`launch/check_nodes.py --report`) measured of the network between nodes."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from coe_megatron.errors import ConfigError
from coe_megatron.estimate.machine import Link, Machine, Way, machine_of_device
from coe_megatron.files import problem, read_limited
from coe_megatron.parsing import JSON_BYTES, first_of, parse_json
from coe_megatron.text import duration

_SETTING = "parallel.network"


@dataclass(frozen=True)
class Speeds:
    """Measured over all good nodes, with one process on each.

    Attributes:
        bandwidth: bytes per second that leave a node in an all-to-all.
        latency: seconds of an all-to-all of a few bytes.
    """

    bandwidth: float
    latency: float

    def __str__(self) -> str:
        return f"{self.bandwidth / 1e9:.3g} GB/s and {duration(self.latency)}"


@dataclass(frozen=True)
class MeasuredNetwork:
    """A report of the node check.

    Attributes:
        report: its path.
        device: a node's first device, as the check names it: CUDA's name, or `cpu, N cores`; empty if unknown.
        speeds: None if it measured no network: there is one good node only, or a measurement failed.
    """

    report: str
    device: str
    speeds: Speeds | None

    @property
    def name(self) -> str:
        """The name of the report's file."""
        return Path(self.report).name

    @cached_property
    def machine(self) -> Machine | None:
        """The packaged machine with these devices, and what was measured between its nodes; None without either.

        If the nodes have GPUs, each is assumed to have a network adapter as fast as that of the check's process;
        otherwise the ranks of a node share what was measured. A ring goes from node to node, with a latency for each.
        """
        found = machine_of_device(self.device)
        if found is None or self.speeds is None:
            return None
        start, bandwidth = self.speeds.latency, self.speeds.bandwidth
        way, ring = Way(start, 0.0, bandwidth), Way(start, start, bandwidth)
        adapters = found.ranks_per_node if found.cores is None else 1
        return replace(found, across=Link(all_to_all=way, ring=ring, point_to_point=way), adapters=adapters)


class _Strict(BaseModel):
    """Converts no types; other keys are not checked."""

    model_config = ConfigDict(strict=True, extra="allow")


class _Speeds(_Strict):
    all_to_all: Annotated[float, Field(ge=1e-9, le=1e9)]  # GB/s
    latency: Annotated[float, Field(ge=0, le=1e6)]


class _Node(_Strict):
    devices: list[Annotated[str, Field(max_length=1000)]] = []


class _Report(_Strict):
    nodes: dict[str, _Node]
    bad: dict[str, str]
    all_nodes: dict[str, Any]


def read_network(path: str) -> MeasuredNetwork:
    """Read the report that `parallel.network` names.

    Raises:
        ConfigError: it cannot be read, or is not a report with bandwidth and latency; one line.
    """
    try:
        report = _Report.model_validate(parse_json(read_limited(Path(path), _SETTING, JSON_BYTES)))
        speeds = _Speeds.model_validate(report.all_nodes) if report.all_nodes else None
    except ValidationError as error:
        reason = f"it is not a report of this version's launch/check_nodes.py: {first_of(error)}"
        raise problem(path, _SETTING, reason) from None
    except ConfigError:
        raise
    except ValueError as error:
        raise problem(path, _SETTING, f"not valid JSON ({error})") from None
    devices = (node.devices[0] for name, node in report.nodes.items() if name not in report.bad and node.devices)
    measured = None if speeds is None else Speeds(speeds.all_to_all * 1e9, speeds.latency)
    return MeasuredNetwork(path, next(devices, ""), measured)
