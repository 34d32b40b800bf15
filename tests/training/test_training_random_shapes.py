"""Thirty random configs: parameters and FLOPs by the closed forms against built models, ours and the oracle."""

import random
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from flops_counted import counting
from model_build import reset_megatron
from torch.utils.flop_counter import FlopCounterMode

from coe_megatron.chain.language_model import ChainLanguageModel
from coe_megatron.chain.language_model import ModelSettings as OracleSettings
from coe_megatron.chain.routing import RouterSettings
from coe_megatron.chain.settings import ChainSettings, Gating, NormPlacement, Recompute, Residual
from coe_megatron.config import RunConfig
from coe_megatron.config.checks import check
from coe_megatron.config.layout import moe_pattern
from coe_megatron.config.settings import MLASettings, ModelSettings, MoESettings
from coe_megatron.estimate.activations import extra_flops
from coe_megatron.estimate.closed_forms import ModelShape, forward_flops, parameters, training_flops
from coe_megatron.estimate.run_shape import RunShape
from coe_megatron.model.build import build_model

pytestmark = pytest.mark.usefixtures("single_rank")
BATCH = 2
SEEDS = range(30)


def draw(seed: int) -> tuple[RunConfig, int]:
    """A config and its vocabulary; every third one the oracle can be built for as well (see `has_oracle`)."""
    pick = random.Random(seed)
    plain = seed % 3 == 0
    heads, layers = pick.choice([2, 4]), pick.randint(1, 3)
    model = ModelSettings(
        num_layers=layers,
        hidden_size=heads * pick.choice([8, 12]),
        num_attention_heads=heads,
        seq_length=pick.choice([8, 20]),
        ffn_hidden_size=pick.choice([12, 40]),
        activation=pick.choice(["swiglu", "gelu"]),
    )
    if not plain:
        model = replace(
            model,
            **_attention(pick, heads),
            normalization=pick.choice(["RMSNorm", "LayerNorm"]),
            untied_embeddings=pick.random() < 0.5,
        )
    experts = pick.choice([4, 6, 8])
    layer_freq = [0] * (layers - 1) + [1]
    pick.shuffle(layer_freq)
    moe = MoESettings(
        num_experts=experts,
        topk=pick.randint(1, experts),
        ffn_hidden_size=4 * pick.randint(2, 6),
        num_shared_experts=pick.randint(0, 2),
        layer_freq=1 if plain or pick.random() < 0.5 else layer_freq,
    )
    chain = ChainSettings(
        pick.randint(1, 4), *(pick.choice(get_args(kind)) for kind in (Gating, Residual, NormPlacement))
    )
    conditioned = pick.random() < 0.6 and chain.norm_placement != "iteration_norm"
    no_return = pick.random() < 0.8 and chain.gating != "fixed" and chain.iterations * moe.topk <= experts
    learned_scale = pick.choice([None, None, 0.0, 1.0])
    chain = replace(chain, learned_scale=learned_scale, conditioned=conditioned, no_return=no_return)
    if not conditioned and pick.random() < 0.3:
        chain = replace(chain, modulation_rank=pick.randint(1, 6))
    if chain.iterations > 1 and chain.residual == "inner" and pick.random() < 0.5:
        chain = replace(chain, streams=pick.randint(2, 4))
    with_experts = [number for number, has in enumerate(moe_pattern(RunConfig(model=model, moe=moe)), 1) if has]
    if not plain and chain.iterations * moe.topk <= experts:
        chain = replace(chain, layers=tuple(pick.sample(with_experts, pick.randint(1, max(1, len(with_experts) - 1)))))
    elif chain.norm_placement != "iteration_norm" and pick.random() < 0.4:
        chain = replace(chain, latent=4 * pick.randint(1, model.hidden_size // 4 - 1))
    config = RunConfig(model=model, moe=moe, chain=chain)
    check(config)
    return config, pick.choice([40, 96])


def _attention(pick: random.Random, heads: int) -> dict[str, Any]:
    kind = pick.choice(["mha", "gqa", "mla"])
    if kind == "mla":
        sizes = {name: 2 * pick.randint(2, 6) for name in ("qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")}
        return {"mla": MLASettings(kv_lora_rank=10, q_lora_rank=pick.choice([None, 14]), **sizes)}
    groups = {"num_query_groups": heads // 2} if kind == "gqa" else {}
    norms, over_heads = pick.random() < 0.5, pick.random() < 0.4
    own = {"qk_layernorm": norms, "qk_norm_over_heads": norms and over_heads, "qkv_bias": pick.random() < 0.3}
    return {**own, "kv_channels": pick.choice([None, 6]), **groups}


def has_oracle(config: RunConfig) -> bool:
    model = config.model
    own_attention = model.mla or model.num_query_groups or model.kv_channels or model.qk_layernorm or model.qkv_bias
    rms = model.normalization == "RMSNorm"
    return not own_attention and rms and model.untied_embeddings and config.moe.layer_freq == 1


def oracle(shape: ModelShape) -> ChainLanguageModel:
    return ChainLanguageModel(
        OracleSettings(
            shape.vocab,
            shape.hidden,
            shape.layers,
            shape.heads,
            shape.expert_ffn,
            RouterSettings(shape.experts, shape.topk),
            shape.chain,
            shape.shared_ffn,
            "swiglu" if shape.swiglu else "gelu",
        )
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_parameters_are_exact(seed: int) -> None:
    config, vocabulary = draw(seed)
    shape = RunShape.of(config, vocabulary).model
    counted = parameters(shape)
    reset_megatron()
    models: list[torch.nn.Module] = [build_model(config, vocabulary)]
    if has_oracle(config):
        models.append(oracle(shape))
    for model in models:
        assert counted.total == sum(p.numel() for p in model.parameters()), config
    named = dict(models[0].named_parameters())

    def size(*parts: str) -> int:
        return sum(p.numel() for name, p in named.items() if any(part in name for part in parts))

    assert counted.experts == size(".mlp.experts."), config
    assert counted.shared == size(".shared_experts."), config
    assert counted.routers == size(".mlp.router.", ".later_routers."), config
    assert counted.norms == size("norm"), config
    assert counted.gains == size("_gains.", ".stream_weights."), config
    assert counted.variants == size(".modulation_", ".latent_"), config


@pytest.mark.thorough
@pytest.mark.parametrize("seed", SEEDS)
def test_flops_are_those_of_the_forward_pass(seed: int) -> None:
    config, vocabulary = draw(seed)
    shape = RunShape.of(config, vocabulary).model
    reset_megatron()
    model = build_model(config, vocabulary)
    tokens = torch.randint(vocabulary, (BATCH, shape.seq_length))
    positions = torch.arange(shape.seq_length).expand_as(tokens)
    with counting(shape) as counter:
        model(tokens, positions, None)
    expected = forward_flops(shape).total * tokens.numel()
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01), config


@pytest.mark.parametrize("seed", [seed for seed in SEEDS if has_oracle(draw(seed)[0])])
def test_flops_are_those_of_the_oracle(seed: int) -> None:
    config, vocabulary = draw(seed)
    shape = RunShape.of(config, vocabulary).model
    tokens = torch.randint(vocabulary, (BATCH, shape.seq_length))
    with FlopCounterMode(display=False) as forward:
        output = oracle(shape)(tokens)
    with FlopCounterMode(display=False) as backward:
        (output.logits.sum() + output.balance_loss).backward()
    assert forward.get_total_flops() == pytest.approx(forward_flops(shape).total * tokens.numel(), rel=0.01), config
    both = forward.get_total_flops() + backward.get_total_flops()
    assert both == pytest.approx(training_flops(shape).total * tokens.numel(), rel=0.01), config


@pytest.mark.thorough
@pytest.mark.parametrize("seed", SEEDS[:6])
def test_recomputing_costs_the_chains_forward_pass_again(seed: int) -> None:
    config, vocabulary = draw(seed)
    shape = RunShape.of(config, vocabulary).model
    tokens = torch.randint(vocabulary, (BATCH, shape.seq_length))
    positions = torch.arange(shape.seq_length).expand_as(tokens)
    found = {}
    for mode in get_args(Recompute):
        reset_megatron()
        model = build_model(replace(config, moe=replace(config.moe, recompute=mode)), vocabulary)
        with counting(shape) as counter:
            model(tokens, positions, None).sum().backward()
        found[mode] = counter.get_total_flops()
    # Where torch stops a second pass depends on what ran in this process before: the projection out of a latent space,
    # the last product of a layer, may run again, although nothing needs it.
    last = sum(count * 2 * sum(kind.latent_matrices[1:]) for count, kind in shape.moe_kinds)
    for mode, flops in found.items():
        expected, added = extra_flops(shape, mode), (flops - found["none"]) / tokens.numel()
        allowed = [expected, expected + last] if mode == "layer" else [expected]
        assert any(added == pytest.approx(each, rel=0.01) for each in allowed), (mode, config)


def test_the_draw_reaches_everything() -> None:
    configs = [draw(seed)[0] for seed in SEEDS]
    assert sum(map(has_oracle, configs)) >= 10
    models = [config.model for config in configs]
    assert {bool(model.mla) for model in models} == {bool(model.num_query_groups) for model in models} == {True, False}
    assert {model.untied_embeddings for model in models} == {model.qk_layernorm for model in models} == {True, False}
    assert {config.moe.num_shared_experts > 0 for config in configs} == {True, False}
    assert any(isinstance(config.moe.layer_freq, list) for config in configs)
    for field, kind in (("gating", Gating), ("residual", Residual), ("norm_placement", NormPlacement)):
        assert {getattr(config.chain, field) for config in configs} == set(get_args(kind))
    assert {config.chain.iterations for config in configs} == {1, 2, 3, 4}
    chosen = [(config.chain.layers, sum(moe_pattern(config))) for config in configs]
    assert any(layers is not None and len(layers) < count for layers, count in chosen)
    assert {config.chain.learned_scale for config in configs} == {None, 0.0, 1.0}
    for name in ("modulation_rank", "streams", "latent"):
        assert {getattr(config.chain, name) is None for config in configs} == {True, False}, name
    for flag in ("conditioned", "no_return"):
        assert {getattr(config.chain, flag) for config in configs} == {True, False}
