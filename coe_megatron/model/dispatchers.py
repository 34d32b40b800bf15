"""Megatron's token dispatchers, for what `exchange` does not do: capacity, all-gather, overlapped shared experts.

T: tokens, N: experts.
"""

from copy import copy

import torch
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher, MoETokenDispatcher

from coe_megatron.model.capacity import rows_per_expert


def for_one_pass(dispatcher: MoETokenDispatcher) -> MoETokenDispatcher:
    """A copy that one pass through the experts may write its state on; the state goes with the copy.

    Megatron's dispatchers keep routing map, counts and splits on themselves from dispatch to combine, the flex
    dispatcher on its communication manager.
    """
    own = copy(dispatcher)
    if hasattr(own, "_comm_manager"):
        own._comm_manager = copy(own._comm_manager)
    return own


class AllToAllDispatcher(MoEAlltoAllTokenDispatcher):
    """Megatron's dispatcher, where a capacity to pad to may be larger than T."""

    capacity: int | None
    num_out_tokens: int

    def preprocess(self, routing_map: torch.Tensor) -> torch.Tensor:
        """Routing map [T, N] -> the row count of each local expert, and what the all-to-all has to know."""
        if not self.drop_and_pad:
            return super().preprocess(routing_map)
        topk, factor = self.config.moe_router_topk, self.moe_expert_capacity_factor
        self.capacity = rows_per_expert(len(routing_map), topk, self.num_experts, factor)
        self.num_out_tokens = self.capacity * self.num_experts
        return torch.full((self.num_local_experts,), self.capacity * self.tp_size * self.ep_size)
