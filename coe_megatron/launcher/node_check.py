"""A check of nodes before a run: what each has, whether its folder can be written, and how fast it talks to others.

One process a node takes part. The first node leads: all meet at its store, it gathers what each node says of itself,
lets pairs of neighbours and then all good nodes time an all-to-all and an all-reduce, and judges. Every wait has an
end, so a node that does not answer is named and not waited for. Imports torch.

Pairs tell which node is at fault: neighbours form a ring, so that each node has two partners, and it counts with the
faster of the two. A cable that is slow thus shows at its own node alone.
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

from coe_megatron.distributed.rendezvous import LOOPBACK, join, serve
from coe_megatron.text import aligned

GIB = 2**30
_SMALLEST, _LARGEST = 2**18, 2**28  # bytes of a message: doubled until it takes long enough to be timed
_LONG_ENOUGH = 0.05  # seconds
_REPETITIONS = 3
_WRITTEN = b"coe" * 2**20
_CLOCK_ROUNDS = 5
_TASKS_AHEAD = 10  # times the time for one: how long the first node may be busy with others
_NO_ANSWER = "does not answer"


@dataclass(frozen=True)
class Place:
    """This process among the nodes, and where they meet: at the first node, unless others serve a store there."""

    index: int
    names: tuple[str, ...]
    address: str
    port: int
    served: bool = False

    @property
    def name(self) -> str:
        return self.names[self.index]

    @property
    def leads(self) -> bool:
        return self.index == 0


@dataclass(frozen=True)
class Limits:
    """From where on a node is bad."""

    timeout: float = 60  # seconds for each of the parts
    memory: float = 1  # GiB of free host memory
    device_memory: float = 1  # GiB of free memory on each device
    disk: float = 1  # GiB of free disk in the output folder
    skew: float = 1  # seconds between its clock and the first node's
    slow: float = 4  # times slower than the median node
    bandwidth: float = 0  # GB/s


@dataclass
class Node:
    """What is known of a node; bandwidths in GB/s (1e9 bytes), of its faster pair; None is what is not known."""

    host: str = ""
    devices: list[str] = field(default_factory=list)
    memory: int | None = None  # bytes of free host memory
    device_memory: int | None = None  # bytes free on the device that has least
    disk: int | None = None  # bytes free in the output folder
    skew: float | None = None  # seconds that its clock is ahead of the first node's
    all_reduce: float | None = None
    all_to_all: float | None = None
    troubles: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """All nodes by name, the bad ones with the reason, and the bandwidths (GB/s) over all good ones together."""

    nodes: dict[str, Node]
    bad: dict[str, str]
    together: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def table(self) -> str:
        """A line for each node, one for all together, and one for each bad node."""
        head = ("node", "devices", "memory", "on device", "disk", "clock", "all-to-all", "all-reduce")
        lines = aligned([head, *(_cells(name, node) for name, node in self.nodes.items())], "<<>")
        if self.together:
            lines.append(f"all good nodes together: {_both(self.together)}")
        return "\n".join(lines + [f"bad: {name}: {reason}" for name, reason in self.bad.items()])


def _cells(name: str, node: Node) -> list[str]:
    devices = _count(tuple(node.devices))
    sizes = ["-" if size is None else f"{size / GIB:.1f} GiB" for size in (node.memory, node.device_memory, node.disk)]
    skew = "-" if node.skew is None else f"{node.skew * 1000:+.1f} ms"
    speeds = ["-" if speed is None else f"{speed:.3g} GB/s" for speed in (node.all_to_all, node.all_reduce)]
    return [name, devices, *sizes, skew, *speeds]


def _both(speeds: dict[str, float]) -> str:
    return f"all-to-all {speeds['all_to_all']:.3g} GB/s, all-reduce {speeds['all_reduce']:.3g} GB/s"


def check(place: Place, output: Path, limits: Limits) -> Report | None:
    """Take part in the check; the report at the first node, None at others.

    Raises:
        TimeoutError: the first node does not answer.
    """
    own = _within(limits.timeout, lambda: look_at_this_node(output, limits))
    store = _meet(place, limits)
    try:
        store.set(f"node/{place.index}", json.dumps(asdict(own)))
        if place.leads:
            return _Lead(place, store, limits).report()
        _Member(place, store, limits).follow()
        return None
    except (dist.DistError, TimeoutError) as error:
        raise TimeoutError(f"{place.names[0]}, where the nodes meet, does not answer any more") from error


def look_at_this_node(output: Path, limits: Limits) -> Node:
    """Devices, memory, disk, and whether the output folder can be written and read."""
    node = Node(host=platform.node(), memory=psutil.virtual_memory().available)
    with _noted(node, "devices"):
        _look_at_devices(node)
    with _noted(node, f"output folder {output}"):
        output.mkdir(parents=True, exist_ok=True)
        node.disk = shutil.disk_usage(output).free
        _write_and_read(output)
    for kind, free, least in (
        ("host memory", node.memory, limits.memory),
        ("device memory", node.device_memory, limits.device_memory),
        (f"disk for {output}", node.disk, limits.disk),
    ):
        if free is not None and free < least * GIB:
            node.troubles.append(f"{kind}: {free / GIB:.1f} GiB are free, {least:g} are needed")
    return node


class _noted(suppress):
    """An error becomes a trouble of the node."""

    def __init__(self, node: Node, what: str) -> None:
        super().__init__(OSError, RuntimeError, ValueError)
        self.node, self.what = node, what

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        caught = bool(super().__exit__(kind, error, trace))
        if caught:
            self.node.troubles.append(f"{self.what}: {getattr(error, 'strerror', None) or str(error).splitlines()[0]}")
        return caught


def _look_at_devices(node: Node) -> None:
    """Each must give out memory and count with it."""
    for index in range(torch.cuda.device_count()):
        node.devices.append(torch.cuda.get_device_name(index))
        free = torch.cuda.mem_get_info(index)[0]
        node.device_memory = free if node.device_memory is None else min(free, node.device_memory)
        if torch.ones(2**20, device=f"cuda:{index}").sum().item() != 2**20:
            raise ValueError(f"device {index} cannot count")
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
            raise ValueError("what was written does not come back")
    finally:
        file.unlink(missing_ok=True)


def _within(seconds: float, look: Callable[[], Node]) -> Node:
    """What `look` finds; a node with a trouble when it takes longer (a folder on a dead file server never returns)."""
    found: list[Node] = []
    thread = threading.Thread(target=lambda: found.append(look()), daemon=True)
    thread.start()
    thread.join(seconds / 2)  # the other half is for saying so
    return (
        found[0] if found else Node(host=platform.node(), troubles=[f"disk or device: no answer in {seconds / 2:g} s"])
    )


def _meet(place: Place, limits: Limits) -> dist.Store:
    try:
        if place.leads and not place.served:
            store = serve(LOOPBACK if len(place.names) == 1 else place.address, place.port)
        else:
            store = join(place.address, place.port, limits.timeout)
        return dist.PrefixStore("node check", store)
    except (dist.DistError, OSError) as error:
        meeting = f"{place.names[0]} ({place.address}:{place.port})"
        raise TimeoutError(f"{meeting}, where the nodes meet: {str(error).splitlines()[0]}") from error


def _get(store: dist.Store, key: str, seconds: float) -> Any:
    """What somebody writes under the key within this time.

    Raises:
        TimeoutError: nobody does.
    """
    try:
        store.wait([key], timedelta(seconds=max(seconds, 0.001)))
    except dist.DistStoreError as error:
        raise TimeoutError from error
    return json.loads(store.get(key))


class _Member:
    """A node's part: it does what the first node asks for."""

    def __init__(self, place: Place, store: dist.Store, limits: Limits) -> None:
        self.place, self.store, self.limits = place, store, limits

    def follow(self) -> None:
        """Until the first node says that it is over, or is gone."""
        for number in count():
            task = _get(self.store, f"task/{self.place.index}/{number}", _TASKS_AHEAD * self.limits.timeout)
            answer = self.do(task)
            self.store.set(f"answer/{self.place.index}/{number}", json.dumps(answer))
            if task["what"] == "end":
                return

    def do(self, task: dict[str, Any]) -> Any:
        if task["what"] == "clock":
            return time.time()
        if task["what"] == "speeds":
            try:
                return self._speeds(task["members"], task["meeting"])
            except RuntimeError as error:
                return {"error": str(error).splitlines()[0]}
        return None

    def _speeds(self, members: list[int], meeting: str) -> dict[str, float]:
        """GB/s between the members, the same on all of them."""
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore(meeting, self.store),
            rank=members.index(self.place.index),
            world_size=len(members),
            timeout=timedelta(seconds=self.limits.timeout / 3),  # one to connect, one to fail, one to say so
        )
        try:
            sent = (len(members) - 1) / len(members)  # of a message that is dealt out to all, this share leaves a node
            return {
                "all_to_all": sent * _bytes_per_second(_all_to_all, device) / 1e9,
                "all_reduce": 2 * sent * _bytes_per_second(dist.all_reduce, device) / 1e9,
            }
        finally:
            dist.destroy_process_group()


def _all_to_all(message: torch.Tensor) -> None:
    parts = message[: message.numel() // dist.get_world_size() * dist.get_world_size()]
    dist.all_to_all_single(torch.empty_like(parts), parts)


def _bytes_per_second(communicate: Callable[[torch.Tensor], Any], device: torch.device) -> float:
    """Of a message that is doubled until it takes long enough; the best of some repetitions, for others may disturb."""
    size = _SMALLEST
    _seconds(communicate, size, device)  # the first one connects
    while (seconds := _seconds(communicate, size, device)) < _LONG_ENOUGH and size < _LARGEST:
        size *= 2
    return size / min(seconds, *(_seconds(communicate, size, device) for _ in range(_REPETITIONS)))


def _seconds(communicate: Callable[[torch.Tensor], Any], size: int, device: torch.device) -> float:
    """What a message of so many bytes takes, by the slowest member."""
    message = torch.zeros(size, dtype=torch.uint8, device=device)
    dist.barrier()
    began = time.perf_counter()
    communicate(message)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = torch.tensor(time.perf_counter() - began, device=device)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds)


class _Lead(_Member):
    """The first node's part: ask all, itself too, and judge."""

    def __init__(self, place: Place, store: dist.Store, limits: Limits) -> None:
        super().__init__(place, store, limits)
        self.nodes = {name: Node() for name in place.names}
        self.bad: dict[str, str] = {}
        self.asked = [0] * len(place.names)
        self.together: dict[str, float] = {}

    def report(self) -> Report:
        self._gather()
        self._compare_devices()
        self._compare_clocks()
        self._compare_speeds(self._good())
        self._time_together(self._good())
        gone = {name for name, reason in self.bad.items() if reason.startswith(_NO_ANSWER)}
        there = [index for index, name in enumerate(self.place.names) if name not in gone]
        self._ask({index: {"what": "end"} for index in there}, seconds=1)
        return Report(self.nodes, self.bad, self.together)

    def _good(self) -> list[int]:
        return [index for index, name in enumerate(self.place.names) if name not in self.bad]

    def _gather(self) -> None:
        deadline = time.monotonic() + self.limits.timeout
        for index, name in enumerate(self.place.names):
            try:
                self.nodes[name] = node = Node(**_get(self.store, f"node/{index}", deadline - time.monotonic()))
            except TimeoutError:
                self.bad[name] = f"{_NO_ANSWER} within {self.limits.timeout:g} s"
                continue
            if node.troubles:
                self.bad[name] = "; ".join(node.troubles)

    def _ask(self, tasks: dict[int, dict[str, Any]], seconds: float | None = None) -> dict[int, Any]:
        """The answers of all that are asked; who gives none in time is bad."""
        seconds = self.limits.timeout if seconds is None else seconds
        deadline = time.monotonic() + seconds
        for index, task in tasks.items():
            self.store.set(f"task/{index}/{self.asked[index]}", json.dumps(task))
        answers = {index: self.do(task) for index, task in tasks.items() if index == self.place.index}
        for index, task in tasks.items():
            number = self.asked[index]
            self.asked[index] += 1
            if index in answers:
                continue
            try:
                answers[index] = _get(self.store, f"answer/{index}/{number}", deadline - time.monotonic())
            except TimeoutError:
                self.bad[self.place.names[index]] = f"{_NO_ANSWER} ({task['what']}) within {seconds:g} s"
        return answers

    def _compare_devices(self) -> None:
        """A node with other devices than most is bad; where there is no most, the first node's count."""
        devices = [tuple(self.nodes[self.place.names[index]].devices) for index in self._good()]
        for index in self._good():
            name = self.place.names[index]
            usual = max(devices, key=devices.count)
            if (own := tuple(self.nodes[name].devices)) != usual:
                self.bad[name] = f"devices are {_count(own)}, of most nodes {_count(usual)}"

    def _compare_clocks(self) -> None:
        for index in self._good():
            name = self.place.names[index]
            rounds = [self._clock(index) for _ in range(_CLOCK_ROUNDS) if name not in self.bad]
            if name in self.bad:
                continue
            self.nodes[name].skew = skew = min(rounds)[1]
            if abs(skew) > self.limits.skew:
                ahead = "ahead of" if skew > 0 else "behind"
                self.bad[name] = f"clock: {abs(skew):.1f} s {ahead} {self.place.names[0]}'s"

    def _clock(self, index: int) -> tuple[float, float]:
        """Seconds that the question took, and how far the node's clock is ahead, if both ways took the same."""
        began = time.time()
        answer = self._ask({index: {"what": "clock"}}).get(index, 0)
        ended = time.time()
        return ended - began, answer - (began + ended) / 2

    def _compare_speeds(self, members: list[int]) -> None:
        """Time all pairs of neighbours on the ring of nodes; each node counts with the faster of its two."""
        speeds: dict[int, list[dict[str, float]]] = {index: [] for index in members}
        for number, pairs in enumerate(rounds_of_pairs(members)):
            tasks = {
                index: {"what": "speeds", "members": pair, "meeting": f"pairs/{number}/{pair[0]}"}
                for pair in pairs
                for index in pair
            }
            for index, answer in self._ask(tasks).items():
                if "error" not in answer:
                    speeds[index].append(answer)
        self._judge_speeds({index: found for index, found in speeds.items() if self.place.names[index] not in self.bad})

    def _judge_speeds(self, speeds: dict[int, list[dict[str, float]]]) -> None:
        if len(speeds) < 2:
            return
        connected = [index for index, found in speeds.items() if found]
        for index in set(speeds) - set(connected) - (set() if connected else {self.place.index}):
            self.bad[self.place.names[index]] = "cannot exchange data with its neighbours, which others can"
        for what in ("all_to_all", "all_reduce"):
            best = {index: max(speed[what] for speed in speeds[index]) for index in connected}
            usual = statistics.median(best.values()) if best else 0
            for index, speed in best.items():
                name = self.place.names[index]
                setattr(self.nodes[name], what, speed)
                if speed < max(usual / self.limits.slow, self.limits.bandwidth):
                    said = f"slow: {what.replace('_', '-')} {speed:.3g} GB/s with its better neighbour"
                    self.bad.setdefault(name, f"{said}, the median is {usual:.3g} GB/s")

    def _time_together(self, members: list[int]) -> None:
        if len(members) < 2:
            return
        answers = self._ask({i: {"what": "speeds", "members": members, "meeting": "together"} for i in members})
        for index, answer in answers.items():
            if "error" in answer:
                self.bad.setdefault(self.place.names[index], f"all nodes together: {answer['error']}")
        if len(answers) == len(members) and not any("error" in answer for answer in answers.values()):
            self.together = next(iter(answers.values()))


def rounds_of_pairs(members: list[int]) -> list[list[list[int]]]:
    """The neighbours on a ring of members, in rounds in which nobody has two partners."""
    if len(members) < 3:
        return [[members]] if len(members) == 2 else []
    ring = [[one, other] for one, other in zip(members, [*members[1:], members[0]], strict=True)]
    if len(ring) % 2 == 0:
        return [ring[0::2], ring[1::2]]
    return [ring[0:-1:2], ring[1::2], ring[-1:]]


def _count(devices: tuple[str, ...]) -> str:
    return ", ".join(f"{devices.count(kind)} x {kind}" for kind in sorted(set(devices))) or "none"
