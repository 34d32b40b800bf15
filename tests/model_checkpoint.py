"""Saving and loading one layer in Megatron's distributed checkpoint format, for tests on one rank and on several."""

from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer


def make_stock_layer(config: TransformerConfig) -> TransformerLayer:
    """A whole transformer layer of Megatron's own, with sequential experts."""
    spec = get_gpt_layer_local_spec(num_experts=config.num_moe_experts, normalization=config.normalization)
    return build_module(spec, config=config, layer_number=1)


@torch.no_grad()
def scramble(layer: TransformerLayer, seed: int) -> TransformerLayer:
    """Random weights everywhere, norms and routers included; on all ranks the same but for experts."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in layer.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return layer


def save(layer: TransformerLayer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    dist_checkpointing.save(layer.sharded_state_dict(prefix="layer."), str(folder))


def load(layer: TransformerLayer, folder: Path) -> TransformerLayer:
    """Every parameter of the layer has to be in the checkpoint."""
    state = dist_checkpointing.load(layer.sharded_state_dict(prefix="layer."), str(folder))
    layer.load_state_dict({name.removeprefix("layer."): value for name, value in state.items()}, strict=True)
    return layer


@torch.no_grad()
def sub_layer(layer: TransformerLayer, h_BSD: torch.Tensor) -> torch.Tensor:
    return layer._forward_mlp(h_BSD.transpose(0, 1).contiguous()).transpose(0, 1)
