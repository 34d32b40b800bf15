"""What the parts refuse: the message names the field, its value and what would be valid."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.enums import AttnMaskType
from model_build import make_coe, make_config, mlp_class

from coe_megatron.chain.settings import ChainSettings
from coe_megatron.local_backend.attention import SDPACoreAttention
from coe_megatron.local_backend.experts import GroupedExperts
from coe_megatron.local_backend.megatron_compat import moe_submodules
from coe_megatron.local_backend.norm import Norm
from coe_megatron.model import coe_block_spec, coe_layer_spec
from coe_megatron.model.layer import CoELayer


def changed(**values: Any) -> Any:
    """A config changed after its own validation, which would refuse (or wants hardware for) some of these."""
    config = make_config()
    for name, value in values.items():
        setattr(config, name, value)
    return config


def build_core(config: Any) -> SDPACoreAttention:
    return SDPACoreAttention(config, 1, AttnMaskType.causal, "self")


def build_experts(config: Any) -> GroupedExperts:
    one = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    return GroupedExperts(8, config, pg_collection=SimpleNamespace(ep=one, expt_tp=one, expt_dp=one))


def build_norm(config: Any) -> torch.nn.Module:
    return Norm(config=config, hidden_size=16)


def build_layer(config: Any) -> CoELayer:
    return make_coe(config, iterations=2)


def build_own_layer(config: Any) -> CoELayer:
    """A layer in a spec of the user's own, which refuses nothing before."""
    stock = get_gpt_layer_local_spec(num_experts=4, normalization="RMSNorm").submodules.mlp
    return CoELayer(config, moe_submodules(stock), chain=ChainSettings(2))


SPECS = (coe_layer_spec, coe_block_spec)
NARROW = {
    "fp8": "hybrid",
    "fp4": "e2m1",
    "fp8_param": True,
    "fp4_param": True,
    "fp8_dot_product_attention": True,
    "fp8_multi_head_attention": True,
    "activation_func_fp8_input_store": True,
    "moe_router_padding_for_quantization": True,
    "quant_recipe": "recipe",
}
OTHER_SPECS = {"experimental_attention_variant": "dsa", "qk_l2_norm": True, "use_kitchen": True}
REFUSED = [
    (build_core, {"window_size": (4, 0)}, "default"),
    (build_core, {"apply_query_key_layer_scaling": True}, "default"),
    (build_core, {"softmax_type": "off-by-one"}, "default"),
    (build_core, {"qk_clip": True}, "default"),
    (build_core, {"log_max_attention_logit": True}, "default"),
    (build_experts, {"add_bias_linear": True}, "default"),
    (build_experts, {"moe_apply_probs_on_input": True}, "default"),
    (build_experts, {"moe_latent_size": 8}, "default"),
    (build_experts, {"activation_func_clamp_value": 7.0}, "default"),
    (build_experts, {"glu_linear_offset": 1.0}, "default"),
    (build_experts, {"fine_grained_activation_offloading": True}, "default"),
    (build_experts, {"init_model_with_meta_device": True}, "default"),
    (build_experts, {"use_te_activation_func": True}, "default"),
    (build_experts, {"hidden_size": 18}, "multiple of 4"),
    (build_experts, {"moe_ffn_hidden_size": 22}, "multiple of 4"),
    (build_experts, {"moe_ffn_hidden_size": 12, "params_dtype": torch.bfloat16}, "multiple of 8"),
    (build_norm, {"normalization": "L2Norm"}, "RMSNorm, LayerNorm"),
    (build_norm, {"layernorm_zero_centered_gamma": True}, "Transformer Engine"),
    (build_layer, {"cuda_graph_impl": "local"}, "none"),
    (build_layer, {"moe_shared_expert_overlap": True}, "False"),
    (build_own_layer, {"fp8": "e4m3"}, "no FP8 or FP4"),
    (build_own_layer, {"moe_token_drop_policy": "first"}, "probs, position"),
    (build_own_layer, {"overlap_moe_expert_parallel_comm": True}, "must be False"),
    (coe_layer_spec, {"num_moe_experts": None}, "at least one"),
    (coe_layer_spec, {"moe_layer_freq": 2}, "take coe_block_spec"),
    (coe_layer_spec, {"moe_layer_freq": [1, 0]}, "take coe_block_spec"),
    *((spec, {name: value}, "no FP8 or FP4") for spec in SPECS for name, value in NARROW.items()),
    *((spec, {name: value}, "the specs of a chain") for spec in SPECS for name, value in OTHER_SPECS.items()),
    (coe_block_spec, {"delay_wgrad_compute": True}, "must be False"),
    (coe_block_spec, {"cuda_graph_impl": "transformer_engine"}, "none"),
    (
        coe_layer_spec,
        {"tensor_model_parallel_size": 2, "multi_latent_attention": True},
        "set sequence_parallel to True",
    ),
]


@pytest.mark.parametrize("build, changes, valid", REFUSED, ids=lambda value: getattr(value, "__name__", str(value)))
def test_refusal_names_field_value_and_what_is_valid(build: Any, changes: dict, valid: str) -> None:
    name, value = next(iter(changes.items()))
    with pytest.raises(ValueError) as refusal:
        build(changed(**changes))
    assert f"{name} is {value!r}" in str(refusal.value)
    assert valid in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_list_without_dense_layers_is_no_reason_to_refuse() -> None:
    assert mlp_class(coe_layer_spec(changed(moe_layer_freq=[1, 1])).submodules.mlp) is CoELayer


@pytest.mark.parametrize(
    "field, value, valid",
    [
        ("iterations", 0, "at least 1"),
        ("iterations", 2.0, "an integer"),
        ("iterations", True, "an integer"),
        ("gating", "shared", "independent, shared_router, fixed"),
        ("residual", "none", "inner, outer, init"),
        ("norm_placement", "postnorm", "prenorm, reference, iteration_norm"),
        ("aux_loss_reduction", "max", "sum, mean"),
        ("learned_scale", math.inf, "finite"),
        ("learned_scale", True, "finite"),
        ("learned_scale", "1", "finite"),
        ("conditioned", "yes", "true or false"),
        ("no_return", None, "true or false"),
        ("layers", [1], "a list of integers"),
        ("layers", (1, 2.0), "a list of integers"),
        ("layers", 3, "a list of integers"),
    ],
)
def test_chain_settings_refuse(field: str, value: Any, valid: str) -> None:
    with pytest.raises(ValueError) as refusal:
        ChainSettings(**{field: value})
    assert f"chain.{field} is {value!r}" in str(refusal.value)
    assert valid in str(refusal.value)


def test_tensor_parallelism_without_sequence_parallelism_is_refused_in_training() -> None:
    layer = make_coe(make_config())
    layer.attn_tp_group = SimpleNamespace(size=lambda: 2)
    with pytest.raises(ValueError, match="sequence_parallel is False"):
        layer(torch.zeros(2, 1, 16))
