"""What of Megatron's config a chain ignores or breaks, refused in one line that names field, value and remedy.

What single parts do not offer, these refuse themselves: experts, core attention, norm.
"""

from megatron.core.transformer.transformer_config import TransformerConfig

from coe_megatron.chain.settings import ChainSettings
from coe_megatron.errors import ConfigError
from coe_megatron.local_backend.megatron_compat import has_transformer_engine

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


def refuse_for_chain(config: TransformerConfig, chain: ChainSettings) -> None:
    """Raise a ConfigError if a layer of this config cannot have this chain."""
    chain.require_experts(config.num_moe_experts, config.moe_router_topk, config.moe_router_num_groups)
    if chain.no_return:
        refuse_unrecorded(config, "chain.no_return")
    if chain.iterations > 1 and config.moe_shared_expert_overlap:
        raise ConfigError(
            "moe_shared_expert_overlap is True: the shared experts keep the state of one pass, so with more than one "
            "iteration it must be False"
        )


def needs_stock_dispatcher(config: TransformerConfig) -> str | None:
    """What of the config only Megatron's token dispatchers can do, as `field is value`; None if there is nothing."""
    wanted = {
        "moe_token_dispatcher_type": config.moe_token_dispatcher_type != "alltoall",
        "moe_expert_capacity_factor": config.moe_expert_capacity_factor is not None,
        "moe_shared_expert_overlap": config.moe_shared_expert_overlap,
        "moe_permute_fusion": config.moe_permute_fusion,
    }
    return next((f"{name} is {getattr(config, name)!r}" for name, is_wanted in wanted.items() if is_wanted), None)


def refuse_for_exchange(config: TransformerConfig, deduplicated: bool, overlap_chunks: int) -> None:
    """Raise a ConfigError if tokens cannot travel as they are to, see `exchange`."""
    if overlap_chunks < 1:
        raise ConfigError(f"overlap_chunks is {overlap_chunks}: it must be at least 1")
    reason = needs_stock_dispatcher(config)
    if reason and deduplicated:
        raise ConfigError(f"{reason}: with the deduplicated dispatcher it must be Megatron's default")
    if reason and overlap_chunks > 1:
        raise ConfigError(f"{reason}: with overlap_chunks {overlap_chunks} it must be Megatron's default")


def refuse_unrecorded(config: TransformerConfig, feature: str) -> None:
    """Raise a ConfigError if experts are chosen where no RoutingRecord can listen, which the feature needs."""
    if config.moe_router_fusion:
        raise ConfigError(f"moe_router_fusion is True: with {feature} it must be False")
    if config.moe_router_load_balancing_type == "sinkhorn":
        raise ConfigError(f"moe_router_load_balancing_type is 'sinkhorn': with {feature} use an auxiliary loss")


def refuse_dense_layers(config: TransformerConfig) -> None:
    """Raise a ConfigError if some layers are to have no experts, which `coe_layer_spec` cannot do."""
    frequency = config.moe_layer_freq
    has_dense = 0 in frequency if isinstance(frequency, list) else frequency != 1
    if has_dense:
        raise ConfigError(
            f"moe_layer_freq is {frequency!r}: coe_layer_spec makes every layer a chain; take coe_block_spec, which "
            "follows it"
        )


def refuse_missing_engine(config: TransformerConfig, use_transformer_engine: bool) -> None:
    """Raise a ConfigError if Transformer Engine is asked for and not there, or needed and not asked for."""
    if use_transformer_engine and not has_transformer_engine():
        raise ConfigError("use_transformer_engine is True: Transformer Engine is not installed, set it to False")
    tensor = config.tensor_model_parallel_size
    if config.multi_latent_attention and tensor > 1 and not (use_transformer_engine or config.sequence_parallel):
        raise ConfigError(
            f"tensor_model_parallel_size is {tensor}: with multi_latent_attention and without Transformer Engine set "
            "sequence_parallel to True, or gradients of the rotary keys would not be summed over the ranks"
        )


def _refuse(config: TransformerConfig, unsupported: dict[str, str]) -> None:
    for name, reason in unsupported.items():
        value = getattr(config, name)
        if value not in (None, False, "none"):
            raise ConfigError(f"{name} is {value!r}: {reason}")
