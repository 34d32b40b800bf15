"""Recomputing changes no bit, counts nothing twice, and follows the routes of the first pass whatever happens."""

from itertools import product
from typing import Any, get_args

import pytest
import torch
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from megatron.core.transformer.transformer_layer import TransformerLayer
from model_build import (
    BATCH,
    HIDDEN,
    LOSSES,
    SEQUENCE,
    TOPK,
    Named,
    gradient,
    make_config,
    make_layer,
    reset_megatron,
    tracked_losses,
)

from coe_megatron.chain.settings import ChainSettings, Gating, NormPlacement, Recompute, Residual
from coe_megatron.model import coe_layer_spec
from coe_megatron.model.router import CoERouter, Routing
from coe_megatron.model.router_state import update_router_state

MODES = get_args(Recompute)
SHARED = {"moe_shared_expert_intermediate_size": 20}
BIAS = {
    "moe_router_score_function": "sigmoid",
    "moe_router_pre_softmax": False,
    "moe_router_enable_expert_bias": True,
    "moe_router_bias_update_rate": 0.5,
}
CAPACITY = {"moe_expert_capacity_factor": 0.7, "moe_router_load_balancing_type": "aux_loss"}
FEATURES: dict[str, dict[str, Any]] = {
    "losses, jitter, dropout": {"moe_input_jitter_eps": 0.2, "hidden_dropout": 0.3, **SHARED},
    "expert bias": {**BIAS, **SHARED},
    "groups": {"moe_router_num_groups": 4, "moe_router_group_topk": 1},
    "renormalised": {"moe_router_pre_softmax": False},
    "global_aux_loss": {"moe_router_load_balancing_type": "global_aux_loss"},
    "capacity, by probability": {**CAPACITY, "moe_token_drop_policy": "probs"},
    "capacity, by position": {**CAPACITY, "moe_token_drop_policy": "position"},
    "capacity, padded": {**CAPACITY, "moe_pad_expert_input_to_capacity": True},
    "per-token loss": {"calculate_per_token_loss": True},
    "allgather": {"moe_token_dispatcher_type": "allgather"},
    "random logits": {"moe_router_force_load_balancing": True},
    "no gating of experts": {"gated_linear_unit": False, "activation_func": torch.nn.functional.gelu},
    "bf16": {"params_dtype": torch.bfloat16, "bf16": True, "moe_router_dtype": "fp32"},
}


def build(recompute: str, chain: ChainSettings, **changes: Any) -> TransformerLayer:
    """A layer with weights that do not depend on how it recomputes."""
    reset_megatron()
    model_parallel_cuda_manual_seed(5)
    torch.manual_seed(5)
    return make_layer(make_config(**{**LOSSES, **changes}), chain, recompute=recompute)


def two_steps(layer: TransformerLayer, padding: bool = False) -> Named:
    """Outputs, gradients, losses and counts of two steps of two micro-batches, both in flight at once."""
    generator = torch.Generator().manual_seed(3)
    model_parallel_cuda_manual_seed(7)
    torch.manual_seed(7)
    mask = torch.zeros(BATCH, SEQUENCE, dtype=torch.bool)
    mask[0, 3:] = True
    found: Named = {}
    for step in range(2):
        batches = [torch.randn(SEQUENCE, BATCH, HIDDEN, generator=generator) for _ in range(2)]
        inputs = [batch.to(layer.config.params_dtype).requires_grad_() for batch in batches]
        outs = [layer._forward_mlp(h, padding_mask=mask if padding else None) for h in inputs]
        for i, (h, out) in enumerate(zip(inputs, outs, strict=True)):
            out.backward(out.detach().cos())
            found |= {f"out {step}.{i}": out.detach(), f"h {step}.{i}": h.grad}
        for t, router in enumerate(layer.mlp.routers):
            found |= {f"{name} {step}.{t}": value for name, value in router.stats.losses.items()}
            found |= {f"load {step}.{t}": router.stats.load, f"calls {step}.{t}": torch.tensor(router.stats.calls)}
            if router.enable_expert_bias:
                found[f"counts {step}.{t}"] = router.local_tokens_per_expert.clone()
        update_router_state(layer)
        found |= {
            f"bias {step}.{t}": r.expert_bias.clone() for t, r in enumerate(layer.mlp.routers) if r.enable_expert_bias
        }
    found |= {f"gradient of {name}": gradient(parameter) for name, parameter in layer.named_parameters()}
    found |= {f"tracked {name}": value for name, value in tracked_losses().items()}
    return found | {"next random number": torch.rand(1)}


def differences(found: Named, truth: Named) -> list[str]:
    assert found.keys() == truth.keys()
    return [name for name in truth if not torch.equal(found[name], truth[name])]


@pytest.mark.thorough
@pytest.mark.parametrize("gating", get_args(Gating))
@pytest.mark.parametrize("norm_placement", get_args(NormPlacement))
def test_not_a_bit_changes(gating: Gating, norm_placement: NormPlacement) -> None:
    for residual, iterations in product(get_args(Residual), (1, 2, 3)):
        chain = ChainSettings(iterations, gating, residual, norm_placement)
        changes = FEATURES["losses, jitter, dropout"]
        truth = two_steps(build("none", chain, **changes), padding=True)
        for mode in MODES[1:]:
            found = two_steps(build(mode, chain, **changes), padding=True)
            assert differences(found, truth) == [], (mode, chain)


@pytest.mark.thorough
@pytest.mark.parametrize("gating", get_args(Gating))
@pytest.mark.parametrize("feature", FEATURES)
def test_not_a_bit_changes_with(feature: str, gating: Gating) -> None:
    chain, changes = ChainSettings(3, gating), FEATURES[feature]
    truth = two_steps(build("none", chain, **changes))
    for mode in MODES[1:]:
        assert differences(two_steps(build(mode, chain, **changes)), truth) == [], mode


def test_what_is_counted_is_counted_once() -> None:
    """The modes agree on more than nothing."""
    found = two_steps(build("layer", ChainSettings(2), **BIAS))
    tokens = 2 * SEQUENCE * BATCH
    assert float(found["load 0.1"].sum()) == float(found["counts 0.1"].sum()) == tokens * TOPK
    assert int(found["calls 1.1"]) == 4 and float(found["counts 1.0"].sum()) == tokens * TOPK
    assert float(found["seq_load_balancing_loss 0.0"]) > 2.0 - 1e-6  # two micro-batches of at least 1 each


@pytest.mark.parametrize("mode", ["iteration", "layer"])
@pytest.mark.parametrize("feature", ["groups", "expert bias", "capacity, by probability", "capacity, padded", "bf16"])
def test_the_second_pass_follows_the_routes_of_the_first(
    mode: Recompute, feature: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the passes the routers' weights change their signs: whoever chose again would choose other experts."""
    layer = build(mode, ChainSettings(3, residual="init"), **{**FEATURES[feature], "moe_z_loss_coeff": None}).mlp
    routes: list[torch.Tensor] = []
    forward = CoERouter.forward

    def listen(self: CoERouter, *arguments: Any) -> Routing:
        routing = forward(self, *arguments)
        routes.append(routing.chosen_TN.clone())
        return routing

    monkeypatch.setattr(CoERouter, "forward", listen)
    h = torch.randn(SEQUENCE, BATCH, HIDDEN).to(layer.config.params_dtype).requires_grad_()
    out = layer(h)[0]
    first = list(routes)
    with torch.no_grad():
        for router in layer.routers:
            router.weight.neg_()
    out.sum().backward()
    second = routes[len(first) :]
    assert len(first) == len(second) == 3
    if mode == "iteration":
        second.reverse()  # the last iteration is recomputed first
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    del routes[:]
    layer(h)
    assert all(not torch.equal(a, b) for a, b in zip(first, routes, strict=True)), "no route would have flipped"


@pytest.mark.parametrize("mode", ["iteration", "layer"])
def test_megatrons_replay_is_asked_in_the_first_pass(mode: Recompute) -> None:
    layer = build(mode, ChainSettings(2), moe_enable_routing_replay=True)
    RouterReplay.set_global_router_replay_action(RouterReplayAction.RECORD)
    h = torch.randn(SEQUENCE, BATCH, HIDDEN, requires_grad=True)
    out = layer._forward_mlp(h)
    recorded = RouterReplay.get_recorded_data()
    assert [routes.shape for routes in recorded] == [(SEQUENCE * BATCH, TOPK)] * 2
    RouterReplay.set_replay_data(recorded)
    RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    with torch.no_grad():
        layer.mlp.router.weight.neg_()
    again = layer._forward_mlp(h)
    again.sum().backward()
    loads = [router.stats.load for router in layer.mlp.routers]
    out.sum().backward()
    for router, load, routes in zip(layer.mlp.routers, loads, recorded, strict=True):
        assert torch.equal(router.stats.load, load)
        assert torch.equal(load, 2 * routes.flatten().bincount(minlength=len(load)))


@pytest.mark.thorough
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("feature", FEATURES)
def test_nothing_of_a_call_stays_on_routers_and_dispatcher(feature: str, mode: Recompute) -> None:
    """Statistics apart, and buffers, which count over a step; also after a second pass, which ends by an exception."""
    chain = ChainSettings(3, no_return=feature != "groups")
    layer = build(mode, chain, **FEATURES[feature], moe_enable_routing_replay=True)
    parts = [*layer.mlp.routers, layer.mlp.token_dispatcher]
    lasting = ("stats", "input_jitter")
    before = [{name: value for name, value in vars(part).items() if name not in lasting} for part in parts]
    for _ in range(2):
        out = layer._forward_mlp(torch.randn(SEQUENCE, BATCH, HIDDEN).to(layer.config.params_dtype).requires_grad_())
        out.sum().backward()
        for part, attributes in zip(parts, before, strict=True):
            assert vars(part).keys() - set(lasting) == attributes.keys()
            assert all(getattr(part, name) is value for name, value in attributes.items())


def test_evaluation_recomputes_nothing() -> None:
    for mode in MODES:
        layer = build(mode, ChainSettings(2), **SHARED)
        h = torch.randn(SEQUENCE, BATCH, HIDDEN)
        with torch.no_grad():
            out = layer.eval()._forward_mlp(h)
        assert all(router.stats.load is None for router in layer.mlp.routers)
        assert torch.equal(out, build("none", ChainSettings(2), **SHARED).eval()._forward_mlp(h).detach())


@pytest.mark.parametrize("module, mode", [("moe", "layer"), ("moe_act", "experts"), ("layernorm", "none")])
def test_megatrons_names_of_modules(module: str, mode: Recompute) -> None:
    config = make_config(recompute_granularity="selective", recompute_modules=[])
    config.recompute_modules = [module]  # Megatron wants grouped experts of Transformer Engine for moe_act
    layer = make_layer(config, ChainSettings(2))
    assert (layer.mlp.recompute, layer.mlp.experts.recompute) == (mode, mode == "experts")


@pytest.mark.parametrize(
    "recompute, changes, message",
    [
        ("all", {}, "recompute is 'all': it must be one of none, experts, iteration, layer"),
        ("iteration", {"recompute_granularity": "selective", "recompute_modules": ["moe"]}, "already selects 'layer'"),
        ("layer", {"moe_router_fusion": True}, "moe_router_fusion is True: .* must be False"),
        ("iteration", {"moe_router_load_balancing_type": "sinkhorn"}, "type is 'sinkhorn': .* auxiliary loss"),
    ],
)
def test_what_cannot_be_recomputed_is_refused(recompute: Any, changes: dict[str, Any], message: str) -> None:
    config = make_config()
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        coe_layer_spec(config, recompute=recompute)
