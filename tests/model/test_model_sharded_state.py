"""Distributed checkpoints: Megatron's MoE layer and ours read each other's, and the keys are Megatron's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from model_build import make_config, make_layer
from model_checkpoint import load, make_stock_layer, save, scramble, sub_layer
from model_oracle import make_batch

from coe_megatron.chain.settings import ChainSettings

CASES: dict[str, dict[str, Any]] = {
    "SwiGLU": {},
    "SwiGLU, shared experts with gate": {
        "moe_shared_expert_intermediate_size": 20,
        "moe_shared_expert_gate": True,
    },
    "GELU": {"gated_linear_unit": False, "activation_func": torch.nn.functional.gelu},
    "expert bias": {
        "moe_router_score_function": "sigmoid",
        "moe_router_pre_softmax": False,
        "moe_router_enable_expert_bias": True,
    },
}


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    return {key: t.global_shape for key, t in dist_checkpointing.load_tensors_metadata(str(folder)).items()}


@pytest.mark.thorough
@pytest.mark.parametrize("norm_placement", ["prenorm", "iteration_norm"])
@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_checkpoints_of_stock_layer_and_ours_are_the_same(changes: dict, norm_placement: str, tmp_path: Path) -> None:
    config, chain = make_config(**changes), ChainSettings(1, norm_placement=norm_placement)
    stock, layer = scramble(make_stock_layer(config), 1), make_layer(config, chain)
    h_BSD, _ = make_batch(config.hidden_size)
    save(stock, tmp_path / "stock")
    truth = sub_layer(stock, h_BSD)
    torch.testing.assert_close(sub_layer(load(layer, tmp_path / "stock"), h_BSD), truth, rtol=1e-6, atol=1e-6)
    save(layer, tmp_path / "ours")
    again = load(make_stock_layer(config), tmp_path / "ours")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), stock.parameters(), strict=True))
    assert stored_shapes(tmp_path / "ours") == stored_shapes(tmp_path / "stock")


@pytest.mark.thorough
@pytest.mark.parametrize("gating", ["independent", "shared_router", "fixed"])
@pytest.mark.parametrize("norm_placement", ["prenorm", "reference", "iteration_norm"])
def test_a_chain_comes_back_as_it_was(gating: str, norm_placement: str, tmp_path: Path) -> None:
    config, chain = make_config(**CASES["expert bias"]), ChainSettings(3, gating=gating, norm_placement=norm_placement)
    layer = scramble(make_layer(config, chain), 1)
    for t, router in enumerate(layer.mlp.routers):
        router.expert_bias.fill_(t + 1)
    save(layer, tmp_path)
    again = load(make_layer(config, chain), tmp_path)
    values = {name: value for name, value in layer.state_dict().items() if value is not None}
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in values.items())
    assert [float(router.expert_bias[0]) for router in again.mlp.routers] == [1.0, 2.0, 3.0][: len(layer.mlp.routers)]


def test_keys_of_a_chain(tmp_path: Path) -> None:
    chain = ChainSettings(2, norm_placement="iteration_norm")
    save(make_layer(make_config(), chain), tmp_path)
    assert {key for key in stored_shapes(tmp_path) if "mlp" in key} == {
        "layer.mlp.linear_fc1.layer_norm_weight",  # where Megatron keeps the norm before the MLP
        "layer.mlp.norms.1.weight",
        "layer.mlp.router.weight",
        "layer.mlp.later_routers.0.weight",
        "layer.mlp.experts.experts.linear_fc1.weight",
        "layer.mlp.experts.experts.linear_fc2.weight",
    }
