"""How many tokens an expert takes: Megatron's capacity, but of the tokens that are not padding.

Megatron's own dropping counts padded positions: they take places in an expert, and they raise its capacity, so that the
same documents with more padding drop other tokens. Without a padding mask its function is the one that is called here.

T: positions of a micro-batch on this rank, N: experts, K: experts chosen for a token.
"""

import math

import torch
from megatron.core.transformer.moe.moe_utils import apply_router_token_dropping, get_capacity


def within_capacity(
    gates_TN: torch.Tensor,
    chosen_TN: torch.Tensor,
    padding_T: torch.Tensor | None,
    *,
    topk: int,
    factor: float,
    policy: str,
) -> torch.Tensor:
    """The choices that no expert turns away; each takes the real tokens' mean load times `factor`, rounded up.

    The capacity is a tensor, so that the host waits for nothing. Of equals the first in the order of positions stay; on
    the CPU Megatron's function, for want of a rule in torch's top-k, keeps any of them.

    Args:
        gates_TN: the router's gates, without gradients.
        chosen_TN: bool.
        padding_T: bool, True at padding, which goes to no expert; None without a mask.
        policy: who stays: the largest gates (`probs`), or the first in the order of positions (`position`).

    Returns:
        Bool [T, N].
    """
    if padding_T is None:
        return apply_router_token_dropping(gates_TN, chosen_TN, topk, factor, policy)[1]
    chosen_TN = chosen_TN & ~padding_T.unsqueeze(1)
    capacity = ((~padding_T).sum().double() * topk / chosen_TN.shape[1] * factor).ceil()  # get_capacity on the device
    if policy == "position":
        return chosen_TN & (chosen_TN.cumsum(0) <= capacity)
    ranking_TN = gates_TN.masked_fill(~chosen_TN, -math.inf)
    rank_TN = ranking_TN.argsort(dim=0, descending=True, stable=True).argsort(dim=0)
    return chosen_TN & (rank_TN < capacity)


def rows_per_expert(positions: int, topk: int, experts: int, factor: float) -> int:
    """With `moe_pad_expert_input_to_capacity`: rows of every expert, whatever is padding; at most all positions."""
    return min(get_capacity(positions * topk, experts, factor), positions)


def filled_up(chosen_TN: torch.Tensor, rows: int) -> torch.Tensor:
    """Bool [T, N], True exactly `rows` times for each expert: at the choices, and from the front at others.

    Args:
        chosen_TN: bool, at most `rows` True for each expert; the others have gates of 0.
    """
    order_TN = chosen_TN.to(torch.int8).argsort(dim=0, descending=True, stable=True)
    return torch.zeros_like(chosen_TN).scatter(0, order_TN[:rows], True)
