"""Architectures that transformers knows: models of one iteration that fit one are opened without code of ours."""

from collections.abc import Iterator

from coe_megatron.config.layout import moe_pattern
from coe_megatron.config.settings import RunConfig
from coe_megatron.convert import rules
from coe_megatron.convert.architecture import Architecture, Values, yarn
from coe_megatron.convert.coe_architecture import COE
from coe_megatron.convert.rules import Constant, Rule, Rules, renamed
from coe_megatron.errors import ConfigError


def _common_reasons(config: RunConfig) -> Iterator[str]:
    """Why a model is none that transformers knows."""
    model, chain = config.model, config.chain
    if chain.iterations > 1:
        yield f"it iterates {chain.iterations} times"
    if chain.norm_placement == "reference":
        yield "chain.norm_placement is reference"
    if chain.learned_scale is not None or chain.conditioned:
        yield "it has learned gains"
    if chain.modulation_rank is not None or chain.latent is not None:
        yield "it has a modulation or a latent space"
    if model.activation != "swiglu" or model.normalization != "RMSNorm":
        yield "it has another activation than swiglu or another norm than RMSNorm"


def _grouped_reasons(config: RunConfig) -> Iterator[str]:
    """Why it is none of those with grouped-query attention."""
    model, moe = config.model, config.moe
    if model.mla is not None:
        yield "it has multi-latent attention"
    if moe.score_function != "softmax" or moe.expert_bias:
        yield "its scores are not a softmax alone"
    if moe.scaling != 1.0:
        yield f"moe.scaling is {moe.scaling}"
    if moe.num_groups is not None:
        yield "its routing is limited to groups of experts"


def _no_biases_or_gates(config: RunConfig) -> Iterator[str]:
    if config.model.qkv_bias:
        yield "queries, keys and values have biases"
    if config.moe.num_shared_experts:
        yield "it has shared experts"


def _olmoe_reasons(config: RunConfig) -> Iterator[str]:
    yield from _grouped_reasons(config)
    yield from _no_biases_or_gates(config)
    model = config.model
    if not (model.qk_layernorm and model.qk_norm_over_heads):
        yield "it does not normalise queries and keys over all heads"
    if 0 in moe_pattern(config):
        yield "it has dense layers"
    if model.kv_channels not in (None, model.hidden_size // model.num_attention_heads):
        yield "model.kv_channels is not hidden_size / num_attention_heads"


def _mixtral_reasons(config: RunConfig) -> Iterator[str]:
    yield from _grouped_reasons(config)
    yield from _no_biases_or_gates(config)
    if config.model.qk_layernorm:
        yield "it normalises queries and keys"
    if not config.moe.renormalise:
        yield "moe.renormalise is false"
    if 0 in moe_pattern(config):
        yield "it has dense layers"


def _qwen3_reasons(config: RunConfig) -> Iterator[str]:
    yield from _grouped_reasons(config)
    yield from _no_biases_or_gates(config)
    if not config.model.qk_layernorm or config.model.qk_norm_over_heads:
        yield "it does not normalise each head's queries and keys"


def _qwen2_reasons(config: RunConfig) -> Iterator[str]:
    model = config.model
    yield from _grouped_reasons(config)
    if model.qk_layernorm:
        yield "it normalises queries and keys"
    if not config.moe.num_shared_experts:
        yield "it has no shared experts"
    if model.kv_channels not in (None, model.hidden_size // model.num_attention_heads):
        yield "model.kv_channels is not hidden_size / num_attention_heads"


def _deepseek_reasons(config: RunConfig, best_of_a_group: int) -> Iterator[str]:
    model, moe = config.model, config.moe
    if model.mla is None:
        yield "it has no multi-latent attention"
    if not moe.num_shared_experts or moe.shared_expert_gate:
        yield "it has no shared experts, or a gate of theirs"
    layers = moe_pattern(config)
    if sorted(layers) != list(layers):
        yield "it has dense layers after layers with experts"
    if moe.group_topk is not None and moe.topk // moe.group_topk != best_of_a_group:
        yield f"a group's score is the sum of its best {moe.topk // moe.group_topk} experts, not {best_of_a_group}"


def _deepseek_v2_reasons(config: RunConfig) -> Iterator[str]:
    yield from _deepseek_reasons(config, 1)
    if config.moe.score_function != "softmax" or config.moe.renormalise or config.moe.expert_bias:
        yield "its gates are not a softmax over all experts alone"


def _deepseek_v3_reasons(config: RunConfig) -> Iterator[str]:
    yield from _deepseek_reasons(config, 2)
    if config.moe.score_function != "sigmoid":
        yield "its scores are no sigmoid"


def _rotary(config: RunConfig) -> Values:
    """Both forms: releases of transformers before 5 read `rope_theta` and `rope_scaling`."""
    theta, stretched = float(config.model.rotary_base), yarn(config)
    kind: Values = {"rope_type": "default"}
    if stretched is not None:
        kind = {"rope_type": "yarn", "beta_fast": 32, "beta_slow": 1, **stretched}
    return {
        "rope_theta": theta,
        "rope_scaling": None if stretched is None else kind,
        "rope_parameters": {"rope_theta": theta, **kind},
    }


def _shared_values(config: RunConfig) -> Values:
    moe = config.moe
    return {
        "hidden_act": "silu",
        "rms_norm_eps": config.model.layernorm_epsilon,
        "num_experts_per_tok": moe.topk,
        "router_aux_loss_coef": moe.aux_loss_coeff,
        "output_router_logits": False,
        **_rotary(config),
    }


def _mixtral_values(config: RunConfig) -> Values:
    return {
        **_shared_values(config),
        "head_dim": config.model.kv_channels,
        "intermediate_size": config.moe.ffn_hidden_size,
        "num_local_experts": config.moe.num_experts,
        "sliding_window": None,
    }


def _olmoe_values(config: RunConfig) -> Values:
    return {
        **_shared_values(config),
        "intermediate_size": config.moe.ffn_hidden_size,
        "num_experts": config.moe.num_experts,
        "norm_topk_prob": config.moe.renormalise,
        "attention_bias": False,
        "clip_qkv": None,
    }


def _qwen_values(config: RunConfig) -> Values:
    model, moe = config.model, config.moe
    shared = moe.num_shared_experts * moe.ffn_hidden_size
    return {
        **_shared_values(config),
        "head_dim": model.kv_channels or model.hidden_size // model.num_attention_heads,
        "intermediate_size": model.ffn_hidden_size or 4 * model.hidden_size,
        "moe_intermediate_size": moe.ffn_hidden_size,
        "num_experts": moe.num_experts,
        "norm_topk_prob": moe.renormalise,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer, has_experts in enumerate(moe_pattern(config)) if not has_experts],
        "use_sliding_window": False,
        **({"shared_expert_intermediate_size": shared, "qkv_bias": True} if shared else {"attention_bias": False}),
    }


def _deepseek_values(config: RunConfig) -> Values:
    model, moe, mla = config.model, config.moe, config.model.mla
    assert mla is not None
    grouped = moe.num_groups is not None
    if moe.score_function == "softmax":
        method: Values = {"topk_method": "group_limited_greedy" if grouped else "greedy", "scoring_func": "softmax"}
        groups: Values = {"n_group": moe.num_groups, "topk_group": moe.group_topk, "norm_topk_prob": False}
    else:
        method = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "num_mtp_layers": 0}
        groups = {"n_group": moe.num_groups or 1, "topk_group": moe.group_topk or 1, "norm_topk_prob": moe.topk > 1}
    return {
        **_shared_values(config),
        "kv_lora_rank": mla.kv_lora_rank,
        "q_lora_rank": mla.q_lora_rank,
        "qk_nope_head_dim": mla.qk_head_dim,
        "qk_rope_head_dim": mla.qk_pos_emb_head_dim,
        "v_head_dim": mla.v_head_dim,
        "intermediate_size": model.ffn_hidden_size or 4 * model.hidden_size,
        "moe_intermediate_size": moe.ffn_hidden_size,
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.num_shared_experts,
        "first_k_dense_replace": moe_pattern(config).count(0),
        "moe_layer_freq": 1,
        "routed_scaling_factor": moe.scaling,
        "attention_bias": False,
        **method,
        **groups,
    }


def _gated_moe(config: RunConfig, prefix: str, gate: str, value: str, second: str) -> Rules:
    names = (f"{prefix}.experts.{{e}}.{name}.weight" for name in (gate, value, second))
    return [renamed("mlp.router.weight", f"{prefix}.gate.weight"), *rules.experts_alone(config, *names)]


def _usual_moe(config: RunConfig, layer: int) -> Rules:
    return _gated_moe(config, "mlp", "gate_proj", "up_proj", "down_proj")


def _mixtral_moe(config: RunConfig, layer: int) -> Rules:
    return _gated_moe(config, "block_sparse_moe", "w1", "w3", "w2")


def _qwen2_moe(config: RunConfig, layer: int) -> Rules:
    """Its shared experts have a gate; where ours have none, one of zeros makes 1/2."""
    name = "mlp.shared_expert_gate.weight"
    first, second = rules.feed_forward("mlp.shared_experts.", "mlp.shared_expert.")
    if config.moe.shared_expert_gate:
        return [*_usual_moe(config, layer), first, second, renamed("mlp.shared_experts.gate_weight", name)]
    assert isinstance(second, Rule)
    gate = Constant(name, (1, config.model.hidden_size))
    return [*_usual_moe(config, layer), first, rules.scaled(second, 2.0), gate]


def _no_biases(config: RunConfig) -> Rules:
    model = config.model
    if model.qkv_bias:
        return []
    width = model.kv_channels or model.hidden_size // model.num_attention_heads
    heads, groups = model.num_attention_heads, model.num_query_groups or model.num_attention_heads
    sizes = {"q": heads, "k": groups, "v": groups}
    return [Constant(f"self_attn.{name}_proj.bias", (count * width,)) for name, count in sizes.items()]


def _deepseek_moe(config: RunConfig, layer: int) -> Rules:
    return [*_usual_moe(config, layer), *rules.feed_forward("mlp.shared_experts.", "mlp.shared_experts.")]


def _deepseek_v3_moe(config: RunConfig, layer: int) -> Rules:
    name = "mlp.gate.e_score_correction_bias"
    bias = (
        renamed("mlp.router.expert_bias", name) if config.moe.expert_bias else Constant(name, (config.moe.num_experts,))
    )
    return [*_deepseek_moe(config, layer), bias]


_DENSE = rules.feed_forward("mlp.", "mlp.")
NATIVE = (
    Architecture("mixtral", "MixtralForCausalLM", _mixtral_reasons, _mixtral_values, _mixtral_moe, _DENSE),
    Architecture("olmoe", "OlmoeForCausalLM", _olmoe_reasons, _olmoe_values, _usual_moe, _DENSE),
    Architecture("qwen3_moe", "Qwen3MoeForCausalLM", _qwen3_reasons, _qwen_values, _usual_moe, _DENSE),
    Architecture("qwen2_moe", "Qwen2MoeForCausalLM", _qwen2_reasons, _qwen_values, _qwen2_moe, _DENSE, _no_biases),
    Architecture("deepseek_v2", "DeepseekV2ForCausalLM", _deepseek_v2_reasons, _deepseek_values, _deepseek_moe, _DENSE),
    Architecture(
        "deepseek_v3", "DeepseekV3ForCausalLM", _deepseek_v3_reasons, _deepseek_values, _deepseek_v3_moe, _DENSE
    ),
)


def of_model(config: RunConfig) -> tuple[Architecture, list[str]]:
    """The architecture that opens without code of ours, or else `coe`; and lines that say why not the others.

    Raises:
        ConfigError: a setting makes a model that no export represents.
    """
    if config.moe.force_load_balancing:
        raise ConfigError("moe.force_load_balancing is true: random routing cannot be exported")
    if common := list(_common_reasons(config)):
        return COE, [f"transformers has no architecture for it: {'; '.join(common)}"]
    reasons = {each.name: list(each.why_not(config)) for each in NATIVE}
    fitting = [each for each in NATIVE if not reasons[each.name]]
    lines = [f"it is no {name}: {'; '.join(why)}" for name, why in reasons.items() if why]
    return (fitting[0], []) if fitting else (COE, lines)
