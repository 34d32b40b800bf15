"""With one iteration and `prenorm` our layer is Megatron's MoELayer: names, outputs, gradients, losses, counters."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig
from model_build import (
    BATCH,
    LOSSES,
    SEQUENCE,
    Named,
    copy_from_stock,
    errors,
    gradient,
    make_coe,
    make_config,
    make_stock,
    reset_megatron,
    stock_named,
    tracked_losses,
)
from ranks import run_ranks

from coe_megatron.model import CoELayer

TOLERANCE = 1e-6  # relative to the largest entry, fp32
CHAIN_TOLERANCE = 5e-6  # gradients of two iterations are summed in another order

AUX = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.1}
GELU = {"gated_linear_unit": False, "activation_func": torch.nn.functional.gelu}
SIGMOID = {"moe_router_score_function": "sigmoid", "moe_router_pre_softmax": False}
BIAS = {**SIGMOID, "moe_router_enable_expert_bias": True}
CAPACITY = {**AUX, "moe_expert_capacity_factor": 0.7}
RECOMPUTE = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
SHARED = {"moe_shared_expert_intermediate_size": 20}

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "aux_loss": AUX,
    "seq_aux_loss and z_loss": LOSSES,
    "global_aux_loss": {"moe_router_load_balancing_type": "global_aux_loss", "moe_aux_loss_coeff": 0.1},
    "list of losses": {
        "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss", "global_aux_loss"],
        "moe_aux_loss_coeff": [0.1, 0.2, 0.3],
        "moe_z_loss_coeff": 0.01,
    },
    "loss per token": {**LOSSES, "calculate_per_token_loss": True},
    "sinkhorn": {"moe_router_load_balancing_type": "sinkhorn"},
    "sigmoid": {**SIGMOID, **LOSSES},
    "sigmoid, expert bias": {**BIAS, **LOSSES},
    "softmax after top-k": {"moe_router_pre_softmax": False, **LOSSES},
    "group-limited": {"moe_router_num_groups": 4, "moe_router_group_topk": 1, **LOSSES},
    "scaling factor": {"moe_router_topk_scaling_factor": 2.5, **LOSSES},
    "capacity, by probability": {**CAPACITY, "moe_token_drop_policy": "probs"},
    "capacity, by position": {**CAPACITY, "moe_token_drop_policy": "position"},
    "capacity, padded": {**CAPACITY, "moe_pad_expert_input_to_capacity": True},
    "capacity, allgather": {**CAPACITY, "moe_token_dispatcher_type": "allgather"},
    "jitter": {"moe_input_jitter_eps": 0.2, **LOSSES},
    "allgather": {"moe_token_dispatcher_type": "allgather", **LOSSES},
    "GELU": GELU,
    "GELU, shared experts": {**GELU, **SHARED},
    "shared experts": SHARED,
    "shared experts, gate": {**SHARED, "moe_shared_expert_gate": True},
    "router in fp32": {"moe_router_dtype": "fp32", **LOSSES},
    "router in fp64": {"moe_router_dtype": "fp64", **LOSSES},
    "one expert": {"num_moe_experts": 1, "moe_router_topk": 1, **LOSSES},
    "every expert": {"moe_router_topk": 8, **LOSSES},
    "recompute": {**RECOMPUTE, **SHARED, **LOSSES},
    "recompute with expert bias and jitter": {**RECOMPUTE, **BIAS, **LOSSES, "moe_input_jitter_eps": 0.2},
    "recompute shared experts": {
        "recompute_granularity": "selective",
        "recompute_modules": ["shared_experts"],
        **SHARED,
    },
}
CHAINS = [
    {"gating": "shared_router"},
    {"gating": "fixed"},
    {"residual": "outer"},
    {"residual": "init"},
    {"aux_loss_reduction": "mean"},
]


def make_biased_stock(config: TransformerConfig) -> MoELayer:
    """Megatron's layer; with an expert bias that is not 0, where there is one."""
    stock = make_stock(config)
    if stock.router.expert_bias is not None:
        stock.router.expert_bias.normal_(std=0.3)
    return stock


def train_step(layer: MoELayer, padding_mask: torch.Tensor | None = None) -> Named:
    """Two micro-batches forward and backward: outputs, gradients of inputs, tracked losses, counters."""
    reset_megatron()
    generator, found = torch.Generator().manual_seed(5 + torch.distributed.get_rank()), {}
    for batch in range(2):
        torch.manual_seed(batch)  # input jitter
        x = torch.randn(SEQUENCE, BATCH, layer.config.hidden_size, generator=generator).requires_grad_()
        out, bias = layer(x, padding_mask=padding_mask)
        assert bias is None
        out.backward(torch.randn(out.shape, generator=generator))
        found |= {f"output {batch}": out.detach(), f"input gradient {batch}": x.grad}
    found |= {f"tracked {name}": value for name, value in tracked_losses().items()}
    return found | {f"buffer {name}": value.clone() for name, value in layer.named_buffers()}


def assert_equal_to_stock(changes: dict, chain: dict | None = None, padding_mask: torch.Tensor | None = None) -> None:
    config = make_config(**changes)
    stock, layer = make_biased_stock(config), make_coe(config, megatron_losses=True, **(chain or {}))
    copy_from_stock(layer, stock)
    found, truth = train_step(layer, padding_mask), train_step(stock, padding_mask)
    found |= {name: gradient(p) for name, p in layer.named_parameters()}
    truth |= stock_named(stock, gradient)
    assert max(errors(found, truth).values()) <= TOLERANCE, errors(found, truth)


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_equals_stock_layer(changes: dict) -> None:
    assert_equal_to_stock(changes)


@pytest.mark.parametrize("chain", CHAINS, ids=str)
def test_equals_stock_layer_whatever_the_chain(chain: dict) -> None:
    assert_equal_to_stock({**LOSSES, **SHARED}, chain)


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_two_iterations_equal_two_stock_layers(changes: dict) -> None:
    """x + F_1(x) + F_2(x + F_1(x)): the same experts twice, each time with a router (and its counters) of its own."""
    config = make_config(**changes)
    first, second = make_biased_stock(config), make_biased_stock(config)
    layer = make_coe(config, megatron_losses=True, iterations=2)
    copy_chain_from_stock(layer, first, second)
    truth = train_step(TwoStockLayers(first, second))
    found = train_step(layer)
    found |= {name: gradient(p) for name, p in layer.named_parameters()}
    truth |= chain_names(*(stock_named(stock, gradient) for stock in (first, second)))
    truth |= {name: value / 2 for name, value in truth.items() if name.startswith("tracked")}  # ours is the mean
    assert max(errors(found, truth).values()) <= CHAIN_TOLERANCE, errors(found, truth)


class TwoStockLayers(torch.nn.Module):
    """What a chain of two iterations with inner residual adds to its input, out of two layers of Megatron's."""

    def __init__(self, first: MoELayer, second: MoELayer) -> None:
        super().__init__()
        self.first, self.second, self.config = first, second, first.config

    def forward(self, x: torch.Tensor, padding_mask: torch.Tensor | None = None) -> tuple[torch.Tensor, None]:
        step = self.first(x)[0]
        return step + self.second(x + step)[0], None

    def named_buffers(self, *_args: Any, **_kwargs: Any) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(chain_names(*(dict(stock.named_buffers()) for stock in (self.first, self.second))).items())


def chain_names(first: Named, second: Named) -> Named:
    """Two layers' tensors under the names of a chain: its second router's, and the sum of what both share."""
    shared = {name: value + second[name] for name, value in first.items() if not name.startswith("router.")}
    routers = {name: value for name, value in first.items() if name.startswith("router.")}
    later = {f"later_routers.0.{name[7:]}": value for name, value in second.items() if name.startswith("router.")}
    return routers | later | shared


@torch.no_grad()
def copy_chain_from_stock(layer: CoELayer, first: MoELayer, second: MoELayer) -> None:
    """The weights of `first` and the router of `second`; `second` gets the experts of `first`."""
    second.load_state_dict(first.state_dict() | second.router.state_dict(prefix="router."))
    state = {name: value for name, value in first.state_dict().items() if not name.startswith("experts.")}
    experts = {name: value for name, value in stock_named(first, lambda p: p).items() if name.startswith("experts.")}
    later = second.router.state_dict(prefix="later_routers.0.")
    layer.load_state_dict(state | experts | later | {"experts._extra_state": None}, strict=True)


def compare_on_a_rank(changes: dict) -> None:
    torch.manual_seed(1)  # weights, the same on both ranks
    assert_equal_to_stock({"tensor_model_parallel_size": 2, "sequence_parallel": True, **changes})


@pytest.mark.ranks
@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize("kind", ["aux_loss", "seq_aux_loss", "global_aux_loss"])
@pytest.mark.parametrize("per_token", [False, True], ids=["loss per micro-batch", "loss per token"])
def test_equals_stock_layer_with_tensor_parallelism(kind: str, per_token: bool, experts: int) -> None:
    """Megatron-Core 0.19.2 scales auxiliary losses per token by the ranks of a sequence, 0.16.1 does not."""
    changes = {**LOSSES, "moe_router_load_balancing_type": kind, "calculate_per_token_loss": per_token}
    layout = {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": experts}
    run_ranks(compare_on_a_rank, 2, {**changes, **SHARED, "expert_tensor_parallel_size": experts}, **layout)


@pytest.mark.parametrize("kind", ["aux_loss", "seq_aux_loss", "global_aux_loss"])
def test_equals_stock_layer_with_padding(kind: str) -> None:
    mask = torch.zeros(BATCH, SEQUENCE, dtype=torch.bool)
    mask[1, 4:] = mask[2, 2:] = True
    assert_equal_to_stock({**LOSSES, "moe_router_load_balancing_type": kind}, padding_mask=mask)


def test_evaluation_equals_stock_layer_and_counts_nothing() -> None:
    config = make_config(**BIAS, **LOSSES)
    stock, layer = make_stock(config).eval(), make_coe(config).eval()
    copy_from_stock(layer, stock)
    x = torch.randn(SEQUENCE, BATCH, config.hidden_size)
    torch.testing.assert_close(layer(x)[0], stock(x)[0], rtol=1e-6, atol=1e-6)
    assert layer.router.stats.calls == 0 and not tracked_losses()
    assert not layer.router.local_tokens_per_expert.any()


@pytest.mark.parametrize("shared", [{}, SHARED])
def test_parameters_are_those_of_the_stock_layer(shared: dict) -> None:
    config = make_config(**shared)
    stock, layer = make_stock(config), make_coe(config)
    ours = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert ours == {name: tuple(p.shape) for name, p in stock_named(stock, lambda p: p).items()}
    assert isinstance(layer, MoELayer)


@torch.no_grad()
def test_experts_start_with_the_spread_of_the_stock_layer() -> None:
    config = make_config(hidden_size=64, moe_ffn_hidden_size=64, init_method_std=0.02, num_layers=8)
    layer, stock = make_coe(config), make_stock(config)
    theirs = stock_named(stock, lambda p: p.detach())
    for name in ("experts.weight1", "experts.weight2"):
        ours = layer.get_parameter(name)
        assert float(ours.std()) == pytest.approx(float(theirs[name].std()), rel=0.05)
        assert not torch.equal(ours[0], ours[1])


@pytest.mark.parametrize("changes", [LOSSES, {**LOSSES, "moe_router_topk": 8}, {**LOSSES, "num_moe_experts": 64}])
def test_rows_by_sorting_are_megatrons_bit_for_bit(changes: dict) -> None:
    layer = make_coe(make_config(**changes), iterations=2)
    for router in layer.routers:
        router.has_sparse_gates = False
    found = train_step(layer) | {name: gradient(p) for name, p in layer.named_parameters()}
    layer.zero_grad()
    layer.exchange = None
    truth = train_step(layer) | {name: gradient(p) for name, p in layer.named_parameters()}
    sums = {name for name in truth if name.startswith("experts.")}  # over iterations, in one product
    assert all(torch.equal(found[name], truth[name]) for name in truth.keys() - sums)
    assert max(errors(found, truth)[name] for name in sums) < 1e-6
