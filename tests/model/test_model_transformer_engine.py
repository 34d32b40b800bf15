"""Chains of Transformer Engine's parts: what the specs hold, and names in checkpoints where it is installed.

Where it is not installed, Megatron's spec functions get empty classes for its modules: enough to compare specs, not to
build layers.
"""

from functools import partial
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.extensions import transformer_engine_spec_provider
from megatron.core.extensions.transformer_engine import TENorm
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from model_build import make_coe, make_config, make_gpt, make_mla_config, mlp_class

from coe_megatron.chain.settings import ChainSettings
from coe_megatron.config.settings import ModelSettings, ParallelSettings, RunConfig
from coe_megatron.errors import ConfigError
from coe_megatron.local_backend.latent_attention import LatentAttention
from coe_megatron.local_backend.megatron_compat import has_transformer_engine, moe_submodules
from coe_megatron.model import CoELayer, build, coe_block_spec, coe_layer_spec, unsupported
from coe_megatron.model.specs import with_local_names
from coe_megatron.zero.expert_groups import is_expert

LAYERS = {"num_layers": 2, "moe_layer_freq": [0, 1], "moe_grouped_gemm": True}
CONFIGS = {"MHA": make_config, "MLA": make_mla_config, "MLA, q_lora_rank": partial(make_mla_config, q_lora_rank=8)}
MODULES = ("Linear", "ColumnParallelLinear", "RowParallelLinear", "LayerNormColumnParallelLinear")
MODULES += ("ColumnParallelGroupedLinear", "RowParallelGroupedLinear", "DotProductAttention", "ActivationOp")
installed = pytest.mark.skipif(not has_transformer_engine(), reason="Transformer Engine is not installed")


@pytest.fixture
def engine(single_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron's specs for Transformer Engine, also where it is not installed."""
    if has_transformer_engine():
        return
    provider = transformer_engine_spec_provider
    for module in MODULES:
        monkeypatch.setattr(provider, f"TE{module}", type(module, (), {}))
    monkeypatch.setattr(gpt_layer_specs, "TESpecProvider", provider.TESpecProvider, raising=False)
    monkeypatch.setattr(gpt_layer_specs, "TENorm", TENorm, raising=False)
    monkeypatch.setattr(provider, "is_te_min_version", lambda _version: True)
    monkeypatch.setattr(unsupported, "has_transformer_engine", lambda: True)


def parts_of(layer: ModuleSpec) -> Any:
    return layer.submodules


def class_of(spec: Any) -> type:
    return spec.module if isinstance(spec, ModuleSpec) else spec.func


def block_of(config: Any, norm_placement: str = "prenorm") -> Any:
    return coe_block_spec(config, ChainSettings(2, norm_placement=norm_placement), use_transformer_engine=True)


@pytest.mark.parametrize("make", CONFIGS.values(), ids=CONFIGS)
def test_all_but_the_moe_layer_is_megatrons(engine: None, make: Any) -> None:
    config = make(**LAYERS)
    theirs = gpt_layer_specs.get_gpt_decoder_block_spec(config, use_transformer_engine=True)
    ours = block_of(config)
    assert ours.layer_norm is theirs.layer_norm is TENorm
    dense, chain = (parts_of(layer) for layer in ours.layer_specs)
    assert mlp_class(dense.mlp) is MLP and mlp_class(chain.mlp) is CoELayer
    for layer, stock in zip(ours.layer_specs, theirs.layer_specs, strict=True):
        attention, other = parts_of(layer).self_attention, parts_of(stock).self_attention
        assert attention.module is other.module
        assert vars(attention.submodules) == vars(other.submodules)
        assert parts_of(layer).pre_mlp_layernorm is parts_of(stock).pre_mlp_layernorm
    keywords = chain.mlp.params if isinstance(chain.mlp, ModuleSpec) else chain.mlp.keywords
    assert keywords["norm"] is TENorm


@pytest.mark.parametrize(("grouped", "experts"), [(True, TEGroupedMLP), (False, SequentialMLP)])
def test_experts_and_shared_experts_are_megatrons(engine: None, grouped: bool, experts: type) -> None:
    config = make_config(moe_grouped_gemm=grouped)
    spec = coe_layer_spec(config, ChainSettings(2), use_transformer_engine=True)
    stock = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(num_experts=8, moe_grouped_gemm=grouped)
    mlp, theirs = parts_of(spec).mlp, moe_submodules(parts_of(stock).mlp)
    ours = mlp.submodules if isinstance(mlp, ModuleSpec) else mlp.keywords["submodules"]
    assert class_of(ours.experts) is class_of(theirs.experts) is experts
    assert class_of(ours.shared_experts) is class_of(theirs.shared_experts)


def test_norms_of_iterations_take_the_place_of_the_one_before_the_layer(engine: None) -> None:
    for layer in block_of(make_config(**LAYERS), "iteration_norm").layer_specs[1:]:
        assert parts_of(layer).pre_mlp_layernorm is IdentityOp
        assert parts_of(layer).sharded_state_dict_keys_map["mlp.norms.0."] == "pre_mlp_layernorm."


def stored_name(layer: ModuleSpec, name: str) -> str:
    """A tensor's key as Megatron's layer stores it: by the first prefix of its map that matches."""
    for prefix, stored in parts_of(layer).sharded_state_dict_keys_map.items():
        if name.startswith(prefix):
            return stored + name.removeprefix(prefix)
    return name


def test_names_of_norms_become_those_of_the_local_block(engine: None) -> None:
    dense, chain = with_local_names(block_of(make_config(**LAYERS), "iteration_norm")).layer_specs
    assert stored_name(dense, "mlp.linear_fc1.layer_norm_weight") == "mlp.linear_fc1.layer_norm_weight"
    assert stored_name(chain, "pre_mlp_layernorm.weight") == "mlp.linear_fc1.layer_norm_weight"
    assert stored_name(chain, "mlp.norms.0.weight") == "mlp.linear_fc1.layer_norm_weight"
    assert stored_name(chain, "mlp.norms.1.weight") == "mlp.norms.1.weight"
    dense, chain = with_local_names(block_of(make_mla_config(**LAYERS), "iteration_norm")).layer_specs
    assert stored_name(dense, "mlp.linear_fc1.layer_norm_weight") == "pre_mlp_layernorm.weight"
    assert stored_name(chain, "mlp.norms.0.weight") == "pre_mlp_layernorm.weight"
    for latent in ("q", "kv"):
        fused = f"self_attention.linear_{latent}_up_proj.layer_norm_weight"
        assert stored_name(chain, fused) == f"self_attention.{latent}_layernorm.weight"


def test_the_query_of_mla_has_no_second_norm(engine: None) -> None:
    block = block_of(make_mla_config(**LAYERS))
    assert {parts_of(layer).self_attention.module for layer in block.layer_specs} == {MLASelfAttention}
    with_local_names(block)
    assert {parts_of(layer).self_attention.module for layer in block.layer_specs} == {LatentAttention}


def test_a_backend_without_its_device_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig(model=ModelSettings(backend="transformer_engine"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    build.require_backend(config)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    build.require_backend(RunConfig())
    with pytest.raises(ConfigError, match=r"model\.backend is transformer_engine: .* use local"):
        build.require_backend(config)


@pytest.mark.parametrize(("parallel", "separate"), [({}, False), ({"expert": 2}, True), ({"tensor": 2}, True)])
def test_experts_of_other_replicas_are_marked(single_rank: None, parallel: dict[str, int], separate: bool) -> None:
    layer = make_coe(make_config())
    build._mark_experts(layer, RunConfig(parallel=ParallelSettings(**parallel)))
    assert {is_expert(parameter) for parameter in layer.experts.parameters()} == {separate}


def stored(model: torch.nn.Module) -> dict[str, tuple[tuple[int, ...], int, torch.dtype]]:
    """Keys of a model's tensors in a checkpoint: global shape, number of shards, dtype."""
    found: dict[str, list[ShardedTensor]] = {}
    for shard in model.sharded_state_dict().values():
        parts = nested_values(shard.build()) if isinstance(shard, ShardedTensorFactory) else [shard]
        for part in parts:
            if isinstance(part, ShardedTensor):
                found.setdefault(part.key, []).append(part)
    return {key: (parts[0].global_shape, len(parts), parts[0].dtype) for key, parts in found.items()}


@installed
@pytest.mark.parametrize("norm_placement", ["prenorm", "reference", "iteration_norm"])
@pytest.mark.parametrize("make", CONFIGS.values(), ids=CONFIGS)
def test_checkpoints_of_both_backends_have_the_same_keys(
    single_rank: None, make: Any, norm_placement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its modules refuse to be built without CUDA, but can be: only their forward passes need it."""
    shared = {"moe_shared_expert_intermediate_size": 20}
    config, chain = make(**LAYERS, **shared), ChainSettings(2, norm_placement=norm_placement)
    config.use_cpu_initialization = not torch.cuda.is_available()
    local = make_gpt(config, coe_block_spec(config, chain))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model = make_gpt(config, with_local_names(block_of(config, norm_placement)))
    assert isinstance(model.decoder.layers[1].mlp.experts, TEGroupedMLP)
    assert stored(model) == stored(local)
    count = sum(parameter.numel() for parameter in local.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@installed
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device, on which its products work")
def test_routers_of_local_specs_leave_it_alone_without_cuda(single_rank: None) -> None:
    layer = make_coe(make_config())
    assert layer(torch.randn(4, 2, 16))[0].isfinite().all()
