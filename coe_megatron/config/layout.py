"""How ranks divide the work: the sizes of a layout, and the one place that says which layouts are valid and why.

Of TP x PP ranks each group holds the dense parameters once, of ETP x EP x PP ranks the experts; what is left of all
ranks is data parallelism, of replicas of the one and of the other. Megatron builds its groups from the same numbers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import lcm

from coe_megatron.alignment import row_multiple
from coe_megatron.config.settings import RunConfig


@dataclass(frozen=True)
class Layout:
    """Sizes that multiply to the number of ranks.

    Attributes:
        world_size: number of ranks.
        tensor: TP, ranks that cut attention, shared experts, embedding and, between these, the sequence.
        pipeline: PP, stages of consecutive layers.
        expert: EP, ranks that divide the experts of a layer among them.
        expert_tensor: ETP, ranks that cut every expert.
    """

    world_size: int
    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    expert_tensor: int = 1

    @property
    def data(self) -> int:
        """Replicas of the dense parameters; each has micro-batches of its own."""
        return self.world_size // (self.tensor * self.pipeline)

    @property
    def expert_data(self) -> int:
        """Replicas of an expert."""
        return self.world_size // (self.expert_tensor * self.expert * self.pipeline)

    def __str__(self) -> str:
        """Such as `data 4, tensor 2, expert 2`; what is 1 is left out, but for data."""
        sizes = {"tensor": self.tensor, "pipeline": self.pipeline, "expert": self.expert}
        sizes["expert tensor"] = self.expert_tensor
        return ", ".join([f"data {self.data}", *(f"{name} {size}" for name, size in sizes.items() if size > 1)])


def layout(config: RunConfig, world_size: int | None = None) -> Layout:
    """The run's layout.

    Args:
        world_size: number of ranks; when None `parallel.world_size`, or as few as the other sizes allow.
    """
    parallel = config.parallel
    size = world_size or parallel.world_size or _unit(config)
    return Layout(size, parallel.tensor, parallel.pipeline, parallel.expert, parallel.expert_tensor)


def moe_pattern(config: RunConfig) -> tuple[int, ...]:
    """1 for each layer with experts, 0 for each dense one, as Megatron reads `layer_freq`."""
    frequency = config.moe.layer_freq
    if isinstance(frequency, int):
        return tuple(int(layer % frequency == 0) for layer in range(config.model.num_layers))
    return tuple(frequency)


def chain_pattern(config: RunConfig) -> tuple[int, ...]:
    """1 for each layer that is a chain, 0 for each that has experts but is none, or has none."""
    pattern = enumerate(moe_pattern(config), start=1)
    return tuple(int(has_experts and config.chain.is_chain(number)) for number, has_experts in pattern)


def problems(config: RunConfig, world_size: int | None = None) -> Iterator[str]:
    """Every rule that a layout breaks, one line each."""
    yield from _tensor(config)
    yield from _experts(config)
    yield from _pipeline(config)
    yield from _ranks(config, world_size)


def _unit(config: RunConfig) -> int:
    """The number of ranks must be a multiple of this."""
    parallel = config.parallel
    return parallel.pipeline * lcm(parallel.tensor, parallel.expert * parallel.expert_tensor)


def _tensor(config: RunConfig) -> Iterator[str]:
    size, model, moe = config.parallel.tensor, config.model, config.moe
    if size > 1 and model.mla is not None:
        yield (
            f"parallel.tensor is {size}: with model.mla it must be 1, because Megatron-Core 0.16.1 without Transformer "
            "Engine then leaves out a part of the gradients of attention; take parallel.expert or parallel.pipeline"
        )
    cut = {
        "model.num_attention_heads": model.num_attention_heads,
        "model.num_query_groups": model.num_query_groups or size,
        "model.seq_length": model.seq_length,
        "model.vocab_size": model.vocab_size or 64,  # the tokenizer's size is rounded up to a multiple of that
        "the width of the shared experts": moe.num_shared_experts * moe.ffn_hidden_size,
    }
    if isinstance(moe.layer_freq, list) or moe.layer_freq > 1:
        cut["model.ffn_hidden_size"] = model.ffn_hidden_size or 4 * model.hidden_size
    for name, value in cut.items():
        if value % size:
            yield f"parallel.tensor is {size}: it must divide {name} ({value})"


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
    stages = config.parallel.pipeline
    if stages == 1:
        return
    if config.model.num_layers % stages:
        yield f"parallel.pipeline is {stages}: it must divide model.num_layers ({config.model.num_layers})"
    if config.zero.stage > 1:
        yield (
            f"zero.stage is {config.zero.stage}: with parallel.pipeline ({stages}) it must be 0 or 1, because stages 2 "
            "and 3 take gradients away after every micro-batch, of which a pipeline has several under way"
        )
    elif config.zero.stage == 1 and _are_apart(config) and not all(map(any, _by_stage(config))):
        yield (
            f"moe.layer_freq is {config.moe.layer_freq}: with parallel.pipeline ({stages}) each stage needs a layer "
            "with experts, or zero.stage be 0: DeepSpeed's stages would wait for each other's norms of experts"
        )
    if not config.model.untied_embeddings:
        yield (
            f"model.untied_embeddings is false: with parallel.pipeline ({stages}) it must be true, because the first "
            "stage would hold the embedding and the last one the output layer"
        )


def _are_apart(config: RunConfig) -> bool:
    """Whether experts have other replicas than what is dense."""
    return config.parallel.expert > 1 or config.parallel.expert_tensor != config.parallel.tensor


def _by_stage(config: RunConfig) -> list[tuple[int, ...]]:
    """`moe_pattern` cut into pipeline stages; that divides the layers."""
    pattern, count = moe_pattern(config), config.model.num_layers // config.parallel.pipeline
    return [pattern[first : first + count] for first in range(0, len(pattern), max(1, count))]


def _ranks(config: RunConfig, world_size: int | None) -> Iterator[str]:
    meant, unit, training = config.parallel.world_size, _unit(config), config.training
    if None not in (meant, world_size) and meant != world_size:
        yield f"parallel.world_size is {meant}: {world_size} ranks were started, start as many or leave it null"
    found = layout(config, meant or world_size)
    if found.world_size % unit:
        sizes = {name: getattr(config.parallel, name) for name in ("tensor", "pipeline", "expert", "expert_tensor")}
        which = [name for name, size in sizes.items() if size > 1]
        yield (
            f"{' and '.join(f'parallel.{name} is {sizes[name]}' for name in which)}: the number of ranks "
            f"({found.world_size}) must be a multiple of {unit}; start so many (torchrun --nproc-per-node {unit}) or "
            f"give {' '.join(f'parallel.{name}=1' for name in which)}"
        )
        return
    rows = training.micro_batch * found.data
    if training.global_batch % rows:
        yield (
            f"training.global_batch is {training.global_batch}: it must be a multiple of training.micro_batch x "
            f"data-parallel ranks ({training.micro_batch} x {found.data} = {rows})"
        )
