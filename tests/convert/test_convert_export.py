"""An export's logits are those of our own model: every gating, residual, norm placement and attention, with and without
cache and padding; and models of one iteration are opened by transformers without code of ours."""

from itertools import product
from typing import Any, get_args

import pytest
import torch
from convert_build import (
    ATTENTION,
    VOCAB,
    ModelWeights,
    distance,
    make_model,
    make_run,
    our_logits,
    random_tokens,
    write,
)
from model_build import reset_megatron

from coe_megatron.chain.settings import ChainSettings, Gating, NormPlacement, Residual
from coe_megatron.config import RunConfig
from coe_megatron.convert import native_architectures
from coe_megatron.convert.architecture import Architecture
from coe_megatron.convert.coe_architecture import COE
from coe_megatron.convert.hf_files.modeling_coe import CoEForCausalLM
from coe_megatron.convert.load import of_weights

pytestmark = pytest.mark.usefixtures("single_rank")

CHAINS = [
    ChainSettings(*each) for each in product((1, 2, 3), get_args(Gating), get_args(Residual), get_args(NormPlacement))
]
ATTENTIONS = list(ATTENTION)
OTHERS: dict[str, RunConfig] = {
    "learned scale and conditioned": make_run(chain=ChainSettings(2, learned_scale=0.5, conditioned=True)),
    "no return": make_run(
        chain=ChainSettings(3, no_return=True), moe={"expert_bias": True, "score_function": "sigmoid"}
    ),
    "modulation": make_run(chain=ChainSettings(2, norm_placement="iteration_norm", modulation_rank=3)),
    "streams": make_run(chain=ChainSettings(3, streams=2, learned_scale=0.5)),
    "latent": make_run(chain=ChainSettings(2, "fixed", "init", "reference", latent=8)),
    "MoE in a latent space": make_run(chain=ChainSettings(1, latent=8, modulation_rank=2)),
    "modulation and streams in a latent space": make_run(
        "MLA", ChainSettings(2, streams=3, latent=8, modulation_rank=2)
    ),
    "chains in some layers": make_run(chain=ChainSettings(2, layers=(2,)), num_layers=3),
    "dense layers": make_run(moe={"layer_freq": [0, 1]}),
    "dense layers, MLA": make_run("MLA", moe={"layer_freq": [0, 1]}),
    "LayerNorm": make_run(
        "GQA with norms", ChainSettings(2, norm_placement="iteration_norm"), normalization="LayerNorm"
    ),
    "GELU": make_run(activation="gelu"),
    "tied": make_run(untied_embeddings=False),
    "no shared experts": make_run(moe={"num_shared_experts": 0}),
    "gate of shared experts": make_run("GQA with biases", moe={"shared_expert_gate": True, "num_shared_experts": 2}),
    "norms over heads, LayerNorm": make_run("GQA with norms over heads", normalization="LayerNorm"),
    "groups": make_run(moe={"num_groups": 4, "group_topk": 1, "scaling": 2.5}),
    "sigmoid and bias": make_run(moe={"score_function": "sigmoid", "expert_bias": True}),
    "renormalised": make_run(moe={"renormalise": True}),
    "K = 1": make_run(moe={"topk": 1, "score_function": "sigmoid"}),
}


def exported(config: RunConfig) -> tuple[torch.nn.Module, CoEForCausalLM]:
    """Our model, and the one that its export makes."""
    ours = make_model(config)
    return ours, of_weights(ModelWeights(ours), config, {})


def logits_of(model: Any, tokens: torch.Tensor, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens, **more).logits


@pytest.mark.parametrize(
    "number", range(len(CHAINS)), ids=[f"{c.iterations} {c.gating} {c.residual} {c.norm_placement}" for c in CHAINS]
)
def test_every_chain_has_our_logits(number: int) -> None:
    ours, theirs = exported(make_run(ATTENTIONS[number % len(ATTENTIONS)], CHAINS[number]))
    require_our_logits(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_every_chain_has_our_logits_in_every_attention(attention: str) -> None:
    for chain in CHAINS:
        reset_megatron()
        require_our_logits(*exported(make_run(attention, chain)))


@pytest.mark.parametrize("name", OTHERS)
def test_every_other_setting_has_our_logits(name: str) -> None:
    require_our_logits(*exported(OTHERS[name]))


def require_our_logits(ours: torch.nn.Module, theirs: CoEForCausalLM) -> None:
    tokens = random_tokens()
    truth = our_logits(ours, tokens)
    assert distance(logits_of(theirs, tokens), truth) < 1e-5
    # Position by position, from the cache; then with padding on either side, where only the other places count.
    first = theirs(tokens[:, :4])
    later = [first.logits]
    for at in range(4, tokens.shape[1]):
        later.append(logits_of(theirs, tokens[:, at : at + 1], cache=first.cache))
    assert distance(torch.cat(later, dim=1), truth) < 1e-5
    padding = torch.zeros(len(tokens), 3, dtype=torch.long)
    mask = torch.cat([padding, torch.ones_like(tokens)], dim=1)
    assert distance(logits_of(theirs, torch.cat([padding, tokens], 1), attention_mask=mask)[:, 3:], truth) < 1e-5
    right = logits_of(theirs, torch.cat([tokens, padding], 1), attention_mask=mask.flip(1))[:, :-3]
    assert distance(right, truth) < 1e-5


def test_a_changed_weight_shows() -> None:
    """The comparison is no tautology: each tensor of the model matters."""
    config = make_run(
        "MLA",
        ChainSettings(2, norm_placement="iteration_norm", learned_scale=1.0),
        moe={"score_function": "sigmoid", "expert_bias": True},
    )
    ours, theirs = exported(config)
    tokens = random_tokens()
    truth = our_logits(ours, tokens)
    for name, tensor in theirs.named_parameters():
        kept = tensor.detach().clone()
        with torch.no_grad():
            tensor += torch.linspace(0.5, 1.5, tensor.numel()).view_as(tensor)
        assert distance(logits_of(theirs, tokens), truth) > 1e-4, name
        tensor.data.copy_(kept)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_greedy_generation_is_the_same_with_and_without_cache_and_in_a_batch(attention: str) -> None:
    _, model = exported(make_run(attention, ChainSettings(2)))
    tokens = random_tokens(rows=2)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), tokens[:1, :5]], dim=1)
    mask = (torch.arange(9) >= 4).long()[None]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    batch = model.generate(
        torch.cat([padded, tokens[1:]]), attention_mask=torch.cat([mask, torch.ones_like(mask)]), **options
    )
    for row, prompt in zip(batch, (tokens[:1, :5], tokens[1:]), strict=True):
        for use_cache in (True, False):
            alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), use_cache=use_cache, **options)
            assert alone[0, -8:].tolist() == row[-8:].tolist()


def test_router_logits_states_and_loss() -> None:
    config = make_run(chain=ChainSettings(3))
    _, model = exported(config)
    tokens = random_tokens()
    out = model(tokens, labels=tokens, output_router_logits=True, output_hidden_states=True, logits_to_keep=0)
    assert len(out.router_logits) == 2 * 3 and out.router_logits[0].shape == (tokens.numel(), 8)
    assert len(out.hidden_states) == 1 + config.model.num_layers
    truth = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert torch.equal(out.loss, truth)
    torch.testing.assert_close(model(tokens, logits_to_keep=1).logits, out.logits[:, -1:])


ONE, SIGMOID = ChainSettings(1), {"score_function": "sigmoid"}
NATIVE: dict[str, list[RunConfig]] = {
    "mixtral": [make_run("GQA", ONE, {"num_shared_experts": 0, "renormalise": True})],
    "olmoe": [make_run("GQA with norms over heads", ONE, {"num_shared_experts": 0, "renormalise": True})],
    "qwen3_moe": [
        make_run("GQA with norms", ONE, {"num_shared_experts": 0, "renormalise": renormalise, "layer_freq": layers})
        for renormalise, layers in ((True, 1), (False, [0, 1]))
    ],
    "qwen2_moe": [
        make_run("GQA with biases", ONE, {"shared_expert_gate": True, "num_shared_experts": 2}),
        make_run("GQA", ONE, {"renormalise": True}),
        make_run("MHA", ONE, {"layer_freq": [1, 0]}),
    ],
    "deepseek_v2": [
        make_run("MLA", ONE, {"layer_freq": [0, 1], "scaling": 2.0}),
        make_run("MLA with latent queries and YaRN", ONE, {"num_groups": 4, "group_topk": 2}),
    ],
    "deepseek_v3": [
        make_run("MLA with latent queries and YaRN", ONE, SIGMOID | {"expert_bias": True, "scaling": 2.5}),
        make_run("MLA", ONE, SIGMOID | {"topk": 4, "num_groups": 4, "group_topk": 2, "num_shared_experts": 2}),
    ],
}


@pytest.mark.parametrize(
    ("name", "number"), [(name, n) for name, configs in NATIVE.items() for n in range(len(configs))]
)
def test_transformers_opens_a_model_of_one_iteration_without_our_code(name: str, number: int, tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM

    config = NATIVE[name][number]
    architecture, reasons = native_architectures.of_model(config)
    assert architecture.name == name and reasons == []
    ours = make_model(config)
    folder = write(config, architecture, ModelWeights(ours), tmp_path / "exported")
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(theirs).__module__.startswith("transformers.models.")
    tokens = random_tokens()
    assert distance(logits_of(theirs, tokens), our_logits(ours, tokens)) < 1e-5


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (make_run(), "iterates 2 times"),
        (make_run(chain=ChainSettings(1, norm_placement="reference")), "norm_placement is reference"),
        (make_run("GQA", ONE, {"num_shared_experts": 0}), "moe.renormalise is false"),
        (make_run("MLA", ONE, {"renormalise": True}), "gates are not a softmax"),
        (make_run("MLA", ONE, {"num_groups": 4, "group_topk": 1}), "sum of its best 2 experts"),
        (make_run("MLA", ONE, {"layer_freq": [1, 0]}), "dense layers after"),
    ],
)
def test_why_a_model_has_no_architecture_in_transformers_is_said(config: RunConfig, reason: str) -> None:
    architecture, reasons = native_architectures.of_model(config)
    assert architecture is COE and reason in "; ".join(reasons)


def test_native_names_cover_all_architectures() -> None:
    kinds: list[Architecture] = [*native_architectures.NATIVE]
    assert {kind.name for kind in kinds} == NATIVE.keys() and VOCAB < 64
