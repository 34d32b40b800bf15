"""Megatron's process groups of a run of any number of ranks, against the closed forms of `estimate.traffic`."""

from collections.abc import Callable

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.parallel_state import RankGenerator

from coe_megatron.config.layout import Layout
from coe_megatron.distributed import process_groups
from coe_megatron.errors import ConfigError
from coe_megatron.estimate import traffic
from coe_megatron.estimate.run_shape import RunShape
from coe_megatron.training.data_shard import data_shard

_OWN: dict[str, Callable[[], dist.ProcessGroup]] = {
    "tensor": parallel_state.get_tensor_model_parallel_group,
    "context": parallel_state.get_context_parallel_group,
    "data": process_groups.replicas,
    "expert_tensor": parallel_state.get_expert_tensor_parallel_group,
    "expert": parallel_state.get_expert_model_parallel_group,
    "expert_data": parallel_state.get_expert_data_parallel_group,
    "pipeline": parallel_state.get_pipeline_model_parallel_group,
}
_ORDER = "tp-cp-ep-dp-pp"  # Megatron's, by which it numbers ranks
_DENSE = {"tensor": "tp", "context": "cp", "data": "dp-cp", "pipeline": "pp"}
_EXPERTS = {"expert_tensor": "tp", "expert": "ep", "expert_data": "dp", "pipeline": "pp"}
_OTHERS = {False: ("dp", "tp-pp", "tp-cp", "tp-dp", "tp-dp-cp"), True: ("tp-ep", "tp-ep-pp")}


def check_own_groups(run: RunShape, rank: int) -> None:
    """Check the groups and the data shard of this rank (`as_rank`) against the closed forms.

    Raises:
        ConfigError: a group has other members.
    """
    for name, group in _assumed(run).items():
        found, wanted = dist.get_process_group_ranks(_OWN[name]()), _members(rank, group)
        if found != wanted:
            raise ConfigError(
                f"process groups: the {name} group of rank {rank} has {_shown(found)}, not {_shown(wanted)}"
            )
    layout = run.layout
    stage = layout.world_size // layout.pipeline
    shard, wanted_shard = data_shard(), rank % stage // (layout.tensor * layout.context)
    if shard != {"dp_rank": wanted_shard, "dp_size": layout.data}:
        raise ConfigError(f"process groups: rank {rank} takes the samples of {shard}, not of replica {wanted_shard}")


def check_all_groups(run: RunShape) -> None:
    """Check that the groups of every kind have each rank once, and are those of the closed forms.

    Raises:
        ConfigError: they do not.
    """
    layout, assumed = run.layout, _assumed(run)
    for with_experts, named in ((False, _DENSE), (True, _EXPERTS)):
        generator = _generator(layout, with_experts)
        for kind in (*named.values(), *_OTHERS[with_experts]):
            made = generator.get_ranks(kind)
            if sorted(rank for ranks in made for rank in ranks) != list(range(layout.world_size)):
                raise ConfigError(f"process groups: the {kind} groups do not have each rank once")
        for name, kind in named.items():
            for ranks in generator.get_ranks(kind):
                if ranks != (wanted := _members(ranks[0], assumed[name])):
                    raise ConfigError(f"process groups: a {name} group is {_shown(ranks)}, not {_shown(wanted)}")


def _assumed(run: RunShape) -> dict[str, traffic.Group]:
    return traffic.groups(run.layout, run.config.parallel.ranks_per_node)


def _generator(layout: Layout, with_experts: bool) -> RankGenerator:
    if with_experts:
        return RankGenerator(
            layout.expert_tensor, layout.expert, layout.expert_data, layout.pipeline, cp=1, order=_ORDER
        )
    return RankGenerator(layout.tensor, 1, layout.data, layout.pipeline, cp=layout.context, order=_ORDER)


def _members(rank: int, group: traffic.Group) -> list[int]:
    """The ranks of this size and stride with this one."""
    first = rank - rank // group.stride % group.size * group.stride
    return list(range(first, first + group.size * group.stride, group.stride))


def _shown(ranks: list[int]) -> str:
    return f"ranks {', '.join(map(str, ranks[:3]))}{', ...' * (len(ranks) > 3)} ({len(ranks):,} in all)"
