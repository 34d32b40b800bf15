"""Spec functions that put Chain-of-Experts layers into anybody's Megatron-Core `GPTModel`.

Both start from Megatron's own specs and exchange parts of a copy: the MoE layer for CoELayer, and without Transformer
Engine also the experts (grouped), the norm (sequence parallelism) and the core attention (torch's). With Transformer
Engine all other parts stay Megatron's, so `moe_grouped_gemm` selects grouped experts.
"""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TENorm
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules, get_transformer_layer_offset

from coe_megatron.chain.settings import ChainSettings, Recompute
from coe_megatron.errors import ConfigError
from coe_megatron.local_backend.attention import SDPACoreAttention
from coe_megatron.local_backend.experts import GroupedExperts
from coe_megatron.local_backend.latent_attention import LatentAttention
from coe_megatron.local_backend.megatron_compat import experts_spec, moe_layer_spec, moe_submodules
from coe_megatron.local_backend.norm import Norm
from coe_megatron.model.layer import CoELayer
from coe_megatron.model.recompute import recompute_mode
from coe_megatron.model.unsupported import refuse_dense_layers, refuse_for_specs, refuse_missing_engine


def coe_layer_spec(
    config: TransformerConfig,
    chain: ChainSettings | None = None,
    *,
    recompute: Recompute = "none",
    use_transformer_engine: bool = False,
    pg_collection: ProcessGroupCollection | None = None,
    deduplicated: bool = False,
    overlap_chunks: int = 1,
    megatron_losses: bool = False,
) -> ModuleSpec:
    """The spec of one transformer layer whose MLP is a Chain-of-Experts, for `GPTModel(transformer_layer_spec=)`.

    Args:
        config: decides, as for Megatron's own specs, between MHA/GQA and MLA, norms, experts and shared experts.
        chain: the chain's settings; CoE-2 with the paper's defaults and `prenorm` when None. Chains in some `layers`
            alone need `coe_block_spec`, and so do dense layers (`moe_layer_freq`).
        recompute: what the backward pass computes again instead of keeping it; see CoELayer.
        use_transformer_engine: build on Megatron's Transformer Engine spec (its experts with `moe_grouped_gemm`).
            Built without a GPU, but its kernels were not run yet.
        pg_collection: process groups of the layer, for Megatron-Core 0.16.1, which does not pass those of the model to
            CoELayer and logs "Unknown MLP type": if you give GPTModel a `pg_collection`, give it here too. 0.19.2
            passes them, and this argument has no effect.
        deduplicated: a token travels once to each rank with some of its experts; see `model.exchange`.
        overlap_chunks: parts of the tokens that go through the chain in turns, so that one's experts work while
            another's rows travel.
        megatron_losses: scale losses of routers as Megatron-Core does where it is wrong; see RouterWithLosses.
    """
    if config.num_moe_experts is None:
        raise ConfigError("num_moe_experts is None: a Chain-of-Experts layer needs at least one routed expert")
    if chain is not None and chain.layers is not None:
        raise ConfigError(f"chain.layers is {list(chain.layers)}: for layers that differ take coe_block_spec")
    refuse_dense_layers(config)
    refuse_for_specs(config)
    refuse_missing_engine(config, use_transformer_engine)
    if use_transformer_engine:
        spec = get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
            multi_latent_attention=config.multi_latent_attention,
            use_te_activation_func=config.use_te_activation_func,
        )
    else:
        spec = get_gpt_layer_local_spec(
            num_experts=config.num_moe_experts,
            qk_layernorm=config.qk_layernorm,
            multi_latent_attention=config.multi_latent_attention,
            normalization=config.normalization,
        )
    mode = _recompute(config, recompute, use_transformer_engine)
    own = _own_arguments(mode, deduplicated, overlap_chunks, megatron_losses)
    return _convert(spec, chain or ChainSettings(), use_transformer_engine, pg_collection, own)


def coe_block_spec(
    config: TransformerConfig,
    chain: ChainSettings | None = None,
    *,
    recompute: Recompute = "none",
    use_transformer_engine: bool = False,
    pg_collection: ProcessGroupCollection | None = None,
    vp_stage: int | None = None,
    deduplicated: bool = False,
    overlap_chunks: int = 1,
    megatron_losses: bool = False,
) -> TransformerBlockSubmodules:
    """The specs of this pipeline stage's layers, dense or Chain-of-Experts as `config.moe_layer_freq` says.

    Arguments as for `coe_layer_spec`; `vp_stage` is the virtual pipeline stage, if there is one. With `chain.layers`
    the other layers with experts choose C·K of them at once, and `hetereogenous_dist_checkpoint` has to be True.
    """
    chain = chain or ChainSettings()
    refuse_for_specs(config)
    refuse_missing_engine(config, use_transformer_engine)
    if chain.layers is not None:
        chain.require_experts(config.num_moe_experts or 0, config.moe_router_topk, config.moe_router_num_groups)
        if not config.hetereogenous_dist_checkpoint:
            raise ConfigError(
                "hetereogenous_dist_checkpoint is False: with chain.layers it must be True, or checkpoints would want "
                "the same tensors of all layers"
            )
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine, normalization=config.normalization, vp_stage=vp_stage
    )
    mode = _recompute(config, recompute, use_transformer_engine)
    first = get_transformer_layer_offset(config, vp_stage=vp_stage) + 1
    own = _own_arguments(mode, deduplicated, overlap_chunks, megatron_losses)
    plain = {**own, "topk": chain.iterations * config.moe_router_topk}
    layers = [
        _convert(spec, chain, use_transformer_engine, pg_collection, own)
        if chain.is_chain(number)
        else _convert(spec, chain.plain, use_transformer_engine, pg_collection, plain)
        for number, spec in enumerate(block.layer_specs, start=first)
    ]
    layer_norm = block.layer_norm if use_transformer_engine else Norm
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=layer_norm)


def with_local_names(block: TransformerBlockSubmodules) -> TransformerBlockSubmodules:
    """A block of Transformer Engine's parts as the same model as the local block, under the same checkpoint keys.

    Megatron's specs for Transformer Engine store norms elsewhere, as parts of the linear layer that follows or as norms
    of their own. With `qk_layernorm` and MLA without `q_lora_rank`, 0.19.2 also gives the query a second norm of the
    hidden state, which LatentAttention leaves out.

    Args:
        block: of `coe_block_spec` with Transformer Engine; its layers are changed.
    """
    fused, own = "mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."
    for spec in block.layer_specs:
        parts: TransformerLayerSubmodules = spec.submodules
        names = parts.sharded_state_dict_keys_map
        if parts.self_attention.module is MLASelfAttention:
            parts.self_attention.module = LatentAttention
            names[fused] = own
            for latent, projection in (("q", "linear_q_up_proj"), ("kv", "linear_kv_up_proj")):
                names[f"self_attention.{projection}.layer_norm_"] = f"self_attention.{latent}_layernorm."
        else:
            names.update((name, fused) for name in (own, "mlp.norms.0."))
    return block


def _own_arguments(
    recompute: Recompute, deduplicated: bool, overlap_chunks: int, megatron_losses: bool
) -> dict[str, Any]:
    """Further arguments of CoELayer."""
    return {
        "recompute": recompute,
        "deduplicated": deduplicated,
        "overlap_chunks": overlap_chunks,
        "megatron_losses": megatron_losses,
    }


def _recompute(config: TransformerConfig, recompute: Recompute, use_transformer_engine: bool) -> Recompute:
    if use_transformer_engine and recompute == "experts":
        raise ConfigError("recompute is 'experts': with Transformer Engine's experts use recompute_modules ['moe_act']")
    return recompute_mode(config, recompute)


def _convert(
    spec: ModuleSpec,
    chain: ChainSettings,
    use_transformer_engine: bool,
    pg_collection: ProcessGroupCollection | None,
    own: dict[str, Any],
) -> ModuleSpec:
    """A copy of Megatron's layer spec with our parts in it (Megatron shares one spec object among its layers).

    Args:
        own: further arguments of CoELayer.
    """
    spec = deepcopy(spec)
    parts: TransformerLayerSubmodules = spec.submodules
    norm = TENorm if use_transformer_engine else Norm
    if not use_transformer_engine:
        _use_torch_parts(parts)
    submodules = moe_submodules(parts.mlp)
    if submodules is not None:
        if not use_transformer_engine:
            experts = experts_spec(GroupedExperts, recompute=own["recompute"] == "experts")
            submodules = replace(submodules, experts=experts)
        parts.mlp = moe_layer_spec(CoELayer, submodules, pg_collection, chain=chain, norm=norm, **own)
        _use_norm_placement(parts, chain)
    return spec


def _use_torch_parts(parts: TransformerLayerSubmodules) -> None:
    if parts.self_attention.module is MLASelfAttention:
        parts.self_attention.module = LatentAttention
    attention = parts.self_attention.submodules
    attention.core_attention = SDPACoreAttention
    parts.input_layernorm = parts.pre_mlp_layernorm = Norm
    for name in ("q_layernorm", "k_layernorm", "kv_layernorm"):
        if getattr(attention, name, IdentityOp) not in (IdentityOp, None):
            setattr(attention, name, Norm)


def _use_norm_placement(parts: TransformerLayerSubmodules, chain: ChainSettings) -> None:
    """Connect the layer to the residual stream as `norm_placement` says; `prenorm` is Megatron's own way."""
    if chain.norm_placement == "iteration_norm":
        # The layer has a norm per iteration; the first is stored where the stock layer stores its pre-MLP norm.
        parts.pre_mlp_layernorm = IdentityOp
        stored = parts.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", "pre_mlp_layernorm.")
        parts.sharded_state_dict_keys_map["mlp.norms.0."] = stored
    elif chain.norm_placement == "reference":
        parts.mlp_bda = get_replace_stream


def get_replace_stream(_training: bool, _fused: bool):
    """Replaces Megatron's bias-dropout-add with `reference`: the layer's output is the residual stream."""

    def replace_stream(
        output_with_bias: tuple[torch.Tensor, None], _residual: torch.Tensor, _dropout: float
    ) -> torch.Tensor:
        return output_with_bias[0]

    return replace_stream
