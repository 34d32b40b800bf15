"""The time of tokens' ways through a chain, chunk by chunk.

`chain_seconds` goes through a chain as `CoELayer` does, chunk by chunk in turns, with these times:

* a way there or back, and the latency of each all-to-all. Rows are one, gates with local experts another, sums one; in
  the backward pass gradients of sums are one, and of rows and gates two. NCCL delivers those of a group one after the
  other, gloo two at once, since a group has two threads.
* the host's wait for the sizes: an all-to-all, or with expert tensor parallelism an all-gather. In the backward pass,
  in a recomputed pass, and where `fixed` gating uses choices again, the sizes are known.
* shared experts, which work while tokens travel, unless ranks share all cores of a node.
* routers and experts: each chunk loads the experts' weights again. The backward pass computes twice as much.

So chunks pay for more latencies, and hide work behind ways. Gathers of expert tensor parallelism, which is inside
nodes, take no time here.
"""

from dataclasses import dataclass, replace
from heapq import heapreplace

from coe_megatron.estimate.closed_forms import ModelShape
from coe_megatron.estimate.run_shape import RunShape

FORWARD, BACKWARD = (2, 1), (1, 2)  # all-to-alls that start together, before the experts and after them
_SIMULATED = 32  # iterations; further ones take as long


def has_megatrons_dispatcher(run: RunShape) -> bool:
    """Whether Megatron's dispatcher sends the tokens, and not ours."""
    return run.config.moe.capacity_factor is not None or run.config.moe.dispatcher == "allgather"


@dataclass(frozen=True)
class PassSeconds:
    """Seconds of a chunk in an iteration.

    Attributes:
        way: of the rows there, or back.
        latency: of an all-to-all.
        sizes: until the host knows them.
        router, shared, experts: work.
        started: all-to-alls that start together, before the experts and after them.
        at_once: all-to-alls of a group that are delivered at the same time.
        hides: whether shared experts work while tokens travel.
    """

    way: float
    latency: float
    sizes: float
    router: float
    shared: float
    experts: float
    started: tuple[int, int] = FORWARD
    at_once: int = 1
    hides: bool = True

    @property
    def backward(self) -> "PassSeconds":
        """With twice the work, and known sizes."""
        work = {name: 2 * getattr(self, name) for name in ("router", "shared", "experts")}
        return replace(self, sizes=0.0, started=BACKWARD, **work)


def layer_seconds(run: RunShape, kind: ModelShape, forward: PassSeconds) -> tuple[float, float]:
    """Forward and backward pass of a micro-batch through a MoE layer of a kind; backward with what is recomputed.

    Args:
        forward: of a chunk in an iteration.
    """
    recompute = run.config.moe.recompute
    again = [replace(forward, sizes=0.0)] if recompute in ("iteration", "layer") else []
    chunks, iterations, routings = run.config.moe.resolved_chunks(), kind.chain.iterations, kind.routings

    def seconds(each: PassSeconds) -> float:
        if recompute == "iteration":  # all chunks finish an iteration before the next one
            routed, reused = (chain_seconds(each, chunks, 1, count) for count in (1, 0))
            return routings * routed + (iterations - routings) * reused
        simulated = min(iterations, _SIMULATED)
        return chain_seconds(each, chunks, simulated, routings) * iterations / simulated

    return seconds(forward), sum(map(seconds, (*again, forward.backward)))


class _Group:
    """A process group that delivers all-to-alls, and a link that carries the rows of one after the other."""

    def __init__(self, each: PassSeconds) -> None:
        self._each, self._free, self._link = each, [0.0] * each.at_once, 0.0

    def start(self, now: float, count: int) -> float:
        """When `count` all-to-alls that start now have arrived; the first one has the rows."""
        arrived = now
        for number in range(count):
            end = max(now, self._free[0])
            if number == 0:
                end = self._link = max(end, self._link) + self._each.way
            end += self._each.latency
            heapreplace(self._free, end)
            arrived = max(arrived, end)
        return arrived


def chain_seconds(each: PassSeconds, chunks: int, iterations: int, routings: int) -> float:
    """From the first router to the last token that is back.

    Args:
        routings: iterations with a router, which are the first ones.
    """
    now, group = 0.0, _Group(each)
    there, back = [0.0] * chunks, [0.0] * chunks
    before, after = each.started
    for t in range(iterations):
        for chunk in range(chunks):
            now = max(now, back[chunk]) + (each.router + each.sizes if t < routings else 0.0)
            there[chunk] = group.start(now if each.hides else now + each.shared, before)
            now += each.shared
        for chunk in range(chunks):
            now = max(now, there[chunk]) + each.experts
            back[chunk] = group.start(now, after)
    return max(now, *back)
