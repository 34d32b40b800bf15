"""Memory of gradients and activations during the backward pass of a step, and in the optimizer update.

Activations are freed as gradients appear, so the sum of their maxima would be too large: the peak of a step is the
largest of its moments. This follows DeepSpeed 0.19.8 tensor by tensor (`runtime/zero/stage_1_and_2.py`, `stage3.py`,
`bf16_optimizer.py`, `engine.py`); tests compare it with running engines.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from coe_megatron.config.zero_sizes import ZeroSizes
from coe_megatron.estimate.activations import Segment
from coe_megatron.estimate.parameter_shards import ParameterShards

_FP32 = 4


class Gradients(NamedTuple):
    """Bytes of gradients.

    Attributes:
        accumulated: resident after the backward pass: sums over micro-batches, or the gradients themselves.
        temporary: freed by the end of the backward pass: gradients that are to be added or reduced.
        buckets: communication buckets, with DeepSpeed's copies of their contents.
    """

    accumulated: int
    temporary: int
    buckets: int


@dataclass(frozen=True)
class Moment:
    """Bytes of what is allocated and freed within a step, at one moment.

    Attributes:
        gradients: gradients and communication buckets.
        activations: activations and temporaries of the backward pass.
        gathered: weights that stage 3 has gathered.
        update: temporaries of the optimizer update.
    """

    gradients: Gradients
    activations: int = 0
    gathered: int = 0
    update: int = 0

    @property
    def total(self) -> int:
        """All bytes."""
        return sum(self.gradients) + self.activations + self.gathered + self.update


@dataclass(frozen=True)
class Reduction:
    """How gradients are accumulated and reduced.

    Attributes:
        stage: ZeRO stage.
        element_bytes: bytes of an element of a gradient as autograd computes it.
        accumulates: whether there were micro-batches before the last one.
        buffers: number of bucket buffers in stages 1 and 2, one or two.
        pipelined: whether gradients are reduced only after all micro-batches; stage 1 in fp32 then accumulates full
            gradients.
    """

    stage: int
    element_bytes: int
    accumulates: bool
    buffers: int
    pipelined: bool = False

    @property
    def bf16(self) -> bool:
        """Whether weights are bf16."""
        return self.element_bytes < _FP32

    @property
    def in_place(self) -> bool:
        """Whether full fp32 sums are reduced in place: in stage 0, and in stage 1 with bf16."""
        return self.stage == 0 or (self.stage == 1 and self.bf16)

    def buffer(self, sizes: ZeroSizes) -> int:
        """Bytes of the bucket buffers; those of stage 2 have the dtype of the gradients."""
        if self.in_place:
            return 0
        return (self.element_bytes if self.stage == 2 else _FP32) * self.buffers * sizes.reduce_bucket


def moments(
    shards: ParameterShards, segments: list[Segment], reduction: Reduction, earlier: int = 0, gathered: int = 0
) -> Iterator[Moment]:
    """Moments of the last micro-batch's backward pass, and of the update.

    Args:
        segments: in the order of the forward pass, like `shards.segments`.
        earlier: bytes of activations of other micro-batches in flight in a pipeline.
        gathered: bytes of weights that stage 3 has gathered in the backward pass.
    """
    full = reduction.in_place or reduction.pipelined
    gradients = _FullSums(shards, reduction) if full else _Buckets(shards, reduction)
    left = earlier + sum(segment.kept for segment in segments)
    for segment, tensors in zip(reversed(segments), reversed(shards.segments), strict=True):
        yield Moment(gradients.now, left + segment.working, gathered)
        for number, size in enumerate(tensors):
            remaining = segment.at_later_gradients if number else segment.at_first_gradient
            for peak in gradients.add(size):
                yield Moment(peak, left - segment.kept + remaining, gathered)
        left -= segment.kept
    yield Moment(gradients.end(), left, gathered)
    yield from _update(shards, reduction)


class _FullSums:
    """Gradients are added to full fp32 sums as they appear, and reduced after the backward pass."""

    def __init__(self, shards: ParameterShards, reduction: Reduction) -> None:
        self._shards, self._reduction = shards, reduction
        allocated = _FP32 * shards.total if reduction.accumulates or reduction.bf16 else 0
        self.now = Gradients(allocated, 0, reduction.buffer(shards.sizes))

    def add(self, size: int) -> Iterator[Gradients]:
        """Add the gradient of a tensor of `size` parameters; yields the memory at its peaks."""
        if self._reduction.bf16:
            yield self.now._replace(temporary=(self._reduction.element_bytes + _FP32) * size)
        elif self._reduction.accumulates:
            yield self.now._replace(temporary=_FP32 * size)
        else:
            self.now = self.now._replace(accumulated=self.now.accumulated + _FP32 * size)
            yield self.now

    def end(self) -> Gradients:
        """The reduction: in fp32, DeepSpeed copies gradients into flat buckets; in bf16 they are flat already."""
        shards = self._shards
        if self._reduction.pipelined and not self._reduction.in_place:
            return Gradients(_FP32 * shards.total, _FP32 * shards.overlapping, self.now.buckets)
        copied = 0 if self._reduction.bf16 else min(shards.total, shards.sizes.reduce_bucket + shards.largest_tensor)
        return Gradients(_FP32 * shards.total, 0, _FP32 * copied)


class _Buckets:
    """Gradients are copied into a bucket, which is reduced when the next one does not fit.

    A tensor larger than the bucket is reduced in its own memory, instead of a bucket. After a reduction, the rank's own
    partition is copied into a buffer and the rest is freed; stage 1 frees tensors larger than the bucket only at the
    end of the step. This models the rank with the last partition of the model, which needs that buffer first, when most
    activations are still allocated. Stages 1 and 2 allocate the buckets in each pass when its first gradient is there.
    """

    def __init__(self, shards: ParameterShards, reduction: Reduction) -> None:
        self._shards, self._reduction = shards, reduction
        self._in_bucket = self._oversized = self._seen = 0
        self._has_buckets = reduction.stage == 3
        separate = reduction.bf16 or reduction.stage == 3
        own = _FP32 * (shards.partition if separate else shards.overlapping)
        allocated = reduction.stage == 3 or (reduction.stage == 2 and reduction.accumulates)
        # The buffer of the own partition, if it is not allocated yet.
        self._own = 0 if reduction.stage == 3 or (allocated and reduction.bf16) else own
        self._own_stays = not allocated
        self._adds = reduction.stage == 1 and reduction.accumulates  # to full sums, from which it reduces
        self._accumulated = _FP32 * shards.total if self._adds else own * allocated
        self._temporary = 0

    @property
    def now(self) -> Gradients:
        """The memory at this moment."""
        buckets = self._reduction.buffer(self._shards.sizes) if self._has_buckets else 0
        return Gradients(self._accumulated, self._temporary, buckets)

    def add(self, size: int) -> Iterator[Gradients]:
        """As `_FullSums.add`."""
        capacity = self._shards.sizes.reduce_bucket
        self._temporary += self._reduction.element_bytes * size
        yield self.now
        self._has_buckets = True
        if self._adds:
            self._temporary -= self._reduction.element_bytes * size
        if self._in_bucket and self._in_bucket + size > capacity:
            yield self._reduce()
        if size <= capacity:
            self._free(size)
        else:
            self._oversized = size
        self._in_bucket += size
        self._seen += size

    def end(self) -> Gradients:
        """Reduce the rest of the bucket."""
        return self._reduce()

    def _reduce(self) -> Gradients:
        if self._own_stays:
            self._accumulated += self._own
        else:
            self._temporary += self._own
        self._own, now = 0, self.now
        peak = now._replace(buckets=now.buckets + self._copied())
        if self._reduction.stage > 1 or self._seen <= self._shards.partition:
            self._free(self._oversized)
        self._oversized = self._in_bucket = 0
        return peak

    def _copied(self) -> int:
        """Bytes that are copied to reduce the bucket; none in fp32 if all of it belongs to one rank."""
        if self._reduction.stage == 3:
            return _FP32 * self._in_bucket
        if self._reduction.bf16:
            return (self._reduction.element_bytes + _FP32) * self._in_bucket
        return _FP32 * self._in_bucket if self._in_bucket > self._shards.partition else 0

    def _free(self, size: int) -> None:
        if self._adds:
            self._accumulated -= _FP32 * size
        else:
            self._temporary -= self._reduction.element_bytes * size


def _update(shards: ParameterShards, reduction: Reduction) -> Iterator[Moment]:
    """Fused AdamW needs no temporaries, but stages 1 and 2 in fp32, and stage 3, flatten its gradients first."""
    stage = reduction.stage
    if stage == 0 or (stage == 1 and (reduction.bf16 or reduction.pipelined)):
        yield Moment(Gradients(_FP32 * shards.total, 0, 0))
    elif stage == 2 and reduction.bf16:
        yield Moment(Gradients(_FP32 * shards.partition, 0, 0))
    else:
        reduced, buckets = shards.overlapping, 0
        if stage == 3:
            reduced, buckets = shards.partition, reduction.buffer(shards.sizes)
        yield Moment(Gradients(_FP32 * reduced, 0, buckets), update=_FP32 * shards.largest_update)
