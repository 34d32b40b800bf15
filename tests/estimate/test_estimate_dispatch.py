"""What `auto` takes for the dispatch of tokens, and the predicted times, by hand."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coe_megatron.config import RunConfig, parse
from coe_megatron.config.layout import Layout
from coe_megatron.config.settings import MoESettings
from coe_megatron.errors import ConfigError
from coe_megatron.estimate import measured_network
from coe_megatron.estimate.closed_forms import ranks_of_a_token
from coe_megatron.estimate.dispatch import Dispatch, dispatch, resolved
from coe_megatron.estimate.exchange_time import PassSeconds, chain_seconds
from coe_megatron.estimate.machine import Arithmetic, Machine, Memory, Rates, machine
from coe_megatron.estimate.measured_network import MeasuredNetwork, Speeds, read_network
from coe_megatron.estimate.node_limit import node_limit
from coe_megatron.estimate.run_estimate import estimate
from coe_megatron.estimate.run_shape import RunShape
from coe_megatron.estimate.step_time import moe_seconds
from coe_megatron.estimate.traffic import expert_nodes

VOCABULARY = 512
AUTO = {"dispatcher": "auto", "overlap_chunks": "auto"}
TOKENS, HIDDEN, FP32, LAYERS, ITERATIONS, MICRO_BATCHES = 128, 32, 4, 2, 2, 2
COPIES = 2 * (1 - 6 / 28)  # of EP 2: 1 - C(4, 2) / C(8, 2) for each rank
SLOW = {"all_to_all": 1e-3, "all_reduce": 1e-3, "latency": 5e-3}  # a megabyte per second


def config(moe: dict[str, Any] = AUTO, **sections: dict[str, Any]) -> RunConfig:
    """Two ranks on two nodes, each with two micro-batches of 128 tokens."""
    parallel = {"expert": 2, "world_size": 2, "ranks_per_node": 1, **sections.pop("parallel", {})}
    return parse(
        {
            "model": {"num_layers": LAYERS, "hidden_size": HIDDEN, "num_attention_heads": 2, "seq_length": 32},
            "moe": {"num_experts": 8, "topk": 2, "ffn_hidden_size": 16, **moe},
            "training": {"global_batch": 16, "micro_batch": 4, **sections.pop("training", {})},
            "parallel": parallel,
            **sections,
        }
    )


def report(folder: Path, devices: list[str] | None = None, **changes: Any) -> str:
    """A report of the node check."""
    nodes = {"a": {"devices": []}, "b": {"devices": ["cpu, 2 cores"] if devices is None else devices}}
    content = {"nodes": nodes, "bad": {}, "all_nodes": SLOW, **changes}
    (folder / "check.json").write_text(json.dumps(content))
    return str(folder / "check.json")


def taken(run: RunShape) -> tuple[str, int | str]:
    return run.config.moe.dispatcher, run.config.moe.overlap_chunks


def shown(run: RunShape) -> Dispatch:
    found = dispatch(run)
    assert found is not None
    return found


# way, latency, sizes, router, shared, experts; chunks, iterations, routings; seconds
CHAINS = [
    ((2, 0, 0.5, 0.25, 1, 4), (1, 1, 1), 0.75 + 2 + 4 + 2),  # the shared experts work while tokens travel
    ((2, 0, 0.5, 0.25, 3, 4), (1, 1, 1), 0.75 + 3 + 4 + 2),  # and longer than that
    ((2, 0, 0.5, 0, 0, 4), (1, 3, 3), 3 * 8.5),
    ((2, 0, 0.5, 0, 0, 4), (1, 3, 1), 3 * 8 + 0.5),
    # Two chunks, experts as long as both ways. First there 0-1, 1-2; work 1-3, 3-5; back 3-4, 5-6.
    ((1, 0, 0, 0, 0, 2), (2, 1, 1), 6),
    # ... there again 6-7, 7-8, since the first chunk waits for the work of the other; work 7-9, 9-11; back 9-10, 11-12.
    ((1, 0, 0, 0, 0, 2), (2, 2, 2), 12),
    # Ways as long as the work of two: there 0-2, 2-4; work 2-3, 4-5; back 4-6, 6-8: the link has no pause.
    ((2, 0, 0, 0, 0, 1), (2, 1, 1), 8),
    # Sizes are waited for by one chunk after the other: there 1-2, 2-3; work 2-3, 3-4; back 3-4, 4-5.
    ((1, 0, 1, 0, 0, 1), (2, 1, 1), 5),
]


@pytest.mark.parametrize(("seconds", "counts", "total"), CHAINS)
@pytest.mark.parametrize("at_once", [1, 2])
def test_chunks_go_through_a_chain_in_turns(
    seconds: tuple[float, ...], counts: tuple[int, int, int], total: float, at_once: int
) -> None:
    """Without latency it is no matter how many all-to-alls are delivered at once: one link carries all rows."""
    assert chain_seconds(PassSeconds(*seconds, at_once=at_once), *counts) == total


# all-to-alls at once, chunks; forward with sizes, backward; seconds for a latency of 1 and a way of 0.
LATENCIES = [
    (1, 1, 1 + 2 + 1, 1 + 2),
    (2, 1, 1 + 1 + 1, 1 + 1),
    # Sizes 0-1, 1-2; there 1-2, 2-3 and 3-4, 4-5; back 5-6, 6-7. Backward 0-1, 1-2; 2-3, 3-4 and 4-5, 5-6.
    (1, 2, 7, 2 + 4),
    # Sizes 0-1, 1-2; there 1-2, 1-2 and 2-3, 2-3; back 3-4 and, when its rows are there, 3-4. Backward as before.
    (2, 2, 4, 3),
]


@pytest.mark.parametrize(("at_once", "chunks", "forward", "backward"), LATENCIES)
def test_latencies_of_a_group_come_one_after_the_other(
    at_once: int, chunks: int, forward: float, backward: float
) -> None:
    each = PassSeconds(0, 1, 1, 0, 0, 0, at_once=at_once)
    assert chain_seconds(each, chunks, 1, 1) == forward
    assert chain_seconds(each.backward, chunks, 1, 1) == backward


def test_shared_experts_work_while_tokens_travel_if_there_are_cores_for_both() -> None:
    # Router 1, sizes 1; rows there 4-7 beside shared experts 2-4, or after them; experts 2 and back 3.
    both = [PassSeconds(2, 1, 1, 1, 2, 2, at_once=2, hides=hides) for hides in (True, False)]
    assert [chain_seconds(each, 1, 1, 1) for each in both] == [2 + 3 + 2 + 3, 2 + 2 + 3 + 2 + 3]


def test_a_step_without_compute_is_ways_latencies_and_sizes(tmp_path: Path) -> None:
    """Of a GPU, which works in a thousandth of the time that the network takes."""
    network = report(tmp_path, ["NVIDIA H100"])
    run = resolved(config({}, parallel={"network": network}), VOCABULARY)
    way = 2 * TOKENS * HIDDEN * FP32 / 2 / 1e6  # K rows for each token, and half of them to the other node
    forward, backward = (1 + 3) * 5e-3 + 2 * way, 3 * 5e-3 + 2 * way
    passes = MICRO_BATCHES * LAYERS * ITERATIONS
    found = shown(run)
    assert found.taken.seconds == pytest.approx(passes * (forward + backward), rel=0.01)
    assert found.taken.collectives == passes * (1 + 3 + 3)
    assert found.taken.sent == found.taken.across_nodes == passes * 4 * 2 * TOKENS * HIDDEN * FP32 // 2
    again = resolved(config({"recompute": "iteration"}, parallel={"network": network}), VOCABULARY)
    assert shown(again).taken.seconds == pytest.approx(passes * (2 * forward - 5e-3 + backward), rel=0.01)
    assert shown(again).taken.collectives == passes * (1 + 3 + 3 + 3)
    known = passes // ITERATIONS  # sizes of the second iterations
    for recompute, expected in (("none", forward + backward), ("iteration", 2 * forward - 5e-3 + backward)):
        fixed = config({"recompute": recompute}, parallel={"network": network}, chain={"gating": "fixed"})
        found = shown(resolved(fixed, VOCABULARY)).taken
        assert found.seconds == pytest.approx(passes * expected - known * 5e-3, rel=0.01)
        assert found.collectives == passes * (1 + 3 * (1 + (recompute != "none")) + 3) - known


def flat(found: Machine, rate: float) -> Machine:
    """A machine with one speed in all products, and without any other limit."""
    products = Rates([1.0], [1.0], [[rate]])
    return replace(found, fp32=Arithmetic(None, products, products), memory=Memory([1.0], [1e30], None))


def test_routers_shared_experts_and_experts_take_their_flops(tmp_path: Path) -> None:
    """On a core whose only limit is its speed in products; the shared expert is hidden by the way."""
    network = report(tmp_path, all_nodes={**SLOW, "latency": 0})
    run = resolved(config({}, parallel={"network": network}), VOCABULARY)
    assert run.network is not None and run.network.machine is not None
    slow, none = (flat(run.network.machine, rate) for rate in (4e10, 1e30))
    router, experts = 2 * 8 * HIDDEN, 2 * 2 * 3 * HIDDEN * 16
    work = MICRO_BATCHES * LAYERS * ITERATIONS * 3 * TOKENS * (router + experts) / 4e10
    assert moe_seconds(run, slow, 0) - moe_seconds(run, none, 0) == pytest.approx(work)


@pytest.mark.parametrize(("device", "shared"), [("cpu, 8 cores", 2), ("NVIDIA H100 80GB HBM3", 1)])
def test_ranks_of_a_node_share_a_network_unless_each_has_a_gpu(device: str, shared: int, tmp_path: Path) -> None:
    network = report(tmp_path, [device], all_nodes={**SLOW, "latency": 0})
    parallel = {"expert": 4, "world_size": 4, "ranks_per_node": 2, "network": network}
    run = resolved(config({}, parallel=parallel, training={"global_batch": 32}), VOCABULARY)
    way = 2 * TOKENS * HIDDEN * FP32 / 2 / 1e6
    seconds = MICRO_BATCHES * LAYERS * ITERATIONS * 4 * way * shared
    assert run.network is not None and run.network.machine is not None
    assert moe_seconds(run, flat(run.network.machine, 1e30), 0) == pytest.approx(seconds, rel=0.01)


@pytest.mark.parametrize(("expert_tensor", "sizes"), [(1, 1), (2, 3)])
def test_sizes_are_an_all_to_all_or_go_round_a_ring_of_nodes(tmp_path: Path, expert_tensor: int, sizes: int) -> None:
    """One latency over four nodes, or with expert tensor parallelism three."""
    network = report(tmp_path, ["NVIDIA H100"], all_nodes={**SLOW, "all_to_all": 1e6})
    size = 4 * expert_tensor
    parallel = {"expert": 4, "world_size": size, "tensor": expert_tensor, "ranks_per_node": expert_tensor}
    cut = {**parallel, "expert_tensor": expert_tensor, "network": network}
    run = resolved(config({}, parallel=cut, training={"global_batch": 32}), VOCABULARY)
    passes = MICRO_BATCHES * LAYERS * ITERATIONS
    assert shown(run).taken.seconds == pytest.approx(passes * (sizes + 3 + 3) * 5e-3, rel=0.01)


@pytest.mark.parametrize(
    ("layout", "ranks_per_node", "nodes"),
    [
        (Layout(16, expert=8), 8, 1),
        (Layout(16, expert=16), 8, 2),
        (Layout(16, expert=4, expert_tensor=2), 2, 4),
        (Layout(12, expert=4), 6, 2),  # ranks 4 to 7
        (Layout(4, expert=4), 6, 1),
        (Layout(16, expert=8), 3, 4),  # ranks 0 to 7 are on 3 nodes, 8 to 15 on 4
    ],
)
def test_nodes_of_an_expert_parallel_group(layout: Layout, ranks_per_node: int, nodes: int) -> None:
    run = RunShape(config({}, parallel={"ranks_per_node": ranks_per_node}), VOCABULARY, layout)
    assert expert_nodes(run) == nodes


def test_without_a_report_bytes_decide() -> None:
    found = shown(resolved(config(), VOCABULARY))
    assert (found.taken, len(found.candidates)) == (found.auto, 2)
    assert taken(resolved(config(), VOCABULARY)) == ("deduplicated", 1)
    assert found.auto.sent / found.candidates[0].sent == pytest.approx(COPIES / 2, rel=1e-5)
    assert str(found) == (
        "deduplicated, 1 chunk: 0.79 of the bytes of alltoall (by bytes alone: parallel.network is null)"
    )


@pytest.mark.parametrize(("expert", "dispatcher"), [(2, "deduplicated"), (4, "alltoall")])
def test_a_tenth_of_the_bytes_has_to_be_saved(expert: int, dispatcher: str) -> None:
    """With two experts on each of four ranks a token goes to 1.86 ranks, 0.93 of its two experts."""
    assert ranks_of_a_token(8, 2, 4) == pytest.approx(4 * (1 - 15 / 28))
    run = resolved(config(parallel={"expert": expert, "world_size": 4}, training={"global_batch": 32}), VOCABULARY)
    assert taken(run) == (dispatcher, 1)


@pytest.mark.parametrize(
    ("changes", "basis"),
    [
        ({"parallel": {"ranks_per_node": 2}}, "by bytes alone: tokens stay inside nodes of 2 ranks"),
        ({"all_nodes": {}}, "by bytes alone: check.json has no measurement over all nodes"),
        ({"devices": ["NVIDIA L4"]}, "by bytes alone: the speed of NVIDIA L4 is unknown"),
        ({"devices": []}, "by bytes alone: the speed of the devices is unknown"),
        ({"bad": {"b": "slow"}}, "by bytes alone: the speed of the devices is unknown"),
    ],
)
def test_without_measurements_that_apply_there_is_one_chunk(
    changes: dict[str, Any], basis: str, tmp_path: Path
) -> None:
    parallel = {**changes.pop("parallel", {}), "network": report(tmp_path, **changes)}
    run = resolved(config(parallel=parallel), VOCABULARY)
    assert taken(run) == ("deduplicated", 1) and {each.chunks for each in shown(run).candidates} == {1}
    assert f"({basis}" in str(shown(run))


# GB/s, latency, width of an expert, and what is taken
NETWORKS = [
    (1e3, 5e-3, 16, ("alltoall", 1)),  # nothing but latency
    (1e3, 1e-6, 512, ("alltoall", 1)),  # nothing but work
    (1e-3, 1e-6, 16, ("deduplicated", 1)),  # nothing but bytes
    (2e-2, 1e-6, 512, ("deduplicated", 2)),  # as much work as bytes
    (2e-2, 1.5e-2, 512, ("deduplicated", 1)),  # and so much latency that chunks would wait longer
]


@pytest.mark.parametrize(("bandwidth", "latency", "width", "expected"), NETWORKS)
def test_the_network_decides(
    bandwidth: float,
    latency: float,
    width: int,
    expected: tuple[str, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without the caches of a real machine, for which two small chunks are faster than a large one."""
    monkeypatch.setattr(measured_network, "machine_of_device", lambda _device: flat(machine("cpu"), 4e10))
    network = report(tmp_path, all_nodes={"all_to_all": bandwidth, "latency": latency})
    training = {"global_batch": 128, "micro_batch": 64}
    run = resolved(config({**AUTO, "ffn_hidden_size": width}, parallel={"network": network}, training=training), 512)
    assert taken(run) == expected, [(str(each), each.seconds) for each in shown(run).candidates]


@pytest.mark.parametrize(
    ("moe", "parallel", "expected"),
    [
        ({"capacity_factor": 2.0}, {}, ("alltoall", 1)),
        ({"dispatcher": "allgather"}, {}, ("allgather", 1)),
        ({}, {"expert": 1}, ("alltoall", 1)),
        ({"overlap_chunks": 3}, {"expert": 1}, ("alltoall", 3)),
        ({"overlap_chunks": 3}, {}, ("deduplicated", 3)),
        ({"dispatcher": "alltoall"}, {}, ("alltoall", 1)),
    ],
)
def test_what_is_given_and_what_only_megatrons_dispatchers_do_is_no_choice(
    moe: dict[str, Any], parallel: dict[str, Any], expected: tuple[str, int]
) -> None:
    assert taken(resolved(config({**AUTO, **moe}, parallel=parallel), VOCABULARY)) == expected


def test_a_chunk_has_a_position_of_the_sequence(tmp_path: Path) -> None:
    changed = config(parallel={"network": report(tmp_path)})
    short = replace(changed, model=replace(changed.model, seq_length=3))
    counts = ({each.chunks for each in shown(resolved(each, VOCABULARY)).candidates} for each in (changed, short))
    assert list(counts) == [{1, 2, 4}, {1, 2}]


def test_a_run_without_auto_is_told_what_it_would_take() -> None:
    assert str(shown(resolved(config({}), VOCABULARY))) == (
        "alltoall, 1 chunk (by bytes alone: parallel.network is null); auto would take deduplicated, 1 chunk: 0.79 of "
        "the bytes of alltoall"
    )


def test_the_estimate_is_of_what_is_taken_and_says_why(tmp_path: Path) -> None:
    given = config(parallel={"network": report(tmp_path)})
    run, plain = resolved(given, VOCABULARY), resolved(replace(given, moe=config({}).moe), VOCABULARY)
    cost, other = estimate(run), estimate(plain)
    assert cost.communication["all_to_all"].total < other.communication["all_to_all"].total
    line = cost.table().splitlines()[-1]
    assert line.startswith("dispatch           deduplicated, 2 chunks: 0.79 of the bytes of alltoall, predicted ")
    assert line.endswith(" with alltoall, 1 chunk (check.json: 0.001 GB/s and 5 ms)")
    said = json.loads(json.dumps(cost.as_dict()["dispatch"]))
    assert said["taken"] == said["auto"] == said["candidates"][3] and len(said["candidates"]) == 6
    assert estimate(run.changed(replace(run.config, zero=replace(run.config.zero, stage=2)))).dispatch == cost.dispatch
    assert "dispatch" not in estimate(resolved(config(parallel={"expert": 1}), VOCABULARY)).table()


@pytest.mark.parametrize("name", AUTO)
def test_nothing_is_estimated_or_built_before_it_is_resolved(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^moe\.{name} is auto: .*dispatch\.resolved replaces it$"):
        RunShape.of(config({name: "auto"}), VOCABULARY)
    with pytest.raises(ConfigError, match=name):
        MoESettings(**{name: "auto"}).resolved_chunks()


def test_a_report_is_read(tmp_path: Path) -> None:
    path = report(tmp_path, ["NVIDIA H100", "NVIDIA H100"], anything=1)
    assert read_network(path) == MeasuredNetwork(path, "NVIDIA H100", Speeds(1e6, 5e-3))
    assert read_network(report(tmp_path, all_nodes={})).speeds is None


NO_REPORT = "it is not a report of this version's launch/check_nodes.py: "
BROKEN: dict[str, tuple[str, str]] = {
    "no JSON": ("{", "not valid JSON"),
    "a list": ("[]", NO_REPORT),
    "something else": ("{}", f"{NO_REPORT}nodes: Field required"),
    "deep": ('{"nodes":' + "[" * 99 + "]" * 99 + "}", "not valid JSON (it is nested more than 32 levels deep)"),
    "an older one": (
        json.dumps({"nodes": {}, "bad": {}, "all_nodes": {"all_to_all": 1.0, "all_reduce": 1.0}}),
        f"{NO_REPORT}latency: Field required",
    ),
    "no bandwidth": (
        json.dumps({"nodes": {}, "bad": {}, "all_nodes": {"all_to_all": 0, "latency": 1}}),
        f"{NO_REPORT}all_to_all: Input should be greater",
    ),
    "a number as text": (
        json.dumps({"nodes": {}, "bad": {}, "all_nodes": {"all_to_all": "1", "latency": 1}}),
        f"{NO_REPORT}all_to_all: Input should be a valid number",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_is_no_report_is_one_line(name: str, tmp_path: Path) -> None:
    content, said = BROKEN[name]
    path = tmp_path / "check.json"
    path.write_text(content)
    with pytest.raises(ConfigError) as refused:
        resolved(config(parallel={"network": str(path)}), VOCABULARY)
    assert str(refused.value).startswith(f"parallel.network is {path}: {said}") and str(refused.value).isprintable()


def test_a_report_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"^parallel\.network is nowhere\.json: there is no such file$"):
        resolved(config({}, parallel={"network": "nowhere.json"}), VOCABULARY)


EVERY_RANK = {"expert": 8, "world_size": 8, "ranks_per_node": 2}


@pytest.mark.parametrize(
    ("groups", "topk", "parallel", "limit"),
    [
        ((4, 2), 4, {}, (4, 2)),  # a group in each node
        ((8, 2), 4, {}, (4, 2)),  # two
        ((8, 4), 4, {}, (4, 4)),
        ((2, 1), 4, {}, (4, 2)),  # a group has two nodes
        ((2, 1), 1, {}, (4, 1)),  # of which one expert is on one
        ((4, 2), 4, {"expert": 4, "expert_tensor": 2}, (4, 2)),
        (None, 4, {}, None),
        ((8, 2), 4, {"ranks_per_node": 8}, None),  # one node
        ((8, 2), 4, {"ranks_per_node": 3}, None),  # unevenly
    ],
)
def test_groups_limit_the_nodes_of_a_token(
    groups: tuple[int, int] | None, topk: int, parallel: dict[str, Any], limit: tuple[int, int] | None
) -> None:
    chosen = {} if groups is None else {"num_groups": groups[0], "group_topk": groups[1]}
    moe = {"num_experts": 16, "topk": topk, "dispatcher": "deduplicated", **chosen}
    training = {"global_batch": 64}
    found = node_limit(resolved(config(moe, parallel={**EVERY_RANK, **parallel}, training=training), VOCABULARY))
    assert (found and (found.nodes, found.most)) == limit


def test_the_bytes_across_nodes_follow_the_groups() -> None:
    """Two of four nodes, with one group of four experts on each node's two ranks, and two experts on a rank."""
    moe = {"num_experts": 16, "topk": 4, "num_groups": 4, "group_topk": 2, "dispatcher": "deduplicated"}
    run = resolved(config(moe, parallel=EVERY_RANK, training={"global_batch": 64}), VOCABULARY)
    found = node_limit(run)
    assert found is not None
    assert found.mean == pytest.approx(2 * (1 - 1 / 70)), "4 of 8 are all in the other group once in C(8, 4) times"
    assert found.mean_without_groups == pytest.approx(4 * (1 - 495 / 1820)), "C(12, 4) / C(16, 4)"
    ranks, ranks_without = 4 * (1 - 15 / 70), 8 * (1 - 1001 / 1820)  # C(6, 4) / C(8, 4), and C(14, 4) / C(16, 4)
    passes = MICRO_BATCHES * LAYERS * ITERATIONS * 4
    assert found.across_nodes == pytest.approx(passes * ranks * 6 / 8 * TOKENS * HIDDEN * FP32, rel=1e-5)
    assert found.across_nodes_without_groups == pytest.approx(found.across_nodes / ranks * ranks_without, rel=1e-5)
    line = estimate(run).table().splitlines()[-1]
    assert line.startswith("nodes per token    at most 2 of 4 in an iteration, 1.97 on average (2.91 without groups); ")
