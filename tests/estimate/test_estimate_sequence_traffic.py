"""What parts of a sequence are estimated to send, against the collectives of a forward and a backward pass."""

from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from typing import Any

import pytest
import torch
from collective_trace import CollectiveTrace
from model_build import reset_megatron
from ranks import run_ranks

from coe_megatron.config.load import parse
from coe_megatron.config.settings import (
    MLASettings,
    ModelSettings,
    MoESettings,
    ParallelSettings,
    RunConfig,
    TrainingSettings,
)
from coe_megatron.estimate.run_estimate import estimate
from coe_megatron.estimate.run_shape import RunShape
from coe_megatron.estimate.traffic import tensor_collectives
from coe_megatron.model.build import build_model

VOCABULARY, ROWS = 128, 2
LATENTS = {
    "MHA": None,
    "MLA": MLASettings(64, None, 32, 16, 32),
    "MLA of latent queries": MLASettings(64, 96, 32, 16, 32),
}


def config_of(name: str, **sizes: int) -> RunConfig:
    return RunConfig(
        model=ModelSettings(num_layers=2, hidden_size=128, num_attention_heads=4, seq_length=64, mla=LATENTS[name]),
        moe=MoESettings(num_experts=4, topk=2, ffn_hidden_size=64, load_balancing="none"),
        parallel=ParallelSettings(**sizes),
        training=TrainingSettings(precision="fp32", micro_batch=ROWS, global_batch=ROWS),
    )


def sent(**sizes: int) -> dict[str, int]:
    found = {}
    for name in LATENTS:
        model = build_model(config_of(name, **sizes), VOCABULARY)
        length = 64 // sizes.get("context", 1)
        tokens = torch.randint(VOCABULARY, (ROWS, length))
        with CollectiveTrace() as trace:
            model(tokens, torch.arange(length).expand(ROWS, length), None, labels=tokens).sum().backward()
        found[name] = sum(call.sent for call in trace.calls)
    return found


@pytest.mark.ranks
def test_the_states_of_all_attentions_are_sent_as_often_as_is_said() -> None:
    groups = {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
    found, _ = run_ranks(partial(sent, tensor=2), 2, **groups)
    for name, total in found.items():
        said = estimate(RunShape.of(config_of(name, tensor=2), VOCABULARY, 2)).communication["tensor"].total
        # Besides, the loss sums a few numbers per token over the parts of the vocabulary.
        assert said <= total < 1.02 * said, (name, said, total)


COUNTED: dict[str, dict[str, Any]] = {
    "MHA": {},
    "MLA": {"model": {"mla": asdict(LATENTS["MLA"])}},  # type: ignore[call-overload]
    "MLA of latent queries": {"model": {"mla": asdict(LATENTS["MLA of latent queries"])}},  # type: ignore[call-overload]
    "own norms, no shared experts": {
        "moe": {"num_shared_experts": 0},
        "chain": {"iterations": 3, "norm_placement": "iteration_norm"},
    },
    "recomputed": {"moe": {"recompute": "layer"}, "chain": {"iterations": 2}},
    "dense layers": {"model": {"num_layers": 4}, "moe": {"layer_freq": 2}, "chain": {"gating": "fixed"}},
}


def counted_config(name: str) -> RunConfig:
    given = COUNTED[name]
    model = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16, "hidden_dropout": 0.0}
    moe = {"num_experts": 4, "topk": 2, "ffn_hidden_size": 16, "num_shared_experts": 1}
    rest = {"parallel": {"tensor": 2}, "training": {"precision": "fp32", "micro_batch": ROWS, "global_batch": ROWS}}
    own = {"model": model | given.get("model", {}), "moe": moe | given.get("moe", {})}
    return parse({**rest, **own, "chain": given.get("chain", {})})


def calls() -> dict[str, int]:
    found = {}
    for name in COUNTED:
        reset_megatron()
        model = build_model(counted_config(name), VOCABULARY)
        tokens = torch.randint(VOCABULARY, (ROWS, 16))
        with CollectiveTrace() as trace:
            model(tokens, torch.arange(16).expand(ROWS, 16), None, labels=tokens).sum().backward()
        summed = sum(getattr(parameter, "sequence_parallel", False) for parameter in model.parameters())
        found[name] = len(trace.calls) + summed  # which the engine sums one by one
    return found


@pytest.mark.ranks
@pytest.mark.skipif(not version("megatron-core").startswith("0.16"), reason="traced with Megatron-Core 0.16 only")
def test_collectives_of_tensor_parallel_ranks_are_counted() -> None:
    found, _ = run_ranks(calls, 2, tensor_model_parallel_size=2, expert_tensor_parallel_size=1)
    said = {name: tensor_collectives(RunShape.of(counted_config(name), VOCABULARY, 2), 0) for name in COUNTED}
    assert said == found


@pytest.mark.ranks
def test_keys_and_values_of_all_parts_are_gathered_once() -> None:
    found, _ = run_ranks(partial(sent, context=2), 2, context_parallel_size=2)
    for name, total in found.items():
        assert estimate(RunShape.of(config_of(name, context=2), VOCABULARY, 2)).communication["context"].total == total
