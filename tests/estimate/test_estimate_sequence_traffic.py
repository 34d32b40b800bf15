"""What parts of a sequence are estimated to send, against the collectives of a forward and a backward pass."""

from functools import partial

import pytest
import torch
from collective_trace import CollectiveTrace
from ranks import run_ranks

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


@pytest.mark.ranks
def test_keys_and_values_of_all_parts_are_gathered_once() -> None:
    found, _ = run_ranks(partial(sent, context=2), 2, context_parallel_size=2)
    for name, total in found.items():
        assert estimate(RunShape.of(config_of(name, context=2), VOCABULARY, 2)).communication["context"].total == total
