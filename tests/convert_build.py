"""Small models of ours as Hugging Face models, without a checkpoint in between, for the tests of `convert`."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coe_megatron.chain.settings import ChainSettings
from coe_megatron.checkpoint import sharding
from coe_megatron.config import RunConfig
from coe_megatron.config.settings import MLASettings, ModelSettings, MoESettings
from coe_megatron.convert.architecture import Architecture, config_values
from coe_megatron.convert.export import items, write_shards
from coe_megatron.convert.weights import MemoryWeights, Weights
from coe_megatron.model.build import build_model
from coe_megatron.training.answer_accuracy import assembled

VOCAB = 48
ATTENTION: dict[str, dict[str, Any]] = {
    "MHA": {},
    "GQA": {"num_query_groups": 2},
    "GQA with norms": {"num_query_groups": 2, "qk_layernorm": True, "kv_channels": 6},
    "GQA with biases": {"num_query_groups": 2, "qkv_bias": True},
    "GQA with norms over heads": {"num_query_groups": 2, "qk_layernorm": True, "qk_norm_over_heads": True},
    "MLA": {"mla": MLASettings(8, None, 8, 4, 6)},
    "MLA with latent queries and YaRN": {
        "mla": MLASettings(8, 6, 8, 4, 12, rotary_scaling_factor=8.0, original_max_position_embeddings=8)
    },
}


class ModelWeights(MemoryWeights):
    """The weights of a model in this process, as a checkpoint would have them."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(assembled([sharding.main_parts(model)]))


def make_run(
    attention: str = "MHA", chain: ChainSettings | None = None, moe: dict[str, Any] | None = None, **model: Any
) -> RunConfig:
    """Two layers of 8 experts, 2 per token, one shared."""
    sizes = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "seq_length": 32, "ffn_hidden_size": 20}
    experts = {"num_experts": 8, "topk": 2, "ffn_hidden_size": 12, "load_balancing": "none"}
    return replace(
        RunConfig(),
        model=ModelSettings(**(sizes | ATTENTION[attention] | model)),
        moe=MoESettings(**(experts | (moe or {}))),
        chain=chain or ChainSettings(),
    )


def make_model(config: RunConfig) -> torch.nn.Module:
    """Our model, in evaluation mode, with weights so large that each of its parts shows in the logits."""
    model = build_model(config, VOCAB).eval()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "gain" in name or "norm" in name:
            torch.nn.init.normal_(tensor.data, mean=0.0 if name.endswith("bias") else 1.0, std=0.2)
        elif "expert_bias" in name or tensor.ndim > 1:
            torch.nn.init.normal_(tensor.data, std=0.2)
    return model


def our_logits(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    """[B, S, V] of our model."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        return model(tokens, positions, None)


def write(config: RunConfig, architecture: Architecture, weights: Weights, folder: Path) -> Path:
    """An exported model without tokenizer and code."""
    folder.mkdir(parents=True, exist_ok=True)
    write_shards(list(items(weights, config, architecture, None)), folder, 40_000, lambda line: None)
    (folder / "config.json").write_text(json.dumps(config_values(config, architecture, VOCAB, {})))
    return folder


def distance(found: Tensor, truth: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((found - truth).detach().abs().max() / truth.detach().abs().max())


def random_tokens(rows: int = 3, length: int = 9) -> Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(5))
