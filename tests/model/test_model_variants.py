"""The variants of the chain: against the oracle, recomputed, noted, stored and loaded."""

import math
from pathlib import Path
from typing import Any

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
    errors,
    make_config,
    make_layer,
    make_oracle,
)
from model_checkpoint import load, save, scramble, sub_layer
from model_oracle import STREAMS, VARIANTS, layer_step, make_batch, oracle_step
from test_model_recompute import FEATURES, MODES, build, differences, two_steps

from coe_megatron.chain.settings import ChainSettings, Recompute
from coe_megatron.model.routing_stats import report_routing, reset_routing

BIAS, CAPACITY = FEATURES["expert bias"], FEATURES["capacity, by probability"]
PADDED = FEATURES["capacity, padded"]
TOLERANCE = 1e-5  # relative to the largest entry, fp32
SHARED = {"moe_shared_expert_intermediate_size": 20}
ALL = VARIANTS | STREAMS
COUNTS = [
    *((variant, count) for variant in ALL for count in (1, 2) if count > 1 or variant in VARIANTS),
    *(pytest.param(variant, 3, marks=pytest.mark.thorough) for variant in ALL),
]


def chain_of(variant: str, iterations: int) -> ChainSettings:
    return ChainSettings(**{"iterations": iterations, **ALL[variant]})


def compare(config: Any, chain: ChainSettings) -> dict[str, float]:
    """The relative error of h', of the input's gradient and of every parameter's gradient."""
    oracle, layer = make_oracle(config, chain), make_layer(config, chain)
    copy_from_oracle(layer, oracle)
    h_BSD, grad_BSD = make_batch(config.hidden_size)
    return errors(layer_step(layer, h_BSD, grad_BSD), oracle_step(oracle, h_BSD, grad_BSD))


@pytest.mark.parametrize(("variant", "iterations"), COUNTS)
def test_equals_oracle(variant: str, iterations: int) -> None:
    found = compare(make_config(**LOSSES, **SHARED), chain_of(variant, iterations))
    assert max(found.values()) <= TOLERANCE, found


@pytest.mark.parametrize("variant", ALL)
def test_differs_from_the_plain_chain(variant: str) -> None:
    """A variant without effect would equal the oracle for no merit of its own."""
    config, chain = make_config(**LOSSES, **SHARED), chain_of(variant, 3)
    plain = ChainSettings(3, chain.gating, chain.residual, chain.norm_placement)
    layer, other = make_layer(config, chain), make_layer(config, plain)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.2)
            theirs = dict(other.named_parameters()).get(name)
            if theirs is not None and theirs.shape == parameter.shape:  # not in a latent space
                other.get_parameter(name).copy_(parameter)
    h_BSD, grad_BSD = make_batch(config.hidden_size)
    found, truth = (layer_step(each, h_BSD, grad_BSD) for each in (layer, other))
    assert any(not torch.equal(found[name], truth[name]) for name in truth)


@pytest.mark.thorough
@pytest.mark.parametrize("variant", ALL)
def test_not_a_bit_changes_when_recomputed(variant: str) -> None:
    changes = FEATURES["losses, jitter, dropout"]
    truth = two_steps(build("none", chain_of(variant, 3), **changes), padding=True)
    for mode in MODES[1:]:
        found = two_steps(build(mode, chain_of(variant, 3), **changes), padding=True)
        assert differences(found, truth) == [], mode


@pytest.mark.thorough
@pytest.mark.parametrize("variant", ALL)
def test_comes_back_from_a_checkpoint_as_it_was(variant: str, tmp_path: Path) -> None:
    config, chain = make_config(), chain_of(variant, 3)
    layer = scramble(make_layer(config, chain), 1)
    save(layer, tmp_path)
    again = load(make_layer(config, chain), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), again.parameters(), strict=True))
    h_BSD, _ = make_batch(config.hidden_size)
    assert torch.equal(sub_layer(layer, h_BSD), sub_layer(again, h_BSD))


def test_gains_are_marked_for_whoever_sums_gradients_over_parts_of_a_sequence() -> None:
    config = make_config()
    config.sequence_parallel = True
    layer = make_layer(config, ChainSettings(2, learned_scale=0.0, conditioned=True)).mlp
    for gains, value in ((layer.variants.increment_gains, 0.0), (layer.variants.state_gains, 1.0)):
        assert [gain.tolist() for gain in gains] == [[value] * config.hidden_size] * 2
        assert all(gain.sequence_parallel for gain in gains)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("changes", [{}, BIAS, CAPACITY, PADDED, {"moe_router_pre_softmax": False}])
def test_no_token_goes_back_to_an_expert(changes: dict[str, Any], mode: Recompute) -> None:
    """With a bias that pulls all tokens to two experts, and whatever is recomputed; C K = N uses every expert once."""
    layer = build(mode, ChainSettings(4, no_return=True), **changes)
    if layer.mlp.router.enable_expert_bias:
        for router in layer.mlp.routers:
            router.expert_bias[:2] = 5.0
    reset_routing(layer, detailed=True)
    h_BSD, grad_BSD = make_batch(HIDDEN)
    found = layer_step(layer, h_BSD, grad_BSD)
    assert all(value.isfinite().all() for value in found.values())
    reports = report_routing(layer)
    assert [report.overlap for report in reports] == [None, 0.0, 0.0, 0.0]
    assert all(math.isfinite(report.entropy) and report.entropy <= math.log(EXPERTS) for report in reports)
    if changes not in (CAPACITY, PADDED):  # a token that was turned away has not had the expert
        assert reports[-1].entropy <= math.log(TOPK) + 1e-6, "two experts are left"
        loads = torch.stack([router.stats.load for router in layer.mlp.routers])
        assert loads.sum(0).tolist() == [SEQUENCE * BATCH] * EXPERTS


@pytest.mark.thorough
@pytest.mark.parametrize("feature", FEATURES)
def test_no_return_does_not_change_a_bit_when_recomputed_with(feature: str) -> None:
    chain, changes = ChainSettings(3, no_return=True), FEATURES[feature]
    if feature == "groups":
        with pytest.raises(ValueError, match=r"chain\.no_return is true: with groups"):
            build("none", chain, **changes)
        return
    truth = two_steps(build("none", chain, **changes))
    for mode in MODES[1:]:
        assert differences(two_steps(build(mode, chain, **changes)), truth) == [], mode


def test_no_return_in_evaluation_and_for_losses_by_iteration() -> None:
    config, chain = make_config(**LOSSES), ChainSettings(3, no_return=True)
    oracle, layer = make_oracle(config, chain), make_layer(config, chain)
    copy_from_oracle(layer, oracle)
    h_BSD, grad_BSD = make_batch(config.hidden_size)
    truth = oracle(h_BSD)
    torch.testing.assert_close(sub_layer(layer.eval(), h_BSD), truth.stream)
    layer_step(layer.train(), h_BSD, grad_BSD)
    for t, router in enumerate(layer.mlp.routers):
        assert torch.equal(router.stats.load, truth.loads[t].double())
        torch.testing.assert_close(router.stats.losses["z_loss"], truth.losses[t]["z_loss"].detach() / 0.01)
        seq = truth.losses[t]["seq_aux_loss"].detach() / 0.1
        torch.testing.assert_close(router.stats.losses["seq_load_balancing_loss"], seq)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_moe_experts": 5}, "chain.no_return is true: 3 iterations with 2 experts each need 6 experts"),
        ({"moe_router_fusion": True}, "moe_router_fusion is True"),
        ({"moe_router_load_balancing_type": "sinkhorn"}, "type is 'sinkhorn'"),
    ],
)
def test_what_cannot_go_with_no_return_is_refused(changes: dict[str, Any], message: str) -> None:
    config = make_config()
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        make_layer(config, ChainSettings(3, no_return=True))
