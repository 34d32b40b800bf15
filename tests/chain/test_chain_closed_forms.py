"""Closed forms against the paper's numbers, the built oracle, and torch's own FLOP counter."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from coe_megatron.chain.language_model import ChainLanguageModel, ModelSettings
from coe_megatron.chain.method import ChainOfExperts
from coe_megatron.chain.routing import RouterSettings
from coe_megatron.chain.settings import ChainSettings
from coe_megatron.estimate.closed_forms import (
    ModelShape,
    expert_combinations,
    forward_flops,
    parameters,
    training_flops,
)

PAPER = ModelShape(
    layers=4,
    hidden=1024,
    vocab=102_400,
    heads=8,
    seq_length=512,
    experts=63,
    topk=8,
    expert_ffn=704,
    shared_ffn=704,
    attention="mla",
    kv_lora_rank=512,
    qk_nope=128,
    qk_rope=64,
    v_head_dim=128,
    chain=ChainSettings(iterations=1),
)
CHAINS = [
    ChainSettings(1),
    ChainSettings(2),
    ChainSettings(3, "shared_router", "init", "iteration_norm"),
    ChainSettings(3, "fixed", "outer", "reference"),
    ChainSettings(2, "independent", "inner", "iteration_norm"),
    ChainSettings(3, "fixed", learned_scale=1.0),
    ChainSettings(2, learned_scale=0.0, conditioned=True),
    ChainSettings(3, no_return=True),
    ChainSettings(2, norm_placement="iteration_norm", modulation_rank=3),
    ChainSettings(3, streams=4, modulation_rank=2, latent=12),
    ChainSettings(1, latent=8),
    ChainSettings(2, "fixed", "outer", learned_scale=1.0, latent=16),
]


def test_the_papers_parameters():
    count = parameters(PAPER)
    assert count.without_embeddings - count.final_norm == 570_955_776 == 4 * 142_738_944
    assert count.final_norm == 1_024
    assert count.total == 780_672_000
    assert count.total == count.without_embeddings + 2 * 102_400 * 1_024
    two = parameters(replace(PAPER, chain=ChainSettings(iterations=2)))
    assert two.total - count.total == two.routers - count.routers == 258_048


def test_the_papers_savings():
    def saved(smaller, larger):
        return 1 - parameters(smaller).total / parameters(larger).total

    chain = ChainSettings(iterations=2)
    assert saved(replace(PAPER, experts=47, topk=4, chain=chain), PAPER) == pytest.approx(0.177, abs=5e-4)
    assert saved(PAPER, replace(PAPER, layers=8)) == pytest.approx(0.422, abs=5e-4)
    assert saved(PAPER, replace(PAPER, layers=12)) == pytest.approx(0.594, abs=5e-4)


def test_equal_expert_compute_but_more_shared_compute():
    one = forward_flops(PAPER)
    two = forward_flops(replace(PAPER, topk=4, chain=ChainSettings(iterations=2)))
    assert two.experts == one.experts
    assert two.shared == 2 * one.shared and two.routers == 2 * one.routers
    assert forward_flops(replace(PAPER, chain=ChainSettings(2, "fixed"))).routers == one.routers
    assert training_flops(PAPER).total == 3 * one.total


def test_chains_in_some_layers():
    some = replace(PAPER, topk=4, chain=ChainSettings(2), chains=(0, 1, 0, 0))
    all_of_them, none = replace(some, chains=None), PAPER
    for kind in ("routers", "gains", "idle_experts"):
        counted = [getattr(parameters(shape), kind) for shape in (some, all_of_them, none)]
        assert 4 * counted[0] == counted[1] + 3 * counted[2], kind
    for kind in ("routers", "experts", "shared"):
        counted = [getattr(forward_flops(shape), kind) for shape in (some, all_of_them, none)]
        assert 4 * counted[0] == counted[1] + 3 * counted[2], kind


def test_combinations():
    ratio = expert_combinations(64, 4, 2) / expert_combinations(64, 8)
    assert ratio == pytest.approx(91.2, abs=0.05)
    assert expert_combinations(3, 2) == 3


def test_active_parameters_grow_with_routings_up_to_all():
    expert = 4 * 3 * 1024 * 704
    assert parameters(PAPER).idle_experts == (63 - 8) * expert
    two = replace(PAPER, chain=ChainSettings(2))
    assert parameters(two).idle_experts == (63 - 16) * expert
    assert parameters(replace(PAPER, chain=ChainSettings(2, "fixed"))).idle_experts == (63 - 8) * expert
    dense = parameters(replace(PAPER, experts=8, chain=ChainSettings(2)))
    assert dense.active == dense.total
    count = parameters(two)
    assert count.active - count.active_without_embeddings == count.embedding + count.output


def test_query_compression_of_mla():
    plain, compressed = parameters(PAPER), parameters(replace(PAPER, q_lora_rank=256))
    assert compressed.attention - plain.attention == 4 * (1024 * 256 + 256 * 8 * 192 - 1024 * 8 * 192)
    assert compressed.norms - plain.norms == 4 * 256


def test_dense_layers_and_groups_and_ties():
    shape = replace(PAPER, attention="mha", kv_groups=2, head_dim=64, dense_ffn=300, moe_layers=(0, 1, 1, 0))
    count = parameters(shape)
    assert count == parameters(replace(shape, moe_layers=2))
    assert count.dense == 2 * 3 * 1024 * 300
    assert count.attention == 4 * (1024 * 8 * 64 * 2 + 2 * 1024 * 2 * 64)
    assert count.routers == 2 * 63 * 1024
    assert forward_flops(shape).dense == 2 * count.dense
    tied = replace(shape, untied_embeddings=False)
    assert count.total - parameters(tied).total == 102_400 * 1_024
    assert forward_flops(tied) == forward_flops(shape)


def build(shape):
    """The oracle model of a shape."""
    router = RouterSettings(shape.experts, shape.topk)
    activation = "swiglu" if shape.swiglu else "gelu"
    settings = ModelSettings(
        shape.vocab,
        shape.hidden,
        shape.layers,
        shape.heads,
        shape.expert_ffn,
        router,
        shape.chain,
        shape.shared_ffn,
        activation,
    )
    return ChainLanguageModel(settings)


def small(chain, swiglu=True):
    return ModelShape(
        layers=2,
        hidden=32,
        vocab=50,
        heads=4,
        seq_length=24,
        experts=6,
        topk=2,
        expert_ffn=20,
        shared_ffn=16,
        swiglu=swiglu,
        chain=chain,
    )


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("swiglu", [True, False])
def test_parameters_equal_those_of_the_built_model(chain, swiglu):
    shape = small(chain, swiglu)
    count, model = parameters(shape), build(shape)
    layers = list(model.chains)

    def size(*names):
        return sum(p.numel() for layer in layers for n, p in layer.named_parameters() if n.split(".")[0] in names)

    assert count.total == sum(p.numel() for p in model.parameters())
    assert count.routers == size("router_weights")
    assert count.gains + count.variants == size("variants")
    assert count.experts == size("w1", "w2")
    assert count.shared == size("shared_w1", "shared_w2")
    norms = size("norm_gains") + sum(a.norm.weight.numel() for a in model.attentions)
    assert count.norms == norms + model.norm.weight.numel()
    assert count.attention == sum(p.numel() for a in model.attentions for p in (a.qkv.weight, a.out.weight))


@pytest.mark.thorough
@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("swiglu", [True, False])
def test_flops_equal_those_counted_in_the_built_model(chain, swiglu):
    shape, batch = small(chain, swiglu), 2
    tokens = torch.randint(shape.vocab, (batch, shape.seq_length))
    with FlopCounterMode(display=False) as counter:
        output = build(shape)(tokens)
    flops = forward_flops(shape)
    tokens_counted = batch * shape.seq_length
    assert counter.get_total_flops() == pytest.approx(flops.total * tokens_counted, rel=0.01)
    with FlopCounterMode(display=False) as backward:
        output.logits.sum().backward()
    both = counter.get_total_flops() + backward.get_total_flops()
    assert both == pytest.approx(training_flops(shape).total * tokens_counted, rel=0.01)


@pytest.mark.parametrize("chain", CHAINS)
def test_flops_of_the_layer_alone(chain):
    shape = small(chain)
    router = RouterSettings(shape.experts, shape.topk)
    layer = ChainOfExperts(shape.hidden, shape.expert_ffn, router, chain, shared_ffn=shape.shared_ffn)
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(2, 5, shape.hidden))
    flops = forward_flops(replace(shape, layers=1))
    assert counter.get_total_flops() == pytest.approx(
        10 * (flops.total - flops.output - flops.attention - flops.attention_scores), rel=0.01
    )


def test_norms_on_queries_and_keys_and_with_biases():
    shape = replace(PAPER, attention="mha", head_dim=64)
    count = parameters(shape)
    assert parameters(replace(shape, qk_layernorm=True)).norms - count.norms == 4 * 2 * 64
    assert parameters(replace(shape, layer_norm=True)).norms == 2 * count.norms
    assert parameters(replace(PAPER, qk_layernorm=True)) == parameters(PAPER)  # latents have their norms anyway


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"hidden": 0}, "hidden is 0"),
        ({"topk": 64}, "topk is 64.*at most experts, 63"),
        ({"attention": "linear"}, "attention is 'linear'.*mha or mla"),
        ({"kv_lora_rank": 0}, "kv_lora_rank is 0"),
        ({"attention": "mha", "heads": 7}, "heads is 7.*divisor of hidden"),
        ({"moe_layers": (1, 0)}, "moe_layers.*4 numbers"),
        ({"moe_layers": 5}, "moe_layers is 5"),
        ({"moe_layers": 3}, "dense_ffn is 0"),
        ({"chains": (1, 0)}, "chains is .*4 numbers"),
        ({"chains": (1, 1, 0, 0), "moe_layers": (0, 1, 1, 1), "dense_ffn": 8}, "chains is .*1 only for"),
        ({"chains": (1, 1, 0, 0), "chain": ChainSettings(8)}, "topk is 8.*at most experts / C"),
        ({"chain": ChainSettings(8, no_return=True)}, "no_return is true: 8 iterations with 8 experts each need 64"),
    ],
)
def test_bad_shapes_are_one_clear_line(fields, named):
    with pytest.raises(ValueError, match=named):
        replace(PAPER, **fields)


def test_closed_forms_need_no_torch():
    code = "import sys, coe_megatron.estimate.activations; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
