"""Tokens' way to the ranks of their experts and back: all-to-all with known sizes, started early and waited for late.

Two ways of sending, as `moe.dispatcher` says:

* `alltoall`: a row for each of a token's K choices;
* `deduplicated`: one row for each rank that holds some of a token's experts, with the gates of all of them; the rank
  spreads it to its experts and returns one row, their weighted sum.

Without capacity the host knows the number of rows, K per token, so on a single rank it waits for nothing. With several
it waits once, for how many rows each rank sends to each. With expert tensor parallelism, ranks that share experts
gather each other's rows, and each returns its part of the sums.

Three steps with a result each (`depart`, `work`, `arrive`): between them rows travel, and other work can be done.
Nothing is kept here from one pass to the next, so that C iterations and several chunks of tokens can be under way.

T: tokens of this rank, K: experts per token, N: experts, E: experts of a rank, D: hidden, M: rows sent or received, k:
slots of a row (K if deduplicated, else 1), G: ranks that share N experts (expert parallel x expert tensor parallel).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.distributed import ProcessGroup

from coe_megatron.distributed.flights import Flight
from coe_megatron.local_backend.expert_mlp import Assignment


@dataclass(frozen=True)
class Sizes:
    """What a rank has to know of all ranks' rows, on the host.

    Attributes:
        sent, received: rows to and from each rank of the expert-parallel group.
        gathered: rows that each rank of the expert-tensor-parallel group has received.
        rows: rows of the experts here: the slots with an expert, of all gathered rows.
    """

    sent: list[int]
    received: list[int]
    gathered: list[int]
    rows: int


@dataclass(frozen=True)
class Outgoing:
    """Rows under way to their experts.

    Attributes:
        assignment: on a single rank, where no row travels: to the experts; else None.
        flight: of states [M, D], and of gates and local experts (E for none), fp32 [M, 2k].
        tokens_M: int64, the token of each row that was sent.
        sizes: see Sizes.
    """

    assignment: Assignment | None = None
    flight: Flight | None = None
    tokens_M: Tensor | None = None
    sizes: Sizes | None = None


@dataclass(frozen=True)
class Returning:
    """Sums under way back.

    Attributes:
        output: on a single rank: [T, D].
        flight: of sums [M, D].
        tokens_M: as in Outgoing.
    """

    output: Tensor | None = None
    flight: Flight | None = None
    tokens_M: Tensor | None = None


class Exchange:
    """The exchange of one layer.

    Args:
        num_experts: N.
        ep_group, tp_group, tp_ep_group: expert parallel, expert tensor parallel, and both.
        deduplicated: see above.
    """

    def __init__(
        self,
        num_experts: int,
        ep_group: ProcessGroup,
        tp_group: ProcessGroup,
        tp_ep_group: ProcessGroup,
        deduplicated: bool = False,
    ) -> None:
        self.ep_group, self.tp_group, self.tp_ep_group = ep_group, tp_group, tp_ep_group
        self.local_experts = num_experts // ep_group.size()
        self.deduplicated = deduplicated

    def depart(self, tokens_TD: Tensor, gates_TK: Tensor, experts_TK: Tensor, sizes: Sizes | None = None) -> Outgoing:
        """Send each token to its experts.

        Args:
            experts_TK: int64, of N.
            sizes: those of an earlier pass with the same choices; None to ask the other ranks.
        """
        if self.tp_ep_group.size() == 1:
            slots_R, ends_E = _by_expert(experts_TK, self.local_experts, experts_TK.numel())
            return Outgoing(Assignment(tokens_TD, gates_TK, slots_R, ends_E))
        select = self._by_rank if self.deduplicated else self._by_choice
        counts_2G, rows = select(gates_TK, experts_TK)
        sizes = sizes or self._ask(counts_2G)
        tokens_M, gates_Mk, experts_Mk = rows(sum(sizes.sent))
        flight = Flight(self.ep_group, sizes.sent, sizes.received)
        # Local experts are small numbers, and one message is faster than two.
        flight.depart(tokens_TD.index_select(0, tokens_M), torch.cat([gates_Mk.float(), experts_Mk.float()], dim=1))
        return Outgoing(None, flight, tokens_M, sizes)

    def work(self, outgoing: Outgoing, experts: Callable[[Assignment], Tensor]) -> Returning:
        """Wait for the rows, let the experts work on them, and send their sums back."""
        if outgoing.assignment is not None:
            return Returning(experts(outgoing.assignment))
        assert outgoing.flight is not None and outgoing.sizes is not None
        tokens_MD, slots_M2k = outgoing.flight.arrive()
        gathered, tensor_parallel = outgoing.sizes.gathered, self.tp_group.size() > 1
        if tensor_parallel:
            tokens_MD, slots_M2k = (
                gather_from_sequence_parallel_region(rows, group=self.tp_group, output_split_sizes=gathered)
                for rows in (tokens_MD, slots_M2k)
            )
        gates_Mk, experts_Mk = (part.contiguous() for part in slots_M2k.chunk(2, dim=1))
        slots_R, ends_E = _by_expert(experts_Mk.detach(), self.local_experts, outgoing.sizes.rows)
        output_MD = experts(Assignment(tokens_MD, gates_Mk, slots_R, ends_E))
        if tensor_parallel:
            output_MD = reduce_scatter_to_sequence_parallel_region(output_MD, self.tp_group, gathered)
        flight = outgoing.flight.back()
        flight.depart(output_MD)
        return Returning(None, flight, outgoing.tokens_M)

    def arrive(self, returning: Returning, tokens: int) -> Tensor:
        """Wait for the sums, and add those of each token: [T, D].

        Args:
            tokens: T.
        """
        if returning.output is not None:
            return returning.output
        assert returning.flight is not None and returning.tokens_M is not None
        (rows_MD,) = returning.flight.arrive()
        return RowSums.apply(rows_MD, returning.tokens_M, tokens)

    def _by_choice(self, gates_TK: Tensor, experts_TK: Tensor) -> tuple[Tensor, "_Rows"]:
        """A row for each choice: `_Counts` and `_Rows`."""
        experts_M, slots_M = experts_TK.flatten().sort(stable=True)
        ranks = torch.arange(self.ep_group.size(), device=experts_M.device)
        counts_G = _ends(experts_M // self.local_experts, ranks).diff(prepend=ranks.new_zeros(1))

        def rows(_: int) -> tuple[Tensor, Tensor, Tensor]:
            gates_M = gates_TK.flatten().index_select(0, slots_M)
            local_M = experts_M % self.local_experts
            return slots_M // experts_TK.shape[1], gates_M.unsqueeze(1), local_M.unsqueeze(1)

        return torch.stack([counts_G, counts_G]), rows

    def _by_rank(self, gates_TK: Tensor, experts_TK: Tensor) -> tuple[Tensor, "_Rows"]:
        """A row for each rank with an expert of a token: `_Counts` and `_Rows`."""
        tokens, ranks = len(experts_TK), self.ep_group.size()
        rank_TK = experts_TK // self.local_experts
        slots_GT = torch.zeros(ranks, tokens, dtype=torch.int64, device=rank_TK.device)
        slots_GT.scatter_add_(0, rank_TK.t(), torch.ones_like(rank_TK).t())
        goes_GT = slots_GT > 0

        def rows(total: int) -> tuple[Tensor, Tensor, Tensor]:
            order = goes_GT.flatten().to(torch.uint8).argsort(descending=True, stable=True)[:total]
            tokens_M, rank_M1 = order % tokens, (order // tokens).unsqueeze(1)
            is_there_Mk = rank_TK.index_select(0, tokens_M) == rank_M1
            gates_Mk = gates_TK.index_select(0, tokens_M) * is_there_Mk
            local_Mk = experts_TK.index_select(0, tokens_M) - rank_M1 * self.local_experts
            return tokens_M, gates_Mk, local_Mk.where(is_there_Mk, self.local_experts)

        return torch.stack([goes_GT.sum(1), slots_GT.sum(1)]), rows

    def _ask(self, counts_2G: Tensor) -> Sizes:
        """Tell the others how many rows, and slots with an expert, go where; the host waits for their answers."""
        counts_G2 = counts_2G.t().contiguous()
        if self.tp_group.size() == 1:  # an all-to-all, since gloo's all-gather goes round the ranks one by one
            theirs_G2 = torch.empty_like(counts_G2)
            dist.all_to_all_single(theirs_G2, counts_G2, group=self.ep_group)
            mine, theirs = torch.stack([counts_G2, theirs_G2]).tolist()
            received = [rows for rows, _ in theirs]
            return Sizes([rows for rows, _ in mine], received, [sum(received)], sum(slots for _, slots in theirs))
        group, ranks = self.tp_ep_group, self.ep_group.size()
        counts = counts_G2.new_empty(group.size() * ranks, 2)
        dist.all_gather_into_tensor(counts, counts_G2, group=group)
        # Neighbours in the group are those of expert tensor parallelism.
        by_rank = counts.view(ranks, self.tp_group.size(), ranks, 2).tolist()
        mine, own = self.ep_group.rank(), self.tp_group.rank()
        return Sizes(
            sent=[rows for rows, _ in by_rank[mine][own]],
            received=[there[own][mine][0] for there in by_rank],
            gathered=[sum(there[part][mine][0] for there in by_rank) for part in range(self.tp_group.size())],
            rows=sum(part[mine][1] for there in by_rank for part in there),
        )


class RowSums(torch.autograd.Function):
    """Rows [M, D] added up by token [M]: [T, D]. Unlike torch's index_add it does not keep the rows."""

    @staticmethod
    def forward(ctx, rows_MD: Tensor, tokens_M: Tensor, tokens: int) -> Tensor:
        ctx.save_for_backward(tokens_M)
        return rows_MD.new_zeros(tokens, rows_MD.shape[1]).index_add_(0, tokens_M, rows_MD)

    @staticmethod
    def backward(ctx, gradient_TD: Tensor) -> tuple[Tensor, None, None]:
        (tokens_M,) = ctx.saved_tensors
        return gradient_TD.index_select(0, tokens_M), None, None


# Given the number of rows M: the token of each [M], gates and local experts [M, k] of its slots.
_Rows = Callable[[int], tuple[Tensor, Tensor, Tensor]]


def _by_expert(experts_Mk: Tensor, experts: int, rows: int) -> tuple[Tensor, Tensor]:
    """Slots sorted by expert, int64 [R], and the row after the last one of each expert, int32 [E].

    Args:
        experts: E; slots of other numbers have no expert.
        rows: R, the number of slots that have one.
    """
    sorted_Mk, slots = experts_Mk.flatten().sort(stable=True)
    return slots[:rows], _ends(sorted_Mk, torch.arange(experts, dtype=sorted_Mk.dtype, device=slots.device))


def _ends(sorted_numbers: Tensor, numbers: Tensor) -> Tensor:
    """int32: where each of `numbers` ends in the sorted ones."""
    return torch.searchsorted(sorted_numbers, numbers, right=True, out_int32=True)
