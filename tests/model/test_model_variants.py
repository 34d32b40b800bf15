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
    relative_error,
    tracked_losses,
)
from model_checkpoint import load, save, scramble, sub_layer
from model_oracle import VARIANTS, layer_step, make_batch, oracle_step
from test_model_recompute import FEATURES, MODES, build, differences, two_steps

from coe_megatron.chain.settings import ChainSettings, Recompute
from coe_megatron.model.routing_stats import report_routing, reset_routing, summary

BIAS, CAPACITY = FEATURES["expert bias"], FEATURES["capacity, by probability"]
PADDED = FEATURES["capacity, padded"]
TOLERANCE = 1e-5  # relative to the largest entry, fp32
SHARED = {"moe_shared_expert_intermediate_size": 20}


def chain_of(variant: str, iterations: int) -> ChainSettings:
    return ChainSettings(**{"iterations": iterations, **VARIANTS[variant]})


def compare(config: Any, chain: ChainSettings) -> dict[str, float]:
    """The relative error of h', of the input's gradient and of every parameter's gradient."""
    oracle, layer = make_oracle(config, chain), make_layer(config, chain)
    copy_from_oracle(layer, oracle)
    h_BSD, grad_BSD = make_batch(config.hidden_size)
    return errors(layer_step(layer, h_BSD, grad_BSD), oracle_step(oracle, h_BSD, grad_BSD))


@pytest.mark.parametrize("iterations", [1, 2, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_oracle(variant: str, iterations: int) -> None:
    found = compare(make_config(**LOSSES, **SHARED), chain_of(variant, iterations))
    assert max(found.values()) <= TOLERANCE, found


@pytest.mark.parametrize("variant", VARIANTS)
def test_differs_from_the_plain_chain(variant: str) -> None:
    """A variant without effect would equal the oracle for no merit of its own."""
    config, chain = make_config(**LOSSES, **SHARED), chain_of(variant, 3)
    plain = ChainSettings(3, chain.gating, chain.residual, chain.norm_placement)
    layer, other = make_layer(config, chain), make_layer(config, plain)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.2)
            if name in dict(other.named_parameters()):
                other.get_parameter(name).copy_(parameter)
    h_BSD, grad_BSD = make_batch(config.hidden_size)
    found, truth = (layer_step(each, h_BSD, grad_BSD) for each in (layer, other))
    assert any(not torch.equal(found[name], truth[name]) for name in truth)


@pytest.mark.parametrize("variant", VARIANTS)
def test_not_a_bit_changes_when_recomputed(variant: str) -> None:
    changes = FEATURES["losses, jitter, dropout"]
    truth = two_steps(build("none", chain_of(variant, 3), **changes), padding=True)
    for mode in MODES[1:]:
        found = two_steps(build(mode, chain_of(variant, 3), **changes), padding=True)
        assert differences(found, truth) == [], mode


@pytest.mark.parametrize("variant", VARIANTS)
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
    layer = make_layer(config, ChainSettings(2, learned_scale=True, increment_scale=0.0, conditioned=True)).mlp
    for gains, value in ((layer.increment_gains, 0.0), (layer.state_gains, 1.0)):
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
    reset_routing(layer, watch=True)
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


def test_routers_apart_touch_initial_weights_of_later_routers_alone(tmp_path: Path) -> None:
    plain, apart = (build("none", ChainSettings(3, routers_apart=on)) for on in (False, True))
    first = apart.mlp.router.weight
    for router, shift in zip(apart.mlp.later_routers, (2, 5), strict=True):  # 8/3 and 16/3, rounded down
        assert torch.equal(router.weight, first.roll(shift, 0))
    other = dict(plain.named_parameters())
    assert all(torch.equal(p, other[name]) for name, p in apart.named_parameters() if "later" not in name)
    save(scramble(plain, 1), tmp_path)
    again = load(apart, tmp_path)
    assert all(map(torch.equal, plain.parameters(), again.parameters()))


JOINT = {"seq": {}, "batch": {"moe_router_load_balancing_type": "aux_loss"}, "sigmoid": FEATURES["expert bias"]}


@pytest.mark.parametrize("recompute", MODES)
@pytest.mark.parametrize("changes", JOINT.values(), ids=JOINT.keys())
def test_joint_balance_equals_oracle_with_padding(changes: dict[str, Any], recompute: Recompute) -> None:
    config = make_config(**{**LOSSES, **changes, "moe_router_enable_expert_bias": False})
    chain = ChainSettings(3, aux_loss_reduction="joint")
    oracle, layer = make_oracle(config, chain), make_layer(config, chain, recompute=recompute)
    copy_from_oracle(layer, oracle)
    padding_BS = torch.zeros(BATCH, SEQUENCE, dtype=torch.bool)
    padding_BS[1, 4:] = padding_BS[2, 1:] = True
    h_BSD, grad_BSD = make_batch(config.hidden_size)
    found = errors(layer_step(layer, h_BSD, grad_BSD, padding_BS), oracle_step(oracle, h_BSD, grad_BSD, padding_BS))
    assert max(found.values()) <= TOLERANCE, found


@pytest.mark.parametrize("feature", FEATURES)
def test_joint_balance_does_not_change_a_bit_when_recomputed_with(feature: str) -> None:
    chain, changes = ChainSettings(3, aux_loss_reduction="joint"), FEATURES[feature]
    truth = two_steps(build("none", chain, **changes), padding=True)
    for mode in MODES[1:]:
        assert differences(two_steps(build(mode, chain, **changes), padding=True), truth) == [], mode


def test_joint_balance_is_noted_once_at_the_last_iteration() -> None:
    config, chain = make_config(**LOSSES), ChainSettings(3, aux_loss_reduction="joint")
    oracle, layer = make_oracle(config, chain), make_layer(config, chain)
    copy_from_oracle(layer, oracle)
    h_BSD, grad_BSD = make_batch(config.hidden_size)
    reset_routing(layer, watch=True)
    layer_step(layer, h_BSD, grad_BSD)
    losses = oracle(h_BSD).losses
    truth = float(losses[-1]["seq_aux_loss"].detach()) / 0.1
    reports = report_routing(layer)
    assert [sorted(report.losses) for report in reports] == [["z_loss"]] * 2 + [["seq_load_balancing_loss", "z_loss"]]
    assert reports[-1].losses["seq_load_balancing_loss"] == pytest.approx(truth)
    assert summary(reports)["aux_loss"] == pytest.approx(truth)
    tracked = tracked_losses()
    assert tracked["seq_load_balancing_loss"].tolist() == pytest.approx([truth])
    z_losses = [float(loss["z_loss"].detach()) / (0.01 / 3) for loss in losses]
    assert [report.losses["z_loss"] for report in reports] == pytest.approx(z_losses)
    assert tracked["z_loss"].tolist() == pytest.approx([sum(z_losses) / 3])


def test_joint_balance_keeps_no_scores_between_calls() -> None:
    layer = build("none", ChainSettings(3, aux_loss_reduction="joint")).mlp
    layer(torch.randn(SEQUENCE, BATCH, HIDDEN, requires_grad=True))
    assert all(router.take_scored() == () for router in layer.routers)


def test_joint_balance_with_a_loss_per_token_is_that_without_times_the_tokens() -> None:
    found, batch_loss = [], {"moe_router_load_balancing_type": "aux_loss", "moe_z_loss_coeff": None}
    for per_token in (False, True):
        layer = build(
            "none", ChainSettings(2, aux_loss_reduction="joint"), calculate_per_token_loss=per_token, **batch_loss
        )
        hidden = torch.randn(SEQUENCE, BATCH, HIDDEN, generator=torch.Generator().manual_seed(1))
        layer.mlp(hidden)[0].sum().mul(0).backward()
        found.append(layer.mlp.router.weight.grad)
    assert relative_error(found[1], found[0] * SEQUENCE * BATCH) < 1e-5
