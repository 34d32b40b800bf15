"""The shards of all ranks: the weights once, and ZeRO's partitions of what their replicas have in common.

Shards of weights do not depend on the number of replicas. So all ranks of the smallest world with the same TP, CP, PP,
EP and ETP are built, without storage; some ranks of the full world are compared with them.
"""

import pickle
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from tqdm import tqdm

from coe_megatron.checkpoint import sharding
from coe_megatron.checkpoint.tensor_index import covers
from coe_megatron.config import layout as layouts
from coe_megatron.errors import ConfigError
from coe_megatron.estimate import closed_forms
from coe_megatron.estimate.parameter_shards import parameter_shards
from coe_megatron.estimate.run_shape import RunShape
from coe_megatron.scale.rehearsal.ranks import as_rank, build_without_storage
from coe_megatron.zero import expert_groups

Place = tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # key, size of the tensor, offset, size


@dataclass(frozen=True)
class RankShards:
    """What one rank holds before ZeRO partitions it.

    Attributes:
        dense, experts: number of parameters.
        main: the parts of weights and buffers that no earlier rank has.
        parts: number of its parts, with those that other ranks have too.
        described: bytes of a list of all these parts, as ranks send them to each other before a save.
    """

    dense: int
    experts: int
    main: tuple[Place, ...]
    parts: int
    described: int

    @classmethod
    def of(cls, model: torch.nn.Module) -> "RankShards":
        """Of the model of this rank."""
        experts = sum(each.numel() for each in model.parameters() if expert_groups.is_expert(each))
        dense = sum(each.numel() for each in model.parameters()) - experts
        parts = sharding.stored_parts(model)
        described = len(pickle.dumps([part.without_data() for part in parts]))
        return cls(dense, experts, tuple(map(_place, sharding.main_parts(model))), len(parts), described)

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.dense + self.experts


def _place(part: ShardedTensor) -> Place:
    """Where a part is in its tensor; experts are slices of one, and have a dimension less than it."""
    size = (1,) * part.prepend_axis_num + tuple(part.local_shape)
    return part.key, tuple(part.global_shape), tuple(part.global_offset), size


def smallest_world(run: RunShape) -> int:
    """The fewest ranks with the same TP, CP, PP, EP and ETP."""
    return layouts.rank_unit(run.config)


def build_all(run: RunShape) -> list[RankShards]:
    """The shards of every rank of the smallest world; each takes about a second for a model of 27 layers."""
    found, size = [], smallest_world(run)
    for rank in tqdm(range(size), desc="shards", unit="rank", disable=None, leave=False):
        with as_rank(run, rank, size):
            found.append(RankShards.of(build_without_storage(run)))
    return found


def check_once(run: RunShape, shards: Iterable[RankShards]) -> None:
    """Check that the parts of all ranks are each tensor once, and together the parameters of the closed form.

    Raises:
        ConfigError: there is a gap or an overlap, or another number.
    """
    sizes: dict[str, tuple[int, ...]] = {}
    chunks: dict[str, list[ChunkStorageMetadata]] = defaultdict(list)
    for key, size, offset, length in (place for rank in shards for place in rank.main):
        if sizes.setdefault(key, size) != size:
            raise ConfigError(f"shards: {key} has the size {list(size)} on one rank and {list(sizes[key])} on another")
        chunks[key].append(ChunkStorageMetadata(torch.Size(offset), torch.Size(length)))
    for key, size in sizes.items():
        if not covers(chunks[key], torch.Size(size)):
            raise ConfigError(f"shards: the {len(chunks[key]):,} parts of {key} are not the tensor once")
    found, wanted = sum(map(prod, sizes.values())), closed_forms.parameters(run.model).total
    if found != wanted + (buffers := _buffers(run)):
        raise ConfigError(f"shards: the ranks hold {found - buffers:,} parameters, but the model has {wanted:,}")


def _buffers(run: RunShape) -> int:
    """Numbers that a checkpoint has besides the parameters: the expert bias."""
    return (
        run.model.experts
        * sum(count * kind.routers for count, kind in run.model.moe_kinds)
        * run.config.moe.expert_bias
    )


def check_stages(run: RunShape, shards: list[RankShards]) -> None:
    """Check the parameters of each rank, which ZeRO partitions, against `parameter_shards` of its stage.

    Raises:
        ConfigError: a rank holds another number, or the partitions of the replicas leave some out.
    """
    on_stage = len(shards) // run.layout.pipeline
    for rank, shard in enumerate(shards):
        wanted = parameter_shards(run, rank // on_stage)
        held = (shard.dense, shard.experts) if wanted.separate_experts else (shard.parameters, 0)
        total = (wanted.dense, wanted.experts) if wanted.separate_experts else (wanted.total, 0)
        if held != total:
            raise ConfigError(f"optimizer: rank {rank} holds {held} dense and expert parameters, but ZeRO gets {total}")


def check_in_full_world(run: RunShape, rank: int, found: RankShards, shards: list[RankShards]) -> None:
    """Check that a rank of the full world holds what its counterpart does, or nothing if it is a further replica.

    Raises:
        ConfigError: it has other parts.
    """
    full, unit = run.layout.world_size // run.layout.pipeline, len(shards) // run.layout.pipeline
    stage, place = divmod(rank, full)
    wanted = shards[stage * unit + place].main if place < unit else ()
    if set(found.main) != set(wanted):
        raise ConfigError(
            f"shards: rank {rank} of {run.layout.world_size:,} would write {len(found.main):,} parts of weights, "
            f"not the {len(wanted):,} that {len(shards):,} ranks leave to it"
        )
