"""Recomputation of iterations or layers in the backward pass, with the routing of the first pass.

Megatron's `recompute_granularity="full"` recomputes whole transformer layers: it works, but without routing records.

T: tokens, N: experts, K: experts per token.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.moe.router_replay import RouterReplay
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from coe_megatron.chain.settings import Recompute
from coe_megatron.errors import ConfigError
from coe_megatron.model.exchange import Sizes
from coe_megatron.model.unsupported import refuse_unrecorded


def recompute_mode(config: TransformerConfig, recompute: Recompute) -> Recompute:
    """The mode that our own setting or Megatron's `recompute_modules` selects.

    Raises:
        ConfigError: there is no such mode, or the two select different ones.
    """
    if recompute not in get_args(Recompute):
        raise ConfigError(f"recompute is {recompute!r}: it must be one of {', '.join(get_args(Recompute))}")
    modules = config.recompute_modules if config.recompute_granularity == "selective" else []
    selected: Recompute = "layer" if "moe" in modules else "experts" if "moe_act" in modules else "none"
    if "none" not in (recompute, selected) and recompute != selected:
        raise ConfigError(
            f"recompute is {recompute!r}: recompute_modules already selects {selected!r}, leave it at none"
        )
    recompute = selected if recompute == "none" else recompute
    if recompute in ("iteration", "layer"):
        refuse_unrecorded(config, f"recompute {recompute!r}")
    return recompute


@dataclass
class RoutingRecord:
    """The routing of one forward pass of a router: filled in the first pass, used in the recomputed one.

    Recomputed logits can differ in their last bits (sums on CUDA have no fixed order). A token with a tie could then
    choose another expert: gradients would be wrong, and shapes of tensors would change. A record belongs to one call,
    so that several calls can wait for their backward passes.

    Attributes:
        experts_TK: int64, the experts of each token, in the order of choice.
        kept_TN: bool, the choices that were not dropped for capacity; None without a capacity.
        counted: counts of the global auxiliary loss before this pass: tokens per expert, and micro-batches.
        sizes: what ranks told each other to send tokens to their experts.
    """

    experts_TK: torch.Tensor | None = None
    kept_TN: torch.Tensor | None = None
    counted: tuple[torch.Tensor, torch.Tensor] | None = None
    sizes: Sizes | None = None

    @property
    def is_known(self) -> bool:
        """Whether the first pass has filled it."""
        return self.experts_TK is not None


@dataclass(frozen=True)
class ReplayedTopK:
    """Takes the place of Megatron's RouterReplay in one call of top-k routing.

    Attributes:
        record: used if it is known, else filled.
        masked_TN: bool, experts that a token must not choose; None for none.
        stock: Megatron's RouterReplay, used in the first pass; None if it is off.
    """

    record: RoutingRecord
    masked_TN: torch.Tensor | None
    stock: RouterReplay | None

    def get_replay_topk(self, scores_TN, topk, num_groups, group_topk, choose) -> tuple[torch.Tensor, torch.Tensor]:
        """The chosen scores and experts [T, K].

        Both passes gather the scores: checkpointing requires that they save the same tensors.
        """
        if self.record.experts_TK is None:
            if self.stock is not None:
                choose = partial(self.stock.get_replay_topk, default_compute_topk=choose)
            ranking_TN = scores_TN.detach()
            if self.masked_TN is not None:  # a score of 0 does not mask: others may be 0, and a bias raises it
                ranking_TN = ranking_TN.masked_fill(self.masked_TN, -math.inf)
            _, self.record.experts_TK = choose(ranking_TN, topk, num_groups, group_topk)
        return Chosen.apply(scores_TN, self.record.experts_TK), self.record.experts_TK


class Chosen(torch.autograd.Function):
    """torch.gather along the experts, [T, N] -> [T, K], which does not keep its input for the backward pass."""

    @staticmethod
    def forward(ctx, scores_TN: torch.Tensor, experts_TK: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(experts_TK)
        ctx.experts = scores_TN.shape[1]
        return scores_TN.gather(1, experts_TK)

    @staticmethod
    def backward(ctx, gradient_TK: torch.Tensor) -> tuple[torch.Tensor, None]:
        (experts_TK,) = ctx.saved_tensors
        return gradient_TK.new_zeros(len(gradient_TK), ctx.experts).scatter_(1, experts_TK, gradient_TK), None


def recomputed(function: Callable, *args: Any, to_the_end: bool = False) -> Any:
    """`function(*args)` under activation checkpointing: the backward pass calls it again.

    It uses torch's checkpoint. Megatron's runs a nested backward pass: a weight used in C checkpoints would get C
    separate gradients, which changes rounding and calls ZeRO's hooks C times. torch's restores the generators of the
    CPU and the device (inside Megatron's RNG fork, the forked one), and with them dropout and jitter. Megatron's named
    generators are restored here.

    Args:
        args: anything; tensors may be nested in tuples.
        to_the_end: run the second pass to its end, rather than only until all saved tensors are recomputed.
    """
    leaves, structure = tree_flatten(args)

    def with_structure(*leaves: Any) -> Any:
        return function(*tree_unflatten(leaves, structure))

    return checkpoint(
        with_structure,
        *leaves,
        use_reentrant=False,
        context_fn=_restoring_named_generators,
        early_stop=not to_the_end,
    )


def _restoring_named_generators() -> tuple[AbstractContextManager, AbstractContextManager]:
    """Contexts of the first and the second pass, which must start with the same generator states."""
    before = get_cuda_rng_tracker().get_states()

    @contextmanager
    def replay() -> Iterator[None]:
        tracker = get_cuda_rng_tracker()
        now = tracker.get_states()
        tracker.set_states(before)
        try:
            yield
        finally:
            tracker.set_states(now)

    return nullcontext(), replay()
