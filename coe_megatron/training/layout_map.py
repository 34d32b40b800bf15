"""A map for the terminal: the node of each rank, and what the rank holds."""

from collections.abc import Sequence
from itertools import groupby

from coe_megatron.config.layout import Layout
from coe_megatron.text import aligned

_MAX_NODES = 8


def layout_map(layout: Layout, hosts: Sequence[str], num_experts: int) -> str:
    """One line per node, one cell per rank, and a legend; only the first nodes if there are many.

    Args:
        hosts: host of every rank; consecutive ranks on one host form a node.
        num_experts: experts of a layer.
    """
    nodes = [(host, [rank for rank, _ in group]) for host, group in groupby(enumerate(hosts), key=lambda pair: pair[1])]
    cells = [[_cell(layout, rank, num_experts) for rank in held] for _, held in nodes[:_MAX_NODES]]
    names = [f"{host}, ranks {held[0]}-{held[-1]}" for host, held in nodes[:_MAX_NODES]]
    rows = [[name, *row] for name, row in zip(names, cells, strict=True)]
    lines = [line.rstrip(" |") for line in aligned(rows, "<", " | ")]
    if more := len(nodes) - len(lines):
        lines.append(f"and {more:,} more node{'s' * (more > 1)}")
    return "\n".join([*lines, _legend(layout)])


def _cell(layout: Layout, rank: int, num_experts: int) -> str:
    """Megatron's order of ranks: tensor shards vary fastest, then parts of sequences, replicas or experts, stages."""
    stage, inside = divmod(rank, layout.world_size // layout.pipeline)
    part = inside // layout.expert_tensor % layout.expert
    count = num_experts // layout.expert
    words = {
        f"s{stage}": layout.pipeline > 1,
        f"r{inside // (layout.tensor * layout.context)}": layout.data > 1,
        f"p{inside // layout.tensor % layout.context}": layout.context > 1,
        f"t{inside % layout.tensor}": layout.tensor > 1,
        f"e{part * count}-{(part + 1) * count - 1}": layout.expert > 1,
        f"c{inside % layout.expert_tensor}": layout.expert_tensor > 1,
    }
    return " ".join(word for word, shown in words.items() if shown)


def _legend(layout: Layout) -> str:
    words = {
        "s pipeline stage": layout.pipeline > 1,
        "r replica": layout.data > 1,
        "p part of the sequence": layout.context > 1,
        "t tensor shard": layout.tensor > 1,
        "e experts": layout.expert > 1,
        "c expert tensor shard": layout.expert_tensor > 1,
    }
    return f"({', '.join(word for word, shown in words.items() if shown)})"
