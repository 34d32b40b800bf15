"""What the backward pass computes again instead of keeping it: the modes, the second pass, and the choices it follows.

Megatron's `recompute_granularity="full"` recomputes transformer layers from outside: it works, but without records.

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
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from coe_megatron.chain.settings import Recompute
from coe_megatron.errors import ConfigError
from coe_megatron.model.unsupported import refuse_unrecorded


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
        refuse_unrecorded(config, f"recompute {recompute!r}")
    return recompute


@dataclass
class RoutingRecord:
    """What one router decided in one forward pass: empty at first, written once, followed when the pass is recomputed.

    Recomputed logits can differ in their last bits (sums on CUDA have no fixed order), and a token between two experts
    would go elsewhere: its gradient would be that of another function, and tensors would change their shapes. A record
    belongs to a call and not to the router, so that several calls may wait for their backward passes.

    Attributes:
        experts_TK: int64, the experts of each token, in the order of the choice.
        kept_TN: bool, with a capacity: the choices that it did not turn away.
        counted: what the global auxiliary loss had counted before: token copies by expert, and micro-batches.
    """

    experts_TK: torch.Tensor | None = None
    kept_TN: torch.Tensor | None = None
    counted: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def is_known(self) -> bool:
        """Whether the first pass has been."""
        return self.experts_TK is not None


@dataclass(frozen=True)
class Choice:
    """What Megatron's top-k routing asks in one call, where it would ask its own RouterReplay.

    Attributes:
        record: followed if it is known, else written.
        masked_TN: bool, experts that a token must not be sent to; None for none.
        stock: Megatron's own replay of recorded choices, to ask in the first pass; None if it is off.
    """

    record: RoutingRecord
    masked_TN: torch.Tensor | None
    stock: RouterReplay | None

    def get_replay_topk(self, scores_TN, topk, num_groups, group_topk, choose) -> tuple[torch.Tensor, torch.Tensor]:
        """The chosen scores and experts [T, K].

        Both passes gather the scores, so that both keep the same tensors, as checkpointing requires.
        """
        if self.record.experts_TK is None:
            if self.stock is not None:
                choose = partial(self.stock.get_replay_topk, default_compute_topk=choose)
            ranking_TN = scores_TN.detach()
            if self.masked_TN is not None:  # a score of 0 is not enough: others may be 0 too, and a bias lifts it
                ranking_TN = ranking_TN.masked_fill(self.masked_TN, -math.inf)
            _, self.record.experts_TK = choose(ranking_TN, topk, num_groups, group_topk)
        return scores_TN.gather(1, self.record.experts_TK), self.record.experts_TK


def recomputed(function: Callable, *args: Any, to_the_end: bool = False) -> Any:
    """`function(*args)`, of which only the arguments are kept: the backward pass calls it a second time.

    torch's checkpoint rather than Megatron's, which runs a backward pass of its own inside the backward pass: a weight
    used in C checkpoints would then get C gradients one after the other, which changes their sums by rounding and calls
    ZeRO's hooks C times. torch's restores the generators of the CPU and the device, and with them dropout and jitter;
    inside Megatron's fork for sequence parallelism the device's generator is the forked one. Megatron's named
    generators are restored here.

    Args:
        args: tensors, also within tuples, which torch's checkpoint gets one by one so that it knows them; or anything.
        to_the_end: the second pass goes on when all that is needed is there.
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
