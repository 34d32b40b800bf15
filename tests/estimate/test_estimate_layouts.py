"""What layouts do to memory and traffic, by hand."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from coe_megatron.config import RunConfig, load
from coe_megatron.config.layout import Layout
from coe_megatron.estimate.run_estimate import RunEstimate, estimate
from coe_megatron.estimate.run_shape import RunShape
from coe_megatron.estimate.traffic import Group, Sent, group, groups

PAPER = Path(__file__).parents[2] / "configs" / "paper"
VOCABULARY, TOKENS, HIDDEN, TWO_BYTES = 50_304, 64 * 512, 1024, 2


def config(*overrides: str) -> RunConfig:
    return load(PAPER / "coe-2_4-64.yaml", ["data.path=nowhere", "training.micro_batch=1", *overrides])


def cost(*overrides: str, stage: int | None = None) -> RunEstimate:
    return estimate(RunShape.of(config(*overrides), VOCABULARY), stage)


def test_tensor_parallelism_cuts_all_but_norms_and_routers() -> None:
    one, two = (cost("model.mla=null", "parallel.world_size=2", f"parallel.tensor={size}") for size in (1, 2))
    counted = one.parameters
    whole = counted.norms + counted.routers + counted.experts  # the experts divided by ETP, which is 1
    assert two.memory["weights"] == TWO_BYTES * (whole + (counted.total - whole) // 2)
    both = cost("model.mla=null", "parallel.world_size=2", "parallel.tensor=2", "parallel.expert_tensor=2")
    assert both.memory["weights"] == two.memory["weights"] - TWO_BYTES * counted.experts // 2
    assert both.memory["activations"] < 0.75 * one.memory["activations"]


def test_stages_share_layers_and_the_first_waits_for_all() -> None:
    overrides = ("parallel.world_size=4", "parallel.pipeline=4")
    stages = [cost(*overrides, stage=stage) for stage in range(4)]
    counted = stages[0].parameters
    elements = [each.memory["weights"] // TWO_BYTES for each in stages]
    assert sum(elements) == counted.total
    assert elements[0] - elements[1] == counted.embedding
    assert elements[3] - elements[2] == counted.output + counted.final_norm
    kept = [each.activations["none"] for each in stages]
    assert [each.in_flight for each in kept] == [4, 3, 2, 1]
    assert kept[1].peak - kept[2].peak == sum(kept[1].kept.values())
    assert [bool(each.kept["output"]) for each in kept] == [False, False, False, True]
    assert cost(*overrides).needed == max(each.needed for each in stages)


def test_the_bubble_is_that_of_1f1b() -> None:
    found = cost("parallel.world_size=4", "parallel.pipeline=4")
    assert found.micro_batches == 64 and found.bubble == pytest.approx(3 / 67)
    assert "pipeline bubble 4.5%" in found.table() and f"(pipeline stage {found.stage + 1} of 4)" in found.table()
    assert cost("parallel.world_size=4").bubble == 0


def test_parts_of_stages_shorten_the_bubble_and_are_sent_more_often() -> None:
    """Of 4 layers on 2 stages the first has layers 1 and 3, the second 2 and 4."""
    overrides = ("parallel.world_size=2", "parallel.pipeline=2", "moe.layer_freq=[0,1,1,1]")
    whole, parts = (cost(*overrides, f"parallel.virtual_pipeline={count}", stage=0) for count in (1, 2))
    assert parts.bubble == pytest.approx(1 / (2 * 64 + 1)) and whole.bubble == pytest.approx(1 / 65)
    assert parts.communication["pipeline"].total == 3 * whole.communication["pipeline"].total
    # One pass of two in 1F1B; of the parts 2 + 2 + 1 passes through half of the layers.
    assert whole.activations["none"].in_flight == 2 and parts.activations["none"].in_flight == Fraction(5, 2)
    second = [cost(*overrides, f"parallel.virtual_pipeline={count}", stage=1) for count in (1, 2)]
    for first, last in zip((whole, parts), second, strict=True):
        assert (first.memory["weights"] + last.memory["weights"]) // TWO_BYTES == whole.parameters.total
    # The first stage of two consecutive layers has the dense one, and so it has in parts: layers 1 and 3.
    assert whole.memory["weights"] == parts.memory["weights"]
    later = ("parallel.world_size=2", "parallel.pipeline=2", "moe.layer_freq=[1,0,1,1]")
    whole, parts = (cost(*later, f"parallel.virtual_pipeline={count}", stage=0) for count in (1, 2))
    assert whole.memory["weights"] < parts.memory["weights"]  # layers 1 and 2, or 1 and 3


def test_megatrons_groups_and_who_of_them_shares_a_node() -> None:
    found = groups(Layout(64, tensor=2, pipeline=4, expert=8, expert_tensor=1), ranks_per_node=8)
    assert found == {
        "tensor": Group(2, 1, Fraction(0), Fraction(0), Fraction(0)),
        "context": Group(1, 2, Fraction(0), Fraction(0), Fraction(0)),
        "data": Group(8, 2, Fraction(4, 7), Fraction(2, 8), Fraction(1, 7)),
        "expert_tensor": Group(1, 1, Fraction(0), Fraction(0), Fraction(0)),
        "expert": Group(8, 1, Fraction(0), Fraction(0), Fraction(0)),
        "expert_data": Group(2, 8, Fraction(1), Fraction(1), Fraction(1)),
        "pipeline": Group(4, 16, Fraction(1), Fraction(1), Fraction(1)),
    }


@pytest.mark.parametrize(
    ("sent", "inside", "across"),
    [
        (group(16, 8, 1, 8).all_to_all(800), 700, 0),
        (group(16, 16, 1, 8).all_to_all(1600), 700, 800),
        (group(64, 8, 8, 8).ring(800, 2), 0, 1400),
        (group(16, 8, 2, 8).ring(800, 2), 1050, 350),
        (group(64, 4, 16, 8).to_next(100), 0, 100),
        (group(16, 4, 4, 8).to_next(300), 200, 100),
        (group(16, 1, 1, 8).to_next(100), 0, 0),
        # EP 4 on nodes of 6: of ranks 0-3, 4-7 and 8-11 those in the middle lie in two nodes, two and two
        (group(12, 4, 1, 6).all_to_all(1200), 700, 200),
        (group(12, 4, 1, 6).ring(1200, 1), 750, 150),
        # replicas 0, 2, 4 and 1, 3, 5 of TP 2 on nodes of 4, the last of each in the second node
        (group(6, 3, 2, 4).ring(300, 2), 134, 266),
        (group(6, 3, 2, 4).all_to_all(300), 67, 133),
        # stages of 3 ranks on nodes of 4: 0, 3 | 6 and 1 | 4, 7 and 2 | 5 | 8
        (group(9, 3, 3, 4).to_next(600), 200, 400),
    ],
)
def test_what_crosses_nodes(sent: Sent, inside: int, across: int) -> None:
    assert (sent.inside_node, sent.across_nodes) == (inside, across)


def test_groups_are_those_that_megatron_makes() -> None:
    """Rank 0's, from Megatron's own generator of its groups."""
    from megatron.core.parallel_state import RankGenerator

    ranks = Layout(64, tensor=2, pipeline=4, expert=4, expert_tensor=1, context=2)
    found = groups(ranks, ranks_per_node=64)
    dense = RankGenerator(tp=2, ep=1, dp=4, pp=4, cp=2, order="tp-cp-ep-dp-pp")
    experts = RankGenerator(tp=1, ep=4, dp=4, pp=4, cp=1, order="tp-cp-ep-dp-pp")
    for name, made in {
        "tensor": dense.get_ranks("tp"),
        "context": dense.get_ranks("cp"),
        "data": dense.get_ranks("cp-dp"),
        "pipeline": dense.get_ranks("pp"),
        "expert": experts.get_ranks("ep"),
        "expert_data": experts.get_ranks("dp"),
    }.items():
        group = found[name]
        assert made[0] == [group.stride * member for member in range(group.size)], name


def test_more_expert_parallelism_than_a_node_has_ranks_leaves_it() -> None:
    inside, across = (
        cost(f"parallel.expert={expert}", "parallel.world_size=16").communication["all_to_all"] for expert in (8, 16)
    )
    assert inside.across_nodes == 0
    assert across.across_nodes == pytest.approx(across.total * 8 / 15, rel=1e-6)


def test_what_tensor_parallelism_and_pipelines_send() -> None:
    layers, iterations = 4, 2
    found = cost("model.mla=null", "parallel.world_size=2", "parallel.tensor=2").communication["tensor"]
    width = (
        layers * (5 * HIDDEN + 5 * iterations * HIDDEN) + (2 + 3) * HIDDEN
    )  # attention, shared experts; embedding, output layer
    assert found == Sent(TOKENS * TWO_BYTES * width // 2, 0)
    stages = cost("parallel.world_size=4", "parallel.pipeline=4", "parallel.ranks_per_node=1").communication
    assert stages["pipeline"] == Sent(0, 2 * TOKENS * HIDDEN * TWO_BYTES)  # of a stage in the middle


def test_parts_of_sequences_cut_activations_and_not_weights() -> None:
    """A rank has half of the positions, but for keys and values, which are gathered and thus there twice in all."""
    overrides = ("parallel.world_size=2", "training.micro_batch=2", "model.mla=null")
    one, two = (cost(*overrides, f"parallel.context={size}") for size in (1, 2))
    for kind in ("weights", "optimizer"):
        assert one.memory[kind] == two.memory[kind]
    kept = [each.activations["none"].kept for each in (one, two)]
    assert {kind: 2 * value for kind, value in kept[1].items() if kind != "attention"} == {
        kind: value for kind, value in kept[0].items() if kind != "attention"
    }
    assert kept[0]["attention"] / 2 < kept[1]["attention"] < kept[0]["attention"]
    layers, both = 4, 2 * HIDDEN
    assert two.communication["context"] == Sent(2 * TOKENS // 2 * layers * both * TWO_BYTES, 0)
    assert one.communication["context"] == Sent(0, 0)
    assert one.communication["all_to_all"] == two.communication["all_to_all"]


def test_a_stage_has_the_routers_and_gains_of_its_own_chains() -> None:
    overrides = ("parallel.world_size=4", "parallel.pipeline=4", "chain.layers=[2]", "chain.learned_scale=1")
    stages = [cost(*overrides, stage=stage) for stage in range(4)]
    elements = [each.memory["weights"] // TWO_BYTES for each in stages]
    counted = stages[0].parameters
    assert sum(elements) == counted.total
    assert counted.gains == 2 * HIDDEN and counted.routers == 5 * 64 * HIDDEN
    assert elements[1] - elements[2] == counted.routers // 5 + counted.gains
    assert stages[1].activations["none"].peak > stages[2].activations["none"].peak


def test_recomputed_iterations_send_their_tokens_once_more() -> None:
    plain, again = (
        cost("parallel.world_size=8", "parallel.expert=8", f"moe.recompute={mode}").communication["all_to_all"].total
        for mode in ("experts", "iteration")
    )
    assert again == plain * 3 // 2


def test_smaller_micro_batches_send_as_much_but_for_what_goes_once_each() -> None:
    base = config("parallel.world_size=8", "zero.stage=2")
    one, two = (
        estimate(RunShape.of(replace(base, training=replace(base.training, micro_batch=count)), VOCABULARY))
        for count in (1, 2)
    )
    assert one.communication["gradients"].total == 2 * two.communication["gradients"].total
    assert one.communication["all_to_all"] == two.communication["all_to_all"]


@pytest.mark.parametrize("stage", [1, 2])
def test_deepspeeds_json_leaves_out_the_second_bucket(stage: int, tmp_path: Path) -> None:
    path, common = (
        tmp_path / "deepspeed.json",
        ("parallel.world_size=8", "training.precision=fp32", f"zero.stage={stage}"),
    )
    path.write_text('{"zero_optimization": {"overlap_comm": false}}')
    two, one = (cost(*common, *more).measured for more in ((), (f"zero.deepspeed={path}",)))
    assert two["communication_buckets"] == 2 * one["communication_buckets"] > 0
