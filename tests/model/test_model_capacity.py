"""Capacity against a loop in plain sight, and the same documents with more padding: the same tokens are dropped."""

import math
from itertools import product
from typing import Any, get_args

import pytest
import torch
from model_build import EXPERTS, HIDDEN, LOSSES, TOPK, Named, errors, gradient, make_coe, make_config
from torch import Tensor

from coe_megatron.chain.method import feed_forward
from coe_megatron.chain.routing import RouterSettings, route
from coe_megatron.chain.settings import Gating, Recompute
from coe_megatron.local_backend.experts import GroupedExperts
from coe_megatron.model import CoELayer
from coe_megatron.model.capacity import filled_up, rows_per_expert, within_capacity
from coe_megatron.model.router_state import update_router_state
from coe_megatron.model.routing_stats import RoutingReport, report_routing, reset_routing

LENGTHS = (6, 2, 5)  # of the documents
REAL = sum(LENGTHS)
FACTOR = 0.7
CAPACITY = math.ceil(REAL * TOPK / EXPERTS * FACTOR)
SIGMOID = {"moe_router_score_function": "sigmoid", "moe_router_pre_softmax": False}
KINDS: dict[str, dict[str, Any]] = {
    "probs": {"moe_token_drop_policy": "probs"},
    "position": {"moe_token_drop_policy": "position"},
    "probs, filled up": {"moe_token_drop_policy": "probs", "moe_pad_expert_input_to_capacity": True},
    "position, filled up": {"moe_token_drop_policy": "position", "moe_pad_expert_input_to_capacity": True},
    "probs, allgather": {"moe_token_drop_policy": "probs", "moe_token_dispatcher_type": "allgather"},
    "filled up, allgather": {"moe_pad_expert_input_to_capacity": True, "moe_token_dispatcher_type": "allgather"},
    "expert bias, filled up": {
        **SIGMOID,
        "moe_router_enable_expert_bias": True,
        "moe_pad_expert_input_to_capacity": True,
    },
    "z-loss, aux_loss": {**LOSSES, "moe_router_load_balancing_type": "aux_loss"},
    "z-loss, seq_aux_loss": LOSSES,
    "z-loss, global_aux_loss": {**LOSSES, "moe_router_load_balancing_type": "global_aux_loss"},
    "no capacity": {**LOSSES, "moe_expert_capacity_factor": None},
}


def build(kind: str, recompute: Recompute = "none", factor: float = FACTOR, **chain: Any) -> CoELayer:
    config = make_config(**{"moe_expert_capacity_factor": factor, **KINDS[kind]})
    torch.manual_seed(1)
    layer = make_coe(config, **chain)
    layer.recompute, layer.experts.recompute = recompute, recompute == "experts"
    return layer


def documents(length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states and the output's gradient [S, B, D], which at padding is 0, and the padding mask [B, S]."""
    generator = torch.Generator().manual_seed(3)
    padding_BS = torch.arange(length) >= torch.tensor(LENGTHS).unsqueeze(1)
    x_SBD, grad_SBD = (torch.full((length, len(LENGTHS), HIDDEN), value) for value in (0.5, 0.0))
    for hidden in (x_SBD, grad_SBD):
        hidden[~padding_BS.T] = torch.randn(REAL, HIDDEN, generator=generator)
    return x_SBD, grad_SBD, padding_BS


def step(layer: CoELayer, length: int) -> tuple[Named, list[Tensor], list[RoutingReport]]:
    """Outputs, gradients and counts of one step; the choices [real tokens, N] by iteration; and the reports."""
    x_SBD, grad_SBD, padding_BS = documents(length)
    kept: list[Tensor] = []
    hooks = [r.register_forward_hook(lambda _r, _x, routing: kept.append(routing[1])) for r in layer.routers]
    reset_routing(layer, detailed=True, pairs=True)
    layer.zero_grad()
    x_SBD.requires_grad_()
    out_SBD, _ = layer(x_SBD, padding_mask=padding_BS)
    for hook in hooks:
        hook.remove()
    out_SBD.backward(grad_SBD)
    real_SB = ~padding_BS.T
    found = {"out": out_SBD.detach()[real_SB], "x": x_SBD.grad[real_SB]}
    found |= {name: gradient(parameter).clone() for name, parameter in layer.named_parameters()}
    for t, router in enumerate(layer.routers):
        found[f"load {t}"] = router.stats.load
        found |= {f"{name} {t}": loss for name, loss in router.stats.losses.items()}
        if router.enable_expert_bias:
            found[f"counts {t}"] = router.local_tokens_per_expert.clone()
    update_router_state(layer)
    if layer.config.moe_expert_capacity_factor is not None:
        assert not any(choices[~real_SB.flatten()].any() for choices in kept)
    return found, [choices[real_SB.flatten()] for choices in kept], report_routing(layer)


def keep(gates_TN: Tensor, chosen_TN: Tensor, real_T: Tensor, policy: str) -> Tensor:
    """Of each expert's real tokens the first CAPACITY, in the order of positions or of gates."""
    kept_TN = torch.zeros_like(chosen_TN)
    for expert in range(EXPERTS):
        tokens = [token for token in range(len(real_T)) if real_T[token] and chosen_TN[token, expert]]
        if policy == "probs":
            tokens.sort(key=lambda token: -float(gates_TN[token, expert]))
        kept_TN[tokens[:CAPACITY], expert] = True
    return kept_TN


def plain_chain(layer: CoELayer, x_TD: Tensor, real_T: Tensor) -> tuple[Tensor, list[Tensor]]:
    """What an inner chain adds to its input, token by token and expert by expert, and who went where."""
    state_TD, increment_TD = x_TD.clone(), torch.zeros_like(x_TD)
    settings, kept = RouterSettings(EXPERTS, TOPK), []
    for t in range(layer.chain.iterations):
        if t < len(layer.routers):
            router = layer.routers[t].tied_to or layer.routers[t]
            routing = route(state_TD, router.weight, settings)
            gates_TN = routing.gates_TN
            kept.append(keep(gates_TN, routing.chosen_TN, real_T, layer.config.moe_token_drop_policy))
        f_TD = torch.zeros_like(x_TD)
        for token, expert in kept[-1].nonzero().tolist():
            weights = layer.experts.weight1[expert], layer.experts.weight2[expert]
            f_TD[token] += gates_TN[token, expert] * feed_forward(state_TD[token : token + 1], *weights, "swiglu")[0]
        state_TD, increment_TD = state_TD + f_TD, increment_TD + f_TD
    return increment_TD, kept


@torch.no_grad()
@pytest.mark.parametrize("gating", get_args(Gating))
@pytest.mark.parametrize("iterations", [1, 2, pytest.param(3, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("kind", list(KINDS)[:6])
def test_equals_the_loop_in_plain_sight(kind: str, iterations: int, gating: Gating) -> None:
    for length in (6, 14):
        layer = build(kind, iterations=iterations, gating=gating)
        x_SBD, _, padding_BS = documents(length)
        real_T = ~padding_BS.T.flatten()
        truth_TD, kept = plain_chain(layer, x_SBD.flatten(0, 1), real_T)
        with torch.enable_grad():
            found, choices, reports = step(layer, length)
        assert errors({"out": found["out"]}, {"out": truth_TD[real_T]})["out"] < 1e-5
        assert all(torch.equal(ours, theirs[real_T]) for ours, theirs in zip(choices, kept, strict=True))
        dropped = [1 - int(choice.sum()) / (REAL * TOPK) for choice in kept]
        assert [report.dropped for report in reports[: len(kept)]] == pytest.approx(dropped)
        assert min(dropped) > 0 and max(int(choice.sum(0).max()) for choice in kept) == CAPACITY


@pytest.mark.thorough
@pytest.mark.parametrize("gating", get_args(Gating))
@pytest.mark.parametrize("kind", KINDS)
def test_more_padding_changes_nothing(kind: str, gating: Gating) -> None:
    """Neither who is dropped, nor outputs, gradients, losses, loads, counts and reports; recomputed or not."""
    for iterations, mode in product((1, 2, 3), get_args(Recompute)):
        if iterations != 2 and mode != "none":
            continue
        chain = {"iterations": iterations, "gating": gating}
        truth, kept, reports = step(build(kind, mode, **chain), 6)
        found, choices, others = step(build(kind, mode, **chain), 15)
        assert all(map(torch.equal, choices, kept))
        assert max(errors(found, truth).values()) < 2e-6, errors(found, truth)
        for report, other in zip(reports, others, strict=True):
            assert (other.load, other.dropped, other.pairs) == (report.load, report.dropped, report.pairs)
            assert other.overlap == report.overlap and other.dead_experts == report.dead_experts
            assert other.entropy == pytest.approx(report.entropy, rel=1e-6)
        assert (reports[0].dropped > 0) == (max(truth["load 0"]) == CAPACITY) == (kind != "no capacity")


@pytest.mark.parametrize("policy", ["probs", "position"])
def test_equals_stay_in_the_order_of_positions_however_many_are_padding(policy: str) -> None:
    """In bf16 many gates are equal; a top-k over more positions would keep others of them."""
    generator = torch.Generator().manual_seed(2)
    real, positions = 1000, 4096
    chosen_TN = torch.rand(real, EXPERTS, generator=generator) < TOPK / EXPERTS
    gates_TN = chosen_TN * torch.randint(1, 4, (real, EXPERTS), generator=generator) / 4
    limits = {"topk": TOPK, "factor": FACTOR, "policy": policy}
    kept_TN = within_capacity(gates_TN, chosen_TN, torch.zeros(real, dtype=torch.bool), **limits)
    padding_T = torch.ones(positions, dtype=torch.bool)
    padding_T[torch.randperm(positions, generator=generator)[:real].sort().values] = False
    wide = [torch.ones(positions, EXPERTS, dtype=each.dtype) for each in (gates_TN, chosen_TN)]
    for each, values in zip(wide, (gates_TN, chosen_TN), strict=True):
        each[~padding_T] = values
    found_TN = within_capacity(*wide, padding_T, **limits)
    assert torch.equal(found_TN[~padding_T], kept_TN) and not found_TN[padding_T].any()
    by_megatron_TN = within_capacity(
        torch.rand(real, EXPERTS, generator=generator) * chosen_TN, chosen_TN, None, **limits
    )
    assert by_megatron_TN.sum(0).tolist() == kept_TN.sum(0).tolist()
    assert kept_TN.sum(0).tolist() == [math.ceil(real * TOPK / EXPERTS * FACTOR)] * EXPERTS


@pytest.mark.parametrize("kind", ["probs, filled up", "filled up, allgather"])
@pytest.mark.parametrize("factor", [0.7, 4.0, 100.0])
def test_padding_to_capacity_gives_every_expert_as_many_rows(
    kind: str, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fixed by the number of positions, whatever is padding; and never more than there are."""
    rows: list[list[int]] = []
    forward = GroupedExperts.forward

    def listen(self: GroupedExperts, hidden: Tensor, counts: Tensor, gates: Tensor) -> Any:
        rows.append(counts.tolist())
        return forward(self, hidden, counts, gates)

    monkeypatch.setattr(GroupedExperts, "forward", listen)
    x_SBD, _, padding_BS = documents(14)
    layer = build(kind, factor=factor, iterations=2)
    outs = [layer(x_SBD, padding_mask=mask)[0] for mask in (padding_BS, torch.ones_like(padding_BS), None)]
    positions = x_SBD.shape[0] * x_SBD.shape[1]
    wanted = min(math.ceil(positions * TOPK / EXPERTS * factor), positions)
    assert rows == [[wanted] * EXPERTS] * 6
    assert rows_per_expert(positions, TOPK, EXPERTS, factor) == wanted
    assert not outs[1].any()  # padding alone: no expert has a say
    monkeypatch.undo()
    if factor >= EXPERTS / TOPK:
        outs[0] = outs[0].detach()
        free = build("no capacity", iterations=2)
        assert errors({"": outs[0][~padding_BS.T]}, {"": free(x_SBD)[0][~padding_BS.T]})[""] < 1e-5


def test_experts_are_filled_up_from_the_front() -> None:
    chosen = torch.tensor([[0, 1], [1, 1], [0, 0]], dtype=torch.bool)
    assert filled_up(chosen, 2).tolist() == [[True, True], [True, True], [False, False]]


@pytest.mark.parametrize("recompute", get_args(Recompute))
@pytest.mark.parametrize("kind", ["probs", "position, filled up", "probs, allgather"])
def test_a_micro_batch_of_padding_alone(kind: str, recompute: Recompute) -> None:
    layer = build(kind, recompute, iterations=2)
    x_SBD, _, padding_BS = documents(6)
    out_SBD, _ = layer(x_SBD.requires_grad_(), padding_mask=torch.ones_like(padding_BS))
    out_SBD.square().sum().backward()
    assert not out_SBD.any() and not x_SBD.grad.any()
    assert not any(gradient(parameter).any() for parameter in layer.parameters())
