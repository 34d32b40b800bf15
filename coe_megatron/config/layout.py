"""Parallel layouts: the sizes, and all rules for valid layouts.

Each group of TP x PP ranks holds the dense parameters once, and each group of ETP x EP x PP ranks the experts. The
remaining factors of the world size are their replicas. CP replicas of the dense parameters share their sequences; the
remaining factor of these is data parallelism. Megatron builds its process groups from the same sizes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import lcm

from coe_megatron.alignment import row_multiple
from coe_megatron.config.settings import RunConfig

SIZES = ("tensor", "context", "pipeline", "expert", "expert_tensor")  # settings of `parallel` that divide the ranks


@dataclass(frozen=True)
class Layout:
    """The sizes of a parallel layout.

    Attributes:
        world_size: number of ranks.
        tensor: TP, ranks that shard attention, shared experts, embedding and, in between, the sequence.
        pipeline: PP, stages of layers.
        expert: EP, ranks that share the experts of a layer.
        expert_tensor: ETP, ranks that shard each expert.
        context: CP, replicas of the dense parameters that share their sequences.
        virtual_pipeline: VPP, parts of each stage; all first parts come before all second ones.
    """

    world_size: int
    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    expert_tensor: int = 1
    context: int = 1
    virtual_pipeline: int = 1

    @property
    def replicas(self) -> int:
        """Replicas of the dense parameters."""
        return self.world_size // (self.tensor * self.pipeline)

    @property
    def data(self) -> int:
        """Groups of ranks that process micro-batches of their own."""
        return self.replicas // self.context

    @property
    def expert_data(self) -> int:
        """Replicas of each expert."""
        return self.world_size // (self.expert_tensor * self.expert * self.pipeline)

    @property
    def separate_experts(self) -> bool:
        """Whether replicas of experts form other groups than replicas of the dense parameters."""
        return self.expert > 1 or self.expert_tensor != self.tensor

    def __str__(self) -> str:
        """For example `data 4, tensor 2, expert 2`; sizes of 1 are omitted, except data."""
        sizes = {"tensor": self.tensor, "context": self.context, "pipeline": self.pipeline}
        sizes |= {"virtual pipeline": self.virtual_pipeline, "expert": self.expert, "expert tensor": self.expert_tensor}
        return ", ".join([f"data {self.data}", *(f"{name} {size}" for name, size in sizes.items() if size > 1)])


def layout(config: RunConfig, world_size: int | None = None) -> Layout:
    """The layout of a run.

    Args:
        world_size: number of ranks; None means `parallel.world_size`, or the fewest that the other sizes allow.
    """
    parallel = config.parallel
    size = world_size or parallel.world_size or rank_unit(config)
    names = ("tensor", "pipeline", "expert", "expert_tensor", "context", "virtual_pipeline")
    return Layout(size, *(getattr(parallel, name) for name in names))


def moe_pattern(config: RunConfig) -> tuple[int, ...]:
    """For each layer 1 if it is MoE, 0 if it is dense, as Megatron interprets `layer_freq`."""
    frequency = config.moe.layer_freq
    if isinstance(frequency, int):
        return tuple(int(layer % frequency == 0) for layer in range(config.model.num_layers))
    return tuple(frequency)


def chain_pattern(config: RunConfig) -> tuple[int, ...]:
    """For each layer 1 if it is a chain, 0 if it is a plain MoE or dense layer."""
    pattern = enumerate(moe_pattern(config), start=1)
    return tuple(int(has_experts and config.chain.is_chain(number)) for number, has_experts in pattern)


def problems(config: RunConfig, world_size: int | None = None) -> Iterator[str]:
    """Every rule that the layout breaks, one line each."""
    yield from _tensor(config)
    yield from _context(config)
    yield from _experts(config)
    yield from _pipeline(config)
    yield from _ranks(config, world_size)


def rank_unit(config: RunConfig) -> int:
    """The number that must divide the number of ranks."""
    parallel = config.parallel
    return parallel.pipeline * lcm(parallel.tensor * parallel.context, parallel.expert * parallel.expert_tensor)


def _tensor(config: RunConfig) -> Iterator[str]:
    size, model, moe = config.parallel.tensor, config.model, config.moe
    if size > 1 and model.qk_norm_over_heads:
        yield f"parallel.tensor is {size}: with model.qk_norm_over_heads, whose norms see all heads, it must be 1"
    sharded = {
        "model.num_attention_heads": model.num_attention_heads,
        "model.num_query_groups": model.num_query_groups or size,
        "model.seq_length": model.seq_length,
        "model.vocab_size": model.vocab_size or 64,  # the tokenizer's size is rounded up to a multiple of 64
        "the width of the shared experts": moe.num_shared_experts * moe.ffn_hidden_size,
    }
    if (mla := model.mla) is not None:
        sharded["model.mla.kv_lora_rank + qk_pos_emb_head_dim"] = mla.kv_lora_rank + mla.qk_pos_emb_head_dim
        sharded["model.mla.q_lora_rank"] = mla.q_lora_rank or size
    if isinstance(moe.layer_freq, list) or moe.layer_freq > 1:
        sharded["model.ffn_hidden_size"] = model.ffn_hidden_size or 4 * model.hidden_size
    for name, value in sharded.items():
        if value % size:
            yield f"parallel.tensor is {size}: it must divide {name} ({value})"


def _context(config: RunConfig) -> Iterator[str]:
    size, length, tensor = config.parallel.context, config.model.seq_length, config.parallel.tensor
    if size > 1 and length % (2 * size * tensor):
        yield (
            f"parallel.context is {size}: model.seq_length ({length}) must be a multiple of {2 * size * tensor}"
            f"{', 2 x parallel.context x parallel.tensor' if tensor > 1 else ', 2 x parallel.context'}"
        )


def _experts(config: RunConfig) -> Iterator[str]:
    parallel, moe = config.parallel, config.moe
    if moe.num_experts % parallel.expert:
        yield f"parallel.expert is {parallel.expert}: it must divide moe.num_experts ({moe.num_experts})"
    multiple = row_multiple(config.training.element_bytes)
    if moe.ffn_hidden_size % (parallel.expert_tensor * multiple) and moe.ffn_hidden_size % multiple == 0:
        yield (
            f"parallel.expert_tensor is {parallel.expert_tensor}: it must cut moe.ffn_hidden_size "
            f"({moe.ffn_hidden_size}) into multiples of {multiple} ({config.training.precision})"
        )


def _pipeline(config: RunConfig) -> Iterator[str]:
    stages, parts, layers = config.parallel.pipeline, config.parallel.virtual_pipeline, config.model.num_layers
    if stages == 1:
        if parts > 1:
            yield f"parallel.virtual_pipeline is {parts}: it needs parallel.pipeline above 1"
        return
    if layers % stages:
        yield f"parallel.pipeline is {stages}: it must divide model.num_layers ({layers})"
    elif layers % (stages * parts):
        yield (
            f"parallel.virtual_pipeline is {parts}: with parallel.pipeline ({stages}), {stages * parts} must divide "
            f"model.num_layers ({layers})"
        )
    if config.zero.stage > 1:
        yield (
            f"zero.stage is {config.zero.stage}: with parallel.pipeline ({stages}) it must be 0 or 1, because stages 2 "
            "and 3 partition gradients after each micro-batch, and a pipeline has several in flight"
        )
    elif config.zero.offload_optimizer and layout(config).separate_experts and _has_stage_without_experts(config):
        yield (
            f"zero.offload_optimizer is true: with parallel.pipeline ({stages}) each stage needs a layer with experts, "
            f"not moe.layer_freq {config.moe.layer_freq}, because DeepSpeed sums the norm of each parameter group"
        )
    if not config.model.untied_embeddings:
        yield (
            f"model.untied_embeddings is false: with parallel.pipeline ({stages}) it must be true, because the first "
            "stage holds the embedding and the last one the output layer"
        )


def stage_layers(config: RunConfig, stage: int) -> list[int]:
    """The layers of a pipeline stage, both from 0; in `parallel.virtual_pipeline` parts of consecutive ones."""
    stages, parts = config.parallel.pipeline, config.parallel.virtual_pipeline
    count = config.model.num_layers // (stages * parts)
    firsts = ((part * stages + stage) * count for part in range(parts))
    return [layer for first in firsts for layer in range(first, first + count)]


def _has_stage_without_experts(config: RunConfig) -> bool:
    pattern = moe_pattern(config)
    stages = (stage_layers(config, stage) for stage in range(config.parallel.pipeline))
    return not all(any(pattern[layer] for layer in layers) for layers in stages)


def _ranks(config: RunConfig, world_size: int | None) -> Iterator[str]:
    required, unit, training = config.parallel.world_size, rank_unit(config), config.training
    if None not in (required, world_size) and required != world_size:
        yield f"parallel.world_size is {required}: {world_size} ranks were started, start {required} or set it to null"
    found = layout(config, required or world_size)
    if found.world_size % unit:
        sizes = {name: getattr(config.parallel, name) for name in SIZES}
        names = [name for name, size in sizes.items() if size > 1]
        yield (
            f"{' and '.join(f'parallel.{name} is {sizes[name]}' for name in names)}: the number of ranks "
            f"({found.world_size}) must be a multiple of {unit}; start {unit} (torchrun --nproc-per-node {unit}) or "
            f"set {' '.join(f'parallel.{name}=1' for name in names)}"
        )
        return
    rows = training.micro_batch * found.data
    micro_batches, more = divmod(training.global_batch, rows)
    if not more and found.virtual_pipeline > 1 and micro_batches % found.pipeline:
        yield (
            f"parallel.virtual_pipeline is {found.virtual_pipeline}: the micro-batches of a step on each replica "
            f"({micro_batches}) must be a multiple of parallel.pipeline ({found.pipeline})"
        )
    if more:
        yield (
            f"training.global_batch is {training.global_batch}: it must be a multiple of training.micro_batch x "
            f"data-parallel ranks ({training.micro_batch} x {found.data} = {rows})"
        )
