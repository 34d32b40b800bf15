"""One process as any rank of any number: process groups that send nothing, and a model without storage."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch.testing._internal.distributed.fake_pg import FakeStore

from coe_megatron.distributed import process_groups
from coe_megatron.estimate.run_shape import RunShape
from coe_megatron.model.build import build_model
from coe_megatron.model.stage_parts import StageParts


@contextmanager
def as_rank(run: RunShape, rank: int, world_size: int) -> Iterator[None]:
    """Be this rank: Megatron's groups of all ranks are created as at the start of a run, but connect to nobody."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        process_groups.create_groups(run.config.parallel)
        process_groups.seed_weights(run.config.training.seed)
        yield
    finally:
        process_groups.stop()


def groups_made() -> tuple[int, int]:
    """How many groups this rank has created, and of how many of them it is a member."""
    world = dist.distributed_c10d._world  # torch has no other count
    return world.group_count, len(world.pg_map)


def build_without_storage(run: RunShape) -> GPTModel | StageParts:
    """The model of this rank, whose tensors have shapes but no memory."""
    meta, device_of_megatron = torch.device("meta"), torch.cuda.current_device
    torch.cuda.current_device = lambda: meta  # type: ignore[assignment, return-value] # where Megatron allocates
    try:
        with meta:
            return build_model(run.config, run.vocab_size)
    finally:
        torch.cuda.current_device = device_of_megatron
