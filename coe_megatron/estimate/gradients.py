"""What a rank holds at each moment of a step: from the last loss back to the embedding, and in the update.

Activations go as gradients come, so their sum says nothing: a step's peak is the largest of the moments. They follow
DeepSpeed 0.19.8 tensor by tensor (`runtime/zero/stage_1_and_2.py`, `stage3.py`, `bf16_optimizer.py`, `engine.py`);
tests hold them against running engines.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from coe_megatron.config.zero_sizes import ZeroSizes
from coe_megatron.estimate.activations import Segment
from coe_megatron.estimate.parameter_shards import ParameterShards

_FP32 = 4


class Gradients(NamedTuple):
    """Bytes.

    Attributes:
        summed: what stays when the pass has ended: sums of micro-batches, or gradients in their places.
        fresh: what does not: gradients to be added, or waiting to be reduced.
        buckets: in which they are reduced, with the copies that DeepSpeed makes of a bucket.
    """

    summed: int
    fresh: int
    buckets: int


@dataclass(frozen=True)
class Moment:
    """Bytes of what comes and goes in a step.

    Attributes:
        gradients: and their buckets.
        activations: with what the backward pass takes beside them.
        gathered: weights of stage 3 that are whole meanwhile.
        update: what the optimizer takes for its step.
    """

    gradients: Gradients
    activations: int = 0
    gathered: int = 0
    update: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.gradients) + self.activations + self.gathered + self.update


@dataclass(frozen=True)
class Reduction:
    """How gradients are summed and reduced.

    Attributes:
        stage: of ZeRO.
        element: bytes of a weight's gradient as it comes.
        summed: there were micro-batches before the last one.
        buffers: of stages 1 and 2, one or two.
        whole: stage 1 in fp32 sums whole gradients and reduces them when all passes have ended (pipelines).
    """

    stage: int
    element: int
    summed: bool
    buffers: int
    whole: bool = False

    @property
    def bf16(self) -> bool:
        """Weights are bf16."""
        return self.element < _FP32

    @property
    def in_place(self) -> bool:
        """Whole fp32 sums are reduced where they lie: stage 0, and stage 1 in bf16."""
        return self.stage == 0 or (self.stage == 1 and self.bf16)

    def buffer(self, sizes: ZeroSizes) -> int:
        """Bytes of the buckets; stage 2 has them as gradients come."""
        if self.in_place:
            return 0
        return (self.element if self.stage == 2 else _FP32) * self.buffers * sizes.reduce_bucket


def moments(
    has: ParameterShards, segments: list[Segment], how: Reduction, earlier: int = 0, gathered: int = 0
) -> Iterator[Moment]:
    """Those of the last micro-batch's backward pass and of the update.

    Args:
        segments: in the order of the forward pass, as `has.segments`.
        earlier: bytes of activations of other micro-batches that a pipeline has in flight.
        gathered: bytes of weights that stage 3 has whole within the pass.
    """
    gradients = _Sums(has, how) if how.in_place or how.whole else _Buckets(has, how)
    left = earlier + sum(segment.kept for segment in segments)
    for segment, tensors in zip(reversed(segments), reversed(has.segments), strict=True):
        yield Moment(gradients.now, left + segment.working, gathered)
        for number, size in enumerate(tensors):
            there = left - segment.kept + (segment.last if number else segment.late)
            for most in gradients.arrive(size):
                yield Moment(most, there, gathered)
        left -= segment.kept
    yield Moment(gradients.end(), left, gathered)
    yield from _update(has, how)


class _Sums:
    """Gradients are added to whole sums in fp32 as they come, and reduced when all are there."""

    def __init__(self, has: ParameterShards, how: Reduction) -> None:
        self._has, self._how = has, how
        self.now = Gradients(_FP32 * has.whole if how.summed or how.bf16 else 0, 0, how.buffer(has.sizes))

    def arrive(self, size: int) -> Iterator[Gradients]:
        """A tensor of so many parameters has its gradient; what there is meanwhile."""
        if self._how.bf16:
            yield self.now._replace(fresh=(self._how.element + _FP32) * size)
        elif self._how.summed:
            yield self.now._replace(fresh=_FP32 * size)
        else:
            self.now = self.now._replace(summed=self.now.summed + _FP32 * size)
            yield self.now

    def end(self) -> Gradients:
        """DeepSpeed copies them end to end until there are more than a bucket holds; in bf16 they lie so anyway."""
        has = self._has
        if self._how.whole and not self._how.in_place:
            return Gradients(_FP32 * has.whole, _FP32 * has.touched, self.now.buckets)
        copied = 0 if self._how.bf16 else min(has.whole, has.sizes.reduce_bucket + has.largest_tensor)
        return Gradients(_FP32 * has.whole, 0, _FP32 * copied)


class _Buckets:
    """Gradients are copied into a bucket, which is reduced when the next one does not fit.

    A tensor larger than the bucket waits where it is, and takes a bucket's place. What is reduced and the rank's own
    goes to a buffer; the rest is let go of, in stage 1 at the end of the step where it did not fit into the bucket.
    The rank is the one that holds the end of the model: it needs that buffer first, when most activations are there.
    """

    def __init__(self, has: ParameterShards, how: Reduction) -> None:
        self._has, self._how = has, how
        self._in_bucket = self._waiting = self._arrived = 0
        own = _FP32 * (has.part if how.bf16 or how.stage == 3 else has.touched)
        there = how.stage == 3 or (how.stage == 2 and how.summed)
        self._own = 0 if how.stage == 3 or (there and how.bf16) else own  # the buffer that is still to come
        self._own_stays = not there
        self._adds = how.stage == 1 and how.summed  # to whole sums, out of which it reduces
        self._summed, self._fresh = _FP32 * has.whole if self._adds else own * there, 0

    @property
    def now(self) -> Gradients:
        """What there is."""
        return Gradients(self._summed, self._fresh, self._how.buffer(self._has.sizes))

    def arrive(self, size: int) -> Iterator[Gradients]:
        """As `_Sums.arrive`."""
        room = self._has.sizes.reduce_bucket
        self._fresh += self._how.element * size
        yield self.now
        if self._adds:
            self._fresh -= self._how.element * size
        if self._in_bucket and self._in_bucket + size > room:
            yield self._reduce()
        if size <= room:
            self._forget(size)
        else:
            self._waiting = size
        self._in_bucket += size
        self._arrived += size

    def end(self) -> Gradients:
        """What is left in the bucket is reduced."""
        return self._reduce()

    def _reduce(self) -> Gradients:
        if self._own_stays:
            self._summed += self._own
        else:
            self._fresh += self._own
        self._own, now = 0, self.now
        most = now._replace(buckets=now.buckets + self._copied())
        if self._how.stage > 1 or self._arrived <= self._has.part:
            self._forget(self._waiting)
        self._waiting = self._in_bucket = 0
        return most

    def _copied(self) -> int:
        """Bytes that are copied to reduce what is in the bucket; in fp32 none where all of it is one rank's."""
        if self._how.stage == 3:
            return _FP32 * self._in_bucket
        if self._how.bf16:
            return (self._how.element + _FP32) * self._in_bucket
        return _FP32 * self._in_bucket if self._in_bucket > self._has.part else 0

    def _forget(self, size: int) -> None:
        if self._adds:
            self._summed -= _FP32 * size
        else:
            self._fresh -= self._how.element * size


def _update(has: ParameterShards, how: Reduction) -> Iterator[Moment]:
    """Fused AdamW takes nothing for itself; but stages 1 and 2 in fp32, and 3, lay its gradients end to end before."""
    if how.stage == 0 or (how.stage == 1 and (how.bf16 or how.whole)):
        yield Moment(Gradients(_FP32 * has.whole, 0, 0))
    elif how.stage == 2 and how.bf16:
        yield Moment(Gradients(_FP32 * has.part, 0, 0))
    else:
        reduced, buckets = (has.part, how.buffer(has.sizes)) if how.stage == 3 else (has.touched, 0)
        yield Moment(Gradients(_FP32 * reduced, 0, buckets), update=_FP32 * has.stepped)
