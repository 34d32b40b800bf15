"""Settings of ours that make a Hugging Face model's architecture, or the reason why none do."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from coe_megatron.chain.settings import ChainSettings
from coe_megatron.config import RunConfig
from coe_megatron.config.settings import MLASettings, ModelSettings, MoESettings
from coe_megatron.convert.architecture import Values
from coe_megatron.errors import ConfigError

ONE = ChainSettings(iterations=1)


def run_config(values: Values) -> RunConfig:
    """The config of a run with this model.

    Args:
        values: the model's configuration, with defaults.

    Raises:
        ConfigError: the architecture is unknown, or something of it cannot be represented; the line names it.
    """
    kind = values["model_type"]
    if kind not in _KINDS:
        raise ConfigError(f"model_type is {kind!r}: it must be one of {', '.join(_KINDS)}")
    _refuse(values)
    config = _KINDS[kind](values)
    is_bf16 = "bfloat16" in str(values.get("dtype") or values.get("torch_dtype"))
    return replace(config, training=replace(config.training, precision="bf16" if is_bf16 else "fp32"))


def _refuse(values: Values) -> None:
    """What none of our models has."""
    length = values.get("max_position_embeddings") or 0
    window = values.get("sliding_window") if values.get("use_sliding_window", True) else None
    reasons = {
        "hidden_act": values.get("hidden_act") not in ("silu", "gelu"),
        "attention_bias": bool(values.get("attention_bias")),
        "mlp_bias": bool(values.get("mlp_bias")),
        "clip_qkv": values.get("clip_qkv") is not None,
        "sliding_window": window is not None and window < length,
        "rope_interleave": values.get("rope_interleave") is False,
    }
    for name, is_set in reasons.items():
        if is_set:
            raise ConfigError(f"{name} is {values.get(name)!r}: our models cannot represent it")


def _model(values: Values, **more: Any) -> ModelSettings:
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    groups, width = values.get("num_key_value_heads") or heads, values.get("head_dim") or hidden // heads
    is_latent = "mla" in more
    rotary = _rotary(values, is_latent)
    base = float(rotary.get("rope_theta") or values.get("rope_theta") or 10_000)
    if base != int(base):
        raise ConfigError(f"rope_theta is {base}: our rotary_base is an integer")
    settings: Values = {
        "num_layers": values["num_hidden_layers"],
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": None if is_latent or groups == heads else groups,
        "kv_channels": None if is_latent or width == hidden // heads else width,
        "seq_length": values["max_position_embeddings"],
        "vocab_size": values["vocab_size"],
        "layernorm_epsilon": values.get("rms_norm_eps", values.get("norm_eps")),
        "rotary_base": int(base),
        "untied_embeddings": not values.get("tie_word_embeddings"),
        "init_method_std": values.get("initializer_range", 0.02),
        "ffn_hidden_size": values.get("intermediate_size"),
    }
    return ModelSettings(**(settings | more))


def _rotary(values: Values, is_latent: bool) -> Values:
    """The parameters of rotary positions.

    Raises:
        ConfigError: they are scaled in another way than MLA's YaRN.
    """
    found = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    kind = found.get("rope_type", found.get("type", "default"))
    if kind != "default" and not (is_latent and kind == "yarn"):
        raise ConfigError(f"rope_type is {kind!r}: our models represent default, and yarn with multi-latent attention")
    if kind == "yarn" and (found.get("beta_fast", 32), found.get("beta_slow", 1)) != (32, 1):
        raise ConfigError("beta_fast and beta_slow of yarn are other than 32 and 1: our models cannot represent them")
    return found


_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")  # releases of transformers rename it


def _moe(values: Values, width: str = "moe_intermediate_size", **more: Any) -> MoESettings:
    settings: Values = {
        "num_experts": next(values[name] for name in _COUNTS if name in values),
        "topk": values["num_experts_per_tok"],
        "ffn_hidden_size": values[width],
        "num_shared_experts": 0,
        "renormalise": bool(values.get("norm_topk_prob")),
        "aux_loss_coeff": values.get("router_aux_loss_coef", 0.001),
        "load_balancing": "aux_loss",
    }
    return MoESettings(**(settings | more))


def _with(model: ModelSettings, moe: MoESettings, chain: ChainSettings = ONE) -> RunConfig:
    return replace(RunConfig(), model=model, moe=moe, chain=chain)


def _mixtral(values: Values) -> RunConfig:
    moe = _moe(values, "intermediate_size", renormalise=True)
    return _with(_model(values, ffn_hidden_size=None), moe)


def _qwen3(values: Values) -> RunConfig:
    return _with(_model(values, qk_layernorm=True), _moe(values, layer_freq=_sparse(values)))


def _sparse(values: Values) -> int | list[int]:
    """Qwen: which layers have experts."""
    layers, step, dense = (
        values["num_hidden_layers"],
        values.get("decoder_sparse_step", 1),
        values.get("mlp_only_layers"),
    )
    return _frequency([int(layer not in (dense or ()) and (layer + 1) % step == 0) for layer in range(layers)])


def _frequency(layers: list[int]) -> int | list[int]:
    if 1 not in layers:
        raise ConfigError("no layer has experts: our models are mixtures of experts")
    return layers if 0 in layers else 1


def _deepseek(values: Values) -> RunConfig:
    rotary = _rotary(values, is_latent=True)
    yarn: Values = {}
    if rotary.get("rope_type", rotary.get("type")) == "yarn":
        names = ("original_max_position_embeddings", "mscale", "mscale_all_dim")
        if missing := [name for name in ("factor", *names) if not rotary.get(name)]:
            raise ConfigError(f"yarn has no {missing[0]}: our models cannot represent that")
        yarn = {"rotary_scaling_factor": float(rotary["factor"]), **{name: rotary[name] for name in names}}
    dense, layers = values.get("first_k_dense_replace") or 0, values["num_hidden_layers"]
    moe = _moe(
        values,
        num_shared_experts=values["n_shared_experts"] or 0,
        scaling=float(values.get("routed_scaling_factor", 1.0)),
        layer_freq=_frequency([int(layer >= dense) for layer in range(layers)]),
        **(_v3_routing(values) if values["model_type"] == "deepseek_v3" else _v2_routing(values)),
    )
    return _with(_model(values, mla=_mla(values, yarn)), moe)


def _mla(values: Values, yarn: Values) -> MLASettings:
    """The widths of multi-latent attention, which our exports name as DeepSeek does."""
    return MLASettings(
        kv_lora_rank=values["kv_lora_rank"],
        q_lora_rank=values["q_lora_rank"],
        qk_head_dim=values["qk_nope_head_dim"],
        qk_pos_emb_head_dim=values["qk_rope_head_dim"],
        v_head_dim=values["v_head_dim"],
        **yarn,
    )


def _v2_routing(values: Values) -> Values:
    grouped = values.get("topk_method") == "group_limited_greedy"
    if values.get("norm_topk_prob"):
        raise ConfigError("norm_topk_prob is true: deepseek_v2's own code does not divide gates by their sum")
    return {"renormalise": False, **(_groups(values, 1) if grouped else {})}


def _v3_routing(values: Values) -> Values:
    topk = values["num_experts_per_tok"]
    if bool(values.get("norm_topk_prob")) != (topk > 1):
        raise ConfigError(f"norm_topk_prob is {values.get('norm_topk_prob')}: ours divides sigmoid gates if K > 1")
    groups = _groups(values, 2) if values.get("topk_group") != values.get("n_group") else {}
    return {"score_function": "sigmoid", "renormalise": False, "expert_bias": True, "load_balancing": "none", **groups}


def _groups(values: Values, best: int) -> Values:
    """Group-limited routing, where a group's score is the sum of its `best` experts."""
    topk, groups, group_topk = values["num_experts_per_tok"], values["n_group"], values["topk_group"]
    if topk // group_topk != best:
        raise ConfigError(
            f"topk_group is {group_topk}: our score of a group is the sum of its best K / topk_group = "
            f"{topk // group_topk} experts, that of {values['model_type']} of its best {best}"
        )
    return {"num_groups": groups, "group_topk": group_topk}


def _coe(values: Values) -> RunConfig:
    """An export of our own."""
    yarn = dict(values.get("yarn") or {})
    if yarn:
        yarn["rotary_scaling_factor"] = yarn.pop("factor")
    latent = {"mla": _mla(values, yarn)} if values["kv_lora_rank"] else {}
    model = _model(
        values,
        **latent,
        qk_layernorm=values["qk_layernorm"],
        qk_norm_over_heads=values["qk_norm_over_heads"],
        qkv_bias=values["qkv_bias"],
        activation="swiglu" if values["hidden_act"] == "silu" else "gelu",
        normalization="RMSNorm" if values["norm"] == "rms_norm" else "LayerNorm",
    )
    chained = [number for number, is_chain in enumerate(values["chain_layers"], 1) if is_chain]
    chain = ChainSettings(
        iterations=values["chain_iterations"],
        gating=values["chain_gating"],
        residual=values["chain_residual"],
        norm_placement=values["chain_norm_placement"],
        learned_scale=1.0 if values["chain_learned_scale"] else None,
        conditioned=values["chain_conditioned"],
        no_return=values["chain_no_return"],
        modulation_rank=values.get("chain_modulation_rank"),
        streams=values.get("chain_streams"),
        latent=values.get("chain_latent"),
        layers=None if len(chained) == model.num_layers else tuple(chained),
    )
    moe = _moe(
        values,
        num_shared_experts=values.get("num_shared_experts", 0),
        shared_expert_gate=values["shared_expert_gate"],
        layer_freq=_frequency(values["moe_layers"]),
        score_function=values["scoring_func"],
        scaling=values["routed_scaling_factor"],
        num_groups=values["n_group"],
        group_topk=values["topk_group"],
        expert_bias=values["use_expert_bias"],
        load_balancing="none" if values["use_expert_bias"] else "seq_aux_loss",
    )
    return _with(model, moe, chain)


def _olmoe(values: Values) -> RunConfig:
    model = _model(values, qk_layernorm=True, qk_norm_over_heads=True, ffn_hidden_size=None)
    return _with(model, _moe(values, "intermediate_size"))


def _qwen2(values: Values) -> RunConfig:
    shared, width = values["shared_expert_intermediate_size"], values["moe_intermediate_size"]
    if shared % width:
        raise ConfigError(
            f"shared_expert_intermediate_size is {shared}: ours is a multiple of an expert's width, {width}"
        )
    moe = _moe(values, layer_freq=_sparse(values), num_shared_experts=shared // width, shared_expert_gate=True)
    return _with(_model(values, qkv_bias=bool(values.get("qkv_bias", True))), moe)


_KINDS: dict[str, Callable[[Values], RunConfig]] = {
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "qwen2_moe": _qwen2,
    "qwen3_moe": _qwen3,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
    "coe": _coe,
}
