"""What tensor parallelism is estimated to send, against the collectives of a forward and a backward pass."""

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


def config_of(name: str) -> RunConfig:
    return RunConfig(
        model=ModelSettings(num_layers=2, hidden_size=128, num_attention_heads=4, seq_length=64, mla=LATENTS[name]),
        moe=MoESettings(num_experts=4, topk=2, ffn_hidden_size=64, load_balancing="none"),
        parallel=ParallelSettings(tensor=2),
        training=TrainingSettings(precision="fp32", micro_batch=ROWS, global_batch=ROWS),
    )


def sent() -> dict[str, int]:
    found = {}
    for name in LATENTS:
        model = build_model(config_of(name), VOCABULARY)
        tokens = torch.randint(VOCABULARY, (ROWS, 64))
        with CollectiveTrace() as trace:
            model(tokens, torch.arange(64).expand(ROWS, 64), None, labels=tokens).sum().backward()
        found[name] = sum(call.sent for call in trace.calls)
    return found


@pytest.mark.ranks
def test_the_states_of_all_attentions_are_sent_as_often_as_is_said() -> None:
    groups = {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
    found, _ = run_ranks(sent, 2, **groups)
    for name, total in found.items():
        said = estimate(RunShape.of(config_of(name), VOCABULARY, 2)).communication["tensor"].total
        # Besides, the loss sums a few numbers per token over the parts of the vocabulary.
        assert said <= total < 1.02 * said, (name, said, total)
