"""The routing reports against what the oracle's chain says of the same tokens."""

from itertools import product
from typing import Any, get_args

import pytest
import torch
from model_build import (
    BATCH,
    EXPERTS,
    HIDDEN,
    LOSSES,
    SEQUENCE,
    TOPK,
    copy_from_oracle,
    make_coe,
    make_config,
    make_layer,
    make_oracle,
)
from model_oracle import CHAINS, chain_of, make_batch
from model_reports import Batch, assert_reported, expected_reports

from coe_megatron.chain.settings import ChainSettings, Gating, Recompute
from coe_megatron.model.routing_stats import RoutingReport, report_routing, reset_routing, summary

SHARED = {"moe_shared_expert_intermediate_size": 20}
SIGMOID = {"moe_router_score_function": "sigmoid", "moe_router_pre_softmax": False}
RECOMPUTE = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}


def two_batches() -> list[Batch]:
    """Two micro-batches, each padded, with different numbers of tokens."""
    paddings = torch.zeros(2, BATCH, SEQUENCE, dtype=torch.bool)
    paddings[0, 1, 4:] = paddings[0, 2, 1:] = paddings[1, 0, 5:] = True
    return [(make_batch(HIDDEN, seed=3 + i)[0], padding_BS) for i, padding_BS in enumerate(paddings)]


def pair(chain: ChainSettings, recompute: Recompute = "none", **changes: Any) -> tuple[Any, Any]:
    """The oracle, and a layer with its weights."""
    config = make_config(**LOSSES, **changes)
    oracle, layer = make_oracle(config, chain), make_layer(config, chain, recompute=recompute)
    copy_from_oracle(layer, oracle)
    return oracle, layer


def detailed_step(layer: Any, batches: list[Batch]) -> list[RoutingReport]:
    reset_routing(layer, detailed=True, pairs=True)
    for h_BSD, padding_BS in batches:
        h_SBD = h_BSD.transpose(0, 1).contiguous().requires_grad_()
        layer._forward_mlp(h_SBD, padding_mask=padding_BS).sum().backward()
    return report_routing(layer)


@pytest.mark.parametrize("iterations", [1, 2, pytest.param(3, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("combination", CHAINS, ids="-".join)
def test_reports_are_the_oracle_s(combination: tuple[str, str, str], iterations: int) -> None:
    oracle, layer = pair(chain_of(combination, iterations), **SHARED)
    assert_reported(detailed_step(layer, two_batches()), expected_reports(oracle, two_batches()))


@pytest.mark.parametrize("gating", ["independent", "fixed"])
@pytest.mark.parametrize(
    "changes",
    [SIGMOID, RECOMPUTE, {**SIGMOID, **RECOMPUTE}, {"moe_router_topk": 1}, {"moe_router_topk": EXPERTS}],
    ids=["sigmoid", "recompute", "sigmoid, recompute", "one of N", "all of N"],
)
def test_reports_are_the_oracle_s_with_other_routers(changes: dict[str, Any], gating: str) -> None:
    oracle, layer = pair(ChainSettings(3, gating), **changes)
    reports = detailed_step(layer, two_batches())
    assert_reported(reports, expected_reports(oracle, two_batches()))
    if gating == "fixed" or changes.get("moe_router_topk") == EXPERTS:
        assert [report.overlap for report in reports] == [None, 1.0, 1.0]


@pytest.mark.parametrize("mode", get_args(Recompute)[1:])
@pytest.mark.parametrize("gating", get_args(Gating))
def test_recomputing_changes_no_report(mode: Recompute, gating: Gating) -> None:
    """What a second pass does is in no sum; the modes also agree where a capacity turns copies away."""
    oracle, layer = pair(ChainSettings(3, gating), mode, **SHARED)
    assert_reported(detailed_step(layer, two_batches()), expected_reports(oracle, two_batches()))
    limits = {"moe_expert_capacity_factor": 0.7, "moe_router_load_balancing_type": "aux_loss"}
    config, chain = make_config(**{**LOSSES, **limits}), ChainSettings(3, gating)
    twins = [make_layer(config, chain, recompute=each) for each in ("none", mode)]
    twins[1].load_state_dict(twins[0].state_dict())
    plain, recomputed = (detailed_step(twin, two_batches()) for twin in twins)
    assert recomputed == plain and plain[0].dropped > 0


@pytest.mark.parametrize("recompute", ["none", "iteration"])
def test_streams_report_what_the_plain_chain_does_as_long_as_they_do_it(recompute: Recompute) -> None:
    _, streams = pair(ChainSettings(3, streams=2), recompute, **SHARED)
    _, layer = pair(ChainSettings(3), **SHARED)
    for t, weights in enumerate(streams.mlp.variants.stream_weights):
        read = torch.eye(2)[t % 2]
        weights.data.copy_(torch.cat([read, torch.ones(2), torch.eye(2).flatten()]))
    layer.load_state_dict({name: value for name, value in streams.state_dict().items() if "stream" not in name})
    assert detailed_step(streams, two_batches()) == detailed_step(layer, two_batches())


def test_increments_in_a_latent_space_are_compared_there() -> None:
    _, layer = pair(ChainSettings(2, latent=8), **SHARED)
    first, second = detailed_step(layer, two_batches())
    assert first.increment_cosines is None and first.single_scale is None
    assert second.increment_cosines is not None and -1 <= second.increment_cosines[0] <= 1
    assert second.single_scale is not None and 0 < second.single_scale < 1


def test_an_expert_that_no_router_wants_is_dead() -> None:
    oracle, layer = pair(ChainSettings(2))
    h_BSD, padding_BS = two_batches()[0]
    h_BSD[..., 0] = 8.0  # a feature that all tokens share
    with torch.no_grad():
        oracle.w2[:, 0] = 0.0
        oracle.router_weights[0][:3, 0] = -10.0
        oracle.router_weights[1][5, 0] = -10.0
    copy_from_oracle(layer, oracle)
    reports = detailed_step(layer, [(h_BSD, padding_BS)])
    assert_reported(reports, expected_reports(oracle, [(h_BSD, padding_BS)]))
    assert reports[0].load[:3] == [0.0] * 3 and reports[1].load[5] == 0.0
    assert reports[0].dead_experts >= 3 and reports[1].dead_experts >= 1


def test_a_router_without_preference_has_the_entropy_log_n() -> None:
    layer = pair(ChainSettings(1))[1]
    with torch.no_grad():
        layer.mlp.router.weight.zero_()
    assert detailed_step(layer, two_batches())[0].entropy == pytest.approx(2.0794415)  # log 8


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("policy", ["probs", "position"])
def test_copies_beyond_the_capacity_are_dropped(policy: str, pad: bool) -> None:
    """Against the choices of a twin without capacity; in iteration 1 both see the same tokens."""
    limits = {"moe_token_drop_policy": policy, "moe_pad_expert_input_to_capacity": pad}
    limited = make_coe(make_config(moe_expert_capacity_factor=0.7, **limits), iterations=2)
    free = make_coe(make_config(), iterations=2)
    free.load_state_dict(limited.state_dict())
    x = torch.randn(SEQUENCE, BATCH, HIDDEN)
    chosen = choices(free, x)[0]
    reset_routing(limited, detailed=True, pairs=True)
    served = choices(limited, x)
    first, second = report_routing(limited)
    assert first.pairs is None and second.pairs == (served[0].T.long() @ served[1].long()).tolist()
    capacity = 4  # of each expert: 18 tokens x 2 choices / 8 experts x 0.7, rounded up
    copies = SEQUENCE * BATCH * TOPK
    assert first.dropped == pytest.approx(sum(max(int(n) - capacity, 0) for n in chosen.sum(0)) / copies)
    assert second.dropped == pytest.approx(1 - int(served[1].sum()) / copies)
    assert first.dropped > 0 and second.dropped > 0
    assert second.overlap == pytest.approx(int((served[0] & served[1]).sum()) / int(served[1].sum()))


def choices(layer: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """Bool [T, N] by iteration: the experts in which each token has a part."""
    found: list[torch.Tensor] = []
    hooks = [r.register_forward_hook(lambda _r, _x, routing: found.append(routing.chosen_TN)) for r in layer.routers]
    layer(x)
    for hook in hooks:
        hook.remove()
    return found


def test_nothing_is_noted_in_evaluation_or_on_steps_that_are_not_logged() -> None:
    layer = pair(ChainSettings(2))[1]
    h_BSD, padding_BS = two_batches()[0]
    expected = detailed_step(layer, [(h_BSD, padding_BS)])
    layer.eval()
    layer._forward_mlp(h_BSD.transpose(0, 1), padding_mask=padding_BS)
    layer.train()
    with torch.no_grad():
        layer._forward_mlp(h_BSD.transpose(0, 1), padding_mask=padding_BS)
    assert report_routing(layer) == expected
    reset_routing(layer)
    layer._forward_mlp(h_BSD.transpose(0, 1), padding_mask=padding_BS)
    assert layer.mlp.probe is None and layer.mlp.router.stats.entropy == 0.0
    assert layer.mlp.router.stats.load is not None  # the expert bias and the capacity tests live on it


def test_a_detailed_step_changes_nothing() -> None:
    """Not a bit of output or gradients."""
    layer = pair(ChainSettings(3), **SIGMOID)[1]
    h_BSD, padding_BS = two_batches()[0]
    found = []
    for detailed in (False, True):
        layer.zero_grad()
        reset_routing(layer, detailed)
        h_SBD = h_BSD.transpose(0, 1).contiguous().requires_grad_()
        out = layer._forward_mlp(h_SBD, padding_mask=padding_BS)
        out.square().sum().backward()
        found.append([out.detach(), h_SBD.grad, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)])
    assert len(found[0]) > 5 and all(map(torch.equal, *found))


def test_a_step_of_padding_alone_is_reported_as_zeros() -> None:
    layer = pair(ChainSettings(2))[1]
    h_BSD, padding_BS = two_batches()[0]
    reports = detailed_step(layer, [(h_BSD, torch.ones_like(padding_BS))])
    assert [report.entropy for report in reports] == [0.0, 0.0]
    assert reports[1].overlap == reports[1].dropped == reports[1].state_norm == reports[1].single_scale == 0.0


def test_summary_is_the_mean_over_layers_and_iterations() -> None:
    values = {
        "load": [0.5, 0.5],
        "dropped": 0.25,
        "state_norm": 1.0,
        "increment_norm": 1.0,
        "increment_over_state": 1.0,
    }
    reports = [
        RoutingReport(
            layer,
            t,
            losses={"seq_load_balancing_loss": float(layer), "z_loss": 8.0 * t},
            load_max_over_mean=layer + t,
            dead_experts=layer * t,
            entropy=0.5 * t,
            overlap=None if t == 1 else 0.1 * layer,
            **values,
        )
        for layer, t in product((1, 2), (1, 2))
    ]
    found = summary(reports)
    assert found == pytest.approx(
        {
            "aux_loss": 1.5,
            "z_loss": 12.0,
            "routing_entropy": 0.75,
            "routing_load_max_over_mean": 3.0,
            "routing_dead_experts": 2.25,
            "routing_dropped": 0.25,
            "routing_overlap": 0.15,
        }
    )
    without = summary([report for report in reports if report.iteration == 1])
    assert "routing_overlap" not in without
