"""Closed forms of what one rank holds, in bytes by kind; tests hold them against running engines on the CPU."""

from coe_megatron.config.layout import Layout
from coe_megatron.config.settings import RunConfig
from coe_megatron.estimate.activations import Pass, segments
from coe_megatron.estimate.closed_forms import ModelShape
from coe_megatron.estimate.gradients import Moment, Reduction, moments
from coe_megatron.estimate.parameter_shards import ParameterShards, parameter_shards
from coe_megatron.estimate.run_shape import stage_pass, stage_shape

MEASURED = ("weights", "gradients", "optimizer", "communication_buckets", "activations")  # components of a rank
_MASTER_AND_MOMENTS = 12  # bytes a parameter: fp32 master weight and AdamW's two moments
_FP32 = 4  # bytes; gradients are summed and sent in fp32


def memory(config: RunConfig, shape: ModelShape, ranks: Layout, stage: int, run: Pass) -> dict[str, int]:
    """Bytes on the device of a rank of a pipeline stage at the moment of a step when it holds most.

    `gradients` are summed or wait to be reduced, in `communication_buckets` (with copies that DeepSpeed makes of them).
    `gathered` are weights of stage 3 that are whole for a moment, `whole_sequence` the hidden states that tensor
    parallelism gathers, in a buffer of Megatron's for all layers. `step` is what AdamW's step takes.
    """
    has = parameter_shards(config, shape, ranks, stage)
    course, _ = _course(config, shape, ranks, stage, run)
    peak = max(course, key=lambda moment: moment.total)
    return {
        "weights": _weights(config, has),
        "gathered": peak.gathered,
        "gradients": peak.gradients.summed + peak.gradients.fresh,
        "communication_buckets": peak.gradients.buckets,
        "optimizer": 0 if config.zero.offload_optimizer else _optimizer(config, has),
        "activations": peak.activations,
        "whole_sequence": _whole_sequence(config, shape) if ranks.tensor > 1 else 0,
        "step": 0 if config.zero.offload_optimizer else peak.update,
    }


def components(kinds: dict[str, int]) -> dict[str, int]:
    """`memory` by MEASURED, and what is left: that which stage 3 and tensor parallelism gather, and AdamW's step."""
    found = {name: kinds[name] for name in MEASURED}
    return found | {"other": sum(kinds.values()) - sum(found.values())}


def as_measured(config: RunConfig, shape: ModelShape, ranks: Layout, stage: int, run: Pass) -> dict[str, int]:
    """Bytes by the kinds that can be told apart in a running engine, each at its own most; `peak` of all together."""
    kinds, has = memory(config, shape, ranks, stage, run), parameter_shards(config, shape, ranks, stage)
    course, how = _course(config, shape, ranks, stage, run)
    buffer = how.buffer(has.sizes)
    in_pass = max((each for each in course if each.activations), key=lambda moment: moment.total)
    copies = max(0, in_pass.gradients.buckets - buffer)
    return {
        "weights": kinds["weights"],
        "optimizer": kinds["optimizer"],
        "gradients": _gradients(config, has, micro_batches_of(config, ranks)) + kinds["whole_sequence"],
        "communication_buckets": buffer,
        "activations": in_pass.activations + in_pass.gathered + in_pass.gradients.fresh + copies,
        "peak": sum(kinds.values()),
    }


def _course(
    config: RunConfig, shape: ModelShape, ranks: Layout, stage: int, run: Pass
) -> tuple[list[Moment], Reduction]:
    """The moments of a step, and how it reduces gradients."""
    has, micro_batches, zero = (
        parameter_shards(config, shape, ranks, stage),
        micro_batches_of(config, ranks),
        config.zero,
    )
    passes = stage_pass(run, stage, ranks.pipeline, micro_batches)
    parts = segments(stage_shape(config, shape, stage), passes)
    how = Reduction(
        zero.stage,
        element(config),
        summed=micro_batches > 1,
        buffers=2 if zero.overlap_reduction and zero.stage < 3 and ranks.pipeline == 1 else 1,
        whole=ranks.pipeline > 1,
    )
    earlier = (passes.in_flight - 1) * sum(part.kept for part in parts)
    return list(moments(has, parts, how, earlier, _gathered(config, has))), how


def host(config: RunConfig, shape: ModelShape, ranks: Layout, stage: int) -> dict[str, int]:
    """What such a rank keeps in its host's memory by choice."""
    has = parameter_shards(config, shape, ranks, stage)
    kept = {
        "optimizer": _optimizer(config, has) if config.zero.offload_optimizer else 0,
        "weights": element(config) * has.part if config.zero.offload_parameters else 0,
    }
    return {name: size for name, size in kept.items() if size}


def micro_batches_of(config: RunConfig, ranks: Layout) -> int:
    """Micro-batches of a step on each replica."""
    return config.training.global_batch // (config.training.micro_batch * ranks.data)


def element(config: RunConfig) -> int:
    """Bytes of a weight and of an element of a hidden state."""
    return 2 if config.training.precision == "bf16" else 4


def _weights(config: RunConfig, has: ParameterShards) -> int:
    if config.zero.stage < 3:
        return element(config) * has.whole
    cut = 0 if config.zero.offload_parameters else has.part
    return element(config) * (cut + has.small * (has.dense_replicas > 1))


def _gathered(config: RunConfig, has: ParameterShards) -> int:
    """The largest layer or table, and what is gathered ahead.

    Nothing where nothing is cut, on one rank.
    """
    if config.zero.stage < 3:
        return 0
    return element(config) * min(has.gathered, max(has.largest, has.sizes.live) + has.sizes.prefetch_bucket)


def _gradients(config: RunConfig, has: ParameterShards, micro_batches: int) -> int:
    """Stage 1 sums whole gradients over micro-batches, in bf16 always.

    Stages 1 and 2 in fp32 keep whole tensors of which a part is the rank's.
    """
    stage, bf16 = config.zero.stage, config.training.precision == "bf16"
    if stage == 0 or (stage == 1 and (bf16 or micro_batches > 1 or config.parallel.pipeline > 1)):
        return _FP32 * has.whole
    return _FP32 * (has.part if bf16 or stage == 3 else has.touched)


def _whole_sequence(config: RunConfig, shape: ModelShape) -> int:
    return element(config) * config.training.micro_batch * shape.seq_length * shape.hidden


def _optimizer(config: RunConfig, has: ParameterShards) -> int:
    return (_MASTER_AND_MOMENTS - _FP32) * has.whole if config.zero.stage == 0 else _MASTER_AND_MOMENTS * has.part
