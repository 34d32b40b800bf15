"""Closed forms of what one rank holds, in bytes by kind; tests hold them against running engines on the CPU.

What is cut by what: attention, shared experts, dense layers, embedding and output layer by TP; routed experts by EP and
ETP; norms, gains and routers by neither (of MLA with Transformer Engine the two down-projections are not either).
Layers, and with them embedding and output layer, belong to a pipeline stage. What is left ZeRO cuts over the replicas.
"""

from dataclasses import dataclass

from coe_megatron.chain import closed_forms
from coe_megatron.chain.activations import Activations, Pass, activations
from coe_megatron.chain.closed_forms import ModelShape
from coe_megatron.config.layout import Layout
from coe_megatron.config.settings import RunConfig
from coe_megatron.config.shape import stage_pass, stage_shape

_MASTER_AND_MOMENTS = 12  # bytes a parameter: fp32 master weight and AdamW's two moments
_FP32 = 4  # bytes; gradients are summed and sent in fp32
_PREFETCHED = 50_000_000  # parameters that DeepSpeed's stage 3 fetches ahead (stage3_prefetch_bucket_size)
_SMALL = 100_000  # up to so many parameters a tensor is never cut (stage3_param_persistence_threshold)


@dataclass(frozen=True)
class Held:
    """Parameters of a rank before ZeRO cuts them.

    Attributes:
        dense, experts: how many.
        dense_replicas, expert_replicas: ranks that hold the same ones, over which ZeRO cuts.
        apart: experts are cut and stepped apart from all else, as their ranks are others.
        small: those in tensors that stage 3 leaves whole.
        largest: those of the layer or table that is largest, of what has replicas.
        touched: those in tensors of which ZeRO gives a rank a part or more, where a cut does not care for tensors.
    """

    dense: int
    experts: int
    dense_replicas: int
    expert_replicas: int
    apart: bool
    small: int
    largest: int
    touched: int

    @property
    def whole(self) -> int:
        """All of them."""
        return self.dense + self.experts

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


def held(config: RunConfig, shape: ModelShape, ranks: Layout, stage: int) -> Held:
    """What each rank of a pipeline stage (from 0) holds of the model `shape`."""
    own = stage_shape(config, shape, stage)
    counted = closed_forms.parameters(own)
    first, last = stage == 0, stage == ranks.pipeline - 1
    layers = counted.attention + counted.shared + counted.dense
    tables = counted.embedding * first + counted.output * last
    vectors = counted.norms + counted.gains - (0 if last else counted.final_norm)
    whole = vectors + counted.routers
    experts = counted.experts // (ranks.expert * ranks.expert_tensor)
    table, cut = counted.embedding // ranks.tensor, ranks.expert_data > 1
    in_order = [("dense", size) for size in [table] * first]
    in_order += _tensors(own, ranks) + [("dense", size) for size in [table] * (last and shape.untied_embeddings)]
    return Held(
        dense=(layers + tables) // ranks.tensor + whole,
        experts=experts,
        dense_replicas=ranks.data,
        expert_replicas=ranks.expert_data,
        apart=_are_apart(ranks),
        small=vectors + sum(size for kind, size in in_order if kind == "dense" and size <= _SMALL),
        largest=max(
            -(-(layers // ranks.tensor + whole) // own.layers) + cut * experts // max(1, own.num_moe_layers),
            table,
        ),
        touched=_touched(in_order, ranks),
    )


def memory(config: RunConfig, shape: ModelShape, ranks: Layout, stage: int, run: Pass) -> dict[str, int]:
    """Bytes on the device of a rank of a pipeline stage.

    `gradients` are those between two micro-batches, `buffer` is what they are reduced in. `gathered` are weights of
    stage 3 that are whole for a moment, `whole_sequence` the hidden states that tensor parallelism gathers, in a buffer
    of Megatron's for all layers. `step` is what AdamW's step takes beyond the activations, which are gone by then: it
    shows where a rank has much to update.
    """
    has = held(config, shape, ranks, stage)
    micro_batches = micro_batches_of(config, ranks)
    passes = activations(stage_shape(config, shape, stage), stage_pass(run, stage, ranks.pipeline, micro_batches))
    gathered = _gathered(config, has)
    step = 0 if config.zero.offload_optimizer else _step(config, has)
    return {
        "weights": _weights(config, has),
        "gathered": gathered,
        "gradients": _gradients(config, has, micro_batches),
        "buffer": _bucket(config) + _beside_the_sum(config, has, passes, micro_batches),
        "optimizer": 0 if config.zero.offload_optimizer else _optimizer(config, has),
        "activations": passes.peak,
        "whole_sequence": _whole_sequence(config, shape) if ranks.tensor > 1 else 0,
        "step": max(0, step - gathered - passes.peak),
    }


def as_measured(config: RunConfig, kinds: dict[str, int], micro_batches: int) -> dict[str, int]:
    """`memory` in the kinds that can be told apart in a running engine: what stays between passes, what comes and goes.

    DeepSpeed keeps the bucket of stage 3, and of stage 1 while it sums micro-batches; that of stage 2 it lets go.
    """
    stage = config.zero.stage
    stays = kinds["buffer"] if stage == 3 or (stage == 1 and micro_batches > 1) else 0
    return {
        "weights": kinds["weights"],
        "optimizer": kinds["optimizer"],
        "gradients": kinds["gradients"] + kinds["whole_sequence"] + stays,
        "activations": kinds["activations"] + kinds["gathered"] + kinds["buffer"] - stays,
    }


def host(config: RunConfig, shape: ModelShape, ranks: Layout, stage: int) -> dict[str, int]:
    """What such a rank keeps in its host's memory by choice."""
    has = held(config, shape, ranks, stage)
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


def _weights(config: RunConfig, has: Held) -> int:
    if config.zero.stage < 3:
        return element(config) * has.whole
    cut = 0 if config.zero.offload_parameters else has.part
    return element(config) * (cut + has.small * (has.dense_replicas > 1))


def _gathered(config: RunConfig, has: Held) -> int:
    """The largest layer or table and what is fetched ahead; that is there twice, as it came and parameter by parameter.

    Nothing where nothing is cut, on one rank.
    """
    if config.zero.stage < 3:
        return 0
    return element(config) * (min(has.gathered, has.largest + _PREFETCHED) + min(has.gathered, _PREFETCHED))


def _gradients(config: RunConfig, has: Held, micro_batches: int) -> int:
    """Stage 1 sums whole gradients over micro-batches, in bf16 always.

    Stage 2 in fp32 keeps whole tensors of which a part is the rank's.
    """
    stage, bf16 = config.zero.stage, config.training.precision == "bf16"
    if stage == 2 and not bf16:
        return _FP32 * has.touched
    summed_whole = stage == 0 or (stage == 1 and (bf16 or micro_batches > 1 or config.parallel.pipeline > 1))
    return _FP32 * (has.whole if summed_whole else has.part)


def _bucket(config: RunConfig) -> int:
    """In which gradients are reduced; stage 1 in bf16 reduces in place.

    Stages 1 and 2 fill a second bucket while the first is being reduced.
    """
    zero, bf16 = config.zero, config.training.precision == "bf16"
    size = zero.reduce_bucket_size * (0, 0 if bf16 else _FP32, element(config), _FP32)[zero.stage]
    return size * (2 if zero.overlap_reduction and zero.stage < 3 and config.parallel.pipeline == 1 else 1)


def _whole_sequence(config: RunConfig, shape: ModelShape) -> int:
    return element(config) * config.training.micro_batch * shape.seq_length * shape.hidden


def _beside_the_sum(config: RunConfig, has: Held, passes: Activations, micro_batches: int) -> int:
    """What the gradients of a micro-batch take beyond the peak of its activations, of stage 2 in fp32.

    There they are made beside the sum of those before, as one tensor when the first bucket is full; by then the layers
    whose gradients fill it have let their activations go.
    """
    if config.zero.stage != 2 or config.training.precision == "bf16" or micro_batches == 1:
        return 0
    done = min(1, config.zero.reduce_bucket_size / has.whole)
    left = int((1 - done) * (sum(passes.kept.values()) - passes.kept["output"]))
    return max(0, left + passes.recomputed + passes.gradients + _FP32 * has.touched - passes.peak)


def _optimizer(config: RunConfig, has: Held) -> int:
    return (_MASTER_AND_MOMENTS - _FP32) * has.whole if config.zero.stage == 0 else _MASTER_AND_MOMENTS * has.part


def _step(config: RunConfig, has: Held) -> int:
    """AdamW makes two tensors as large as what it steps at once, which at stage 0 is one parameter after another.

    Stage 3 lays the gradients end to end before.
    """
    return _FP32 * has.stepped * (0, 2, 2, 3)[config.zero.stage]


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


def _tensors(shape: ModelShape, ranks: Layout) -> list[tuple[str, int]]:
    """A rank's matrices but for the tables, in their order: `dense` or `expert`, and sizes."""
    d, cut = shape.hidden, ranks.tensor
    router = shape.experts * d
    shared = [(shape.ffn_matrices - 1) * d * shape.shared_ffn // cut, d * shape.shared_ffn // cut]
    plain = [router, *(shared if shape.shared_ffn else [])]
    chain = plain + [router] * (shape.routers - 1)
    dense = [(shape.ffn_matrices - 1) * d * shape.dense_ffn // cut, d * shape.dense_ffn // cut]
    attention = [size // cut for size in _attention_matrices(shape)]
    expert = shape.experts // ranks.expert * d * shape.expert_ffn // ranks.expert_tensor
    pattern = shape.moe_layers if isinstance(shape.moe_layers, tuple) else (1,) * shape.layers
    experts = [("expert", (shape.ffn_matrices - 1) * expert), ("expert", expert)]
    listed = []
    for is_moe, is_chain in zip(pattern, shape.chains or pattern, strict=True):
        listed += [("dense", size) for size in attention] + (experts if is_moe else [])
        listed += [("dense", size) for size in (chain if is_chain else plain if is_moe else dense)]
    return listed


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
