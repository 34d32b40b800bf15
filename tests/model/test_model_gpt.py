"""The spec functions in Megatron's own GPTModel: training, independence of layers, and the paper's parameter counts."""

from typing import Any

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_config import MLATransformerConfig
from model_build import LOSSES, MLA, copy_from_stock, make_config, make_gpt, make_stock, mlp_class

from coe_megatron.chain.settings import ChainSettings
from coe_megatron.local_backend.norm import Norm
from coe_megatron.model import CoELayer, coe_block_spec, coe_layer_spec
from coe_megatron.model.routing_stats import report_routing, reset_routing

VOCAB, LENGTH = 48, 12
ATTENTION: dict[str, dict[str, Any]] = {
    "MHA": {},
    "MHA, query and key norms": {"qk_layernorm": True},
    "GQA": {"num_attention_heads": 4, "num_query_groups": 2},
    "MLA, rope": {**MLA, "rope_type": "rope"},
    "MLA, yarn": {**MLA, "rope_type": "yarn", "rotary_scaling_factor": 4, "original_max_position_embeddings": 8},
    "MLA, compressed queries": {**MLA, "rope_type": "rope", "q_lora_rank": 8},
}
NORM_PLACEMENTS = ["prenorm", "reference", "iteration_norm"]


def config_of(attention: str, **changes: Any) -> Any:
    base = {"base": MLATransformerConfig} if attention.startswith("MLA") else {}
    return make_config(**base, **ATTENTION[attention], **changes)


def train(model: GPTModel, steps: int = 3) -> list[float]:
    """SGD on one batch of random tokens; the mean loss before each step and after the last."""
    tokens = torch.randint(VOCAB, (2, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(LENGTH).expand(2, -1)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    for step in range(steps + 1):
        loss = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).mean()
        losses.append(float(loss.detach()))
        if step < steps:
            optimizer.zero_grad()
            loss.backward()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
            optimizer.step()
    return losses


@pytest.mark.parametrize("norm_placement", NORM_PLACEMENTS)
@pytest.mark.parametrize("attention", ATTENTION)
def test_a_model_of_chains_trains(attention: str, norm_placement: str) -> None:
    config = config_of(attention, **LOSSES, num_layers=2, moe_shared_expert_intermediate_size=20)
    losses = train(make_gpt(config, coe_layer_spec(config, ChainSettings(2, norm_placement=norm_placement))))
    assert losses[-1] < losses[0] - 0.05, losses


@pytest.mark.parametrize("norm_placement", NORM_PLACEMENTS)
def test_dense_and_chain_layers_take_turns(norm_placement: str) -> None:
    config = make_config(**LOSSES, num_layers=3, moe_layer_freq=[0, 1, 1])
    model = make_gpt(config, coe_block_spec(config, ChainSettings(2, norm_placement=norm_placement)))
    layers = model.decoder.layers
    assert [type(layer.mlp) for layer in layers] == [MLP, CoELayer, CoELayer]
    losses = train(model)
    assert losses[-1] < losses[0] - 0.05, losses
    assert [[router.layer_number for router in layer.mlp.routers] for layer in layers[1:]] == [[2, 2], [3, 3]]


def test_a_model_predicts_only_from_the_past() -> None:
    config = make_config(num_layers=2)
    model = make_gpt(config, coe_layer_spec(config)).eval()
    tokens, positions = torch.randint(VOCAB, (1, LENGTH)), torch.arange(LENGTH)[None]
    changed = tokens.clone()
    changed[0, 8] = (changed[0, 8] + 1) % VOCAB
    with torch.no_grad():
        first, second = (model(each, positions, None) for each in (tokens, changed))
    torch.testing.assert_close(first[0, :8], second[0, :8], rtol=1e-5, atol=1e-6)
    assert float((first[0, 8:] - second[0, 8:]).abs().amin(1).max()) > 1e-4


@pytest.mark.parametrize("function", [coe_layer_spec, coe_block_spec])
def test_layers_share_nothing(function: Any) -> None:
    config = make_config(num_layers=2)
    layers = make_gpt(config, function(config, ChainSettings(2, norm_placement="iteration_norm"))).decoder.layers
    assert not set(map(id, layers[0].modules())) & set(map(id, layers[1].modules()))
    assert not set(map(id, layers[0].parameters())) & set(map(id, layers[1].parameters()))
    assert layers[0].mlp.token_dispatcher is not layers[1].mlp.token_dispatcher


def test_layers_of_a_block_spec_share_no_spec() -> None:
    """Megatron puts one spec object in for all layers of a kind: editing one would edit them all."""
    config = make_config(num_layers=4, moe_layer_freq=[0, 1, 0, 1])
    specs = coe_block_spec(config).layer_specs
    assert len({id(spec) for spec in specs}) == len({id(spec.submodules) for spec in specs}) == 4
    assert [mlp_class(spec.submodules.mlp) for spec in specs] == [MLP, CoELayer, MLP, CoELayer]
    assert len({id(spec.submodules.sharded_state_dict_keys_map) for spec in specs}) == 4


def test_two_models_with_other_chains_stand_side_by_side() -> None:
    """Making a spec changes no spec that was made before, nor Megatron's."""
    config = make_config(num_layers=1)
    first = coe_layer_spec(config, ChainSettings(2))
    coe_layer_spec(config, ChainSettings(3, norm_placement="reference"))
    layer = make_gpt(config, first).decoder.layers[0]
    assert layer.mlp.chain == ChainSettings(2) and isinstance(layer.pre_mlp_layernorm, torch.nn.RMSNorm)


def test_chains_in_some_layers_stand_among_moe_layers_with_as_many_choices() -> None:
    """Checkpoints of ours know the layers apart; what is no chain is Megatron's MoE layer to the last bit."""
    config = make_config(num_layers=3, moe_layer_freq=[1, 1, 0], hetereogenous_dist_checkpoint=True)
    chain = ChainSettings(2, norm_placement="iteration_norm", learned_scale=1.0, layers=(2,))
    layers = make_gpt(config, coe_block_spec(config, chain)).decoder.layers
    assert [type(layer.mlp) for layer in layers] == [CoELayer, CoELayer, MLP]
    assert [(layer.mlp.chain.iterations, layer.mlp.router.topk) for layer in layers[:2]] == [(1, 4), (2, 2)]
    stock = make_stock(make_config(moe_router_topk=4))
    copy_from_stock(layers[0].mlp, stock)
    hidden = torch.randn(LENGTH, 2, config.hidden_size)
    torch.testing.assert_close(layers[0].mlp(hidden)[0], stock(hidden)[0], rtol=1e-5, atol=1e-6)
    model = make_gpt(config, coe_block_spec(config, chain))
    reset_routing(model, detailed=True)
    losses = train(model)
    assert losses[-1] < losses[0] - 0.05, losses
    reports = report_routing(model)
    assert [(report.layer, report.iteration) for report in reports] == [(1, 1), (2, 1), (2, 2)]
    assert all(report.dropped == 0 for report in reports)


def test_chains_in_some_layers_need_to_be_told_of_their_place() -> None:
    chain = ChainSettings(2, layers=(2,))
    with pytest.raises(ValueError, match=r"chain.layers is \[2\]: for layers that differ take coe_block_spec"):
        coe_layer_spec(make_config(num_layers=2), chain)
    with pytest.raises(ValueError, match="hetereogenous_dist_checkpoint is False"):
        coe_block_spec(make_config(num_layers=2), chain)
    whole = make_config(num_layers=2, hetereogenous_dist_checkpoint=True)
    with pytest.raises(ValueError, match="so they need 10, and a layer has 8"):
        coe_block_spec(whole, ChainSettings(5, layers=(2,)))


def test_norms_are_ours_in_every_place() -> None:
    """Megatron's local norm refuses sequence parallelism, so none may be left."""
    config = make_config(num_layers=3, moe_layer_freq=[0, 1, 1], qk_layernorm=True)
    block = coe_block_spec(config)
    assert block.layer_norm is Norm
    for spec in block.layer_specs:
        parts = spec.submodules
        norms = [parts.input_layernorm, parts.pre_mlp_layernorm]
        norms += [parts.self_attention.submodules.q_layernorm, parts.self_attention.submodules.k_layernorm]
        assert norms == [Norm] * 4


PAPER = dict(
    num_layers=4,
    hidden_size=1024,
    num_attention_heads=8,
    ffn_hidden_size=704,
    moe_ffn_hidden_size=704,
    num_moe_experts=63,
    moe_router_topk=8,
    moe_shared_expert_intermediate_size=704,
    moe_router_dtype="fp32",
    q_lora_rank=None,
    kv_lora_rank=512,
    qk_head_dim=128,
    qk_pos_emb_head_dim=64,
    v_head_dim=128,
    qk_layernorm=True,
    perform_initialization=False,
)
PAPER_PARAMETERS = 570_955_776  # the paper section 2, without embeddings and final norm; 4 layers of 142,738,944
ROUTERS_OF_ITERATION_2 = 4 * 63 * 1024
NORMS_OF_ITERATION_2 = 4 * 1024


@pytest.mark.parametrize(
    "chain, more",
    [
        (ChainSettings(1), 0),
        (ChainSettings(2), ROUTERS_OF_ITERATION_2),
        (ChainSettings(2, gating="shared_router"), 0),
        (ChainSettings(2, gating="fixed"), 0),
        (ChainSettings(2, norm_placement="iteration_norm"), ROUTERS_OF_ITERATION_2 + NORMS_OF_ITERATION_2),
    ],
    ids=str,
)
def test_the_papers_model_has_the_papers_parameters(
    chain: ChainSettings, more: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("meta"))
    config = make_config(MLATransformerConfig, rope_type="rope", **PAPER)
    model = make_gpt(config, coe_layer_spec(config, chain), vocab=102_400, share_embeddings_and_output_weights=False)
    assert ROUTERS_OF_ITERATION_2 == 258_048
    assert sum(p.numel() for layer in model.decoder.layers for p in layer.parameters()) == PAPER_PARAMETERS + more
    assert sum(p.numel() for p in model.parameters()) == PAPER_PARAMETERS + more + 2 * 102_400 * 1024 + 1024
