"""From a run's config to Megatron's model."""

import math
from dataclasses import replace

import pytest
import torch

from coe_megatron.chain.settings import ChainSettings
from coe_megatron.config import RunConfig
from coe_megatron.config.settings import MLASettings, ModelSettings, MoESettings
from coe_megatron.estimate import closed_forms
from coe_megatron.estimate.run_shape import RunShape
from coe_megatron.model.build import build_model

pytestmark = pytest.mark.usefixtures("single_rank")
MODEL = ModelSettings(num_layers=2, hidden_size=32, num_attention_heads=2, seq_length=16)
MOE = MoESettings(num_experts=8, topk=2, ffn_hidden_size=16)
MLA = MLASettings(kv_lora_rank=16, qk_head_dim=8, qk_pos_emb_head_dim=8, v_head_dim=8)


@pytest.mark.parametrize(
    ("model", "moe", "chain"),
    [
        (MODEL, MOE, ChainSettings()),
        (MODEL, MOE, ChainSettings(iterations=3, norm_placement="iteration_norm")),
        (MODEL, MOE, ChainSettings(gating="shared_router")),
        (replace(MODEL, num_query_groups=1, untied_embeddings=False), replace(MOE, layer_freq=[0, 1]), ChainSettings()),
        (replace(MODEL, mla=MLA), replace(MOE, num_shared_experts=0), ChainSettings(gating="fixed")),
        (replace(MODEL, mla=replace(MLA, q_lora_rank=8)), MOE, ChainSettings(iterations=1)),
        (replace(MODEL, activation="gelu", ffn_hidden_size=48), replace(MOE, layer_freq=2), ChainSettings()),
    ],
)
def test_closed_form_counts_the_parameters_of_the_built_model(
    model: ModelSettings, moe: MoESettings, chain: ChainSettings
) -> None:
    config = RunConfig(model=model, moe=moe, chain=chain)
    built = sum(parameter.numel() for parameter in build_model(config, 64).parameters())
    assert closed_forms.parameters(RunShape.of(config, 64).model).total == built


def test_initialisation_of_the_paper() -> None:
    """Normal 0.02 everywhere without depth scaling, routers uniform within 1/sqrt(d)."""
    model = replace(MODEL, scaled_init=False)
    config = RunConfig(model=model, moe=replace(MOE, router_init="kaiming_uniform"), chain=ChainSettings(iterations=2))
    layer = build_model(config, 64).decoder.layers[0].mlp
    for router in layer.routers:
        assert router.weight.abs().max() <= 1 / math.sqrt(32)
        assert router.weight.std().item() == pytest.approx(1 / math.sqrt(3 * 32), rel=0.1)
    assert layer.experts.weight2.std().item() == pytest.approx(0.02, rel=0.05)
    assert not torch.equal(layer.routers[0].weight, layer.routers[1].weight)


@pytest.mark.parametrize("forced", [False, True])
def test_forced_balance_takes_the_choice_from_the_router(forced: bool) -> None:
    """A router that sends all tokens to experts 1 and 2; forced, the largest load is near the mean of 64 tokens."""
    config = RunConfig(model=MODEL, moe=replace(MOE, force_load_balancing=forced))
    router = build_model(config, 64).decoder.layers[0].mlp.routers[0]
    with torch.no_grad():
        router.weight.zero_()[:2] = 1.0
        choices_TN = router(torch.rand(256, 1, MODEL.hidden_size)).chosen_TN
    load_N = choices_TN.sum(dim=0).tolist()
    assert sum(load_N) == 512 and (min(load_N) > 32 and max(load_N) < 96 if forced else load_N == [256] * 2 + [0] * 6)


def test_initialisation_of_megatron_scales_what_leads_into_the_stream() -> None:
    layer = build_model(RunConfig(model=MODEL, moe=MOE), 64).decoder.layers[0].mlp
    assert layer.experts.weight1.std().item() == pytest.approx(0.02, rel=0.05)
    assert layer.experts.weight2.std().item() == pytest.approx(0.02 / math.sqrt(2 * MODEL.num_layers), rel=0.05)
