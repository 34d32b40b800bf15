"""The whole sub-layer, norm and residual stream included, against the oracle of `coe_megatron.chain.method`."""

from typing import Any

import pytest
import torch
from model_build import (
    BATCH,
    EXPERTS,
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
from model_oracle import CHAINS, ITERATIONS, chain_of, layer_step, make_batch, oracle_step

from coe_megatron.chain.settings import ChainSettings

TOLERANCE = 1e-5  # relative to the largest entry, fp32
SHARED = {"moe_shared_expert_intermediate_size": 20}
COE2 = ChainSettings(iterations=2)


def compare(config: Any, chain: ChainSettings, padding_BS: torch.Tensor | None = None) -> dict[str, float]:
    """The relative error of h', of the input's gradient and of every parameter's gradient."""
    oracle, layer = make_oracle(config, chain), make_layer(config, chain)
    copy_from_oracle(layer, oracle)
    h_BSD, grad_BSD = make_batch(config.hidden_size)
    truth = oracle_step(oracle, h_BSD, grad_BSD, padding_BS)
    return errors(layer_step(layer, h_BSD, grad_BSD, padding_BS), truth)


@pytest.mark.parametrize("iterations", ITERATIONS)
@pytest.mark.parametrize("combination", CHAINS, ids="-".join)
def test_equals_oracle(combination: tuple[str, str, str], iterations: int) -> None:
    found = compare(make_config(**LOSSES, **SHARED), chain_of(combination, iterations))
    assert max(found.values()) <= TOLERANCE, found


@pytest.mark.parametrize("gating", ["independent", "shared_router", "fixed"])
def test_equals_oracle_with_mean_balance(gating: str) -> None:
    found = compare(make_config(**LOSSES), chain_of((gating, "inner", "prenorm"), 3, "mean"))
    assert max(found.values()) <= TOLERANCE, found


ROUTERS: dict[str, dict[str, Any]] = {
    "batch loss": {**LOSSES, "moe_router_load_balancing_type": "aux_loss"},
    "sigmoid": {**LOSSES, "moe_router_score_function": "sigmoid", "moe_router_pre_softmax": False},
    "softmax after top-k": {**LOSSES, "moe_router_pre_softmax": False},
    "one of N": {**LOSSES, "moe_router_topk": 1},
    "all of N": {**LOSSES, "moe_router_topk": EXPERTS},
    "one expert": {**LOSSES, "num_moe_experts": 1, "moe_router_topk": 1},
    "allgather": {**LOSSES, "moe_token_dispatcher_type": "allgather"},
    "recompute": {**LOSSES, "recompute_granularity": "selective", "recompute_modules": ["moe"]},
    "router in fp64": {**LOSSES, "moe_router_dtype": "fp64"},
}


@pytest.mark.parametrize("changes", ROUTERS.values(), ids=ROUTERS.keys())
def test_equals_oracle_with_other_routers(changes: dict) -> None:
    found = compare(make_config(**changes), COE2)
    assert max(found.values()) <= TOLERANCE, found


@pytest.mark.parametrize("norm_placement", ["prenorm", "iteration_norm"])
@pytest.mark.parametrize("recompute", [False, True])
def test_equals_oracle_with_padding(norm_placement: str, recompute: bool) -> None:
    padding_BS = torch.zeros(BATCH, SEQUENCE, dtype=torch.bool)
    padding_BS[1, 4:] = padding_BS[2, 1:] = True
    again = {"recompute_granularity": "selective", "recompute_modules": ["moe"]} if recompute else {}
    found = compare(make_config(**LOSSES, **again), chain_of(("independent", "inner", norm_placement), 2), padding_BS)
    assert max(found.values()) <= TOLERANCE, found


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("topk", [1, 2])
def test_equals_oracle_where_few_experts_get_all_tokens(topk: int, dispatcher: str) -> None:
    config = make_config(**LOSSES, moe_router_topk=topk, moe_token_dispatcher_type=dispatcher)
    oracle, layer = make_oracle(config, COE2), make_layer(config, COE2)
    h_BSD, grad_BSD = make_batch(config.hidden_size)
    h_BSD[..., 0] = 8.0  # one feature that all tokens share and the routers look at alone
    with torch.no_grad():
        oracle.w2[:, 0] = 0.0
        for weight_ND in oracle.router_weights:
            weight_ND.mul_(1e-3)[:topk, 0] = 1.0
    copy_from_oracle(layer, oracle)
    found = errors(layer_step(layer, h_BSD, grad_BSD), oracle_step(oracle, h_BSD, grad_BSD))
    for router in layer.mlp.routers:
        assert router.stats.load.tolist() == [BATCH * SEQUENCE] * topk + [0] * (EXPERTS - topk)
    assert max(found.values()) <= TOLERANCE, found


@pytest.mark.parametrize("gating", ["independent", "shared_router", "fixed"])
@pytest.mark.parametrize("aux_loss_reduction", ["sum", "mean"])
def test_losses_and_loads_are_kept_by_iteration(gating: str, aux_loss_reduction: str) -> None:
    config, chain = make_config(**LOSSES), chain_of((gating, "inner", "prenorm"), 3, aux_loss_reduction)
    oracle, layer = make_oracle(config, chain), make_layer(config, chain)
    copy_from_oracle(layer, oracle)
    batches = [make_batch(config.hidden_size, seed=seed) for seed in (3, 4)]
    for h_BSD, grad_BSD in batches:
        layer_step(layer, h_BSD, grad_BSD)
    results = [oracle(h_BSD) for h_BSD, _ in batches]
    share = 1 / oracle.num_routings if aux_loss_reduction == "mean" else 1.0
    names = {"seq_load_balancing_loss": ("seq_aux_loss", 0.1), "z_loss": ("z_loss", 0.01)}
    assert len(layer.mlp.routers) == oracle.num_routings
    for t, router in enumerate(layer.mlp.routers):
        assert router.stats.calls == 2
        torch.testing.assert_close(router.stats.load, sum(r.loads[t] for r in results).double())
        for ours, (theirs, coefficient) in names.items():
            truth = sum(r.losses[t][theirs] for r in results) / (coefficient * share)
            torch.testing.assert_close(router.stats.losses[ours], truth, rtol=1e-5, atol=0)
    for name, values in tracked_losses().items():  # Megatron's tracker shows the mean over iterations
        mean = sum(router.stats.losses[name] for router in layer.mlp.routers) / oracle.num_routings
        torch.testing.assert_close(values, mean.reshape(1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("combination", CHAINS, ids="-".join)
def test_bf16_stays_near_the_fp32_oracle(combination: tuple[str, str, str]) -> None:
    """Same bf16-rounded weights and inputs, and a batch in which no choice of experts is close, so that none flips.

    A bf16 value is off by up to 2^-9 = 0.2%. Through norm, two products, activation, gate and sum of each of the two
    iterations some ten such errors add up at random: about 0.6% of a typical entry, and less of the largest. Gradients
    go through twice as many, and where nothing is added to F_1 (`outer`) its errors are not diluted by the stream. So
    1% for h' and 4% for gradients, relative to the largest entry; found are 0.5% and 2.5%.
    """
    chain, half = chain_of(combination, 2), torch.bfloat16
    oracle = make_oracle(make_config(**LOSSES), chain)
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter.copy_(parameter.to(half))
    layer = make_layer(make_config(**LOSSES, bf16=True, params_dtype=half, moe_router_dtype="fp32"), chain)
    copy_from_oracle(layer, oracle)
    h_BSD, grad_BSD = batch_with_clear_choices(oracle)
    chosen: list[torch.Tensor] = []
    for router in layer.mlp.routers:
        router.register_forward_hook(lambda _router, _inputs, routing: chosen.append(routing[1]))
    truth = oracle_step(oracle, h_BSD.float(), grad_BSD.float())
    found = layer_step(layer, h_BSD, grad_BSD)
    routings = oracle(h_BSD.float()).routings[: oracle.num_routings]
    for ours_TN, theirs in zip(chosen, routings, strict=True):
        assert torch.equal(ours_TN.view(SEQUENCE, BATCH, EXPERTS).transpose(0, 1).flatten(0, 1), theirs.chosen_TN)
    assert relative_error(found.pop("h'"), truth.pop("h'")) < 0.01
    assert max(errors(found, truth).values()) < 0.04, errors(found, truth)


def batch_with_clear_choices(oracle: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The first batch, rounded to bf16, whose last chosen experts lead by 1% of the spread of the logits."""

    def clear(logits_TN: torch.Tensor) -> bool:
        ordered_TN = logits_TN.sort(dim=1, descending=True).values
        return bool((ordered_TN[:, TOPK - 1] - ordered_TN[:, TOPK]).min() > 0.01 * logits_TN.std())

    for seed in range(3, 30):
        h_BSD, grad_BSD = (x.to(torch.bfloat16) for x in make_batch(16, seed=seed))
        if all(clear(routing.logits_TN.detach()) for routing in oracle(h_BSD.float()).routings):
            return h_BSD, grad_BSD
    raise AssertionError("every batch has a close choice")


def test_small_increments_survive_bf16() -> None:
    """An increment of 1e-3 of x is right to 2%; x(C) - x(0) in the same arithmetic would have lost it."""
    chain, half = COE2, torch.bfloat16
    oracle = make_oracle(make_config(), chain)
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            parameter.copy_((parameter * {"w2": 2e-3, "ro": 6.0}.get(name[:2], 1.0)).to(half))
    h_BSD, _ = make_batch(16)
    u_BSD = oracle._norm(h_BSD.flatten(0, 1), 0).view_as(h_BSD).detach().to(half)
    layer = make_layer(make_config(bf16=True, params_dtype=half, moe_router_dtype="fp32"), chain)
    copy_from_oracle(layer, oracle)
    truth = increment_of(oracle, u_BSD.float())
    found = layer.mlp(u_BSD.transpose(0, 1).contiguous())[0].transpose(0, 1).detach()
    assert 3e-4 < float(truth.norm() / u_BSD.float().norm()) < 3e-3
    subtracted = (u_BSD + found) - u_BSD
    assert float((found.float() - truth).norm() / truth.norm()) < 0.02
    assert float((subtracted.float() - truth).norm() / truth.norm()) > 0.4


def increment_of(oracle: Any, u_BSD: torch.Tensor) -> torch.Tensor:
    """The oracle's sum of increments when the chain starts at u itself."""
    state_TD = u_BSD.flatten(0, 1)
    increment_TD = torch.zeros_like(state_TD)
    for t in range(oracle.chain.iterations):
        step_TD = oracle._experts(state_TD, oracle._route(t, state_TD, None)).detach()
        state_TD, increment_TD = state_TD + step_TD, increment_TD + step_TD
    return increment_TD.view_as(u_BSD)
