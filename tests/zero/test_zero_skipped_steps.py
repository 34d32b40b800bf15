"""A step that meets a NaN, or a loss that is too large, changes nothing on any rank, at any stage and layout."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engine_build import Named, make_engine, micro_batches, use_groups
from megatron.core import parallel_state
from ranks import run_ranks

from coe_megatron.model.router_state import update_router_state
from coe_megatron.zero import engine as zero
from coe_megatron.zero import optimizer_states as states
from coe_megatron.zero.train_step import train_step

KINDS = {
    "stage 0": {"stage": 0},
    "stage 1": {"stage": 1},
    "stage 1, bf16": {"stage": 1, "precision": "bf16"},
    "stage 1, offload": {"stage": 1, "offload": "optimizer"},
    "stage 2": {"stage": 2},
    "stage 2, bf16": {"stage": 2, "precision": "bf16"},
    "stage 2, offload": {"stage": 2, "offload": "optimizer"},
    "stage 3": {"stage": 3},
    "stage 3, bf16": {"stage": 3, "precision": "bf16"},
    "stage 3, offload": {"stage": 3, "offload": "optimizer and parameters"},
}
MISHAPS = ("NaN in one batch", "infinite loss", "NaN in one expert", "NaN in a table", "too large")
FEW = ("stage 0", "stage 1", "stage 1, bf16", "stage 2", "stage 3")


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize(
    ("layout", "kinds"),
    [
        ({"expert": 2}, FEW),
        ({"pipeline": 2}, ("stage 0", "stage 1, bf16")),
        pytest.param({"expert": 2}, tuple(set(KINDS) - set(FEW)), marks=pytest.mark.full),
        pytest.param({"tensor": 2}, tuple(KINDS), marks=pytest.mark.full),
    ],
)
def test_a_step_that_is_left_out_changes_nothing(layout: dict[str, int], kinds: tuple[str, ...]) -> None:
    """Bit by bit: the states after it, and what the next step makes of them, against an engine without."""
    for rank in run_ranks(try_all, 2, layout, kinds):
        for case, found in rank.items():
            assert found in (LEFT_OUT, GOES_ON), case


LEFT_OUT, GOES_ON = {"taken": False, "changed": []}, {"taken": True, "changed": [], "norm": 0.0}


def try_all(layout: dict[str, int], kinds: tuple[str, ...]) -> dict[str, dict]:
    use_groups(**layout)
    return {f"{kind}: {name}": found for kind in kinds for name, found in try_one(kind).items()}


def try_one(kind: str) -> dict[str, dict]:
    engine = make_engine(micro_batch=2, **KINDS[kind])  # two micro-batches on each of two replicas
    step(engine, 0)
    before = held(engine)
    norm, after = step(engine, 1), held(engine)
    put_back(engine, before)
    found: dict[str, dict] = {}
    for mishap in MISHAPS:
        step(engine, 7, mishap)
        found[mishap] = {
            "taken": zero.was_applied(float(zero.gradient_norm(engine))),
            "changed": different(held(engine), before),
        }
    again = step(engine, 1)
    found["none"] = {
        "taken": zero.was_applied(float(zero.gradient_norm(engine))),
        "changed": different(held(engine), after),
        "norm": again - norm,
    }
    return found


def step(engine: Any, number: int, mishap: str = "") -> float:
    """One step, in which something happens to one micro-batch of one rank; returns its norm."""
    zero.set_lr(engine, 1e-2)
    batches = list(micro_batches(number, engine.train_micro_batch_size_per_gpu()))
    first = parallel_state.get_data_parallel_rank() == 0
    hooks = []
    if mishap == "NaN in one batch" and first and hasattr(engine.module, "embedding"):
        hooks.append(engine.module.embedding.register_forward_hook(spoil_first()))
    if mishap == "NaN in one expert" and dist.get_rank() == 1:
        weight = next(p for name, p in engine.module.named_parameters() if ".experts." in name)
        hooks.append(weight.register_hook(lambda gradient: gradient * torch.nan))

    if mishap == "NaN in a table" and hasattr(engine.module, "embedding"):  # of all gradients in this one alone
        table = engine.module.embedding.word_embeddings.weight
        hooks.append(table.register_hook(lambda gradient: gradient * torch.nan))

    def loss_of(losses: torch.Tensor, batch: Named) -> torch.Tensor:
        loss = (losses.float() * batch["counts"]).sum() / batch["total"]
        spoiled = mishap == "infinite loss" and first and batch["tokens"] is seen[0]
        return loss + (math.inf if spoiled else 0.0)  # whose gradient is finite

    def forward(model: torch.nn.Module, batch: Named) -> torch.Tensor:
        tokens = batch["tokens"]
        seen.append(tokens)
        positions = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
        return model(tokens, positions, None, labels=batch["labels"])

    seen: list[torch.Tensor] = []
    train_step(engine, batches, forward, loss_of, max_loss=1e-3 if mishap == "too large" else 1e3)
    update_router_state(engine.module)
    for hook in hooks:
        hook.remove()
    return float(zero.gradient_norm(engine))


def spoil_first() -> Any:
    """A hook that makes one number of the first micro-batch NaN."""
    calls: list[int] = []

    def spoil(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        spoiled = torch.ones_like(output)
        spoiled[0, 0, 0] = torch.nan
        return output * spoiled if len(calls) == 1 else output

    return spoil


def held(engine: Any) -> Named:
    """Everything a step may change on this rank."""
    with states.gathered_weights(engine):
        found = {name: weight.detach().clone() for name, weight in engine.module.named_parameters()}
    found |= {name: buffer.clone() for name, buffer in engine.module.named_buffers() if buffer is not None}
    for name, parameter in engine.module.named_parameters():
        found |= {f"{kind} {name}": states.read(engine, parameter, kind).clone() for kind in states.KINDS}
    for number, partition in enumerate(states.partitions(engine)):
        found[f"steps {number}"] = states.adam(engine).state[partition]["step"].clone()
    return found


def put_back(engine: Any, kept: Named) -> None:
    buffers = dict(engine.module.named_buffers())
    for name, parameter in engine.module.named_parameters():
        for kind in states.KINDS:
            states.write(engine, parameter, kind, kept[f"{kind} {name}"])
        states.write_weight(engine, parameter, kept[name])
    for name, buffer in buffers.items():
        if buffer is not None:
            buffer.copy_(kept[name])
    states.set_steps(engine, int(kept["steps 0"]))


def different(left: Named, right: Named) -> list[str]:
    return [name for name in right if not torch.equal(left[name], right[name])]
