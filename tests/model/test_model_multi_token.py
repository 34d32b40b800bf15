"""Chains in layers of multi-token prediction, which Megatron's own spec builds from a chain's layer spec."""

from typing import Any

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig
from model_build import (
    LOSSES,
    Named,
    copy_from_stock,
    errors,
    gradient,
    make_config,
    make_gpt,
    reset_megatron,
    stock_named,
    tracked_losses,
)

from coe_megatron.chain.settings import ChainSettings
from coe_megatron.local_backend.attention import SDPACoreAttention
from coe_megatron.model import coe_layer_spec
from coe_megatron.model.layer import CoELayer, coe_layers

LAYERS, PREDICTING = 2, 2
pytestmark = pytest.mark.usefixtures("single_rank")


def config_of(**more: Any) -> TransformerConfig:
    changes = {"num_layers": LAYERS, "mtp_num_layers": PREDICTING, "mtp_loss_scaling_factor": 0.5}
    return make_config(**LOSSES, moe_shared_expert_intermediate_size=20, **changes, **more)


def model_of(config: TransformerConfig, spec: Any) -> GPTModel:
    return make_gpt(config, spec, mtp_block_spec=get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False))


def step(model: GPTModel) -> torch.Tensor:
    """A forward and a backward pass; the losses of the next token [B, S]."""
    reset_megatron()
    tokens = torch.randint(48, (3, 6), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(6).expand(3, 6)
    losses = model(tokens, positions, None, labels=tokens, loss_mask=torch.ones(3, 6))
    losses.sum().backward()
    return losses.detach()


def gradients(model: GPTModel, layers: type, named: Any) -> Named:
    """Of all parameters: those of MoE layers by layer and their names in ours, all others by their own."""
    found, own = {}, set()
    for number, layer in enumerate(part for part in model.modules() if isinstance(part, layers)):
        own |= {id(parameter) for parameter in layer.parameters()}
        found |= {f"{number} {name}": value for name, value in named(layer).items()}
    others = {name: gradient(p) for name, p in model.named_parameters() if id(p) not in own}
    return found | others


def test_one_iteration_is_megatrons_prediction() -> None:
    config = config_of()
    spec = get_gpt_layer_local_spec(num_experts=config.num_moe_experts, normalization="RMSNorm")
    spec.submodules.self_attention.submodules.core_attention = SDPACoreAttention  # Megatron's own mask needs CUDA
    stock = model_of(config, spec)
    model = model_of(config, coe_layer_spec(config, ChainSettings(1)))
    theirs = [part for part in stock.modules() if isinstance(part, MoELayer)]
    ours = list(coe_layers(model))
    assert len(ours) == len(theirs) == LAYERS + PREDICTING
    others = {name: value for name, value in stock.state_dict().items() if ".mlp." not in name}
    missing = model.load_state_dict(others, strict=False).missing_keys
    assert all("_extra_state" in name or ".mlp." in name for name in missing), missing
    for layer, its in zip(ours, theirs, strict=True):
        copy_from_stock(layer, its)
    losses, truth = step(model), step(stock)
    torch.testing.assert_close(losses, truth, rtol=1e-5, atol=1e-6)
    found = gradients(model, CoELayer, lambda layer: {name: gradient(p) for name, p in layer.named_parameters()})
    expected = gradients(stock, MoELayer, lambda layer: stock_named(layer, gradient))
    assert max(errors(found, expected).values()) < 1e-5, errors(found, expected)


def test_every_router_of_a_predicting_chain_is_trained_and_tracked() -> None:
    config = config_of()
    model = model_of(config, coe_layer_spec(config, ChainSettings(2)))
    step(model)
    for layer in coe_layers(model):
        for router in layer.routers:
            assert gradient(router.weight).abs().max() > 0
    for name in ("seq_load_balancing_loss", "z_loss"):
        (values,) = (value for key, value in tracked_losses().items() if key == name)
        assert len(values) == LAYERS + PREDICTING and (values > 0).all(), (name, values)
