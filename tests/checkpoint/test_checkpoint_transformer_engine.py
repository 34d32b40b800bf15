"""A checkpoint of one backend is read by the other: weights, masters and moments, expert by expert."""

from pathlib import Path

import pytest
import torch
from deepspeed import DeepSpeedEngine
from model_build import make_config, make_gpt, make_mla_config

from coe_megatron.chain.settings import ChainSettings
from coe_megatron.checkpoint import sharding
from coe_megatron.config.settings import OptimizerSettings, TrainingSettings, ZeroSettings
from coe_megatron.local_backend.megatron_compat import has_transformer_engine
from coe_megatron.model import coe_block_spec
from coe_megatron.model.specs import with_local_names
from coe_megatron.zero import optimizer_states
from coe_megatron.zero.engine import build_engine

pytestmark = pytest.mark.skipif(not has_transformer_engine(), reason="Transformer Engine is not installed")
LAYERS = {
    "num_layers": 2,
    "moe_layer_freq": [0, 1],
    "moe_grouped_gemm": True,
    "moe_shared_expert_intermediate_size": 20,
}


def make_engine(make, use_transformer_engine: bool, seed: int) -> DeepSpeedEngine:
    """Weights and moments that differ everywhere; Transformer Engine's modules can be built without CUDA, not run."""
    torch.manual_seed(seed)
    config, chain = make(**LAYERS), ChainSettings(2, norm_placement="iteration_norm")
    config.use_cpu_initialization = not torch.cuda.is_available()
    block = coe_block_spec(config, chain, use_transformer_engine=use_transformer_engine)
    with pytest.MonkeyPatch.context() as patch:
        if use_transformer_engine:
            patch.setattr(torch.cuda, "is_available", lambda: True)
        model = make_gpt(config, with_local_names(block) if use_transformer_engine else block)
    engine = build_engine(model, OptimizerSettings(), TrainingSettings(), ZeroSettings(stage=1), accumulation=1)
    for parameter in model.parameters():
        for kind in optimizer_states.KINDS:
            optimizer_states.write(engine, parameter, kind, torch.randn_like(parameter))
        optimizer_states.write_weight(engine, parameter, torch.randn_like(parameter))
    return engine


def contents(engine: DeepSpeedEngine) -> dict[str, list[torch.Tensor]]:
    """Everything that a checkpoint holds, by its key; parts in their order."""
    found: dict[str, list[torch.Tensor]] = {}
    for _, shard in sharding._all_shards(engine.module, lambda *of: optimizer_states.read(engine, *of)):
        for part in sharding._parts(shard):
            found.setdefault(part.key, []).append(part.data)
    return found


@pytest.mark.parametrize("make", [make_config, make_mla_config], ids=["MHA", "MLA"])
@pytest.mark.parametrize("saving", [True, False], ids=["from it", "to it"])
def test_checkpoint_of_the_other_backend(single_rank: None, make, saving: bool, tmp_path: Path) -> None:
    saved, loading = make_engine(make, saving, 1), make_engine(make, not saving, 2)
    sharding.write_tensors(sharding.copy_to_host(saved), tmp_path)
    sharding.load_tensors(loading, tmp_path)
    expected, found = contents(saved), contents(loading)
    assert expected.keys() == found.keys()
    for key, parts in expected.items():
        assert all(torch.equal(part, other) for part, other in zip(parts, found[key], strict=True)), key
