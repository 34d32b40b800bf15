"""Which rank lies where and holds what, as a small map for the terminal."""

from collections.abc import Sequence
from itertools import groupby

from coe_megatron.config.layout import Layout
from coe_megatron.text import aligned

_NODES_SHOWN = 8


def layout_map(ranks: Layout, hosts: Sequence[str], num_experts: int) -> str:
    """A line a node, a cell a rank, a legend of what is in the cells; the first nodes of many.

    Args:
        hosts: of every rank, in their order, where neighbours on a host are a node.
        num_experts: of a layer.
    """
    nodes = [(host, [rank for rank, _ in group]) for host, group in groupby(enumerate(hosts), key=lambda pair: pair[1])]
    cells = [[_cell(ranks, rank, num_experts) for rank in held] for _, held in nodes[:_NODES_SHOWN]]
    names = [f"{host}, ranks {held[0]}-{held[-1]}" for host, held in nodes[:_NODES_SHOWN]]
    rows = [[name, *row] for name, row in zip(names, cells, strict=True)]
    lines = [line.rstrip(" |") for line in aligned(rows, "<", " | ")]
    if more := len(nodes) - len(lines):
        lines.append(f"and {more:,} more node{'s' * (more > 1)}")
    return "\n".join([*lines, _legend(ranks)])


def _cell(ranks: Layout, rank: int, num_experts: int) -> str:
    """Megatron's order: tensor parallelism fastest, then replicas (or experts), pipeline stages slowest."""
    stage, inside = divmod(rank, ranks.ranks // ranks.pipeline)
    part = inside // ranks.expert_tensor % ranks.expert
    count = num_experts // ranks.expert
    words = {
        f"s{stage}": ranks.pipeline > 1,
        f"r{inside // ranks.tensor}": ranks.data > 1,
        f"t{inside % ranks.tensor}": ranks.tensor > 1,
        f"e{part * count}-{(part + 1) * count - 1}": ranks.expert > 1,
        f"c{inside % ranks.expert_tensor}": ranks.expert_tensor > 1,
    }
    return " ".join(word for word, told in words.items() if told)


def _legend(ranks: Layout) -> str:
    words = {
        "s pipeline stage": ranks.pipeline > 1,
        "r replica": ranks.data > 1,
        "t part of tensors": ranks.tensor > 1,
        "e experts": ranks.expert > 1,
        "c cut of experts": ranks.expert_tensor > 1,
    }
    return f"({', '.join(word for word, told in words.items() if told)})"
