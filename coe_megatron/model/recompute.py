"""What the backward pass computes again instead of keeping it: the modes, the second pass, and the routes it follows.

Megatron's `recompute_granularity="full"` recomputes transformer layers from outside: it works, but without routes.

T: tokens, N: experts, K: chosen for a token.
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
from torch.utils.checkpoint import checkpoint

from coe_megatron.chain.settings import Recompute
from coe_megatron.errors import ConfigError


def recompute_mode(config: TransformerConfig, recompute: Recompute) -> Recompute:
    """What is recomputed, whether our own setting or Megatron's `recompute_modules` asks for it.

    Raises:
        ConfigError: there is no such mode, or the two ask for different ones.
    """
    if recompute not in get_args(Recompute):
        raise ConfigError(f"recompute is {recompute!r}: it must be one of {', '.join(get_args(Recompute))}")
    modules = config.recompute_modules if config.recompute_granularity == "selective" else []
    asked: Recompute = "layer" if "moe" in modules else "experts" if "moe_act" in modules else "none"
    if "none" not in (recompute, asked) and recompute != asked:
        raise ConfigError(f"recompute is {recompute!r}: recompute_modules asks for {asked!r} already, leave it at none")
    recompute = asked if recompute == "none" else recompute
    if recompute in ("iteration", "layer"):
        _refuse_unknown_routes(config, recompute)
    return recompute


def _refuse_unknown_routes(config: TransformerConfig, recompute: Recompute) -> None:
    """What chooses experts where no Route can listen, and so might choose others when it is recomputed."""
    if config.moe_router_fusion:
        raise ConfigError(f"moe_router_fusion is True: with recompute {recompute!r} it must be False")
    if config.moe_router_load_balancing_type == "sinkhorn":
        raise ConfigError(
            f"moe_router_load_balancing_type is 'sinkhorn': with recompute {recompute!r} use an auxiliary loss"
        )


@dataclass
class RoutingRecord:
    """What one router decided in one forward pass: empty at first, written once, followed when the pass is recomputed.

    Recomputed logits can differ in their last bits (sums on CUDA have no fixed order), and a token between two experts
    would go elsewhere: its gradient would be that of another function, and tensors would change their shapes. A route
    belongs to a call and not to the router, so that several calls may wait for their backward passes.

    Attributes:
        experts_TK: int64, the experts of each token, in the order of the choice.
        kept_TN: bool, with a capacity: the choices that it did not turn away.
        counted: what the global auxiliary loss had counted before: token copies by expert, and micro-batches.
        stock: Megatron's own replay of recorded routes, to ask in the first pass; None if it is off.
        masked_TN: bool, experts that a token must not be sent to; None, also between calls, for none.
    """

    experts_TK: torch.Tensor | None = None
    kept_TN: torch.Tensor | None = None
    counted: tuple[torch.Tensor, torch.Tensor] | None = None
    stock: RouterReplay | None = None
    masked_TN: torch.Tensor | None = None

    @property
    def is_known(self) -> bool:
        """Whether the first pass has been."""
        return self.experts_TK is not None

    def get_replay_topk(self, scores_TN, topk, num_groups, group_topk, choose) -> tuple[torch.Tensor, torch.Tensor]:
        """The chosen scores and experts [T, K]; Megatron's top-k routing calls this where it would its RouterReplay.

        Both passes gather the scores, so that both keep the same tensors, as checkpointing requires.
        """
        if self.experts_TK is None:
            if self.stock is not None:
                choose = partial(self.stock.get_replay_topk, default_compute_topk=choose)
            ranking_TN = scores_TN.detach()
            if self.masked_TN is not None:  # a score of 0 is not enough: others may be 0 too, and a bias lifts it
                ranking_TN = ranking_TN.masked_fill(self.masked_TN, -math.inf)
            _, self.experts_TK = choose(ranking_TN, topk, num_groups, group_topk)
        return scores_TN.gather(1, self.experts_TK), self.experts_TK


def replayed(function: Callable, *args: Any, to_the_end: bool = False) -> Any:
    """`function(*args)`, of which only the arguments are kept: the backward pass calls it a second time.

    torch's checkpoint rather than Megatron's, which runs a backward pass of its own inside the backward pass: a weight
    used in C checkpoints would then get C gradients one after the other, which changes their sums by rounding and calls
    ZeRO's hooks C times. torch's restores the generators of the CPU and the device, and with them dropout and jitter;
    inside Megatron's fork for sequence parallelism the device's generator is the forked one. Megatron's named
    generators are restored here.

    Args:
        to_the_end: the second pass goes on when all that is needed is there.
    """
    return checkpoint(
        function, *args, use_reentrant=False, context_fn=_restoring_named_generators, early_stop=not to_the_end
    )


def _restoring_named_generators() -> tuple[AbstractContextManager, AbstractContextManager]:
    """What surrounds the first pass and what surrounds the second, which has to begin with the same generators."""
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
