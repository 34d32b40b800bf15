"""Router state that changes once per step: the expert bias, loads of the global auxiliary loss, weights of tokens."""

from collections.abc import Sequence

import torch
from megatron.core.transformer.moe.moe_utils import get_updated_expert_bias

from coe_megatron.model.layer import routers
from coe_megatron.model.router import CoERouter


def weigh_over_step(model: torch.nn.Module, tokens: torch.Tensor) -> None:
    """Let every token weigh the same in the losses of routers, whichever micro-batch of the step it is in.

    Args:
        tokens: without padding in a micro-batch, the mean over all micro-batches of the step, scalar; 0 counts as 1.
    """
    for _, _, router in routers(model):
        router.step_tokens = tokens.clamp(min=1)


def update_router_state(model: torch.nn.Module, applied: bool = True) -> None:
    """Update the expert biases after an optimizer step and reset the loads; collective where `moe.expert_bias` is on.

    Args:
        applied: False for a skipped step, which changes no bias.
    """
    found = [router for _, _, router in routers(model)]
    for router in found:
        router.reset_global_aux_loss_tracker()
    biased = [router for router in found if router.enable_expert_bias]
    if biased and applied:
        _update_expert_bias(biased)
    for router in biased:
        router.local_tokens_per_expert.zero_()


def _update_expert_bias(biased: Sequence[CoERouter]) -> None:
    """Per iteration b_i += rate * sign(mean load - load_i), loads of this step over all ranks (arXiv 2408.15664)."""
    loads = torch.stack([router.local_tokens_per_expert for router in biased])
    biases = torch.stack([router.expert_bias for router in biased])
    updated = get_updated_expert_bias(loads, biases, biased[0].config.moe_router_bias_update_rate)
    for router, bias in zip(biased, updated, strict=True):
        router.expert_bias.copy_(bias)
