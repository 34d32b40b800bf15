"""The parameters of one rank before and after ZeRO partitions them, as tensors in the order of the model.

TP shards attention, shared experts, dense layers, embedding and output layer; EP and ETP shard routed experts. Norms,
gains, routers and matrices of variants are replicated (with Transformer Engine, so are MLA's two down-projections).
Pipeline stages hold layers (consecutive ones, or parts of consecutive ones), the first one also the embedding and the
last one the output layer. ZeRO then partitions the parameters over their replicas.
"""

from collections import Counter
from dataclasses import dataclass

from coe_megatron.config.layout import Layout
from coe_megatron.config.native import read_native
from coe_megatron.config.zero_sizes import ZeroSizes
from coe_megatron.estimate import closed_forms
from coe_megatron.estimate.closed_forms import ModelShape
from coe_megatron.estimate.run_shape import RunShape


@dataclass(frozen=True)
class ParameterShards:
    """Numbers of parameters of one rank before ZeRO partitions them.

    Attributes:
        dense, experts: number of parameters.
        dense_replicas, expert_replicas: number of ranks that hold the same parameters, over which ZeRO partitions.
        separate_experts: experts are partitioned and updated separately, since their replicas form other groups.
        persistent: parameters in tensors that stage 3 does not partition.
        largest_module: parameters of the largest layer or table, counting only those that have replicas.
        overlapping: parameters in tensors that overlap a rank's partition, which may begin and end inside a tensor; the
            largest number over ranks.
        segments: sizes of the matrices, by segment of a forward pass (embedding, attention and feed-forward of each
            layer, output layer, as in `activations.segments`), in the order of their gradients.
        sizes: DeepSpeed's bucket sizes.
    """

    dense: int
    experts: int
    dense_replicas: int
    expert_replicas: int
    separate_experts: bool
    persistent: int
    largest_module: int
    overlapping: int
    segments: tuple[tuple[int, ...], ...]
    sizes: ZeroSizes

    @property
    def total(self) -> int:
        """All parameters."""
        return self.dense + self.experts

    @property
    def largest_tensor(self) -> int:
        """Parameters of the largest matrix."""
        return max(size for segment in self.segments for size in segment)

    @property
    def gathered(self) -> int:
        """Parameters that stage 3 partitions and gathers: not persistent, and with replicas."""
        dense = max(0, self.dense * (self.dense_replicas > 1) - self.persistent)
        return dense + self.experts * (self.expert_replicas > 1)

    @property
    def partition(self) -> int:
        """Parameters in the rank's ZeRO partition."""
        return sum(self._partitions)

    @property
    def largest_update(self) -> int:
        """The largest number of these parameters that AdamW updates at once."""
        return max(self._partitions) if self.separate_experts else self.partition

    @property
    def _partitions(self) -> tuple[int, int]:
        return -(-self.dense // self.dense_replicas), -(-self.experts // self.expert_replicas)


def parameter_shards(run: RunShape, stage: int) -> ParameterShards:
    """The parameters of each rank of a pipeline stage (from 0)."""
    own, layout, native = run.stage_model(stage), run.layout, run.config.zero.deepspeed
    counted = closed_forms.parameters(own)
    first, last = stage == 0, stage == layout.pipeline - 1
    layers = counted.attention + counted.shared + counted.dense
    tables = counted.embedding * first + counted.output * last
    vectors = counted.norms + counted.gains - (0 if last else counted.final_norm)
    replicated = vectors + counted.routers + counted.variants
    dense = (layers + tables) // layout.tensor + replicated
    experts = counted.experts // (layout.expert * layout.expert_tensor)
    table, experts_have_replicas = counted.embedding // layout.tensor, layout.expert_data > 1
    output = [("dense", table)] * (last and own.untied_embeddings)
    segments = [[("dense", table)] * first, *_segments(own, layout), output]
    in_order = [each for segment in segments for each in segment]
    sizes = ZeroSizes.of(dense + experts, read_native(native) if native else {})
    small = [size for kind, size in in_order if kind == "dense" and size <= sizes.persistence_threshold]
    experts_per_layer = experts // max(1, own.num_moe_layers) if experts_have_replicas else 0
    return ParameterShards(
        dense=dense,
        experts=experts,
        dense_replicas=layout.replicas,
        expert_replicas=layout.expert_data,
        separate_experts=layout.separate_experts,
        persistent=vectors + sum(small),
        largest_module=max(-(-(layers // layout.tensor + replicated) // own.layers) + experts_per_layer, table),
        overlapping=_overlapping(in_order, layout),
        segments=tuple(tuple(_in_gradient_order(segment)) for segment in segments),
        sizes=sizes,
    )


def _overlapping(in_order: list[tuple[str, int]], layout: Layout) -> int:
    """See `ParameterShards`. DeepSpeed flattens experts together with all other tensors, or separately."""
    if not layout.separate_experts:
        return _most_overlapping([size for _, size in in_order], layout.replicas)
    dense, experts = ([size for kind, size in in_order if kind == which] for which in ("dense", "expert"))
    return _most_overlapping(dense, layout.replicas) + _most_overlapping(experts, layout.expert_data)


def _most_overlapping(sizes: list[int], replicas: int) -> int:
    """Flatten tensors and split them into equal partitions: the largest total size of tensors that overlap one."""
    partition, start = -(-sum(sizes) // replicas), 0
    totals: Counter[int] = Counter()  # of the partitions in which a tensor begins or ends; others overlap one only
    for size in sizes:
        for number in {start // partition, (start + size - 1) // partition}:
            totals[number] += size
        start += size
    return max(totals.values())


def _segments(shape: ModelShape, layout: Layout) -> list[list[tuple[str, int]]]:
    """A rank's matrices as (`dense` or `expert`, size), by segment: attention and feed-forward of each layer."""
    d, width, tensor = shape.hidden, shape.chain_width, layout.tensor
    router = shape.experts * width
    shared = [(shape.ffn_matrices - 1) * width * shape.shared_ffn // tensor, width * shape.shared_ffn // tensor]
    gate = [width] if shape.shared_gate else []
    plain = [router, *([*gate, *shared] if shape.shared_ffn else [])]
    down, up = shape.modulation_matrices[:1], shape.modulation_matrices[1:]
    chain = plain + [router] * (shape.routers - 1) + down + shape.latent_matrices + up
    dense = [(shape.ffn_matrices - 1) * d * shape.dense_ffn // tensor, d * shape.dense_ffn // tensor]
    attention = [("dense", size // tensor) for size in _attention_matrices(shape)]
    expert = shape.experts // layout.expert * width * shape.expert_ffn // layout.expert_tensor
    pattern = shape.moe_layers if isinstance(shape.moe_layers, tuple) else (1,) * shape.layers
    experts = [("expert", (shape.ffn_matrices - 1) * expert), ("expert", expert)]
    segments = []
    for is_moe, is_chain in zip(pattern, shape.chains or pattern, strict=True):
        others = chain if is_chain else plain if is_moe else dense
        segments += [attention, (experts if is_moe else []) + [("dense", size) for size in others]]
    return segments


def _in_gradient_order(segment: list[tuple[str, int]]) -> list[int]:
    """Sizes in the order of gradients: experts before router and shared experts; attention's output first."""
    experts = [size for kind, size in segment if kind == "expert"]
    first, *rest = [size for kind, size in segment if kind == "dense"] or [0]
    return [*reversed(experts), first, *reversed(rest)]


def _attention_matrices(shape: ModelShape) -> list[int]:
    """Sizes of the matrices of attention, in Megatron's order."""
    d, heads = shape.hidden, shape.heads
    if shape.attention == "mha":
        width = shape.head_width
        return [heads * width * d, d * width * (heads + 2 * (shape.kv_groups or heads))]
    query, rank = heads * (shape.qk_nope + shape.qk_rope), shape.q_lora_rank
    queries = [d * query] if rank is None else [d * rank, rank * query]
    down = d * (shape.kv_lora_rank + shape.qk_rope)
    up = shape.kv_lora_rank * heads * (shape.qk_nope + shape.v_head_dim)
    return [heads * shape.v_head_dim * d, *queries, down, up]
