"""What else a MoE layer of Megatron does, in every iteration of a chain: balance, bias, replay, recompute, padding."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.distributed.finalize_model_grads import _update_router_expert_bias, reset_model_temporary_tensors
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from model_build import (
    BATCH,
    EXPERTS,
    LOSSES,
    SEQUENCE,
    TOPK,
    Named,
    errors,
    gradient,
    make_coe,
    make_config,
    make_layer,
    relative_error,
)

from coe_megatron.chain.settings import ChainSettings
from coe_megatron.model import CoELayer
from coe_megatron.model.dispatchers import for_one_pass

TOKENS = SEQUENCE * BATCH
BIAS = {
    "moe_router_score_function": "sigmoid",
    "moe_router_pre_softmax": False,
    "moe_router_enable_expert_bias": True,
}
SHARED = {"moe_shared_expert_intermediate_size": 20}


def make_input(batch: int = BATCH, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and the gradient of the output, both [S, B, D]."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(SEQUENCE, batch, 16, generator=generator) for _ in range(2))


def step(layer: CoELayer, x: torch.Tensor, grad: torch.Tensor, **more: Any) -> Named:
    """Forward and backward: output, the input's gradient and every parameter's; gradients start at zero."""
    layer.zero_grad()
    torch.manual_seed(7)
    x = x.clone().requires_grad_()
    out, _ = layer(x, **more)
    out.backward(grad)
    return {"out": out.detach(), "x": x.grad, **{name: gradient(p).clone() for name, p in layer.named_parameters()}}


def twin(layer: CoELayer, **changes: Any) -> CoELayer:
    """A layer with the same weights and another config or chain."""
    chain = {name: changes.pop(name) for name in ("aux_loss_reduction",) if name in changes}
    values = {name: getattr(layer.chain, name) for name in ("iterations", "gating", "residual", "norm_placement")}
    other = make_coe(make_config(**changes), **values, **chain)
    other.load_state_dict(layer.state_dict(), strict=True)
    return other


@pytest.mark.parametrize("gating", ["independent", "shared_router"])
def test_mean_balance_is_an_equal_part_of_sum(gating: str) -> None:
    layer = make_coe(make_config(**LOSSES), iterations=2, gating=gating, aux_loss_reduction="sum")
    x, grad = make_input()
    nothing = torch.zeros_like(grad)  # only the losses of the routers are left
    by_sum = step(layer, x, nothing)
    by_mean = step(twin(layer, **LOSSES, aux_loss_reduction="mean"), x, nothing)
    assert float(by_sum["router.weight"].abs().max()) > 1e-3
    halved = {name: value / 2 for name, value in by_sum.items() if name != "out"}
    assert max(errors({name: by_mean[name] for name in halved}, halved).values()) < 1e-6


def test_mean_balance_leaves_fixed_gating_alone() -> None:
    """With one routing there is one loss, whatever C."""
    layer = make_coe(make_config(**LOSSES), iterations=3, gating="fixed", aux_loss_reduction="sum")
    x, grad = make_input()
    by_mean = step(twin(layer, **LOSSES, aux_loss_reduction="mean"), x, grad)
    assert max(errors(by_mean, step(layer, x, grad)).values()) == 0.0


def test_accumulated_micro_batches_equal_one_batch() -> None:
    """With Megatron's scale of 1/4 for auxiliary losses, as its schedule sets it for four micro-batches."""
    layer = make_coe(make_config(**LOSSES), iterations=2)
    x, grad = make_input(batch=4)
    whole = step(layer, x, grad)
    whole_losses = {name: value.clone() for name, value in layer.later_routers[0].stats.losses.items()}
    layer.zero_grad()
    for router in layer.routers:
        router.stats = type(router.stats)()
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(0.25))
    for i in range(4):
        layer(x[:, i : i + 1])[0].backward(grad[:, i : i + 1])
    found = {name: gradient(p) for name, p in layer.named_parameters()}
    assert max(errors(found, {name: whole[name] for name in found}).values()) < 2e-6
    stats = layer.later_routers[0].stats
    assert stats.calls == 4 and float(stats.load.sum()) == 4 * SEQUENCE * TOPK
    for name, loss in stats.losses.items():
        assert float(loss) == pytest.approx(4 * float(whole_losses[name]), rel=1e-5)


def test_dispatchers_agree() -> None:
    layer = make_coe(make_config(**LOSSES, **SHARED), iterations=2)
    other = twin(layer, **LOSSES, **SHARED, moe_token_dispatcher_type="allgather")
    x, grad = make_input()
    assert max(errors(step(other, x, grad), step(layer, x, grad)).values()) < 2e-6


@pytest.mark.parametrize("pad", [False, True])
def test_capacity_holds_in_every_iteration(pad: bool) -> None:
    config = make_config(moe_expert_capacity_factor=0.7, moe_pad_expert_input_to_capacity=pad)
    layer = make_coe(config, iterations=3)
    layer(make_input()[0])
    capacity = 4  # of each expert: 18 tokens x 2 choices / 8 experts x 0.7, rounded up
    for router in layer.routers:
        assert float(router.stats.load.max()) == capacity
        assert float(router.stats.load.sum()) < TOKENS * TOPK


@pytest.mark.parametrize("gating", ["independent", "shared_router"])
def test_expert_bias_is_kept_by_iteration_and_ignores_padding(gating: str) -> None:
    config = make_config(**BIAS, moe_router_bias_update_rate=0.5)
    layer = make_coe(config, iterations=2, gating=gating)
    padding = torch.zeros(BATCH, SEQUENCE, dtype=torch.bool)
    padding[0, 1:] = True
    layer(make_input()[0], padding_mask=padding)
    loads = [router.local_tokens_per_expert.clone() for router in layer.routers]
    assert not torch.equal(*loads)
    for router, load in zip(layer.routers, loads, strict=True):
        assert float(load.sum()) == (TOKENS - SEQUENCE + 1) * TOPK
        assert torch.equal(load, router.stats.load)
    _update_router_expert_bias([layer], config)
    reset_model_temporary_tensors(config, [layer])
    for router, load in zip(layer.routers, loads, strict=True):
        torch.testing.assert_close(router.expert_bias, 0.5 * torch.sign(load.mean() - load))
        assert not router.local_tokens_per_expert.any()


@pytest.mark.parametrize("gating, count", [("independent", 3), ("shared_router", 3), ("fixed", 1)])
def test_recorded_routes_are_replayed(gating: str, count: int) -> None:
    layer = make_coe(make_config(moe_enable_routing_replay=True), iterations=3, gating=gating)
    assert len(RouterReplay.global_router_replay_instances) == count
    x, _ = make_input()
    RouterReplay.set_global_router_replay_action(RouterReplayAction.RECORD)
    recorded = layer(x)[0]
    RouterReplay.set_replay_data(RouterReplay.get_recorded_data())
    RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    assert torch.equal(layer(x)[0], recorded)
    loads = [router.stats.load / 2 for router in layer.routers]
    with torch.no_grad():
        layer.router.weight.neg_()  # would choose other experts
    assert not torch.equal(layer(x)[0], recorded)
    assert [torch.equal(r.stats.load, 3 * load) for r, load in zip(layer.routers, loads, strict=True)] == [True] * count


@pytest.mark.parametrize("gating", ["independent", "shared_router", "fixed"])
@pytest.mark.parametrize("norm_placement", ["prenorm", "reference", "iteration_norm"])
@pytest.mark.parametrize("modules", ["moe", "shared_experts"])
def test_recompute_changes_nothing(gating: str, norm_placement: str, modules: str) -> None:
    """Not a bit, with jittered routing and dropout; and what is counted is counted once."""
    changes = {**LOSSES, **BIAS, **SHARED, "moe_input_jitter_eps": 0.2, "hidden_dropout": 0.3}
    chain = ChainSettings(3, gating=gating, norm_placement=norm_placement)
    plain = make_layer(make_config(**changes), chain)
    recompute = {"recompute_granularity": "selective", "recompute_modules": modules.split()}
    again = make_layer(make_config(**changes, **recompute), chain)
    again.load_state_dict(plain.state_dict())
    x, grad = make_input()
    found = []
    for layer in (plain, again):
        torch.manual_seed(7)
        h = x.clone().requires_grad_()
        out = layer._forward_mlp(h)
        out.backward(grad)
        routers = list(enumerate(layer.mlp.routers))
        loads = {f"load {t}": router.local_tokens_per_expert for t, router in routers}
        losses = {f"loss {t}": sum(router.stats.losses.values()) for t, router in routers}
        found.append(
            {"out": out, "h": h.grad, **loads, **losses} | {n: gradient(p) for n, p in layer.named_parameters()}
        )
    assert [name for name in found[0] if not torch.equal(found[0][name], found[1][name])] == []


@pytest.mark.parametrize("kind", ["aux_loss", "seq_aux_loss", "global_aux_loss"])
def test_padding_has_no_influence(kind: str) -> None:
    """Other values at padded places: same losses, loads and gradients of routers, same output at real places."""
    changes = {**LOSSES, **BIAS, "moe_router_load_balancing_type": kind}
    layer = make_coe(make_config(**changes), iterations=2)
    padding = torch.zeros(BATCH, SEQUENCE, dtype=torch.bool)
    padding[0, 2:] = padding[1, 5:] = True
    real = ~padding.T
    x, grad = make_input()
    grad = grad * real.unsqueeze(-1)
    found = []
    for other in (0.0, 1.0):
        layer = twin(layer, **changes)
        values = step(layer, x + other * make_input(seed=9)[0] * ~real.unsqueeze(-1), grad, padding_mask=padding)
        values["out"], values["x"] = values["out"][real], values["x"][real]
        for t, router in enumerate(layer.routers):
            values |= {f"{name} {t}": loss for name, loss in router.stats.losses.items()}
            values |= {f"load {t}": router.stats.load, f"bias load {t}": router.local_tokens_per_expert}
        found.append(values)
    assert float(found[0]["load 1"].sum()) == int(real.sum()) * TOPK
    assert max(errors(found[1], found[0]).values()) < 1e-6, errors(found[1], found[0])


def test_reference_topology_applies_hidden_dropout() -> None:
    config = make_config(hidden_dropout=0.5)
    layer = make_layer(config, ChainSettings(2, norm_placement="reference"))
    x, _ = make_input()
    with torch.no_grad():
        start = layer.pre_mlp_layernorm(x)
        dropped = layer._forward_mlp(x) - start
        kept = layer.eval()._forward_mlp(x) - start
    share = float((dropped.abs() < 1e-6).float().mean())
    assert 0.4 < share < 0.6
    survivors = dropped.abs() > 1e-6
    assert relative_error(dropped[survivors], 2 * kept[survivors]) < 1e-5


def test_overlapped_shared_experts_belong_to_the_dispatcher_of_the_only_iteration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With overlap the dispatcher runs the shared experts; one that does not know them would leave them out."""
    monkeypatch.setattr(torch.cuda, "Stream", object)
    config = make_config(**SHARED, moe_shared_expert_overlap=True)
    layer = make_coe(config)
    assert layer.token_dispatcher.shared_experts is layer.shared_experts
    assert for_one_pass(layer.token_dispatcher).shared_experts is layer.shared_experts


def test_every_iteration_has_its_own_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_coe(make_config(moe_token_dispatcher_type="allgather"), iterations=3)
    used, dispatch = [], CoELayer.dispatch

    def listen(self: CoELayer, *args: torch.Tensor) -> Any:
        used.append(self.token_dispatcher)
        return dispatch(self, *args)

    monkeypatch.setattr(CoELayer, "dispatch", listen)
    layer(make_input()[0])
    assert len({id(dispatcher) for dispatcher in (*used, layer.token_dispatcher)}) == 3 + 1
    assert (
        sum(p.numel() for p in layer.parameters())
        == sum(p.numel() for p in make_coe(make_config()).parameters()) + 2 * EXPERTS * layer.config.hidden_size
    )


def test_a_pass_has_its_own_communication_manager() -> None:
    """The flex dispatcher, which needs a GPU, keeps a pass's state there."""
    dispatcher = SimpleNamespace(_comm_manager=SimpleNamespace(handle=None), hidden_shape=None)
    own = for_one_pass(dispatcher)
    own._comm_manager.handle = own.hidden_shape = 1
    assert dispatcher._comm_manager.handle is dispatcher.hidden_shape is None
