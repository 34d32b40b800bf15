"""Closed forms of the bytes that one rank sends in a step: by purpose, and by link (within a node or across nodes).

Ranks are numbered as in Megatron: tensor-parallel neighbours first, then expert-parallel ones (for experts) or replicas
(for dense parameters, those that share sequences first), then pipeline stages; a node holds `parallel.ranks_per_node`
consecutive ranks. So the ranks of a group have a constant stride, which determines the nodes they are on. If a group
has g ranks, m of them per node:

* in an all-to-all, each rank sends the same amount to every other rank; the fraction (g - m) / (g - 1) crosses nodes;
* in a ring (reduce, scatter, gather), each rank sends everything to the next rank; averaged over ranks, 1 / m crosses
  nodes, or nothing if m = g;
* a pipeline sends to the next stage; g / m - 1 of the g - 1 boundaries between stages are between nodes. (The way from
  the last stage to the next part of the first is counted as one of them.)

Groups need not fill nodes evenly (with EP 4 on nodes of 6 ranks, one group in three spans two nodes), so ranks are
counted, and a rank sends the mean over all groups of a kind.

All-reduce sends 2 (g - 1) / g of the data; reduce-scatter and all-gather send (g - 1) / g.
"""

from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from math import gcd, lcm

from coe_megatron.config.layout import Layout
from coe_megatron.estimate.closed_forms import ModelShape, ranks_of_a_token
from coe_megatron.estimate.parameter_shards import ParameterShards, parameter_shards
from coe_megatron.estimate.run_shape import RunShape

_FP32 = 4


@dataclass(frozen=True)
class Sent:
    """Bytes that a rank sends in a step, averaged over the groups of a kind."""

    inside_node: int
    across_nodes: int

    @property
    def total(self) -> int:
        """All bytes."""
        return self.inside_node + self.across_nodes

    def __add__(self, other: "Sent") -> "Sent":
        return Sent(self.inside_node + other.inside_node, self.across_nodes + other.across_nodes)


@dataclass(frozen=True)
class Group:
    """A kind of process group; use `group` to create it.

    Attributes:
        size: g, number of ranks.
        stride: difference of consecutive ranks in the numbering of all ranks.
        others_across: fraction of the g - 1 other ranks that are on other nodes.
        ring_across: fraction of the g hops of a ring that are between nodes.
        row_across: fraction of the g - 1 hops from the first to the last rank that are between nodes.
    """

    size: int
    stride: int
    others_across: Fraction
    ring_across: Fraction
    row_across: Fraction

    def ring(self, data: int, rounds: int) -> Sent:
        """A ring over `data` bytes per rank; `rounds` is 1 for scatter or gather, 2 for all-reduce."""
        return _split(rounds * data * (self.size - 1) // self.size, self.ring_across)

    def all_to_all(self, data: int) -> Sent:
        """Each rank sends `data` bytes in equal parts to all ranks, including itself."""
        return _split(data * (self.size - 1) // self.size, self.others_across)

    def to_next(self, data: int) -> Sent:
        """Each rank sends `data` bytes to the next one, the last rank to none."""
        return _split(data if self.size > 1 else 0, self.row_across)


@cache
def group(ranks: int, size: int, stride: int, ranks_per_node: int) -> Group:
    """The mean of all groups of this size and stride among `ranks`, since not all of them span nodes alike."""
    if size == 1:
        return Group(size, stride, Fraction(0), Fraction(0), Fraction(0))
    others, ring, row = 0, 0, 0
    repeats = lcm(size * stride, ranks_per_node)  # ranks, after which groups lie on nodes as before
    ranks = repeats if ranks % repeats == 0 else ranks
    firsts = [rank for rank in range(ranks) if rank // stride % size == 0]
    for first in firsts:
        per_node = Counter((first + member * stride) // ranks_per_node for member in range(size)).values()
        others += size**2 - sum(count**2 for count in per_node)
        ring += len(per_node) if len(per_node) > 1 else 0
        row += len(per_node) - 1
    hops = len(firsts) * max(1, size - 1)
    return Group(size, stride, Fraction(others, hops * size), Fraction(ring, ranks), Fraction(row, hops))


def groups(layout: Layout, ranks_per_node: int) -> dict[str, Group]:
    """Megatron's groups by purpose."""
    strides = {
        "tensor": (layout.tensor, 1),
        "context": (layout.context, layout.tensor),
        "data": (layout.replicas, layout.tensor),
        "expert_tensor": (layout.expert_tensor, 1),
        "expert": (layout.expert, layout.expert_tensor),
        "expert_data": (layout.expert_data, layout.expert_tensor * layout.expert),
        "pipeline": (layout.pipeline, layout.world_size // layout.pipeline),
    }
    return {name: group(layout.world_size, size, stride, ranks_per_node) for name, (size, stride) in strides.items()}


def traffic(run: RunShape, stage: int, shards: ParameterShards | None = None) -> dict[str, Sent]:
    """What a rank of a pipeline stage sends in a step, assuming uniform routing.

    Small messages are not included: losses of routers, gates, gradient norms, and maxima and sums of logits.

    Args:
        shards: the stage's parameters on a rank, if they are known already.
    """
    links = groups(run.layout, run.config.parallel.ranks_per_node)
    return {
        **expert_traffic(run, stage),
        **sequence_traffic(run, stage),
        "pipeline": _pipeline_traffic(run, stage, links["pipeline"]),
        **_replica_traffic(run, shards or parameter_shards(run, stage), links),
    }


def sequence_traffic(run: RunShape, stage: int) -> dict[str, Sent]:
    """The part of it between ranks that share sequences."""
    links = groups(run.layout, run.config.parallel.ranks_per_node)
    return {
        "tensor": _tensor_traffic(run, stage, links["tensor"]),
        "context": _context_traffic(run, stage, links["context"]),
    }


def _state_bytes(run: RunShape, width: int) -> int:
    """Bytes of states of this width of all tokens of a step on one rank, sharded by tensor parallelism."""
    return run.tokens_per_replica // run.layout.tensor * width * run.element_bytes


def expert_traffic(run: RunShape, stage: int) -> dict[str, Sent]:
    """Dispatch and combine in each of C iterations, forward and backward; forward twice if iterations are recomputed.

    The all-to-all sends each token K times, or once to each rank with some of its experts (`deduplicated`), and with
    ETP every rank of a group gathers the tokens of all. With `moe.dispatcher` allgather, all tokens are gathered
    instead. A chain with `latent` sends states of that width.
    """
    layout, forward, shape = run.layout, _forward_passes(run), run.stage_model(stage)
    links = groups(layout, run.config.parallel.ranks_per_node)
    passes = sum(count * kind.chain.iterations for count, kind in shape.moe_kinds) * 2 * (forward + 1)
    states = _state_bytes(run, shape.chain_width)
    if run.config.moe.dispatcher == "allgather":
        size = layout.expert * layout.expert_tensor
        both = group(layout.world_size, size, 1, run.config.parallel.ranks_per_node)
        return {"all_to_all": both.ring(passes * states * size, 1), "expert_tensor": Sent(0, 0)}
    copies = sum(count * kind.chain.iterations * _copies(run, kind) for count, kind in shape.moe_kinds)
    rows = round(copies * 2 * (forward + 1) * states)
    return {
        "all_to_all": links["expert"].all_to_all(rows),
        "expert_tensor": links["expert_tensor"].ring(rows * layout.expert_tensor, 1),
    }


def one_way(run: RunShape, kind: ModelShape) -> Sent:
    """What a micro-batch sends in an iteration of a kind of MoE layer, to the experts or back."""
    links = groups(run.layout, run.config.parallel.ranks_per_node)
    rows = round(_copies(run, kind) * _state_bytes(run, kind.chain_width) / run.micro_batches)
    gathered = links["expert_tensor"].ring(rows * run.layout.expert_tensor, 1)
    return links["expert"].all_to_all(rows) + gathered


def expert_nodes(run: RunShape) -> int:
    """The largest number of nodes that hold a copy of all experts of a layer."""
    size, ranks_per_node = run.layout.expert * run.layout.expert_tensor, run.config.parallel.ranks_per_node
    repeats = ranks_per_node // gcd(size, ranks_per_node)  # groups, after which one begins with a node again
    firsts = range(0, run.layout.world_size, size)[:repeats]
    return max((first + size - 1) // ranks_per_node - first // ranks_per_node + 1 for first in firsts)


def _copies(run: RunShape, shape: ModelShape) -> float:
    """How often a token is sent in an iteration of a kind of MoE layer."""
    moe = run.config.moe
    if moe.dispatcher != "deduplicated":
        return shape.topk
    return ranks_of_a_token(shape.experts, shape.topk, run.layout.expert, moe.num_groups, moe.group_topk)


def _forward_passes(run: RunShape) -> int:
    """Forward passes of an iteration per step: two if it is recomputed."""
    return 2 if run.config.moe.recompute in ("iteration", "layer") else 1


def _tensor_traffic(run: RunShape, stage: int, link: Group) -> Sent:
    """Collectives of sequence parallelism, each over the hidden states of all tokens.

    A column-parallel product gathers its input, again in the backward pass, and scatters the gradient of the input; a
    row-parallel one scatters its output and gathers the gradient of the output. Shared experts do so in every pass.
    """
    shape, forward = run.stage_model(stage), _forward_passes(run)
    pair = 2 * shape.hidden + 3 * shape.hidden  # forward and backward of columns, then rows
    attention = pair
    if shape.attention == "mla":  # queries, keys with values, and the products after the latents
        queries, latent = shape.q_lora_rank or 0, shape.kv_lora_rank + shape.qk_rope
        attention += 3 * (shape.hidden + shape.kv_lora_rank + queries)
        attention += 2 * (latent + queries + shape.qk_rope)  # latents of all ranks for each row; the key of all rows
    shared = sum(count * kind.chain.iterations for count, kind in shape.moe_kinds) if shape.shared_ffn else 0
    width = shape.layers * attention + shared * (5 + (forward - 1) * 2) * shape.chain_width
    width += (shape.layers - shape.num_moe_layers) * pair
    width += 2 * shape.hidden if stage == 0 else 0  # the embedding scatters, and gathers in the backward pass
    width += 3 * shape.hidden if stage == run.layout.pipeline - 1 else 0
    return link.ring(run.tokens_per_replica * width * run.element_bytes, 1)


def tensor_collectives(run: RunShape, stage: int) -> int:
    """How many collectives tensor-parallel ranks make in a micro-batch: those of `traffic`, and small ones.

    The small ones are the maximum and two sums of logits, what routers have counted, and the gradients of norms and
    routers, each of which is summed when it is there.
    """
    shape, forward = run.stage_model(stage), _forward_passes(run)
    chains = shape.moe_kinds
    routings = sum(count * kind.routings for count, kind in chains)
    further_norms = sum(
        count * (kind.chain.iterations - 1) for count, kind in chains if kind.chain.norm_placement == "iteration_norm"
    )
    products, gradients = 5 * (2 * shape.layers - shape.num_moe_layers), 2 * shape.layers + further_norms + routings
    if shape.attention == "mla":  # products after the latents, the latents and the rotary key; their norms
        with_queries = shape.q_lora_rank is not None
        products += (10 + 5 * with_queries) * shape.layers
        gradients += (1 + with_queries) * shape.layers
    if shape.shared_ffn:
        products += (5 + (forward - 1) * 2) * sum(count * kind.chain.iterations for count, kind in chains)
    ends = 2 if stage == 0 else 0
    if stage == run.layout.pipeline - 1:
        ends, gradients = ends + 3 + 3, gradients + 1
    return products + ends + forward * routings + gradients


def _context_traffic(run: RunShape, stage: int, link: Group) -> Sent:
    """Keys and values of whole sequences are gathered in each attention, and their gradients scattered."""
    shape, layout = run.stage_model(stage), run.layout
    width = shape.layers * shape.key_value_width // layout.tensor
    return link.ring(run.tokens_per_replica * layout.context * width * run.element_bytes, 2)


def _pipeline_traffic(run: RunShape, stage: int, link: Group) -> Sent:
    """Hidden states to the next stage, and their gradients to the previous one; the last one of parts has no next."""
    parts = run.layout.virtual_pipeline
    times = 2 * parts - (stage == run.layout.pipeline - 1) - (stage == 0)
    return link.to_next(times * _state_bytes(run, run.model.hidden))


def _replica_traffic(run: RunShape, shards: ParameterShards, links: dict[str, Group]) -> dict[str, Sent]:
    """Gradients and weights. Stages 0 and 1 reduce once per step; 2 and 3 reduce-scatter after every micro-batch.

    Stages 1 and 2 gather weights once per step, stage 3 twice per micro-batch.
    """
    stage, micro_batches = run.config.zero.stage, run.micro_batches
    reduced, gathered = 2 if stage < 2 else micro_batches, (0, 1, 1, 2 * micro_batches)[stage]

    def ring(size: int, rounds: int) -> Sent:
        dense = links["data"].ring(size * shards.dense, rounds)
        return dense + links["expert_data"].ring(size * shards.experts, rounds)

    return {"gradients": ring(_FP32, reduced), "weights": ring(run.element_bytes, gathered)}


def bubble(run: RunShape) -> float:
    """Fraction of a step in which a stage is idle: (P - 1) / (V M + P - 1); M micro-batches, V parts of a stage."""
    stages = run.layout.pipeline
    return (stages - 1) / (run.layout.virtual_pipeline * run.micro_batches + stages - 1)


def _split(sent: int, across_fraction: Fraction) -> Sent:
    across = int(sent * across_fraction)
    return Sent(sent - across, across)
