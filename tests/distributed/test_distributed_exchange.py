"""How tokens travel between ranks: how many, when they are waited for, and that nothing is read before it is there."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from early_reads import late_delivery
from model_build import HIDDEN, LOSSES, SEQUENCE, gradient, make_config, make_layer
from ranks import run_ranks

from coe_megatron.chain.settings import ChainSettings
from coe_megatron.distributed.flights import Flight
from coe_megatron.errors import ConfigError
from coe_megatron.estimate.closed_forms import ranks_of_a_token
from coe_megatron.model.chunks import in_turns
from coe_megatron.model.exchange import Exchange

pytestmark = pytest.mark.ranks

EXPERTS, TOPK, TOKENS = 64, 4, 256
GROUPS = {"moe_router_num_groups": 4, "moe_router_group_topk": 2}
Named = dict[str, torch.Tensor]


def passed(layer: torch.nn.Module, sequence: int = SEQUENCE) -> Named:
    """Output and gradients of a forward and backward pass, this rank's."""
    layer.zero_grad()
    generator = torch.Generator().manual_seed(dist.get_rank())
    h_SBD = torch.randn(sequence, 2, HIDDEN, generator=generator, requires_grad=True)
    out_SBD = layer._forward_mlp(h_SBD)
    out_SBD.backward(h_SBD.detach().cos())
    return {"h'": out_SBD.detach(), "h": h_SBD.grad, **{name: gradient(p) for name, p in layer.named_parameters()}}


@contextmanager
def replaced(owner: Any, name: str, function: Callable) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        setattr(owner, name, original)


def states_sent(ranks: int, deduplicated: bool, recompute: str, changes: dict[str, Any]) -> int:
    """Rows of states that leave this rank in a forward and backward pass of CoE-2(4/64)."""
    sizes = {"expert_model_parallel_size": ranks, "num_moe_experts": EXPERTS, "moe_router_topk": TOPK}
    config = make_config(**sizes, moe_router_force_load_balancing=True, **changes)
    layer = make_layer(config, ChainSettings(2), deduplicated=deduplicated, recompute=recompute)
    sent, original = 0, dist.all_to_all_single

    def count(output: Any, input: torch.Tensor, *sizes: list[int], **kwargs: Any) -> Any:
        nonlocal sent
        if sizes and input.shape[1] == HIDDEN:
            sent += sum(sizes[1]) - sizes[1][dist.get_rank()]
        return original(output, input, *sizes, **kwargs)

    with replaced(dist, "all_to_all_single", count):
        passed(layer, TOKENS // 2)
    return sent


def sent_by(ranks: int) -> dict[Any, int]:
    return {
        (deduplicated, recompute, limited): states_sent(ranks, deduplicated, recompute, GROUPS if limited else {})
        for deduplicated in (False, True)
        for recompute in ("none", "iteration")
        for limited in (False, True)
    }


@pytest.mark.parametrize(("ranks", "share"), [(2, 0.472), (4, 0.694), (8, 0.844)])
def test_a_token_travels_once_to_each_rank_with_some_of_its_experts(ranks: int, share: float) -> None:
    found = run_ranks(sent_by, ranks, ranks, expert_model_parallel_size=ranks)
    sent = {kind: sum(of_rank[kind] for of_rank in found) for kind in found[0]}
    across = (ranks - 1) / ranks
    for recompute, passes in (("none", 4), ("iteration", 6)):
        for limited in (False, True):
            groups = tuple(GROUPS.values()) if limited else ()
            copies = ranks_of_a_token(EXPERTS, TOPK, ranks, *groups)
            whole = ranks * 2 * passes * TOKENS * across
            assert sent[False, recompute, limited] == pytest.approx(TOPK * whole, rel=0.02)
            # With groups each of them gives about as many experts, so more ranks than if all were alike.
            assert sent[True, recompute, limited] == pytest.approx(copies * whole, rel=0.06 if limited else 0.02)
        plain, once = sent[False, recompute, False], sent[True, recompute, False]
        assert once / plain == pytest.approx(share, rel=0.02)
    assert sent[True, "none", True] < sent[True, "none", False] or ranks == 2


VARIANTS: dict[str, dict[str, Any]] = {
    "alltoall": {},
    "chunks": {"overlap_chunks": 2},
    "deduplicated": {"deduplicated": True},
    "chunks, deduplicated": {"overlap_chunks": 3, "deduplicated": True},
    "chunks, recompute": {"overlap_chunks": 2, "recompute": "layer"},
    "chunks, recompute iterations": {"overlap_chunks": 2, "recompute": "iteration"},
}


def build(name: str, gating: str = "independent") -> torch.nn.Module:
    torch.manual_seed(3)
    config = make_config(expert_model_parallel_size=2, moe_shared_expert_intermediate_size=40, **LOSSES)
    return make_layer(config, ChainSettings(3, gating), **VARIANTS[name])


def in_the_air(layer: torch.nn.Module) -> list[int]:
    """The most flights at a time, in the forward pass and in all."""
    flying, most, start, wait = set[int](), [], Flight.start, Flight.wait

    def started(flight: Flight, tensors: Any) -> Any:
        flying.add(id(flight))
        most.append(len(flying))
        return start(flight, tensors)

    def waited(flight: Flight) -> None:
        flying.discard(id(flight))
        wait(flight)

    with replaced(Flight, "start", started), replaced(Flight, "wait", waited):
        h_SBD = torch.randn(SEQUENCE, 2, HIDDEN, requires_grad=True)
        out_SBD = layer._forward_mlp(h_SBD)
        forward = max(most)
        most.clear()
        out_SBD.sum().backward()
    assert not flying
    return [forward, max(most)]


def counts_asked(layer: torch.nn.Module) -> list[int]:
    """How often the ranks ask each other for sizes, in the forward pass and in the backward pass."""
    asked, original = 0, Exchange._ask

    def count(*args: Any) -> Any:
        nonlocal asked
        asked += 1
        return original(*args)

    with replaced(Exchange, "_ask", count):
        out_SBD = layer._forward_mlp(torch.randn(SEQUENCE, 2, HIDDEN, requires_grad=True))
        forward = asked
        out_SBD.sum().backward()
    return [forward, asked - forward]


def exchanges() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in VARIANTS:
        layer, start = build(name), Flight.start

        def start_and_wait(flight: Flight, tensors: Any, start: Callable = start) -> Any:
            arriving = start(flight, tensors)
            flight.wait()
            return arriving

        overlapped = passed(layer)
        with replaced(Flight, "start", start_and_wait):
            found[name, "not overlapped"] = bool(all(torch.equal(overlapped[k], v) for k, v in passed(layer).items()))
        with late_delivery():
            found[name, "late"] = bool(all(torch.equal(overlapped[k], v) for k, v in passed(layer).items()))
        found[name, "in the air"] = in_the_air(layer)
        found[name, "asked"] = counts_asked(layer)
        found[name, "fixed, asked"] = counts_asked(build(name, "fixed"))
    return found


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, Any]]:
    return run_ranks(exchanges, 2, expert_model_parallel_size=2)


@pytest.mark.parametrize("name", VARIANTS)
def test_waiting_late_changes_no_bit(two_ranks: list[dict], name: str) -> None:
    for found in two_ranks:
        assert found[name, "not overlapped"]


@pytest.mark.parametrize("name", VARIANTS)
def test_nothing_is_read_before_it_has_arrived(two_ranks: list[dict], name: str) -> None:
    for found in two_ranks:
        assert found[name, "late"]


@pytest.mark.parametrize("name", VARIANTS)
def test_chunks_are_under_way_at_the_same_time(two_ranks: list[dict], name: str) -> None:
    """In the backward pass too, for which iterations are recomputed apart."""
    chunks = VARIANTS[name].get("overlap_chunks", 1)
    for found in two_ranks:
        assert found[name, "in the air"] == [chunks, chunks]


@pytest.mark.parametrize("name", VARIANTS)
def test_ranks_ask_for_sizes_once_for_each_routing(two_ranks: list[dict], name: str) -> None:
    """Not again when it is recomputed, nor for each iteration that uses it."""
    chunks = VARIANTS[name].get("overlap_chunks", 1)
    for found in two_ranks:
        assert found[name, "asked"] == [3 * chunks, 0]
        assert found[name, "fixed, asked"] == [chunks, 0]


@pytest.mark.parametrize(
    ("changes", "own", "field"),
    [
        ({"moe_expert_capacity_factor": 1.0}, {"deduplicated": True}, "moe_expert_capacity_factor is 1.0"),
        ({"moe_expert_capacity_factor": 1.0}, {"overlap_chunks": 2}, "overlap_chunks 2"),
        (
            {"moe_token_dispatcher_type": "allgather"},
            {"deduplicated": True},
            "moe_token_dispatcher_type is 'allgather'",
        ),
        ({"moe_token_dispatcher_type": "allgather"}, {"overlap_chunks": 2}, "Megatron's default"),
        ({}, {"overlap_chunks": 0}, "overlap_chunks is 0: it must be at least 1"),
    ],
)
def test_what_only_megatrons_dispatchers_do_is_refused(single_rank: None, changes: dict, own: dict, field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        make_layer(make_config(**changes), ChainSettings(2), **own)


def test_generators_take_turns() -> None:
    said: list[str] = []

    def steps(name: str, number: int) -> Any:
        for step in range(number):
            said.append(f"{name}{step}")
            yield
        return name

    assert in_turns([steps("a", 1), steps("b", 3), steps("c", 2)]) == ["a", "b", "c"]
    assert said == ["a0", "b0", "c0", "b1", "c1", "b2"]
