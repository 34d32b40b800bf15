"""Gradient norm and clipping for ZeRO stage 0, where DeepSpeed treats a rank's experts as replicated on all ranks."""

import math

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate

from coe_megatron.zero import expert_groups


def gradient_norm(model: torch.nn.Module) -> float:
    """2-norm of the gradients of the complete model, each parameter counted once; collective."""
    dense, experts = (
        torch.zeros(1, dtype=torch.float64, device=torch.cuda.current_device()) for _ in ("dense", "experts")
    )
    for parameter in model.parameters():
        if parameter.grad is None:
            continue
        square = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32).double().square()
        if expert_groups.is_expert(parameter):
            experts += square
        elif param_is_not_tensor_parallel_duplicate(parameter):
            dense += square
    dist.all_reduce(dense, group=parallel_state.get_model_parallel_group())
    dist.all_reduce(experts, group=parallel_state.get_expert_tensor_model_pipeline_parallel_group())
    return float((dense + experts).sqrt())


def clip(model: torch.nn.Module, max_norm: float) -> float:
    """Scale all gradients so that their norm is at most `max_norm`; returns the norm before clipping.

    If the norm is not finite, this drops the gradients, so that the step is skipped, and returns infinity.
    """
    norm = gradient_norm(model)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    if not math.isfinite(norm):
        model.zero_grad(set_to_none=True)
        return math.inf
    if norm > max_norm:
        torch._foreach_mul_(gradients, max_norm / (norm + 1e-6))
    return norm
