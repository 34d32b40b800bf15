"""What parameters a rank holds, before ZeRO cuts them and after, as tensors in the model's order.

What is cut by what: attention, shared experts, dense layers, embedding and output layer by TP; routed experts by EP and
ETP; norms, gains and routers by neither (of MLA with Transformer Engine the two down-projections are not either).
Layers, and with them embedding and output layer, belong to a pipeline stage. What is left ZeRO cuts over the replicas.
"""

from dataclasses import dataclass

from coe_megatron.config.layout import Layout
from coe_megatron.config.native import read_native
from coe_megatron.config.zero_sizes import ZeroSizes
from coe_megatron.estimate import closed_forms
from coe_megatron.estimate.closed_forms import ModelShape
from coe_megatron.estimate.run_shape import RunShape


@dataclass(frozen=True)
class ParameterShards:
    """Parameters of a rank before ZeRO cuts them.

    Attributes:
        dense, experts: how many.
        dense_replicas, expert_replicas: ranks that hold the same ones, over which ZeRO cuts.
        apart: experts are cut and stepped apart from all else, as their ranks are others.
        small: those in tensors that stage 3 leaves whole.
        largest: those of the layer or table that is largest, of what has replicas.
        touched: those in tensors of which ZeRO gives a rank a part or more, where a cut does not care for tensors.
        segments: sizes of its matrices by the parts of a forward pass: embedding, attention and feed-forward of each
            layer, and output layer, as `chain.activations.segments` has them; in each as their gradients come.
        sizes: of DeepSpeed's buckets.
    """

    dense: int
    experts: int
    dense_replicas: int
    expert_replicas: int
    apart: bool
    small: int
    largest: int
    touched: int
    segments: tuple[tuple[int, ...], ...]
    sizes: ZeroSizes

    @property
    def whole(self) -> int:
        """All of them."""
        return self.dense + self.experts

    @property
    def largest_tensor(self) -> int:
        """The largest matrix."""
        return max(size for segment in self.segments for size in segment)

    @property
    def gathered(self) -> int:
        """Those that stage 3 cuts and gathers: not small, and with replicas."""
        return max(0, self.dense * (self.dense_replicas > 1) - self.small) + self.experts * (self.expert_replicas > 1)

    @property
    def part(self) -> int:
        """What is left of them where ZeRO has cut."""
        return sum(self._parts)

    @property
    def stepped(self) -> int:
        """The most of that which AdamW steps at once."""
        return max(self._parts) if self.apart else self.part

    @property
    def _parts(self) -> tuple[int, int]:
        return -(-self.dense // self.dense_replicas), -(-self.experts // self.expert_replicas)


def parameter_shards(run: RunShape, stage: int) -> ParameterShards:
    """What each rank of a pipeline stage (from 0) holds of the model."""
    own, ranks, native = run.stage_model(stage), run.layout, run.config.zero.deepspeed
    counted = closed_forms.parameters(own)
    first, last = stage == 0, stage == ranks.pipeline - 1
    layers = counted.attention + counted.shared + counted.dense
    tables = counted.embedding * first + counted.output * last
    vectors = counted.norms + counted.gains - (0 if last else counted.final_norm)
    whole = vectors + counted.routers
    dense = (layers + tables) // ranks.tensor + whole
    experts = counted.experts // (ranks.expert * ranks.expert_tensor)
    table, cut = counted.embedding // ranks.tensor, ranks.expert_data > 1
    output = [("dense", table)] * (last and own.untied_embeddings)
    segments = [[("dense", table)] * first, *_segments(own, ranks), output]
    in_order = [each for segment in segments for each in segment]
    sizes = ZeroSizes.of(dense + experts, read_native(native) if native else {})
    return ParameterShards(
        dense=dense,
        experts=experts,
        dense_replicas=ranks.data,
        expert_replicas=ranks.expert_data,
        apart=_are_apart(ranks),
        small=vectors + sum(size for kind, size in in_order if kind == "dense" and size <= sizes.persistence_threshold),
        largest=max(
            -(-(layers // ranks.tensor + whole) // own.layers) + cut * experts // max(1, own.num_moe_layers),
            table,
        ),
        touched=_touched(in_order, ranks),
        segments=tuple(tuple(_as_gradients_come(segment)) for segment in segments),
        sizes=sizes,
    )


def _are_apart(ranks: Layout) -> bool:
    """Whether a rank's experts differ from those of others in ways that its other parameters do not."""
    return ranks.expert > 1 or ranks.expert_tensor != ranks.tensor


def _touched(in_order: list[tuple[str, int]], ranks: Layout) -> int:
    """See `Held`. DeepSpeed lays experts end to end with all else, or apart."""
    if not _are_apart(ranks):
        return _most_touched([size for _, size in in_order], ranks.data)
    dense, experts = ([size for kind, size in in_order if kind == which] for which in ("dense", "expert"))
    return _most_touched(dense, ranks.data) + _most_touched(experts, ranks.expert_data)


def _most_touched(sizes: list[int], replicas: int) -> int:
    """Tensors laid end to end and cut into equal parts: the most that belongs to tensors of one part."""
    part, begins, most = -(-sum(sizes) // replicas), 0, [0] * replicas
    for size in sizes:
        for number in range(begins // part, min(replicas, -(-(begins + size) // part))):
            most[number] += size
        begins += size
    return max(most)


def _segments(shape: ModelShape, ranks: Layout) -> list[list[tuple[str, int]]]:
    """A rank's matrices, `dense` or `expert`, and sizes: of each layer's attention, and of its feed-forward."""
    d, cut = shape.hidden, ranks.tensor
    router = shape.experts * d
    shared = [(shape.ffn_matrices - 1) * d * shape.shared_ffn // cut, d * shape.shared_ffn // cut]
    plain = [router, *(shared if shape.shared_ffn else [])]
    chain = plain + [router] * (shape.routers - 1)
    dense = [(shape.ffn_matrices - 1) * d * shape.dense_ffn // cut, d * shape.dense_ffn // cut]
    attention = [("dense", size // cut) for size in _attention_matrices(shape)]
    expert = shape.experts // ranks.expert * d * shape.expert_ffn // ranks.expert_tensor
    pattern = shape.moe_layers if isinstance(shape.moe_layers, tuple) else (1,) * shape.layers
    experts = [("expert", (shape.ffn_matrices - 1) * expert), ("expert", expert)]
    segments = []
    for is_moe, is_chain in zip(pattern, shape.chains or pattern, strict=True):
        beside = chain if is_chain else plain if is_moe else dense
        segments += [attention, (experts if is_moe else []) + [("dense", size) for size in beside]]
    return segments


def _as_gradients_come(segment: list[tuple[str, int]]) -> list[int]:
    """Experts before router and shared experts; of attention Megatron registers the output first."""
    experts = [size for kind, size in segment if kind == "expert"]
    first, *rest = [size for kind, size in segment if kind == "dense"] or [0]
    return [*reversed(experts), first, *reversed(rest)]


def _attention_matrices(shape: ModelShape) -> list[int]:
    """In Megatron's order."""
    d, heads = shape.hidden, shape.heads
    if shape.attention == "mha":
        width = shape.head_width
        return [heads * width * d, d * width * (heads + 2 * (shape.kv_groups or heads))]
    query, rank = heads * (shape.qk_nope + shape.qk_rope), shape.q_lora_rank
    queries = [d * query] if rank is None else [d * rank, rank * query]
    down = d * (shape.kv_lora_rank + shape.qk_rope)
    up = shape.kv_lora_rank * heads * (shape.qk_nope + shape.v_head_dim)
    return [heads * shape.v_head_dim * d, *queries, down, up]
