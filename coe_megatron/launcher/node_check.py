"""Checks nodes before a run: devices, memory, disk, clock, bandwidth and latency to other nodes. Imports torch.

One process per node takes part. The first node coordinates: all nodes connect to its store, and it collects what each
node reports. Then pairs of neighbours, and finally all good nodes, time an all-to-all and an all-reduce. Every wait has
a timeout, so a node that does not answer is reported and does not block the check.

Pairs show which node is slow: neighbours form a ring, so each node has two partners and counts with the faster one. A
slow cable therefore affects the result of its own node only. With only two nodes, the check cannot tell which one is
slow.
"""

import json
import os
import platform
import shutil
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import torch
import torch.distributed as dist

from coe_megatron.distributed.rendezvous import LOOPBACK, connect_store, serve_store
from coe_megatron.text import aligned, duration

GIB = 2**30
_MIN_MESSAGE, _MAX_MESSAGE = 2**18, 2**28  # bytes: doubled until a message takes long enough to be timed
_MIN_SECONDS, _MIN_LATENCIES = 0.05, 10  # so that latency and the start of a connection hardly count
_REPETITIONS = 3
_SMALL, _IN_A_ROW = 8, 10  # bytes to each member, and all-to-alls one after the other, to measure the latency
_WRITTEN = b"coe" * 2**20
_CLOCK_ROUNDS = 5
_MAX_TASKS_AHEAD = 10  # the first node may be busy with others for the time of so many tasks
_NO_ANSWER = "does not answer"


@dataclass(frozen=True)
class NodeEnv:
    """Index of this node, names of all nodes, and the address of their store.

    Attributes:
        agent_store: whether torchrun's agent hosts the store; otherwise the first node does.
    """

    index: int
    names: tuple[str, ...]
    address: str
    port: int
    agent_store: bool = False

    @property
    def name(self) -> str:
        return self.names[self.index]

    @property
    def is_first(self) -> bool:
        return self.index == 0


@dataclass(frozen=True)
class Limits:
    """Thresholds beyond which a node is bad."""

    timeout: float = 60  # seconds for each part of the check
    memory: float = 1  # GiB of free host memory
    device_memory: float = 1  # GiB of free memory on each device
    disk: float = 1  # GiB of free disk space in the output folder
    skew: float = 1  # seconds between its clock and that of the first node
    slow: float = 4  # times slower than the median node
    bandwidth: float = 0  # GB/s


@dataclass
class Node:
    """The measurements of a node; bandwidths in GB/s (1e9 bytes) and latency are of its faster pair; None: unknown."""

    host: str = ""
    devices: list[str] = field(default_factory=list)
    memory: int | None = None  # bytes of free host memory
    device_memory: int | None = None  # bytes free on the device with the least
    disk: int | None = None  # bytes free in the output folder
    skew: float | None = None  # seconds by which its clock is ahead of that of the first node
    all_reduce: float | None = None
    all_to_all: float | None = None
    latency: float | None = None  # seconds of an all-to-all of a few bytes
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """All nodes by name, the bad ones with the reason, and bandwidths (GB/s) and latency (s) over all good nodes."""

    nodes: dict[str, Node]
    bad: dict[str, str]
    all_nodes: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    def table(self) -> str:
        """A text table: a line per node, one for all good nodes, and one per bad node."""
        head = ("node", "devices", "memory", "on device", "disk", "clock", "all-to-all", "all-reduce", "latency")
        lines = aligned([head, *(_cells(name, node) for name, node in self.nodes.items())], "<<>")
        if self.all_nodes:
            lines.append(f"all good nodes: {_as_text(self.all_nodes)}")
        return "\n".join(lines + [f"bad: {name}: {reason}" for name, reason in self.bad.items()])


def _cells(name: str, node: Node) -> list[str]:
    devices = _count(tuple(node.devices))
    sizes = ["-" if size is None else f"{size / GIB:.1f} GiB" for size in (node.memory, node.device_memory, node.disk)]
    skew = "-" if node.skew is None else f"{node.skew * 1000:+.1f} ms"
    speeds = ["-" if speed is None else f"{speed:.3g} GB/s" for speed in (node.all_to_all, node.all_reduce)]
    return [name, devices, *sizes, skew, *speeds, "-" if node.latency is None else duration(node.latency)]


def _as_text(speeds: dict[str, float]) -> str:
    bandwidths = f"all-to-all {speeds['all_to_all']:.3g} GB/s, all-reduce {speeds['all_reduce']:.3g} GB/s"
    return f"{bandwidths}, latency {duration(speeds['latency'])}"


def check(env: NodeEnv, output: Path, limits: Limits) -> Report | None:
    """Take part in the check; returns the report on the first node, None on others.

    Raises:
        TimeoutError: the first node does not answer.
    """
    own = _within(limits.timeout, lambda: inspect_node(output, limits))
    store = _rendezvous(env, limits)
    try:
        store.set(f"node/{env.index}", json.dumps(asdict(own)))
        if env.is_first:
            return _Coordinator(env, store, limits).report()
        _Worker(env, store, limits).follow()
        return None
    except (dist.DistError, TimeoutError) as error:
        raise TimeoutError(f"{env.names[0]}, which hosts the store, does not answer any more") from error


def inspect_node(output: Path, limits: Limits) -> Node:
    """Measure devices, memory and disk, and check that the output folder can be written and read."""
    node = Node(host=platform.node(), memory=psutil.virtual_memory().available)
    with _recorded(node, "devices"):
        _check_devices(node)
    with _recorded(node, f"output folder {output}"):
        output.mkdir(parents=True, exist_ok=True)
        node.disk = shutil.disk_usage(output).free
        _write_and_read(output)
    for kind, free, least in (
        ("host memory", node.memory, limits.memory),
        ("device memory", node.device_memory, limits.device_memory),
        (f"disk for {output}", node.disk, limits.disk),
    ):
        if free is not None and free < least * GIB:
            node.problems.append(f"{kind}: {free / GIB:.1f} GiB are free, {least:g} are needed")
    return node


class _recorded(suppress):
    """Records an error in the block as a problem of the node."""

    def __init__(self, node: Node, what: str) -> None:
        super().__init__(OSError, RuntimeError, ValueError)
        self.node, self.what = node, what

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        caught = bool(super().__exit__(kind, error, trace))
        if caught:
            self.node.problems.append(f"{self.what}: {getattr(error, 'strerror', None) or str(error).splitlines()[0]}")
        return caught


def _check_devices(node: Node) -> None:
    """Each device must allocate memory and compute a sum correctly."""
    for index in range(torch.cuda.device_count()):
        node.devices.append(torch.cuda.get_device_name(index))
        free = torch.cuda.mem_get_info(index)[0]
        node.device_memory = free if node.device_memory is None else min(free, node.device_memory)
        if torch.ones(2**20, device=f"cuda:{index}").sum().item() != 2**20:
            raise ValueError(f"device {index} computes a wrong sum")
    if not node.devices:
        node.devices = [f"cpu, {len(os.sched_getaffinity(0))} cores"]


def _write_and_read(folder: Path) -> None:
    file = folder / f".node-check-{uuid4().hex}"
    try:
        with file.open("wb") as out:
            out.write(_WRITTEN)
            out.flush()
            os.fsync(out.fileno())
        if file.read_bytes() != _WRITTEN:
            raise ValueError("the file read back differs from what was written")
    finally:
        file.unlink(missing_ok=True)


def _within(seconds: float, measure: Callable[[], Node]) -> Node:
    """The result of `measure`, or a node with a problem if it takes too long (a dead file server never answers)."""
    found: list[Node] = []
    thread = threading.Thread(target=lambda: found.append(measure()), daemon=True)
    thread.start()
    thread.join(seconds / 2)  # the other half is for reporting it
    return (
        found[0] if found else Node(host=platform.node(), problems=[f"disk or device: no answer in {seconds / 2:g} s"])
    )


def _rendezvous(env: NodeEnv, limits: Limits) -> dist.Store:
    try:
        if env.is_first and not env.agent_store:
            store = serve_store(LOOPBACK if len(env.names) == 1 else env.address, env.port)
        else:
            store = connect_store(env.address, env.port, limits.timeout)
        return dist.PrefixStore("node check", store)
    except (dist.DistError, OSError) as error:
        address = f"{env.names[0]} ({env.address}:{env.port})"
        raise TimeoutError(f"{address}, which hosts the store: {str(error).splitlines()[0]}") from error


def _get(store: dist.Store, key: str, seconds: float) -> Any:
    """The value of a key, once another node sets it.

    Raises:
        TimeoutError: nobody sets it within `seconds`.
    """
    try:
        store.wait([key], timedelta(seconds=max(seconds, 0.001)))
    except dist.DistStoreError as error:
        raise TimeoutError from error
    return json.loads(store.get(key))


class _Worker:
    """A node that performs the tasks that the first node sends."""

    def __init__(self, env: NodeEnv, store: dist.Store, limits: Limits) -> None:
        self.env, self.store, self.limits = env, store, limits

    def follow(self) -> None:
        """Perform tasks until the first node ends the check, or is gone."""
        for number in count():
            task = _get(self.store, f"task/{self.env.index}/{number}", _MAX_TASKS_AHEAD * self.limits.timeout)
            answer = self.do(task)
            self.store.set(f"answer/{self.env.index}/{number}", json.dumps(answer))
            if task["what"] == "end":
                return

    def do(self, task: dict[str, Any]) -> Any:
        if task["what"] == "clock":
            return time.time()
        if task["what"] == "speeds":
            try:
                return self._speeds(task["members"], task["prefix"])
            except RuntimeError as error:
                return {"error": str(error).splitlines()[0]}
        return None

    def _speeds(self, members: list[int], prefix: str) -> dict[str, float]:
        """GB/s and latency between the members; equal on all of them."""
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore(prefix, self.store),
            rank=members.index(self.env.index),
            world_size=len(members),
            timeout=timedelta(seconds=self.limits.timeout / 3),  # a third each to connect, to fail, and to report
        )
        try:
            latency = _latency(device)
            sent = (len(members) - 1) / len(members)  # in an all-to-all this share of a message leaves the node
            return {
                "all_to_all": sent * _bytes_per_second(_all_to_all, device, latency) / 1e9,
                "all_reduce": 2 * sent * _bytes_per_second(dist.all_reduce, device, latency) / 1e9,
                "latency": latency,
            }
        finally:
            dist.destroy_process_group()


def _all_to_all(message: torch.Tensor) -> None:
    parts = message[: message.numel() // dist.get_world_size() * dist.get_world_size()]
    dist.all_to_all_single(torch.empty_like(parts), parts)


def _bytes_per_second(communicate: Callable[[torch.Tensor], Any], device: torch.device, latency: float) -> float:
    """Bandwidth for a message that is doubled until it takes long enough; the best of several, since load varies."""
    size, enough = _MIN_MESSAGE, max(_MIN_SECONDS, _MIN_LATENCIES * latency)
    _seconds(communicate, size, device)  # the first call connects
    while (seconds := _seconds(communicate, size, device)) < enough and size < _MAX_MESSAGE:
        size *= 2
    return size / min(seconds, *(_seconds(communicate, size, device) for _ in range(_REPETITIONS)))


def _latency(device: torch.device) -> float:
    """Seconds of an all-to-all of a few bytes, the best of several, of which the first connects.

    Each is some all-to-alls in a row, since members do not leave a barrier at the same moment.
    """

    def communicate(message: torch.Tensor) -> None:
        for _ in range(_IN_A_ROW):
            _all_to_all(message)

    size = _SMALL * dist.get_world_size()
    return min(_seconds(communicate, size, device) for _ in range(1 + _REPETITIONS)) / _IN_A_ROW


def _seconds(communicate: Callable[[torch.Tensor], Any], size: int, device: torch.device) -> float:
    """Seconds for a message of `size` bytes, on the slowest member."""
    message = torch.zeros(size, dtype=torch.uint8, device=device)
    dist.barrier()
    began = time.perf_counter()
    communicate(message)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = torch.tensor(time.perf_counter() - began, device=device)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds)


class _Coordinator(_Worker):
    """The first node: sends tasks to all nodes including itself, and evaluates the answers."""

    def __init__(self, env: NodeEnv, store: dist.Store, limits: Limits) -> None:
        super().__init__(env, store, limits)
        self.nodes = {name: Node() for name in env.names}
        self.bad: dict[str, str] = {}
        self.tasks_sent = [0] * len(env.names)
        self.all_nodes: dict[str, float] = {}

    def report(self) -> Report:
        self._gather()
        self._compare_devices()
        self._compare_clocks()
        self._compare_speeds(self._good())
        self._time_all_nodes(self._good())
        silent = {name for name, reason in self.bad.items() if reason.startswith(_NO_ANSWER)}
        answering = [index for index, name in enumerate(self.env.names) if name not in silent]
        self._ask({index: {"what": "end"} for index in answering}, seconds=1)
        return Report(self.nodes, self.bad, self.all_nodes)

    def _good(self) -> list[int]:
        return [index for index, name in enumerate(self.env.names) if name not in self.bad]

    def _gather(self) -> None:
        deadline = time.monotonic() + self.limits.timeout
        for index, name in enumerate(self.env.names):
            try:
                self.nodes[name] = node = Node(**_get(self.store, f"node/{index}", deadline - time.monotonic()))
            except TimeoutError:
                self.bad[name] = f"{_NO_ANSWER} within {self.limits.timeout:g} s"
                continue
            if node.problems:
                self.bad[name] = "; ".join(node.problems)

    def _ask(self, tasks: dict[int, dict[str, Any]], seconds: float | None = None) -> dict[int, Any]:
        """Send tasks and collect the answers; a node that does not answer in time is bad."""
        seconds = self.limits.timeout if seconds is None else seconds
        deadline = time.monotonic() + seconds
        for index, task in tasks.items():
            self.store.set(f"task/{index}/{self.tasks_sent[index]}", json.dumps(task))
        answers = {index: self.do(task) for index, task in tasks.items() if index == self.env.index}
        for index, task in tasks.items():
            number = self.tasks_sent[index]
            self.tasks_sent[index] += 1
            if index in answers:
                continue
            try:
                answers[index] = _get(self.store, f"answer/{index}/{number}", deadline - time.monotonic())
            except TimeoutError:
                self.bad[self.env.names[index]] = f"{_NO_ANSWER} ({task['what']}) within {seconds:g} s"
        return answers

    def _compare_devices(self) -> None:
        """A node whose devices differ from those of most nodes is bad; ties go to the first node."""
        devices = [tuple(self.nodes[self.env.names[index]].devices) for index in self._good()]
        for index in self._good():
            name = self.env.names[index]
            most_common = max(devices, key=devices.count)
            if (own := tuple(self.nodes[name].devices)) != most_common:
                self.bad[name] = f"devices are {_count(own)}, but most nodes have {_count(most_common)}"

    def _compare_clocks(self) -> None:
        for index in self._good():
            name = self.env.names[index]
            rounds = [self._clock(index) for _ in range(_CLOCK_ROUNDS) if name not in self.bad]
            if name in self.bad:
                continue
            self.nodes[name].skew = skew = min(rounds)[1]
            if abs(skew) > self.limits.skew:
                ahead = "ahead of" if skew > 0 else "behind"
                self.bad[name] = f"clock: {abs(skew):.1f} s {ahead} {self.env.names[0]}'s"

    def _clock(self, index: int) -> tuple[float, float]:
        """Round-trip seconds, and by how much the node's clock is ahead, assuming equal times in both directions."""
        began = time.time()
        answer = self._ask({index: {"what": "clock"}}).get(index, 0)
        ended = time.time()
        return ended - began, answer - (began + ended) / 2

    def _compare_speeds(self, members: list[int]) -> None:
        """Time all pairs of neighbours on the ring of nodes; each node counts with its faster pair."""
        speeds: dict[int, list[dict[str, float]]] = {index: [] for index in members}
        for number, pairs in enumerate(rounds_of_pairs(members)):
            tasks = {
                index: {"what": "speeds", "members": pair, "prefix": f"pairs/{number}/{pair[0]}"}
                for pair in pairs
                for index in pair
            }
            for index, answer in self._ask(tasks).items():
                if "error" not in answer:
                    speeds[index].append(answer)
        self._evaluate_speeds(
            {index: found for index, found in speeds.items() if self.env.names[index] not in self.bad}
        )

    def _evaluate_speeds(self, speeds: dict[int, list[dict[str, float]]]) -> None:
        if len(speeds) < 2:
            return
        connected = [index for index, found in speeds.items() if found]
        for index in set(speeds) - set(connected) - (set() if connected else {self.env.index}):
            self.bad[self.env.names[index]] = "cannot exchange data with its neighbours, unlike other nodes"
        for what in ("all_to_all", "all_reduce"):
            best = {index: max(speed[what] for speed in speeds[index]) for index in connected}
            median = statistics.median(best.values()) if best else 0
            for index, speed in best.items():
                name = self.env.names[index]
                setattr(self.nodes[name], what, speed)
                if speed < max(median / self.limits.slow, self.limits.bandwidth):
                    reason = f"slow: {what.replace('_', '-')} {speed:.3g} GB/s with its faster neighbour"
                    self.bad.setdefault(name, f"{reason}, the median is {median:.3g} GB/s")
        for index in connected:
            self.nodes[self.env.names[index]].latency = min(speed["latency"] for speed in speeds[index])

    def _time_all_nodes(self, members: list[int]) -> None:
        if len(members) < 2:
            return
        answers = self._ask({i: {"what": "speeds", "members": members, "prefix": "all"} for i in members})
        for index, answer in answers.items():
            if "error" in answer:
                self.bad.setdefault(self.env.names[index], f"all nodes: {answer['error']}")
        if len(answers) == len(members) and not any("error" in answer for answer in answers.values()):
            self.all_nodes = next(iter(answers.values()))


def rounds_of_pairs(members: list[int]) -> list[list[list[int]]]:
    """The pairs of neighbours on a ring of members, in rounds in which each member has at most one partner."""
    if len(members) < 3:
        return [[members]] if len(members) == 2 else []
    ring = [[one, other] for one, other in zip(members, [*members[1:], members[0]], strict=True)]
    if len(ring) % 2 == 0:
        return [ring[0::2], ring[1::2]]
    return [ring[0:-1:2], ring[1::2], ring[-1:]]


def _count(devices: tuple[str, ...]) -> str:
    return ", ".join(f"{devices.count(kind)} x {kind}" for kind in sorted(set(devices))) or "none"
