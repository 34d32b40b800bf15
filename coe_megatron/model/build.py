"""From a run's settings to a Megatron-Core GPTModel with Chain-of-Experts layers."""

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from coe_megatron.config.layout import layout
from coe_megatron.config.settings import MLASettings, ModelSettings, MoESettings, RunConfig
from coe_megatron.errors import ConfigError
from coe_megatron.local_backend.attention import SDPACoreAttention
from coe_megatron.local_backend.norm import KeyNorm, QueryNorm
from coe_megatron.model import coe_block_spec
from coe_megatron.model.layer import coe_layers, routers
from coe_megatron.model.specs import with_local_names
from coe_megatron.model.stage_parts import StageParts


def build_model(
    config: RunConfig, vocab_size: int, block: TransformerBlockSubmodules | None = None
) -> GPTModel | StageParts:
    """The model of this rank, initialised; Megatron's process groups and seeds have to stand.

    Args:
        vocab_size: rows of the embedding, padding included.
        block: specs of other layers, to compare with; those of `layer_specs` when None.
    """
    parts = config.parallel.virtual_pipeline
    if parts == 1:
        model = _build_part(config, vocab_size, block, None)
    else:
        model = StageParts(_build_part(config, vocab_size, block, part) for part in range(parts))
    if config.moe.router_init == "kaiming_uniform":
        for _, _, router in routers(model):
            if router.tied_to is None:
                torch.nn.init.kaiming_uniform_(router.weight, a=math.sqrt(5))
    if config.model.mla is not None and config.model.mla.pad_values:
        for module in model.modules():
            if isinstance(module, SDPACoreAttention):
                module.pads_values = True
    if _on_engine(config):
        _mark_experts(model, config)
    return model


def _build_part(
    config: RunConfig, vocab_size: int, block: TransformerBlockSubmodules | None, part: int | None
) -> GPTModel:
    """A pipeline stage, or with interleaved pipelines a part of it."""
    megatron = transformer_config(config)
    return GPTModel(
        config=megatron,
        transformer_layer_spec=block or layer_specs(config, megatron, part),
        vocab_size=vocab_size,
        max_sequence_length=config.model.seq_length,
        position_embedding_type="rope",
        rotary_base=config.model.rotary_base,
        share_embeddings_and_output_weights=not config.model.untied_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=part),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=part),
        vp_stage=part,
    )


def layer_specs(config: RunConfig, megatron: TransformerConfig, part: int | None = None) -> TransformerBlockSubmodules:
    """The specs of this rank's layers with the parts of `model.backend`; checkpoints of both have the same keys.

    Args:
        megatron: the result of `transformer_config`.
        part: of the stage, from 0, with interleaved pipelines.
    """
    engine = _on_engine(config)
    block = coe_block_spec(
        megatron,
        config.chain,
        recompute=config.moe.recompute,
        use_transformer_engine=engine,
        deduplicated=config.moe.dispatcher == "deduplicated",
        overlap_chunks=config.moe.resolved_chunks(),
        vp_stage=part,
    )
    if config.model.qk_norm_over_heads:
        for spec in block.layer_specs:
            spec.submodules.self_attention.submodules.q_layernorm = QueryNorm
            spec.submodules.self_attention.submodules.k_layernorm = KeyNorm
    return with_local_names(block) if engine else block


def require_backend(config: RunConfig) -> None:
    """Raise a ConfigError if this rank does not have what `model.backend` needs."""
    if _on_engine(config) and not torch.cuda.is_available():
        raise ConfigError("model.backend is transformer_engine: it needs a CUDA device, and there is none; use local")


def _on_engine(config: RunConfig) -> bool:
    return config.model.backend == "transformer_engine"


def _mark_experts(model: torch.nn.Module, config: RunConfig) -> None:
    """Mark experts whose replicas differ from those of dense parameters.

    Megatron-Core 0.16.1 marks Transformer Engine's by expert parallelism alone, also where ETP differs from TP.
    """
    separate = layout(config).separate_experts
    for layer in coe_layers(model):
        for parameter in layer.experts.parameters():
            parameter.allreduce = not separate


def transformer_config(config: RunConfig) -> TransformerConfig:
    """Megatron's own config, with everything that is not named here at Megatron's default."""
    bf16 = config.training.precision == "bf16"
    fields: dict[str, Any] = {
        **_model_fields(config.model),
        **_moe_fields(config.moe),
        **_layout_fields(config),
        "hetereogenous_dist_checkpoint": config.chain.layers is not None,
        "moe_grouped_gemm": _on_engine(config),
        "perform_initialization": torch.get_default_device().type != "meta",  # where there is nothing to fill
        "bf16": bf16,
        "params_dtype": torch.bfloat16 if bf16 else torch.float32,
    }
    mla = config.model.mla
    if mla is None:
        return TransformerConfig(**fields)
    return MLATransformerConfig(**fields, **_mla_fields(mla, config.model.rotary_base))


def _layout_fields(config: RunConfig) -> dict[str, Any]:
    parallel = config.parallel
    return {
        "tensor_model_parallel_size": parallel.tensor,
        "sequence_parallel": parallel.tensor > 1,
        "context_parallel_size": parallel.context,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        # Parts of stages: with two stages a batch of messages would mix those to the next and to the previous stage.
        "overlap_p2p_comm": parallel.virtual_pipeline > 1,
        "batch_p2p_comm": parallel.virtual_pipeline == 1,
        "pipeline_dtype": torch.bfloat16 if config.training.precision == "bf16" else torch.float32,
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": parallel.expert_tensor,
    }


def _model_fields(model: ModelSettings) -> dict[str, Any]:
    initialise = partial(torch.nn.init.normal_, std=model.init_method_std)
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
        "kv_channels": model.kv_channels,
        "ffn_hidden_size": model.ffn_hidden_size or 4 * model.hidden_size,
        "gated_linear_unit": model.activation == "swiglu",
        "activation_func": F.silu if model.activation == "swiglu" else F.gelu,
        "add_bias_linear": False,
        "add_qkv_bias": model.qkv_bias,
        # Compiled, which on a CPU takes half a minute and is no faster.
        "bias_activation_fusion": torch.cuda.is_available() and model.activation == "swiglu",
        "bias_dropout_fusion": False,
        "normalization": model.normalization,
        "layernorm_epsilon": model.layernorm_epsilon,
        "qk_layernorm": model.qk_layernorm or model.mla is not None,  # DeepSeek-V2 has norms on its latents
        "hidden_dropout": model.hidden_dropout,
        "attention_dropout": model.attention_dropout,
        "init_method_std": model.init_method_std,
        "output_layer_init_method": None if model.scaled_init else initialise,
    }


def _moe_fields(moe: MoESettings) -> dict[str, Any]:
    return {
        "num_moe_experts": moe.num_experts,
        "moe_router_topk": moe.topk,
        "moe_ffn_hidden_size": moe.ffn_hidden_size,
        "moe_shared_expert_intermediate_size": moe.num_shared_experts * moe.ffn_hidden_size or None,
        "moe_shared_expert_gate": moe.shared_expert_gate,
        "moe_layer_freq": moe.layer_freq,
        "moe_router_score_function": moe.score_function,
        "moe_router_pre_softmax": moe.score_function == "softmax" and not moe.renormalise,
        "moe_router_topk_scaling_factor": None if moe.scaling == 1.0 else moe.scaling,
        "moe_router_num_groups": moe.num_groups,
        "moe_router_group_topk": moe.group_topk,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": moe.load_balancing,
        "moe_aux_loss_coeff": 0.0 if moe.load_balancing == "none" else moe.aux_loss_coeff,
        "moe_z_loss_coeff": moe.z_loss_coeff or None,
        "moe_router_enable_expert_bias": moe.expert_bias,
        "moe_router_bias_update_rate": moe.expert_bias_rate,
        "moe_input_jitter_eps": moe.input_jitter or None,
        "moe_expert_capacity_factor": moe.capacity_factor,
        "moe_pad_expert_input_to_capacity": moe.pad_to_capacity,
        "moe_token_dispatcher_type": "allgather" if moe.dispatcher == "allgather" else "alltoall",
        "moe_router_force_load_balancing": moe.force_load_balancing,
    }


def _mla_fields(mla: MLASettings, rotary_base: int) -> dict[str, Any]:
    yarn = mla.rotary_scaling_factor > 1
    return {
        "multi_latent_attention": True,
        "kv_lora_rank": mla.kv_lora_rank,
        "q_lora_rank": mla.q_lora_rank,
        "qk_head_dim": mla.qk_head_dim,
        "qk_pos_emb_head_dim": mla.qk_pos_emb_head_dim,
        "v_head_dim": mla.v_head_dim,
        "rope_type": "yarn" if yarn else "rope",
        "rotary_base": float(rotary_base),
        "rotary_scaling_factor": mla.rotary_scaling_factor,
        "original_max_position_embeddings": mla.original_max_position_embeddings,
        "mscale": mla.mscale,
        "mscale_all_dim": mla.mscale_all_dim,
    }
