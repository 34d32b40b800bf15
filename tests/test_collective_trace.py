"""benchmarks/collective_trace.py counts what two ranks do, in forward and backward pass."""

from dataclasses import asdict
from typing import Any

import pytest
import torch
import torch.distributed as dist
from collective_trace import CollectiveTrace
from megatron.core.tensor_parallel import all_to_all
from ranks import run_ranks


def communicate() -> list[dict[str, Any]]:
    alone, ones, pair = dist.new_group([dist.get_rank()], use_local_synchronization=True), torch.ones(4), torch.ones(8)
    with CollectiveTrace() as trace:
        dist.all_reduce(ones, group=alone)
        dist.all_reduce(ones)
        dist.all_reduce(ones, async_op=True).wait()
        dist.all_gather_into_tensor(pair, ones)
        rows = torch.ones(5, 3, requires_grad=True)
        splits = [2, 3] if dist.get_rank() == 0 else [1, 4]
        received = [2, 1] if dist.get_rank() == 0 else [3, 4]
        all_to_all(dist.group.WORLD, rows, received, splits).sum().backward()
        dist.barrier()
    dist.all_reduce(ones)  # not recorded
    return [asdict(call) for call in trace.calls]


@pytest.mark.ranks
def test_each_collective_of_several_ranks_is_recorded_once_with_what_it_sends() -> None:
    first, second = run_ranks(communicate, 2)
    kinds = ["all-reduce", "all-reduce", "all-gather", "all-to-all", "all-to-all", "barrier"]
    assert [call["kind"] for call in first] == [call["kind"] for call in second] == kinds
    assert [call["waits"] for call in first] == [True, False, True, True, True, True]
    assert [call["sent"] for call in first] == [16, 16, 16, 3 * 12, 1 * 12, 0]
    assert [call["sent"] for call in second] == [16, 16, 16, 1 * 12, 3 * 12, 0]
    assert {call["purpose"] for call in first} == {"communicate"}
