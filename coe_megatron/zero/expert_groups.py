"""Makes DeepSpeed treat Megatron's experts as experts, on Megatron's groups.

DeepSpeed supports expert parallelism only for its own layers: without one of them in the model it silently averages
experts over all ranks, and it builds the groups itself. But it needs little of such a layer: that it exists, a
`set_deepspeed_parallelism` that fills DeepSpeed's table of groups, and the group's name on every expert parameter.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.utils import groups
from megatron.core import parallel_state


def is_expert(parameter: torch.nn.Parameter) -> bool:
    """Whether a parameter differs between the ranks of the data-parallel group (Megatron marks it with `allreduce`)."""
    return not getattr(parameter, "allreduce", True)


def are_separate() -> bool:
    """Whether the experts of this layout are partitioned and reduced apart, as `Layout.separate_experts`."""
    expert_tensor = parallel_state.get_expert_tensor_parallel_world_size()
    return (
        parallel_state.get_expert_model_parallel_world_size() > 1
        or expert_tensor != parallel_state.get_tensor_model_parallel_world_size()
    )


def group_name() -> str:
    """The key of the expert groups in DeepSpeed's tables."""
    return f"ep_size_{parallel_state.get_expert_model_parallel_world_size()}"


@contextmanager
def expert_placeholder(model: torch.nn.Module) -> Iterator[None]:
    """Add a placeholder MoE layer without weights to the model while DeepSpeed builds its engine.

    Does nothing for a model whose experts are complete on every rank (EP 1): DeepSpeed treats it as dense.
    """
    experts = [parameter for parameter in model.parameters() if is_expert(parameter)]
    if not experts:
        yield
        return
    for parameter in experts:
        parameter.group_name = group_name()  # type: ignore[attr-defined]
        # Stage 3 partitions parameters with these marks over the replicas of an expert; otherwise it mixes experts.
        parameter.ds_zero_placement_family = "autoep_expert"  # type: ignore[attr-defined]
        parameter.ds_zero_partition_group_name = group_name()  # type: ignore[attr-defined]
    model.add_module(_PlaceholderMoELayer.NAME, _PlaceholderMoELayer(num_experts=model.config.num_moe_experts))  # type: ignore
    try:
        yield
    finally:
        delattr(model, _PlaceholderMoELayer.NAME)


class _PlaceholderMoELayer(AutoEPMoELayer):
    """The layer that DeepSpeed looks for. Its AutoEP layer works with ZeRO-3 too, unlike the older `MoE`."""

    NAME = "deepspeed_expert_groups"

    def __init__(self, num_experts: int) -> None:
        torch.nn.Module.__init__(self)  # skips the weights and settings of the base class
        self.num_experts = num_experts

    def set_deepspeed_parallelism(self, *_args, **_kwargs) -> None:
        """Enter Megatron's expert groups, and no others, into DeepSpeed's tables.

        Stage 3 sums the norm over the expert-parallel group, so it includes expert tensor parallelism (EP x ETP).
        """
        expert, replicas = (
            parallel_state.get_expert_tensor_and_model_parallel_group(),
            parallel_state.get_expert_data_parallel_group(),
        )
        tables = {
            "_EXPERT_PARALLEL_GROUP": expert,
            "_EXPERT_PARALLEL_GROUP_RANKS": dist.get_process_group_ranks(expert),
            "_EXPERT_DATA_PARALLEL_GROUP": replicas,
            "_EXPERT_DATA_PARALLEL_GROUP_RANKS": dist.get_process_group_ranks(replicas),
        }
        for table, value in tables.items():
            getattr(groups, table).clear()
            getattr(groups, table)[group_name()] = value
