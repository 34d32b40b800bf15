"""What a rank holds at the moments of a step: from the last micro-batch's loss back to the embedding, and in the update.

Activations go as gradients come, so their sum says nothing: a step's peak is the largest of the moments. They follow
DeepSpeed 0.19.8 tensor by tensor (`runtime/zero/stage_1_and_2.py`, `stage3.py`, `bf16_optimizer.py`, `engine.py`);
tests hold them against running engines.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from coe_megatron.chain.activations import Segment
from coe_megatron.config.zero_sizes import ZeroSizes
from coe_megatron.forecast.held import Held

_FP32 = 4


@dataclass(frozen=True)
class Moment:
    """Bytes of what comes and goes in a step.

    Attributes:
        activations: with what the backward pass takes beside them.
        gradients: summed, waiting to be reduced, and reduced.
        buckets: in which they are reduced, with the copies that DeepSpeed makes of a bucket.
        gathered: weights of stage 3 that are whole meanwhile.
        update: what the optimizer takes for its step.
    """

    activations: int = 0
    gathered: int = 0
    gradients: int = 0
    buckets: int = 0
    update: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.activations + self.gathered + self.gradients + self.buckets + self.update


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
    has: Held, segments: list[Segment], how: Reduction, earlier: int = 0, gathered: int = 0
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
        yield Moment(left + segment.working, gathered, gradients.held, gradients.buckets)
        for number, size in reversed(list(enumerate(tensors))):
            there = left - segment.kept + (segment.late if number else segment.last)
            for most in gradients.arrive(size):
                yield Moment(there, gathered, *most)
        left -= segment.kept
    yield Moment(left, gathered, *gradients.end())
    yield from _update(has, how)


class _Sums:
    """Gradients are added to whole sums in fp32 as they come, and reduced when all are there."""

    def __init__(self, has: Held, how: Reduction) -> None:
        self._has, self._how = has, how
        self.held = _FP32 * has.whole if how.summed or how.bf16 else 0
        self.buckets = how.buffer(has.sizes)

    def arrive(self, size: int) -> Iterator[tuple[int, int]]:
        """A tensor of so many; yields bytes of gradients and of buckets."""
        if self._how.bf16:
            yield self.held + (self._how.element + _FP32) * size, self.buckets
        elif self._how.summed:
            yield self.held + _FP32 * size, self.buckets
        else:
            self.held += _FP32 * size
            yield self.held, self.buckets

    def end(self) -> tuple[int, int]:
        """DeepSpeed copies them end to end until there are more than a bucket holds; in bf16 they lie so anyway."""
        has = self._has
        if self._how.whole and not self._how.in_place:
            return _FP32 * (has.whole + has.touched), self.buckets
        copied = 0 if self._how.bf16 else min(has.whole, has.sizes.reduce_bucket + has.largest_tensor)
        return _FP32 * has.whole, _FP32 * copied


class _Buckets:
    """Gradients are copied into a bucket, which is reduced when the next one does not fit.

    A tensor larger than the bucket waits where it is, and takes a bucket's place. What is reduced and the rank's own
    goes to a buffer; the rest is let go of, in stage 1 at the end of the step where it did not fit into the bucket.
    The rank is the one that holds the end of the model: it needs that buffer first, when most activations are there.
    """

    def __init__(self, has: Held, how: Reduction) -> None:
        self._has, self._how = has, how
        self._in_bucket = self._waiting = self._arrived = 0
        self._element = how.element
        own = has.part if how.bf16 or how.stage == 3 else has.touched
        kept_sum = how.stage > 1 and (how.summed or how.stage == 3)
        self._sum = _FP32 * (has.whole if how.stage == 1 and how.summed else own * kept_sum)
        self._own = 0 if how.stage == 3 or (kept_sum and how.bf16) else _FP32 * own  # the buffer that is still to come
        self._fresh = 0
        self.buckets = how.buffer(has.sizes)

    def _copied(self) -> int:
        """Bytes that are copied to reduce what is in the bucket; none where all of it is one rank's."""
        if self._how.stage == 3:
            return _FP32 * self._in_bucket
        if self._how.bf16:
            return (self._how.element + _FP32) * self._in_bucket
        return _FP32 * self._in_bucket if self._in_bucket > self._has.part else 0

    @property
    def held(self) -> int:
        """Bytes of gradients."""
        return self._sum + self._fresh

    def arrive(self, size: int) -> Iterator[tuple[int, int]]:
        """As `_Sums.arrive`."""
        room = self._has.sizes.reduce_bucket
        adds = self._how.stage == 1 and self._how.summed
        self._fresh += 0 if adds else self._element * size
        yield self.held + (_FP32 * size if adds else 0), self.buckets
        if self._in_bucket and self._in_bucket + size > room:
            yield self._reduce()
        if size <= room:
            self._forget(size)
        else:
            self._waiting = size
        self._in_bucket += size
        self._arrived += size

    def end(self) -> tuple[int, int]:
        """As `_Sums.end`."""
        return self._reduce()

    def _reduce(self) -> tuple[int, int]:
        copies = self._copied()
        self._sum += self._own
        self._own = 0
        most = self.held, self.buckets + copies
        if self._how.stage > 1 or self._arrived <= self._has.part:
            self._forget(self._waiting)
        self._waiting = self._in_bucket = 0
        return most

    def _forget(self, size: int) -> None:
        if self._how.stage == 1 and self._how.summed:
            self._sum -= _FP32 * size
        else:
            self._fresh -= self._element * size


def _update(has: Held, how: Reduction) -> Iterator[Moment]:
    """AdamW makes two tensors as large as what it steps at once, in stage 0 of one parameter after another.

    Stages 1 (in fp32) to 3 lay the gradients of what they step end to end before.
    """
    if how.stage == 0:
        yield Moment(gradients=_FP32 * has.whole, update=2 * _FP32 * has.largest_tensor)
    elif how.stage == 1 and (how.bf16 or how.whole):
        yield Moment(gradients=_FP32 * has.whole, update=2 * _FP32 * has.stepped)
    elif how.stage == 2 and how.bf16:
        yield Moment(gradients=_FP32 * has.part, update=2 * _FP32 * has.stepped)
    elif how.stage == 3:
        yield Moment(
            gradients=_FP32 * has.part, buckets=_FP32 * has.sizes.reduce_bucket, update=3 * _FP32 * has.stepped
        )
    else:
        yield Moment(gradients=_FP32 * has.touched, update=_FP32 * has.stepped)
        yield Moment(gradients=_FP32 * (has.touched if has.apart else 0), update=3 * _FP32 * has.stepped)
