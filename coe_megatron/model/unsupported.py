"""What of Megatron's config a chain ignores or breaks, refused in one line that names field, value and remedy.

What single parts do not offer, these refuse themselves: experts, core attention, norm.
"""

from megatron.core.transformer.transformer_config import TransformerConfig

from coe_megatron.errors import ConfigError

_NARROW = "a chain has no FP8 or FP4, leave it at Megatron's default"
_SCHEDULED = "Megatron then calls the parts of a MoE layer itself, each once and not C times; it must be False"
_ATTENTION = "leave it at Megatron's default, or take Megatron's own spec for it and put CoELayer in"

_BY_LAYER = {
    "fp8": _NARROW,
    "fp4": _NARROW,
    "fp8_param": _NARROW,
    "fp4_param": _NARROW,
    "fp8_dot_product_attention": _NARROW,
    "fp8_multi_head_attention": _NARROW,
    "activation_func_fp8_input_store": _NARROW,
    "moe_router_padding_for_quantization": _NARROW,
    "quant_recipe": _NARROW,
    "overlap_moe_expert_parallel_comm": _SCHEDULED,
    "delay_wgrad_compute": _SCHEDULED,
    "cuda_graph_impl": "a chain runs without CUDA graphs, set it to none",
}
_BY_SPECS = {
    "experimental_attention_variant": f"the specs of a chain have no such attention; {_ATTENTION}",
    "qk_l2_norm": f"the specs of a chain have no such norm of queries and keys; {_ATTENTION}",
    "use_kitchen": f"the specs of a chain do not build on it; {_ATTENTION}",
}
_POLICIES = ("probs", "position")


def refuse_for_layer(config: TransformerConfig) -> None:
    """Raise a ConfigError if no layer with a chain can do as the config says."""
    _refuse(config, _BY_LAYER)
    policy = config.moe_token_drop_policy
    if policy not in _POLICIES:
        raise ConfigError(f"moe_token_drop_policy is {policy!r}: it must be one of {', '.join(_POLICIES)}")


def refuse_for_specs(config: TransformerConfig) -> None:
    """The same, also for what `coe_layer_spec` and `coe_block_spec` alone would ignore."""
    refuse_for_layer(config)
    _refuse(config, _BY_SPECS)


def _refuse(config: TransformerConfig, unsupported: dict[str, str]) -> None:
    for name, reason in unsupported.items():
        value = getattr(config, name)
        if value not in (None, False, "none"):
            raise ConfigError(f"{name} is {value!r}: {reason}")
