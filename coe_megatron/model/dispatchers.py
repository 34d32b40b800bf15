"""Megatron's token dispatchers: one for each pass, and all-to-all without waits and work that have no use.

Without capacity a pass has T K rows, and the host need not wait for the device to know it: rows are put into order by
sorting the T K choices. Only the split sizes of an all-to-all between ranks have to reach the host.

After the all-to-all, rows lie by source rank and within it by expert, and Megatron sorts them by expert: it cuts them
into (ranks x experts) chunks and joins these in another order. With one rank (expert parallel x expert tensor parallel
size 1) the order is right already, but cutting and joining copies every row twice each way.

T: tokens, T': rows, the copies of tokens for this rank's experts, D: hidden, N: experts, K: experts per token.
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
    """Same results and same state as Megatron's dispatcher."""

    tokens_per_expert: torch.Tensor | None
    capacity: int | None
    num_out_tokens: int

    @property
    def _is_sorted(self) -> bool:
        return self.ep_size * self.tp_size == 1

    def preprocess(self, routing_map: torch.Tensor) -> torch.Tensor:
        """Routing map [T, N] -> the row count of each local expert, and what the all-to-all has to know.

        Megatron's own fails where a capacity to pad to is larger than T.
        """
        if not self.drop_and_pad:
            return super().preprocess(routing_map)
        topk, factor = self.config.moe_router_topk, self.moe_expert_capacity_factor
        self.capacity = rows_per_expert(len(routing_map), topk, self.num_experts, factor)
        self.num_out_tokens = self.capacity * self.num_experts
        return torch.full((self.num_local_experts,), self.capacity * self.tp_size * self.ep_size)

    def dispatch_preprocess(
        self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [..., D], routing map and gates [T, N] -> rows [T K, D] sorted by expert, and their gates [T K].

        Rows of an expert are in the order of their tokens, as Megatron's are.
        """
        config = self.config
        if (
            config.moe_expert_capacity_factor is not None
            or config.moe_router_padding_for_quantization
            or config.moe_permute_fusion
            or self.shared_experts is not None
        ):
            return super().dispatch_preprocess(hidden_states, routing_map, probs)
        self.hidden_shape, self.probs, self.routing_map = hidden_states.shape, probs, routing_map
        tokens_TD = hidden_states.view(-1, self.hidden_shape[-1])
        counts = self.preprocess(routing_map)
        self.tokens_per_expert = self._maybe_dtoh_and_synchronize("before_permutation_1", counts)
        self.hidden_shape_before_permute = tokens_TD.shape
        experts, order = routing_map.to(torch.int8).topk(config.moe_router_topk).indices.flatten().sort(stable=True)
        self.reversed_local_input_permutation_mapping = tokens = order // config.moe_router_topk
        gates = probs.flatten().index_select(0, tokens * self.num_experts + experts)
        return tokens_TD.index_select(0, tokens), gates

    def _maybe_dtoh_and_synchronize(self, point: str, tokens_per_expert: torch.Tensor) -> torch.Tensor:
        """Megatron's copies to the host; on a single rank without capacity nothing needs them."""
        if self._is_sorted and self.config.moe_expert_capacity_factor is None:
            return tokens_per_expert
        return super()._maybe_dtoh_and_synchronize(point, tokens_per_expert)

    def dispatch_postprocess(
        self, global_input_tokens: torch.Tensor, global_probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows [T', D] and gates [T'] as they came -> sorted by local expert, with the row count of each expert."""
        if not self._is_sorted or self.shared_experts is not None:
            return super().dispatch_postprocess(global_input_tokens, global_probs)
        assert self.tokens_per_expert is not None
        counts = self._maybe_dtoh_and_synchronize("before_permutation_2", self.tokens_per_expert)
        counts = self._maybe_dtoh_and_synchronize("before_finish", counts)
        self.tokens_per_expert = None
        return global_input_tokens, counts, global_probs

    def combine_preprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Expert outputs [T', D] back into the order in which they came."""
        return hidden_states if self._is_sorted else super().combine_preprocess(hidden_states)
