"""The estimated bytes and number of operations other than products against traces of the local backend."""

from typing import Any

import pytest
import torch
from ranks import run_ranks
from saved_bytes import without_padding
from torch.utils._python_dispatch import TorchDispatchMode

from coe_megatron.config import RunConfig, parse
from coe_megatron.estimate.operations import Moves, Rank
from coe_megatron.estimate.run_shape import RunShape
from coe_megatron.model.build import build_model
from coe_megatron.training import evaluation

VOCABULARY = 512
_FREE = {
    "empty",
    "new_empty",
    "empty_like",
    "empty_strided",
    "new_empty_strided",
    "_local_scalar_dense",
    "detach",
    "alias",
}
_PRODUCTS = {"mm", "bmm", "addmm", "_grouped_mm"}
_COLLECTIVES = {"alltoall_base_", "allreduce_"}


class Traced(TorchDispatchMode):
    """Sums the bytes of inputs and outputs of operations that are neither views nor products; counts all but views."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        if func.is_view or name in _FREE | _COLLECTIVES:
            return out
        self.operations += 1
        if name not in _PRODUCTS and "scaled_dot_product" not in name:
            self.bytes += sum(map(_size, args)) + _size(out)
        return out


def _size(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(_size, value)) if isinstance(value, list | tuple) else 0


def config(**sections: Any) -> RunConfig:
    """Of two layers."""
    model = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 128, "vocab_size": VOCABULARY}
    return parse(
        {
            "model": model | sections.pop("model", {}),
            "moe": {"num_experts": 16, "topk": 2, "ffn_hidden_size": 48} | sections.pop("moe", {}),
            "chain": {"iterations": 2} | sections.pop("chain", {}),
            "training": {"global_batch": 8, "micro_batch": 4, "precision": "fp32"},
            "parallel": sections.pop("parallel", {}),
        }
    )


def traced(given: RunConfig) -> tuple[Traced, Traced]:
    """Forward and backward pass of the model, without an engine."""
    torch.manual_seed(1)
    model, training = build_model(given, VOCABULARY), given.training
    rows, length = training.micro_batch, given.model.seq_length
    batch = {
        "tokens": torch.randint(VOCABULARY, (rows, length)),
        "labels": torch.randint(VOCABULARY, (rows, length)),
        "loss_mask": torch.ones(rows, length),
        "position_ids": torch.arange(length).expand(rows, -1).contiguous(),
        "padding_mask": torch.zeros(rows, length, dtype=torch.bool),
    }

    def forward() -> torch.Tensor:
        return evaluation.masked_loss_sum(evaluation.forward(model, batch), batch)

    with without_padding():
        forward().backward()  # caches and gradients exist from here on
        with Traced() as there:
            loss = forward()
        with Traced() as back:
            loss.backward()
    return there, back


def estimated(given: RunConfig, direction: str) -> Moves:
    run = RunShape.of(given, VOCABULARY, given.parallel.expert)
    parts = list(Rank(run.stage_model(0), run.stage_pass(0)).parts())
    moves: list[tuple[int, Moves]] = [(count, getattr(work, direction)) for count, work, _ in parts]
    return Moves(
        sum(count * each.bytes for count, each in moves), sum(count * each.operations for count, each in moves)
    )


MLA = {"kv_lora_rank": 32, "qk_head_dim": 16, "qk_pos_emb_head_dim": 8, "v_head_dim": 16}
CASES: dict[str, dict[str, Any]] = {
    "mha": {},
    "wide": {"model": {"hidden_size": 128}, "moe": {"ffn_hidden_size": 96, "topk": 4}},
    "mla": {"model": {"mla": MLA}},
    "one iteration, many experts": {"chain": {"iterations": 1}, "moe": {"num_experts": 64, "topk": 8}},
    "four iterations": {"chain": {"iterations": 4}},
    "norms of its own": {"chain": {"iterations": 3, "norm_placement": "iteration_norm"}},
    "one routing": {"chain": {"iterations": 3, "gating": "fixed"}},
    "dense layers": {"model": {"num_layers": 4}, "moe": {"layer_freq": 2}},
    "no shared experts": {"moe": {"num_shared_experts": 0}},
}


@pytest.mark.parametrize("name", CASES)
def test_bytes_and_operations_are_those_of_a_trace(single_rank: None, name: str) -> None:
    given = config(**CASES[name])
    for found, direction in zip(traced(given), ("forward", "backward"), strict=True):
        wanted = estimated(given, direction)
        assert wanted.bytes == pytest.approx(found.bytes, rel=0.25)
        assert wanted.operations == pytest.approx(found.operations, rel=0.25)


@pytest.mark.parametrize(
    ("dispatcher", "topk"), [("alltoall", 2), ("alltoall", 4), ("deduplicated", 2), ("deduplicated", 4)]
)
def test_what_a_dispatch_adds_is_that_of_a_trace(dispatcher: str, topk: int) -> None:
    """On two ranks; collectives are not among it."""
    given = config(moe={"dispatcher": dispatcher, "topk": topk}, parallel={"expert": 2})
    alone = config(moe={"topk": topk})
    found, plain = run_ranks(counted, 2, given, expert_model_parallel_size=2)[0], run_ranks(counted, 1, alone)[0]
    for here, there, direction in zip(found, plain, ("forward", "backward"), strict=True):
        wanted, without = estimated(given, direction), estimated(alone, direction)
        assert wanted.bytes - without.bytes == pytest.approx(here[0] - there[0], rel=0.15)
        assert wanted.operations - without.operations == pytest.approx(here[1] - there[1], rel=0.15)


def counted(given: RunConfig) -> list[tuple[int, int]]:
    """Bytes and operations of a rank, forward and backward."""
    return [(each.bytes, each.operations) for each in traced(given)]
