"""Tensor parallelism under ZeRO, with experts cut as well or divided among the ranks, against one process.

All begin with the weights of one checkpoint and end in checkpoints that one process reads: that is how they compare.
"""

from pathlib import Path

import pytest
import torch
from engine_build import Named, Trace, make_engine, take_steps
from modules_build import errors
from ranks import run_ranks

from coe_megatron.checkpoint import store
from coe_megatron.zero import states

STAGES = (0, 1, 2, 3)
LAYOUTS = {
    "tensor": (2, {"tensor_model_parallel_size": 2}),
    "tensor x expert": (
        2,
        {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
    ),
    "tensor x data, expert x replicas": (
        4,
        {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
    ),
}


def train_alone(folder: Path) -> Trace:
    engine = make_engine(8)
    store.save(folder / "begin", 1, engine, {}, keep=1)
    trace = take_steps(engine, 0, 3)
    trace.weights = masters(engine)
    return trace


def train_together(folder: Path) -> dict[int, Trace]:
    return {stage: train_at(stage, folder) for stage in STAGES}


def train_at(stage: int, folder: Path) -> Trace:
    engine = make_engine(2, stage=stage, seed=7)
    store.load_weights(folder / "begin", engine)
    trace = take_steps(engine, 0, 3)
    store.save(folder / str(stage), 3, engine, {}, keep=1)
    return trace


def read_alone(folder: Path) -> dict[int, Named]:
    engine = make_engine(8, seed=9)
    found = {}
    for stage in STAGES:
        store.load_latest(folder / str(stage), engine)
        found[stage] = masters(engine)
    return found


def masters(engine: torch.nn.Module) -> Named:
    parameters = engine.module.named_parameters()
    return {name: states.read(engine, parameter, states.MASTER).clone() for name, parameter in parameters}


@pytest.mark.ranks
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_stage_is_the_training_of_one_process(layout: str, tmp_path: Path) -> None:
    (alone,) = run_ranks(train_alone, 1, tmp_path)
    ranks, groups = LAYOUTS[layout]
    together = run_ranks(train_together, ranks, tmp_path, **groups)
    (ended,) = run_ranks(read_alone, 1, tmp_path)
    for stage in STAGES:
        trace = together[0][stage]
        assert trace.losses == pytest.approx(alone.losses, rel=1e-5), stage
        assert trace.norms == pytest.approx(alone.norms, rel=1e-5), stage
        whole = {name for name, gradient in trace.gradients.items() if gradient.shape == alone.gradients[name].shape}
        assert "decoder.final_layernorm.weight" in whole, "norms see a part of the sequence each"
        worst = errors({name: trace.gradients[name] for name in whole}, {n: alone.gradients[n] for n in whole})
        assert max(worst.values()) < 1e-5, (stage, worst)
        # Where a gradient is near zero AdamW's first steps are its sign: weights are looser than gradients.
        assert max(errors(ended[stage], alone.weights).values()) < 1e-3, stage
