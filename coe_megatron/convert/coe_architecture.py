"""The project's own architecture, whose code is in `hf_files`: it represents every model."""

from coe_megatron.config.layout import chain_pattern, moe_pattern
from coe_megatron.config.settings import RunConfig
from coe_megatron.convert import rules
from coe_megatron.convert.architecture import Architecture, Values, yarn
from coe_megatron.convert.rules import Rules, renamed


def _coe_values(config: RunConfig) -> Values:
    model, moe, chain, mla = config.model, config.moe, config.chain, config.model.mla
    latent: Values = {}
    if mla is not None:
        latent = {
            "kv_lora_rank": mla.kv_lora_rank,
            "q_lora_rank": mla.q_lora_rank,
            "qk_nope_head_dim": mla.qk_head_dim,
            "qk_rope_head_dim": mla.qk_pos_emb_head_dim,
            "v_head_dim": mla.v_head_dim,
            "yarn": yarn(config),
        }
    return {
        "auto_map": {
            "AutoConfig": "configuration_coe.CoEConfig",
            "AutoModelForCausalLM": "modeling_coe.CoEForCausalLM",
        },
        **latent,
        "head_dim": model.kv_channels,
        "qk_layernorm": model.qk_layernorm and mla is None,
        "qk_norm_over_heads": model.qk_norm_over_heads,
        "qkv_bias": model.qkv_bias,
        "intermediate_size": model.ffn_hidden_size or 4 * model.hidden_size,
        "hidden_act": "silu" if model.activation == "swiglu" else "gelu",
        "norm": "rms_norm" if model.normalization == "RMSNorm" else "layer_norm",
        "norm_eps": model.layernorm_epsilon,
        "rope_theta": float(model.rotary_base),
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.topk,
        "moe_intermediate_size": moe.ffn_hidden_size,
        "shared_expert_intermediate_size": moe.num_shared_experts * moe.ffn_hidden_size,
        "shared_expert_gate": moe.shared_expert_gate,
        "moe_layers": list(moe_pattern(config)),
        "scoring_func": moe.score_function,
        "norm_topk_prob": moe.renormalise,
        "routed_scaling_factor": moe.scaling,
        "n_group": moe.num_groups,
        "topk_group": moe.group_topk,
        "use_expert_bias": moe.expert_bias,
        "chain_iterations": chain.iterations,
        "chain_gating": chain.gating,
        "chain_residual": chain.residual,
        "chain_norm_placement": chain.norm_placement,
        "chain_learned_scale": chain.learned_scale is not None,
        "chain_conditioned": chain.conditioned,
        "chain_no_return": chain.no_return,
        "chain_modulation_rank": chain.modulation_rank,
        "chain_streams": chain.streams,
        "chain_latent": chain.latent,
        "chain_layers": None if chain.layers is None else list(chain_pattern(config)),
        "num_shared_experts": moe.num_shared_experts,
    }


def _coe_rules(config: RunConfig, layer: int) -> Rules:
    model, moe, chain = config.model, config.moe, config.chain
    is_chain = chain.is_chain(layer + 1)
    iterations = chain.iterations if is_chain else 1
    routings = 1 if chain.gating == "fixed" else iterations
    found: Rules = [
        renamed("mlp.experts.experts.linear_fc1.weight", "mlp.experts.w1"),
        renamed("mlp.experts.experts.linear_fc2.weight", "mlp.experts.w2"),
    ]
    for t in range(routings):
        router = "mlp.router." if t == 0 else f"mlp.later_routers.{t - 1}."
        if t == 0 or chain.gating == "independent":
            found.append(renamed(f"{router}weight", f"mlp.routers.{t}.weight"))
        if moe.expert_bias:
            found.append(renamed(f"{router}expert_bias", f"mlp.expert_bias.{t}"))
    if moe.num_shared_experts:
        for part in (1, 2):
            found.append(renamed(f"mlp.shared_experts.linear_fc{part}.weight", f"mlp.shared_experts.w{part}.weight"))
    if moe.num_shared_experts and moe.shared_expert_gate:
        found.append(renamed("mlp.shared_experts.gate_weight", "mlp.shared_gate.weight"))
    for t in range(iterations if is_chain else 0):
        if t and chain.norm_placement == "iteration_norm":
            found += rules.norm(model, f"mlp.norms.{t}.", f"mlp.later_norms.{t - 1}")
        if chain.learned_scale is not None:
            found.append(renamed(f"mlp.variants.increment_gains.{t}", f"mlp.increment_gains.{t}"))
        if chain.conditioned:
            found.append(renamed(f"mlp.variants.state_gains.{t}", f"mlp.state_gains.{t}"))
        if chain.modulation_rank is not None:
            found.append(renamed(f"mlp.variants.modulation_up.{t}", f"mlp.modulation_up.{t}.weight"))
        if chain.streams is not None:
            found.append(renamed(f"mlp.variants.stream_weights.{t}", f"mlp.streams.weights.{t}"))
    if is_chain and chain.modulation_rank is not None:
        found.append(renamed("mlp.variants.modulation_down", "mlp.modulation_down.weight"))
    for name in ("latent_down", "latent_up") if chain.latent is not None else ():
        found.append(renamed(f"mlp.variants.{name}", f"mlp.{name}.weight"))
    return found


_DENSE: Rules = [renamed(f"mlp.linear_fc{part}.weight", f"mlp.w{part}.weight") for part in (1, 2)]
COE = Architecture("coe", "CoEForCausalLM", lambda config: iter(()), _coe_values, _coe_rules, _DENSE)
