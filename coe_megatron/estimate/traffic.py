"""Closed forms of what one rank sends in a step: bytes by what for, and by link: inside its node, and across nodes.

Ranks lie as Megatron places them: tensor-parallel neighbours next to each other, then expert-parallel ones (of experts)
or replicas (of all else), pipeline stages farthest apart; a node has `parallel.ranks_per_node` ranks in a row. So each
group has a stride, from which follows which of its ranks share a node. Of g ranks, m of them in each of its nodes:

* an all-to-all sends each other rank an equal share: (g - m) / (g - 1) of it crosses;
* a ring (reducing, scattering, gathering) sends all to the next rank: of m ranks one has its neighbour in another node,
  so 1 / m crosses, as the mean over the ranks; nothing where m = g;
* a pipeline sends to the next stage: of g - 1 borders between stages, g / m - 1 lie between nodes.

Groups need not fill nodes evenly (of EP 4 on nodes of 6 ranks one group in three lies in two of them), so the ranks are
counted; what a rank sends is the mean over all groups of a kind.

Reducing to all sends 2 (g - 1) / g of the data, scattering or gathering (g - 1) / g.
"""

from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

from coe_megatron.config.layout import Layout
from coe_megatron.estimate.closed_forms import ModelShape
from coe_megatron.estimate.parameter_shards import ParameterShards, parameter_shards
from coe_megatron.estimate.run_shape import RunShape

_FP32 = 4


@dataclass(frozen=True)
class Sent:
    """Bytes that a rank sends in a step, as the mean over the groups of its kind."""

    inside_node: int
    across_nodes: int

    @property
    def total(self) -> int:
        """Both."""
        return self.inside_node + self.across_nodes

    def __add__(self, other: "Sent") -> "Sent":
        return Sent(self.inside_node + other.inside_node, self.across_nodes + other.across_nodes)


@dataclass(frozen=True)
class Group:
    """Ranks that talk to each other; `group` makes it.

    Attributes:
        size: g, how many they are.
        stride: distance of neighbours in the numbering of all ranks.
        others_apart: of the g - 1 others of a rank the share that lies in other nodes.
        ring_apart: of the g steps from each rank to the next, and from the last to the first, the share between nodes.
        row_apart: the same of the g - 1 steps from the first rank to the last.
    """

    size: int
    stride: int
    others_apart: Fraction
    ring_apart: Fraction
    row_apart: Fraction

    def ring(self, data: int, rounds: int) -> Sent:
        """`data` bytes of each rank go around; `rounds` 1 scatters or gathers, 2 reduces to all."""
        return _split(rounds * data * (self.size - 1) // self.size, self.ring_apart)

    def all_to_all(self, data: int) -> Sent:
        """Each rank sends `data` bytes in equal parts to all, itself among them."""
        return _split(data * (self.size - 1) // self.size, self.others_apart)

    def to_the_next(self, data: int) -> Sent:
        """Each rank sends `data` bytes to the next one of a row."""
        return _split(data if self.size > 1 else 0, self.row_apart)


@cache
def group(ranks: int, size: int, stride: int, ranks_per_node: int) -> Group:
    """The mean of all groups of a kind, into which `ranks` fall: where nodes cut them, they do not cut all alike."""
    if size == 1:
        return Group(size, stride, Fraction(0), Fraction(0), Fraction(0))
    others, ring, row = 0, 0, 0
    firsts = [rank for rank in range(ranks) if rank // stride % size == 0]
    for first in firsts:
        together = Counter((first + member * stride) // ranks_per_node for member in range(size)).values()
        others += size**2 - sum(count**2 for count in together)
        ring += len(together) if len(together) > 1 else 0
        row += len(together) - 1
    steps = len(firsts) * max(1, size - 1)
    return Group(size, stride, Fraction(others, steps * size), Fraction(ring, ranks), Fraction(row, steps))


def groups(ranks: Layout, ranks_per_node: int) -> dict[str, Group]:
    """Megatron's groups by what they are for."""
    strides = {
        "tensor": (ranks.tensor, 1),
        "data": (ranks.data, ranks.tensor),
        "expert_tensor": (ranks.expert_tensor, 1),
        "expert": (ranks.expert, ranks.expert_tensor),
        "expert_data": (ranks.expert_data, ranks.expert_tensor * ranks.expert),
        "pipeline": (ranks.pipeline, ranks.world_size // ranks.pipeline),
    }
    return {name: group(ranks.world_size, size, stride, ranks_per_node) for name, (size, stride) in strides.items()}


def traffic(run: RunShape, stage: int) -> dict[str, Sent]:
    """What a rank of a pipeline stage sends in a step; routing taken to be uniform.

    Routers' losses, the norm of the gradients and the logits' maxima and sums are small and left out.
    """
    links = groups(run.layout, run.config.parallel.ranks_per_node)
    return {
        **_of_experts(run, run.stage_model(stage), links),
        "tensor": _of_tensor_parallelism(run, stage, links["tensor"]),
        "pipeline": _of_pipeline(run, stage, links["pipeline"]),
        **_of_replicas(run, parameter_shards(run, stage), links),
    }


def _states(run: RunShape) -> int:
    """Bytes of a rank's part of the hidden states of a step, as tensor parallelism cuts them."""
    return run.tokens_per_replica // run.layout.tensor * run.model.hidden * run.element_bytes


def _of_experts(run: RunShape, shape: ModelShape, links: dict[str, Group]) -> dict[str, Sent]:
    """There and back in each of C iterations, forward and backward; forward twice where iterations are recomputed.

    The all-to-all sends each of K copies of a token, and where experts are cut by ETP every rank of the cut gathers the
    copies of all. `moe.dispatcher` allgather gathers all tokens instead.
    """
    ranks, forward = run.layout, _forward_passes(run)
    passes = sum(count * kind.chain.iterations for count, kind in shape.moe_kinds) * 2 * (forward + 1)
    states = _states(run)
    if run.config.moe.dispatcher == "allgather":
        size = ranks.expert * ranks.expert_tensor
        both = group(ranks.world_size, size, 1, run.config.parallel.ranks_per_node)
        return {"all_to_all": both.ring(passes * states * size, 1), "expert_tensor": Sent(0, 0)}
    # Layers that are no chains send as many copies, at once.
    rows = shape.num_moe_layers * shape.chain.iterations * 2 * (forward + 1) * states * shape.topk
    return {
        "all_to_all": links["expert"].all_to_all(rows),
        "expert_tensor": links["expert_tensor"].ring(rows * ranks.expert_tensor, 1),
    }


def _forward_passes(run: RunShape) -> int:
    """Of an iteration in a step: one more where it is recomputed."""
    return 2 if run.config.moe.recompute in ("iteration", "layer") else 1


def _of_tensor_parallelism(run: RunShape, stage: int, link: Group) -> Sent:
    """With sequence parallelism, each time over the hidden states of all tokens.

    A product whose columns are cut gathers its input, in the backward pass again, and scatters the input's gradient;
    one whose rows are cut scatters its output and gathers the output's gradient. Shared experts do so in every pass.
    """
    shape, forward = run.stage_model(stage), _forward_passes(run)
    pair = 2 * shape.hidden + 3 * shape.hidden  # forward and backward of columns, then rows
    attention = pair
    if shape.attention == "mla":  # queries, keys with values, and the products behind the latents
        attention += 3 * (shape.hidden + shape.kv_lora_rank + (shape.q_lora_rank or 0))
    shared = sum(count * kind.chain.iterations for count, kind in shape.moe_kinds) if shape.shared_ffn else 0
    width = shape.layers * attention + shared * (pair + (forward - 1) * 2 * shape.hidden)
    width += (shape.layers - shape.num_moe_layers) * pair
    width += 2 * shape.hidden if stage == 0 else 0  # the embedding scatters, and gathers in the backward pass
    width += 3 * shape.hidden if stage == run.layout.pipeline - 1 else 0
    return link.ring(run.tokens_per_replica * width * run.element_bytes, 1)


def _of_pipeline(run: RunShape, stage: int, link: Group) -> Sent:
    """Hidden states to the next stage, and their gradients to the one before."""
    times = (stage < run.layout.pipeline - 1) + (stage > 0)
    return link.to_the_next(times * _states(run))


def _of_replicas(run: RunShape, has: ParameterShards, links: dict[str, Group]) -> dict[str, Sent]:
    """Gradients and weights. Stages 0 and 1 reduce once a step; 2 and 3 scatter the gradients of every micro-batch.

    Stages 1 and 2 gather weights once a step, 3 twice a micro-batch.
    """
    stage, micro_batches = run.config.zero.stage, run.micro_batches
    reduced, gathered = 2 if stage < 2 else micro_batches, (0, 1, 1, 2 * micro_batches)[stage]

    def ring(size: int, rounds: int) -> Sent:
        return links["data"].ring(size * has.dense, rounds) + links["expert_data"].ring(size * has.experts, rounds)

    return {"gradients": ring(_FP32, reduced), "weights": ring(run.element_bytes, gathered)}


def bubble(run: RunShape) -> float:
    """Share of a step in which a stage waits for others: (P - 1) / (M + P - 1) of M micro-batches under 1F1B."""
    stages = run.layout.pipeline
    return (stages - 1) / (run.micro_batches + stages - 1)


def _split(sent: int, apart: Fraction) -> Sent:
    across = int(sent * apart)
    return Sent(sent - across, across)
