"""Makes DeepSpeed treat Megatron's experts as experts, on Megatron's groups.

DeepSpeed knows expert parallelism only for layers of its own: without one of them in the model it silently averages
experts over all ranks, and it makes the groups itself. What it reads of a layer is little, though: that there is one,
a `set_deepspeed_parallelism` that fills its table of groups, and on every expert's parameter the name of its group.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.utils import groups
from megatron.core import parallel_state


def is_expert(parameter: torch.nn.Parameter) -> bool:
    """Whether a parameter differs between the ranks of the data-parallel group (Megatron's mark for it)."""
    return not getattr(parameter, "allreduce", True)


def group_name() -> str:
    """The name under which DeepSpeed finds the expert groups."""
    return f"ep_size_{parallel_state.get_expert_model_parallel_world_size()}"


@contextmanager
def announced(model: torch.nn.Module) -> Iterator[None]:
    """While DeepSpeed builds its engine, the model holds a layer without weights that announces the experts.

    Does nothing for a model whose experts are whole on every rank (EP 1): for DeepSpeed it is a dense one.
    """
    experts = [parameter for parameter in model.parameters() if is_expert(parameter)]
    if not experts:
        yield
        return
    for parameter in experts:
        parameter.group_name = group_name()  # type: ignore[attr-defined]
        # Stage 3 cuts what bears these marks over the replicas of an expert; without them it mixes different experts.
        parameter.ds_zero_placement_family = "autoep_expert"  # type: ignore[attr-defined]
        parameter.ds_zero_partition_group_name = group_name()  # type: ignore[attr-defined]
    model.add_module(_Announcement.NAME, _Announcement(num_experts=model.config.num_moe_experts))  # type: ignore
    try:
        yield
    finally:
        delattr(model, _Announcement.NAME)


class _Announcement(AutoEPMoELayer):
    """The layer DeepSpeed looks for: of AutoEP's kind, which unlike its older `MoE` goes with ZeRO-3 as well."""

    NAME = "deepspeed_expert_groups"

    def __init__(self, num_experts: int) -> None:
        torch.nn.Module.__init__(self)  # none of the weights and settings of the base class
        self.num_experts = num_experts

    def set_deepspeed_parallelism(self, *_args, **_kwargs) -> None:
        """DeepSpeed asks here for expert groups; it gets Megatron's, and only those.

        Over the first stage 3 adds up what the ranks of one replica hold of a norm: ranks that divide the experts, and
        ranks that cut them.
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
