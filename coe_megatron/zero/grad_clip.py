"""ZeRO stage 0: norm and clipping of whole gradients. DeepSpeed's own there take a rank's experts for everybody's."""

import math

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate

from coe_megatron.zero import expert_groups


def gradient_norm(model: torch.nn.Module) -> float:
    """2-norm of the gradients of the whole model, each parameter counted once wherever it lies; collective."""
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


def clip(model: torch.nn.Module, largest: float) -> float:
    """Scale all gradients so that their norm is at most `largest`; returns the norm before that.

    Where it is not finite the gradients are forgotten, so that the step changes nothing.
    """
    norm = gradient_norm(model)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    if not math.isfinite(norm):
        model.zero_grad(set_to_none=True)
        return math.inf
    if norm > largest:
        torch._foreach_mul_(gradients, largest / (norm + 1e-6))
    return norm
