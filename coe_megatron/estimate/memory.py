"""Closed forms of the memory of one rank, in bytes by kind; tests compare them with running engines on the CPU."""

from dataclasses import dataclass

from coe_megatron.estimate.activations import segments
from coe_megatron.estimate.checkpoint_size import MASTER_AND_MOMENTS
from coe_megatron.estimate.gradients import Moment, Reduction, moments
from coe_megatron.estimate.parameter_shards import ParameterShards, parameter_shards
from coe_megatron.estimate.run_shape import RunShape

MEASURED = ("weights", "gradients", "optimizer", "communication_buckets", "activations")  # components of a rank
_FP32 = 4  # bytes; gradients are accumulated and reduced in fp32


@dataclass(frozen=True)
class Memory:
    """Memory of a rank of a pipeline stage, in bytes.

    Attributes:
        kinds: device memory at the peak of a step. `gradients` are accumulated or waiting to be reduced, in
            `communication_buckets` (which include DeepSpeed's copies of them). `gathered` are weights that stage 3 has
            gathered; `gathered_sequence` are the hidden states that tensor parallelism gathers, in a buffer that
            Megatron uses for all layers. `step` are temporaries of AdamW's update.
        measured: the kinds that can be distinguished in a running engine, each at its own maximum; `peak` is the
            maximum of their sum.
        host: memory of the host, for what is offloaded.
    """

    kinds: dict[str, int]
    measured: dict[str, int]
    host: dict[str, int]

    @property
    def total(self) -> int:
        """Device memory at the peak."""
        return sum(self.kinds.values())


def memory(run: RunShape, stage: int) -> Memory:
    """The memory of a rank of a pipeline stage (from 0)."""
    shards, zero = parameter_shards(run, stage), run.config.zero
    step, reduction = _moments_of_step(run, stage, shards)
    peak = max(step, key=lambda moment: moment.total)
    kinds = {
        "weights": _weights(run, shards),
        "gathered": peak.gathered,
        "gradients": peak.gradients.accumulated + peak.gradients.temporary,
        "communication_buckets": peak.gradients.buckets,
        "optimizer": 0 if zero.offload_optimizer else _optimizer(run, shards),
        "activations": peak.activations,
        "gathered_sequence": _gathered_sequence(run) if run.layout.tensor > 1 else 0,
        "step": 0 if zero.offload_optimizer else peak.update,
    }
    host = {
        "optimizer": _optimizer(run, shards) if zero.offload_optimizer else 0,
        "weights": run.element_bytes * shards.partition if zero.offload_parameters else 0,
    }
    measured = _measured(run, shards, step, reduction, kinds)
    return Memory(kinds, measured, {name: size for name, size in host.items() if size})


def components(kinds: dict[str, int]) -> dict[str, int]:
    """`Memory.kinds` by MEASURED, and `other`: what stage 3 and tensor parallelism gather, and AdamW's temporaries."""
    found = {name: kinds[name] for name in MEASURED}
    return found | {"other": sum(kinds.values()) - sum(found.values())}


def _measured(
    run: RunShape, shards: ParameterShards, step: list[Moment], reduction: Reduction, kinds: dict[str, int]
) -> dict[str, int]:
    buffer = reduction.buffer(shards.sizes)
    backward_peak = max((moment for moment in step if moment.activations), key=lambda moment: moment.total)
    copies = max(0, backward_peak.gradients.buckets - buffer)
    return {
        "weights": kinds["weights"],
        "optimizer": kinds["optimizer"],
        "gradients": _gradients(run, shards) + kinds["gathered_sequence"],
        "communication_buckets": buffer,
        "activations": backward_peak.activations + backward_peak.gathered + backward_peak.gradients.temporary + copies,
        "peak": sum(kinds.values()),
    }


def _moments_of_step(run: RunShape, stage: int, shards: ParameterShards) -> tuple[list[Moment], Reduction]:
    """The moments of a step, and how it reduces gradients."""
    zero, pass_settings = run.config.zero, run.stage_pass(stage)
    parts = segments(run.stage_model(stage), pass_settings)
    reduction = Reduction(
        zero.stage,
        run.element_bytes,
        accumulates=run.micro_batches > 1,
        buffers=2 if shards.sizes.overlap and zero.stage < 3 and run.layout.pipeline == 1 else 1,
        pipelined=run.layout.pipeline > 1,
    )
    earlier = int((pass_settings.in_flight - 1) * sum(part.kept for part in parts[:-1]))  # no logits
    return list(moments(shards, parts, reduction, earlier, _gathered(run, shards))), reduction


def _weights(run: RunShape, shards: ParameterShards) -> int:
    if run.config.zero.stage < 3:
        return run.element_bytes * shards.total
    partition = 0 if run.config.zero.offload_parameters else shards.partition
    return run.element_bytes * (partition + shards.persistent * (shards.dense_replicas > 1))


def _gathered(run: RunShape, shards: ParameterShards) -> int:
    """The largest layer or table, and what is prefetched; 0 if nothing is partitioned, as on one rank."""
    if run.config.zero.stage < 3:
        return 0
    sizes = shards.sizes
    return run.element_bytes * min(shards.gathered, max(shards.largest_module, sizes.max_live) + sizes.prefetch_bucket)


def _gradients(run: RunShape, shards: ParameterShards) -> int:
    """Gradients between two backward passes.

    Stage 1 accumulates full gradients over micro-batches, in bf16 always. Stages 1 and 2 in fp32 keep all tensors that
    overlap the rank's partition.
    """
    stage, bf16 = run.config.zero.stage, run.config.training.precision == "bf16"
    if stage == 0 or (stage == 1 and (bf16 or run.micro_batches > 1 or run.layout.pipeline > 1)):
        return _FP32 * shards.total
    return _FP32 * (shards.partition if bf16 or stage == 3 else shards.overlapping)


def _gathered_sequence(run: RunShape) -> int:
    positions = run.model.seq_length // run.layout.context
    return run.element_bytes * run.config.training.micro_batch * positions * run.model.hidden


def _optimizer(run: RunShape, shards: ParameterShards) -> int:
    if run.config.zero.stage == 0:  # the weights are fp32 and serve as masters
        return (MASTER_AND_MOMENTS - _FP32) * shards.total
    return MASTER_AND_MOMENTS * shards.partition
