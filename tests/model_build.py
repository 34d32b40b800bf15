"""Small layers and models for the tests of `modules`: Megatron's own, ours and the oracle, with each other's weights.

The parameters of all three are compared under the oracle's names (`router_weights.0`, `norm_gains.0`, `w1`, ...).
S: sequence, B: batch, D: hidden. Megatron's tensors are [S, B, D], the oracle's [B, S, D].
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, get_default_pg_collection
from megatron.core.transformer.moe.router_replay import RouterReplay
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from coe_megatron.chain.method import ChainOfExperts
from coe_megatron.chain.routing import RouterSettings
from coe_megatron.chain.settings import ChainSettings
from coe_megatron.local_backend.megatron_compat import build_moe_layer
from coe_megatron.model import CoELayer, coe_layer_spec

EXPERTS, TOPK, HIDDEN, FFN = 8, 2, 16, 24
SEQUENCE, BATCH = 6, 3
LOSSES = {
    "moe_router_load_balancing_type": "seq_aux_loss",
    "moe_aux_loss_coeff": 0.1,
    "moe_z_loss_coeff": 0.01,
}
MLA = {
    "q_lora_rank": None,
    "kv_lora_rank": 8,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 6,
    "qk_layernorm": True,
}

Named = dict[str, torch.Tensor]


def make_config(base: type = TransformerConfig, **changes: Any) -> TransformerConfig:
    """A tiny config: SwiGLU, RMSNorm, no biases, no dropout, pre-softmax router, all-to-all dispatcher."""
    values: dict[str, Any] = dict(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        ffn_hidden_size=28,
        num_moe_experts=EXPERTS,
        moe_router_topk=TOPK,
        moe_ffn_hidden_size=FFN,
        moe_router_pre_softmax=True,
        moe_token_dispatcher_type="alltoall",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        bias_activation_fusion=False,
        add_bias_linear=False,
        normalization="RMSNorm",
        layernorm_epsilon=1e-6,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=0.2,
    )
    return base(**(values | changes))


def make_stock(config: TransformerConfig) -> MoELayer:
    """Megatron's MoE layer with its sequential experts, as layer 1."""
    spec = get_gpt_layer_local_spec(num_experts=config.num_moe_experts, normalization=config.normalization)
    layer = build_moe_layer(spec.submodules.mlp, config, get_default_pg_collection())
    layer.set_layer_number(1)
    return layer


def mlp_class(mlp: Any) -> type:
    """The class that a layer spec's `mlp` builds: of a ModuleSpec, a partial, or a partial of a class method."""
    function = mlp.module if isinstance(mlp, ModuleSpec) else mlp.func
    return getattr(function, "__self__", function)


def make_coe(config: TransformerConfig, megatron_losses: bool = False, **chain: Any) -> CoELayer:
    """Our layer alone, as layer 1; by default with one iteration."""
    settings = ChainSettings(**({"iterations": 1} | chain))
    spec = coe_layer_spec(config, settings, megatron_losses=megatron_losses)
    layer = build_moe_layer(spec.submodules.mlp, config, get_default_pg_collection())
    layer.set_layer_number(1)
    return layer


def make_layer(config: TransformerConfig, chain: ChainSettings, **spec: Any) -> TransformerLayer:
    """A whole transformer layer, with its norm and its residual; `_forward_mlp` is the sub-layer."""
    return build_module(coe_layer_spec(config, chain, **spec), config=config, layer_number=1)


def make_gpt(config: TransformerConfig, spec: Any, vocab: int = 48, position: str = "rope", **more: Any) -> GPTModel:
    return GPTModel(config, spec, vocab, 32, position_embedding_type=position, **more)


def make_mla_config(**changes: Any) -> MLATransformerConfig:
    return make_config(MLATransformerConfig, **(MLA | {"rope_type": "rope"} | changes))


def make_oracle(config: TransformerConfig, chain: ChainSettings) -> ChainOfExperts:
    """The oracle of a config, with weights large enough that every part of the chain shows in its output."""
    kind = config.moe_router_load_balancing_type
    router = RouterSettings(
        num_experts=config.num_moe_experts,
        topk=config.moe_router_topk,
        score_function=config.moe_router_score_function,
        renormalise=not config.moe_router_pre_softmax and config.moe_router_score_function == "softmax",
        seq_aux_coeff=config.moe_aux_loss_coeff if kind == "seq_aux_loss" else 0.0,
        aux_coeff=config.moe_aux_loss_coeff if kind == "aux_loss" else 0.0,
        z_coeff=config.moe_z_loss_coeff or 0.0,
    )
    oracle = ChainOfExperts(
        config.hidden_size,
        config.moe_ffn_hidden_size,
        router,
        chain,
        shared_ffn=config.moe_shared_expert_intermediate_size or 0,
        norm_eps=config.layernorm_epsilon,
    )
    for name, parameter in oracle.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "gain" in name else 0.0, std=0.2)
    return oracle


def parts_of(layer: TransformerLayer) -> dict[str, torch.nn.Parameter]:
    """The parameters of our transformer layer's MLP sub-layer under the oracle's names."""
    mlp = layer.mlp
    norms = list(mlp.norms) or [layer.pre_mlp_layernorm]
    routers = [router for router in mlp.routers if hasattr(router, "weight")]
    parts = {f"router_weights.{t}": router.weight for t, router in enumerate(routers)}
    parts |= {f"norm_gains.{t}": norm.weight for t, norm in enumerate(norms)}
    parts |= {f"variants.{name}": gain for name, gain in mlp.variants.named_parameters()}
    parts |= {"w1": mlp.experts.weight1, "w2": mlp.experts.weight2}
    if mlp.use_shared_expert:
        parts["shared_w1"] = mlp.shared_experts.linear_fc1.weight
        parts["shared_w2"] = mlp.shared_experts.linear_fc2.weight
    return parts


@torch.no_grad()
def copy_from_oracle(layer: TransformerLayer, oracle: ChainOfExperts) -> None:
    """Give our layer the oracle's weights: this rank's part of them."""
    theirs, ours = dict(oracle.named_parameters()), parts_of(layer)
    assert theirs.keys() == ours.keys()
    for name, parameter in ours.items():
        parameter.copy_(local_part(layer, name, theirs[name]))


def local_part(layer: TransformerLayer, name: str, whole: torch.Tensor) -> torch.Tensor:
    """This rank's part of a parameter (or gradient): its experts, and of each feed-forward its rows or columns."""
    if name in ("w1", "w2"):
        whole, group = whole[layer.mlp.local_expert_indices], layer.mlp.experts.tp_group
    elif name in ("shared_w1", "shared_w2"):
        group = layer.mlp.tp_group
    else:
        return whole
    if name.endswith("1"):  # gate and value are cut alike
        return torch.cat([half.chunk(group.size(), dim=-2)[group.rank()] for half in whole.chunk(2, dim=-2)], dim=-2)
    return whole.chunk(group.size(), dim=-1)[group.rank()]


def stock_named(stock: MoELayer, pick: Callable[[torch.nn.Parameter], torch.Tensor]) -> Named:
    """`pick` of every parameter of Megatron's layer, under our layer's names: experts lie in one tensor there."""
    experts = stock.experts.local_experts
    named = {name: pick(p) for name, p in stock.named_parameters() if not name.startswith("experts.")}
    named["experts.weight1"] = torch.stack([pick(expert.linear_fc1.weight) for expert in experts])
    named["experts.weight2"] = torch.stack([pick(expert.linear_fc2.weight) for expert in experts])
    return named


@torch.no_grad()
def copy_from_stock(layer: CoELayer, stock: MoELayer) -> None:
    """Give our layer the weights and buffers of Megatron's; strict, so both have the same names but for experts."""
    state = {name: value for name, value in stock.state_dict().items() if not name.startswith("experts.")}
    experts = {name: value for name, value in stock_named(stock, lambda p: p).items() if name.startswith("experts.")}
    layer.load_state_dict(state | experts | {"experts._extra_state": None}, strict=True)


def gradient(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter's gradient, zero where there is none."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """The largest difference, relative to the largest entry of `truth` (absolute where that is 0)."""
    assert value.shape == truth.shape
    scale = float(truth.abs().max()) or 1.0
    return float((value.double() - truth.double()).abs().max()) / scale


def errors(values: Named, truths: Named) -> dict[str, float]:
    """The relative error of each tensor; both sides have to hold the same names."""
    assert values.keys() == truths.keys(), values.keys() ^ truths.keys()
    return {name: relative_error(values[name], truths[name]) for name in truths}


def tracked_losses() -> Named:
    """What Megatron's tracker of auxiliary losses holds, by name and layer."""
    tracked = tracker()
    return {
        name: (entry["values"] if isinstance(entry, dict) else entry.values).clone() for name, entry in tracked.items()
    }


def tracker() -> dict[str, Any]:
    if hasattr(moe_utils, "get_moe_metrics_tracker"):
        return moe_utils.get_moe_metrics_tracker()._metrics
    return moe_utils.get_moe_layer_wise_logging_tracker()


def reset_megatron() -> None:
    """Forget what Megatron keeps in modules: tracked losses, the auxiliary losses' scale, routers to replay."""
    tracker().clear()
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    RouterReplay.clear_global_router_replay_instances()
