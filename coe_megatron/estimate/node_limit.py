"""To how many nodes group-limited routing sends a token, if each node has whole groups or each group whole nodes."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from coe_megatron.estimate.closed_forms import ranks_of_a_token
from coe_megatron.estimate.run_shape import RunShape
from coe_megatron.estimate.traffic import expert_traffic


@dataclass(frozen=True)
class NodeLimit:
    """The nodes of a token in an iteration, assuming uniform routing.

    Attributes:
        nodes: that hold the experts of a layer.
        most: that a token goes to, at most.
        mean, mean_without_groups: that a token goes to.
        across_nodes, across_nodes_without_groups: bytes that a rank sends to other nodes in a step, for dispatch and
            combine.
    """

    nodes: int
    most: int
    mean: float
    mean_without_groups: float
    across_nodes: int
    across_nodes_without_groups: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def node_limit(run: RunShape) -> NodeLimit | None:
    """The limit by `moe.num_groups` and `moe.group_topk`.

    None without groups, if the experts of a layer are on one node, or if neither nodes have whole groups nor groups
    whole nodes.
    """
    moe, nodes = run.config.moe, _nodes(run)
    groups, group_topk = moe.num_groups, moe.group_topk
    if groups is None or group_topk is None or nodes is None or (groups % nodes and nodes % groups):
        return None
    most = group_topk * max(1, nodes // groups)
    without = run.changed(replace(run.config, moe=replace(moe, num_groups=None, group_topk=None)))
    return NodeLimit(
        nodes=nodes,
        most=min(nodes, moe.topk, most),
        mean=ranks_of_a_token(moe.num_experts, moe.topk, nodes, groups, group_topk),
        mean_without_groups=ranks_of_a_token(moe.num_experts, moe.topk, nodes),
        across_nodes=_across_nodes(run),
        across_nodes_without_groups=_across_nodes(without),
    )


def _nodes(run: RunShape) -> int | None:
    """Nodes that the experts of a layer fill; None if it is one or less, or they do not fill nodes evenly."""
    ranks, per_node = run.layout.expert * run.layout.expert_tensor, run.config.parallel.ranks_per_node
    is_even = ranks > per_node and ranks % per_node == 0 and per_node % run.layout.expert_tensor == 0
    return ranks // per_node if is_even else None


def _across_nodes(run: RunShape) -> int:
    """Of the pipeline stage that sends most."""
    stages = (expert_traffic(run, stage).values() for stage in range(run.layout.pipeline))
    return max(sum(sent.across_nodes for sent in stage) for stage in stages)
