"""What a rank of bench_machine.py measures: matrix products, moves, host, disk, and collectives.

A number is the median of repeated turns, each long enough for the clock. All ranks measure at the same time, so that
cores, memory and links are shared as in training; only the disk is measured by one.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy.optimize import nnls

from coe_megatron.estimate.step_time import UPDATE_BYTES
from coe_megatron.estimate.traffic import Sent, group

_TURNS, _SHORTEST = 5, 2e-3  # of a measurement; seconds of a turn at least
_EXPERTS = 8  # of a grouped product
_CALLS = 8  # of a collective, in a turn
_BETWEEN, _LEAST = 5e-4, 1e-7  # seconds of work between two collectives; of a collective at least


@dataclass(frozen=True)
class Sizes:
    """What is measured on a kind of device.

    Attributes:
        rows, widths: of matrix products.
        moved: elements of a tensor of elementwise operations.
        sent: elements, in fp32, that a rank gives to a collective.
        saved: bytes of a file.
    """

    rows: tuple[int, ...]
    widths: tuple[int, ...]
    moved: tuple[int, ...]
    sent: tuple[int, ...]
    saved: int


SIZES = {
    "cpu": Sizes(
        rows=(4, 32, 256, 2048),
        widths=(32, 128, 512),
        moved=(2**9, 2**13, 2**17, 2**21),
        sent=(2**4, 2**13, 2**16, 2**19),
        saved=2**27,
    ),
    "cuda": Sizes(
        rows=(16, 128, 1024, 8192),
        widths=(512, 2048, 8192),
        moved=(2**14, 2**18, 2**22, 2**26),
        sent=(2**6, 2**16, 2**20, 2**24),
        saved=2**31,
    ),
}


@dataclass(frozen=True)
class Bench:
    """Measures on one device."""

    device: torch.device

    @property
    def sizes(self) -> Sizes:
        """What is measured on it."""
        return SIZES[self.device.type]

    def seconds(self, work: Callable[[], object]) -> float:
        """Of a call."""
        work()
        calls = 1
        while (spent := self.turn(work, calls)) < _SHORTEST:
            calls = max(2 * calls, int(calls * _SHORTEST / max(spent, 1e-6)))
        return statistics.median(self.turn(work, calls) for _ in range(_TURNS)) / calls

    def turn(self, work: Callable[[], object], calls: int) -> float:
        """Seconds of so many calls."""
        self._finish()
        start = time.perf_counter()
        for _ in range(calls):
            work()
        self._finish()
        return time.perf_counter() - start

    def _finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def rates(self, dtype: torch.dtype, grouped: bool) -> dict[str, list[Any]]:
        """FLOP/s of products, as `estimate.machine.Rates`."""
        rows, widths = self.sizes.rows, self.sizes.widths
        found = [[self._rate(count, width, dtype, grouped) for width in widths] for count in rows]
        return {"rows": [*rows], "widths": [*widths], "rates": found}

    def _rate(self, rows: int, width: int, dtype: torch.dtype, grouped: bool) -> float:
        experts = _EXPERTS if grouped else 1
        weights = torch.randn(experts, width, width, device=self.device).to(dtype)
        inputs = torch.randn(experts * rows, width, device=self.device).to(dtype)
        ends = torch.arange(1, experts + 1, device=self.device, dtype=torch.int32) * rows
        if grouped:
            spent = self.seconds(lambda: F.grouped_mm(inputs, weights, offs=ends))
        else:
            spent = self.seconds(lambda: inputs @ weights[0])
        return 2 * experts * rows * width * width / spent

    def memory(self) -> dict[str, list[float]]:
        """Bytes per second of a layer's usual elementwise operations, by bytes of one."""
        found = [self._moves(elements) for elements in self.sizes.moved]
        return {"bytes": [each for each, _ in found], "rates": [rate for _, rate in found]}

    def _moves(self, elements: int) -> tuple[float, float]:
        """Mean bytes of an operation, and bytes per second."""
        width = 64
        states = torch.randn(elements // width, width, device=self.device)
        other, order = torch.randn_like(states), torch.randperm(len(states), device=self.device)
        basket: list[tuple[int, Callable[[], object]]] = [  # how many such tensors are read and written
            (3, lambda: states + other),
            (3, lambda: states * other),
            (2, lambda: F.silu(states)),
            (2, lambda: states.index_select(0, order)),
            (2, lambda: states.clone()),
            (2, lambda: torch.softmax(states, -1)),
            (3, lambda: torch.zeros_like(states).index_add_(0, order, other)),
        ]
        moved = 4 * elements * sum(count for count, _ in basket)
        return moved / len(basket), moved / sum(self.seconds(work) for _, work in basket)

    def wait(self) -> float:
        """Seconds until the host has a number, and the device its next operation."""
        if self.device.type == "cpu":
            return 0.0
        value = torch.zeros((), device=self.device)
        return self.seconds(lambda: float(value + 1))

    def transfer(self) -> float:
        """Bytes per second between the memory of the host and the device's."""
        here = torch.empty(2**24, pin_memory=self.device.type == "cuda")
        there = torch.empty(2**24, device=self.device)
        return 4 * 2**24 / self.seconds(lambda: there.copy_(here, non_blocking=True))

    def update(self) -> float:
        """Bytes per second that an optimizer in host memory reads and writes."""
        parameter = torch.zeros(2**22, requires_grad=True)
        parameter.grad = torch.ones_like(parameter)
        optimizer = torch.optim.AdamW([parameter], fused=True)
        host = Bench(torch.device("cpu"))
        return UPDATE_BYTES * 2**22 / host.seconds(optimizer.step)

    def disk(self, folder: Path) -> dict[str, float]:
        """Bytes per second of a file that is written and synchronised, and read without the host's cache."""
        path, data = folder / f".machine-{os.getpid()}", os.urandom(2**20) * (self.sizes.saved // 2**20)
        try:
            start = time.perf_counter()
            with path.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            written = time.perf_counter()
            with path.open("rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                while file.read(2**24):
                    pass
            return {"write": len(data) / (written - start), "read": len(data) / (time.perf_counter() - written)}
        finally:
            path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Call:
    """A measured collective.

    Attributes:
        size: ranks of the group.
        sent: bytes that share the bandwidth.
        seconds: of the slowest rank.
    """

    size: int
    sent: float
    seconds: float


@dataclass(frozen=True)
class Calls:
    """Collectives of all ranks, of which `ranks` are on a node; all ranks call the methods together."""

    bench: Bench
    ranks: int

    def ways(self, groups: list[tuple[int, int]], shared: Callable[[Sent], float]) -> dict[str, dict[str, float]]:
        """`estimate.machine.Link` of the collectives in groups.

        Args:
            groups: their sizes and strides.
            shared: the bytes that share a bandwidth, of those that a rank sends.
        """
        calls: dict[str, list[Call]] = {"all_to_all": [], "ring": [], "point_to_point": []}
        for size, stride in groups:
            for kind, call in self._in_groups(size, stride, shared):
                calls[kind].append(call)
        return {kind: fitted(found) for kind, found in calls.items()}

    def _in_groups(self, size: int, stride: int, shared: Callable[[Sent], float]) -> Iterator[tuple[str, Call]]:
        world = dist.get_world_size()
        firsts = [rank for rank in range(world) if rank // stride % size == 0]
        mine, _ = dist.new_subgroups_by_enumeration(
            [[first + stride * number for number in range(size)] for first in firsts]
        )
        link = group(world, size, stride, self.ranks)
        for elements in self.bench.sizes.sent:
            given = torch.zeros(elements * size, device=self.bench.device)
            taken, part = torch.empty_like(given), torch.zeros(elements, device=self.bench.device)
            size_in_bytes = 4 * elements * size
            works: list[tuple[str, Sent, Callable[[], object]]] = [
                (
                    "all_to_all",
                    link.all_to_all(size_in_bytes),
                    partial(dist.all_to_all_single, taken, given, group=mine),
                ),
                ("ring", link.ring(size_in_bytes, 2), partial(dist.all_reduce, given, group=mine)),
                ("ring", link.ring(size_in_bytes, 1), partial(dist.all_gather_into_tensor, taken, part, group=mine)),
                ("ring", link.ring(size_in_bytes, 1), partial(dist.reduce_scatter_tensor, part, given, group=mine)),
            ]
            if stride % self.ranks == 0 or size <= self.ranks:  # the next rank: always there, or always here
                works.append(("point_to_point", link.to_next(4 * elements), partial(_pass_on, part, mine)))
            for kind, sent, work in works:
                yield kind, Call(size, shared(sent), self._seconds(work))

    def _seconds(self, work: Callable[[], object]) -> float:
        """Of a call between other work, as in a step, where ranks do not arrive at once and threads have to wake up.

        The slowest rank's, in the median turn, less the other work.
        """
        busy = self._busy

        def both() -> None:
            busy()
            work()

        both()
        turns = []
        for _ in range(_TURNS):
            dist.barrier()
            alone = self._slowest(self.bench.turn(busy, _CALLS) / _CALLS)
            dist.barrier()
            turns.append(self._slowest(self.bench.turn(both, _CALLS) / _CALLS) - alone)
        return max(_LEAST, statistics.median(turns))

    @cached_property
    def _busy(self) -> Callable[[], None]:
        """Work of about `_BETWEEN` seconds, the same on all ranks."""
        states, weights = (torch.randn(size, 128, device=self.bench.device) for size in (64, 128))
        once = self._slowest(self.bench.seconds(lambda: states @ weights))

        def work() -> None:
            for _ in range(max(1, round(_BETWEEN / once))):
                states @ weights

        return work

    def _slowest(self, seconds: float) -> float:
        value = torch.tensor(seconds, dtype=torch.float64)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return float(value)


def _pass_on(part: torch.Tensor, group: dist.ProcessGroup) -> None:
    """Every second rank of the group sends to the next one."""
    rank = dist.get_group_rank(group, dist.get_rank())
    if rank % 2:
        dist.recv(part, group=group, group_src=rank - 1)
    elif rank + 1 < dist.get_world_size(group):
        dist.send(part, group=group, group_dst=rank + 1)


def fitted(calls: list[Call]) -> dict[str, float]:
    """`estimate.machine.Way` of the calls: start, hop and bandwidth with the least squares of relative errors."""
    rows = np.array([[1.0, call.size - 2, call.sent] for call in calls])
    seconds = np.array([call.seconds for call in calls])
    (start, hop, of_byte), _ = nnls(rows / seconds[:, None], np.ones(len(calls)))
    return {"start": float(start), "hop": float(hop), "bandwidth": float(1 / max(of_byte, 1e-15))}
