"""The map of a layout says where Megatron puts what."""

import pytest
from megatron.core.parallel_state import RankGenerator

from coe_megatron.config.layout import Layout
from coe_megatron.training.layout_map import layout_map


def test_a_map_as_it_is_printed() -> None:
    hosts = [f"node {rank // 4} gpu{rank // 4}" for rank in range(8)]
    assert layout_map(Layout(8, tensor=2, pipeline=2, expert=4), hosts, 64).splitlines() == [
        "node 0 gpu0, ranks 0-3 | s0 r0 t0 e0-15 | s0 r0 t1 e16-31 | s0 r1 t0 e32-47 | s0 r1 t1 e48-63",
        "node 1 gpu1, ranks 4-7 | s1 r0 t0 e0-15 | s1 r0 t1 e16-31 | s1 r1 t0 e32-47 | s1 r1 t1 e48-63",
        "(s pipeline stage, r replica, t tensor shard, e experts)",
    ]


def test_replicas_that_share_sequences() -> None:
    lines = layout_map(Layout(8, tensor=2, context=2), ["a"] * 8, 8).splitlines()
    assert lines == [
        "a, ranks 0-7 | r0 p0 t0 | r0 p0 t1 | r0 p1 t0 | r0 p1 t1 | r1 p0 t0 | r1 p0 t1 | r1 p1 t0 | r1 p1 t1",
        "(r replica, p part of the sequence, t tensor shard)",
    ]


def test_nodes_of_unequal_sizes_and_many_nodes() -> None:
    lines = layout_map(Layout(3), ["a", "a", "b"], 8).splitlines()
    assert lines == ["a, ranks 0-1 | r0 | r1", "b, ranks 2-2 | r2", "(r replica)"]
    lines = layout_map(Layout(40), [f"h{rank // 4}" for rank in range(40)], 8).splitlines()
    assert len(lines) == 10 and lines[-2] == "and 2 more nodes"


@pytest.mark.parametrize("sizes", [(16, 2, 2, 4, 1), (16, 1, 2, 2, 4), (16, 4, 1, 2, 2)])
def test_the_cells_are_megatrons_groups(sizes: tuple[int, ...]) -> None:
    """Ranks that differ in one letter alone form one of Megatron's groups."""
    layout = Layout(*sizes)
    (row, _) = layout_map(layout, ["host"] * layout.world_size, 16).splitlines()
    cells = [{word[0]: word for word in cell.split()} for cell in row.split(" | ")[1:]]
    dense = RankGenerator(layout.tensor, 1, layout.data, layout.pipeline, 1, "tp-cp-ep-dp-pp")
    experts = RankGenerator(
        layout.expert_tensor, layout.expert, layout.expert_data, layout.pipeline, 1, "tp-cp-ep-dp-pp"
    )
    for generator, kind, letters, own in (
        (dense, "tp", "srt", "t"), (dense, "pp", "srt", "s"), (dense, "dp", "srt", "r"),
        (experts, "ep", "sec", "e"), (experts, "tp", "sec", "c"),
    ):  # fmt: skip
        for group in generator.get_ranks(kind):
            shared = set(letters) - {own}
            assert len({tuple(cells[rank].get(letter) for letter in shared) for rank in group}) == 1
            assert len({cells[rank].get(own) for rank in group}) == len(group)
