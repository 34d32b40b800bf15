"""Evaluating changes nothing: losses and weights of a training with noise are the same to the bit with and without it.

What acts in training alone (dropout, jitter, auxiliary losses, counts for the expert bias) is off in between, and no
generator of random numbers goes on.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_build import use_groups
from megatron.core import parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from model_build import reset_megatron, tracked_losses
from ranks import run_ranks

from coe_megatron.chain.settings import ChainSettings
from coe_megatron.config import RunConfig
from coe_megatron.config.settings import (
    ModelSettings,
    MoESettings,
    OptimizerSettings,
    ParallelSettings,
    TrainingSettings,
    ZeroSettings,
)
from coe_megatron.distributed.process_groups import seed_dropout
from coe_megatron.model import routing_stats
from coe_megatron.model.build import build_model
from coe_megatron.model.layer import routers
from coe_megatron.model.router_state import update_router_state
from coe_megatron.training.evaluation import Batch, ValidationSet, forward, masked_loss_sum, validate
from coe_megatron.zero import engine as zero
from coe_megatron.zero import optimizer_states as states
from coe_megatron.zero.train_step import train_step

pytestmark = [pytest.mark.ranks, pytest.mark.slow, pytest.mark.timeout(900)]
LENGTH, VOCAB, STEPS = 12, 64, 2
NOISY = RunConfig(
    model=ModelSettings(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=2,
        seq_length=LENGTH,
        hidden_dropout=0.1,
        attention_dropout=0.1,
    ),
    moe=MoESettings(
        num_experts=8,
        topk=2,
        ffn_hidden_size=16,
        aux_loss_coeff=0.1,
        z_loss_coeff=0.01,
        input_jitter=0.5,
    ),
    training=TrainingSettings(global_batch=8, micro_batch=2),
    optimizer=OptimizerSettings(lr=1e-2),
)
BIAS = {"score_function": "sigmoid", "expert_bias": True, "expert_bias_rate": 0.1}
CASES: dict[str, RunConfig] = {}
for stage in range(4):
    moe = replace(NOISY.moe, recompute=("none", "experts", "iteration", "layer")[stage])
    CASES[f"EP 2, stage {stage}, {moe.recompute}"] = replace(
        NOISY, moe=moe, parallel=ParallelSettings(expert=2), zero=ZeroSettings(stage=stage)
    )
CASES |= {
    "DP 2, expert bias, packed": replace(NOISY, moe=replace(NOISY.moe, **BIAS)),
    "TP 2, global_aux_loss, capacity": replace(
        NOISY,
        moe=replace(NOISY.moe, load_balancing="global_aux_loss", capacity_factor=0.8, pad_to_capacity=True),
        chain=ChainSettings(3, norm_placement="reference"),
        parallel=ParallelSettings(tensor=2),
    ),
    "PP 2, expert bias": replace(
        NOISY, moe=replace(NOISY.moe, **BIAS, recompute="iteration"), parallel=ParallelSettings(pipeline=2)
    ),
}


def batch_of(seed: int, packed: bool = False) -> Batch:
    """Two rows of this rank's: each a document with padding behind it, or `packed`, two that do not see each other."""
    generator = torch.Generator().manual_seed(1000 * seed + parallel_state.get_data_parallel_rank())
    tokens = torch.randint(VOCAB, (2, LENGTH + 1), generator=generator)
    lengths = torch.randint(4, LENGTH - 2, (2, 1), generator=generator)
    places = torch.arange(LENGTH)
    behind = places >= lengths
    padding = torch.zeros_like(behind) if packed else behind
    batch = {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:].contiguous(),
        "position_ids": places.expand(2, -1),
        "padding_mask": padding,
        "loss_mask": (~padding).float(),
    }
    if packed:
        apart = behind.unsqueeze(1) != behind.unsqueeze(2)
        batch["attention_mask"] = (apart | (places > places.unsqueeze(1))).unsqueeze(1)
    return batch


def train(config: RunConfig, evaluate: bool, packed: bool) -> dict[str, Any]:
    """Losses, norms, validation losses and weights of a few steps; between them evaluations, if there are any."""
    reset_megatron()
    parallel = config.parallel
    use_groups(parallel.tensor, parallel.pipeline, parallel.expert)
    seed_dropout(5)
    torch.manual_seed(5)
    steps = 8 // 2 // parallel_state.get_data_parallel_world_size()
    engine = zero.build_engine(build_model(config, VOCAB), config.optimizer, config.training, config.zero, steps)
    seed_dropout(5)
    validation = {"one": ValidationSet([batch_of(100, packed), batch_of(101, packed)], 1.0)}
    found: dict[str, Any] = {"loss": [], "norm": [], "valid": []}
    for step in range(STEPS):
        if evaluate:
            found["valid"] += _evaluated(engine, validation)
        routing_stats.reset_routing(engine.module)
        batches = [batch_of(10 * step + number, packed) for number in range(steps)]
        loss = train_step(engine, batches, forward, lambda losses, batch: masked_loss_sum(losses, batch) / 100)
        update_router_state(engine.module)
        found["loss"].append(float(loss))
        found["norm"].append(float(zero.gradient_norm(engine)))
    found["valid"].append(validate(engine, validation)["valid_loss"])
    with states.gathered_weights(engine):
        named = [*engine.module.named_parameters(), *engine.module.named_buffers()]
        return found | {"weights": {name: value.detach().clone() for name, value in named}}


def _evaluated(engine: zero.Engine, validation: dict[str, ValidationSet]) -> list[float]:
    """Two evaluations of the same weights; all that they could leave behind is as before."""
    before = _state(engine.module)
    losses = [validate(engine, validation)["valid_loss"] for _ in range(2)]
    after = _state(engine.module)
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert losses[0] == losses[1] and engine.training
    return losses[:1]


def _state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Generators, buffers (counts for the expert bias and of the global loss) and what Megatron tracks."""
    generators = {f"generator {name}": state for name, state in get_cuda_rng_tracker().get_states().items()}
    counts = {f"calls {layer} {t}": torch.tensor(router.stats.calls) for layer, t, router in routers(model)}
    named = {**generators, **counts, **tracked_losses(), "generator": torch.get_rng_state()}
    return {name: value.clone() for name, value in {**named, **dict(model.named_buffers())}.items()}


def work_of_a_rank() -> dict[str, list[dict[str, Any]]]:
    """Each case without evaluations and with them; and one with neither evaluations nor jitter."""
    quiet = replace(NOISY, moe=replace(NOISY.moe, input_jitter=0.0), parallel=ParallelSettings(expert=2))
    found = {
        name: [train(config, evaluate, packed=name.endswith("packed")) for evaluate in (False, True)]
        for name, config in CASES.items()
    }
    return found | {"no jitter": [train(quiet, False, False)]}


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, list[dict[str, Any]]]]:
    return run_ranks(work_of_a_rank, 2, seconds=600)


@pytest.mark.parametrize("name", CASES)
def test_evaluating_changes_no_bit_of_the_training(two_ranks: list[dict], name: str) -> None:
    for found in two_ranks:
        never, often = found[name]
        assert often["loss"] == never["loss"] and often["norm"] == never["norm"]
        assert often["valid"][-1] == never["valid"][-1] and len(set(often["valid"])) == STEPS + 1
        assert often["weights"].keys() == never["weights"].keys()
        assert [key for key, value in never["weights"].items() if not torch.equal(often["weights"][key], value)] == []


def test_the_noise_is_there(two_ranks: list[dict]) -> None:
    """Otherwise nothing above would say anything."""
    first = {name: found[0]["loss"][0] for name, found in two_ranks[0].items()}
    assert first["EP 2, stage 0, none"] == first["EP 2, stage 2, iteration"] != first["no jitter"]
