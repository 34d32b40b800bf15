"""Closed forms of what one rank holds, in bytes by kind; tests hold them against running engines on the CPU."""

from dataclasses import dataclass

from coe_megatron.estimate.activations import segments
from coe_megatron.estimate.gradients import Moment, Reduction, moments
from coe_megatron.estimate.parameter_shards import ParameterShards, parameter_shards
from coe_megatron.estimate.run_shape import RunShape

MEASURED = ("weights", "gradients", "optimizer", "communication_buckets", "activations")  # components of a rank
_MASTER_AND_MOMENTS = 12  # bytes a parameter: fp32 master weight and AdamW's two moments
_FP32 = 4  # bytes; gradients are summed and sent in fp32


@dataclass(frozen=True)
class Memory:
    """Bytes on the device of a rank of a pipeline stage.

    Attributes:
        kinds: at the moment of a step when it holds most. `gradients` are summed or wait to be reduced, in
            `communication_buckets` (with copies that DeepSpeed makes of them). `gathered` are weights of stage 3 that
            are whole for a moment, `whole_sequence` the hidden states that tensor parallelism gathers, in a buffer of
            Megatron's for all layers. `step` is what AdamW's step takes.
        measured: by the kinds that can be told apart in a running engine, each at its own most; `peak` of all together.
        host: what such a rank keeps in its host's memory by choice.
    """

    kinds: dict[str, int]
    measured: dict[str, int]
    host: dict[str, int]

    @property
    def total(self) -> int:
        """At that moment."""
        return sum(self.kinds.values())


def memory(run: RunShape, stage: int) -> Memory:
    """What a rank of a pipeline stage (from 0) holds."""
    has, zero = parameter_shards(run, stage), run.config.zero
    course, how = _course(run, stage, has)
    peak = max(course, key=lambda moment: moment.total)
    kinds = {
        "weights": _weights(run, has),
        "gathered": peak.gathered,
        "gradients": peak.gradients.summed + peak.gradients.fresh,
        "communication_buckets": peak.gradients.buckets,
        "optimizer": 0 if zero.offload_optimizer else _optimizer(run, has),
        "activations": peak.activations,
        "whole_sequence": _whole_sequence(run) if run.layout.tensor > 1 else 0,
        "step": 0 if zero.offload_optimizer else peak.update,
    }
    host = {
        "optimizer": _optimizer(run, has) if zero.offload_optimizer else 0,
        "weights": run.element_bytes * has.part if zero.offload_parameters else 0,
    }
    measured = _as_measured(run, has, course, how, kinds)
    return Memory(kinds, measured, {name: size for name, size in host.items() if size})


def components(kinds: dict[str, int]) -> dict[str, int]:
    """`Memory.kinds` by MEASURED, and what is left: what stage 3 and tensor parallelism gather, and AdamW's step."""
    found = {name: kinds[name] for name in MEASURED}
    return found | {"other": sum(kinds.values()) - sum(found.values())}


def _as_measured(
    run: RunShape, has: ParameterShards, course: list[Moment], how: Reduction, kinds: dict[str, int]
) -> dict[str, int]:
    buffer = how.buffer(has.sizes)
    in_pass = max((each for each in course if each.activations), key=lambda moment: moment.total)
    copies = max(0, in_pass.gradients.buckets - buffer)
    return {
        "weights": kinds["weights"],
        "optimizer": kinds["optimizer"],
        "gradients": _gradients(run, has) + kinds["whole_sequence"],
        "communication_buckets": buffer,
        "activations": in_pass.activations + in_pass.gathered + in_pass.gradients.fresh + copies,
        "peak": sum(kinds.values()),
    }


def _course(run: RunShape, stage: int, has: ParameterShards) -> tuple[list[Moment], Reduction]:
    """The moments of a step, and how it reduces gradients."""
    zero, passes = run.config.zero, run.stage_pass(stage)
    parts = segments(run.stage_model(stage), passes)
    how = Reduction(
        zero.stage,
        run.element_bytes,
        summed=run.micro_batches > 1,
        buffers=2 if has.sizes.overlap and zero.stage < 3 and run.layout.pipeline == 1 else 1,
        whole=run.layout.pipeline > 1,
    )
    earlier = (passes.in_flight - 1) * sum(part.kept for part in parts)
    return list(moments(has, parts, how, earlier, _gathered(run, has))), how


def _weights(run: RunShape, has: ParameterShards) -> int:
    if run.config.zero.stage < 3:
        return run.element_bytes * has.whole
    cut = 0 if run.config.zero.offload_parameters else has.part
    return run.element_bytes * (cut + has.small * (has.dense_replicas > 1))


def _gathered(run: RunShape, has: ParameterShards) -> int:
    """The largest layer or table, and what is gathered ahead.

    Nothing where nothing is cut, on one rank.
    """
    if run.config.zero.stage < 3:
        return 0
    return run.element_bytes * min(has.gathered, max(has.largest, has.sizes.max_live) + has.sizes.prefetch_bucket)


def _gradients(run: RunShape, has: ParameterShards) -> int:
    """Stage 1 sums whole gradients over micro-batches, in bf16 always.

    Stages 1 and 2 in fp32 keep whole tensors of which a part is the rank's.
    """
    stage, bf16 = run.config.zero.stage, run.config.training.precision == "bf16"
    if stage == 0 or (stage == 1 and (bf16 or run.micro_batches > 1 or run.layout.pipeline > 1)):
        return _FP32 * has.whole
    return _FP32 * (has.part if bf16 or stage == 3 else has.touched)


def _whole_sequence(run: RunShape) -> int:
    return run.element_bytes * run.config.training.micro_batch * run.model.seq_length * run.model.hidden


def _optimizer(run: RunShape, has: ParameterShards) -> int:
    whole = run.config.zero.stage == 0
    return (_MASTER_AND_MOMENTS - _FP32) * has.whole if whole else _MASTER_AND_MOMENTS * has.part
