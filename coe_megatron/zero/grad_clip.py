"""Gradient norms that replace DeepSpeed's, and clipping for ZeRO stage 0.

In stage 0 DeepSpeed treats a rank's experts as replicated on all ranks. In stage 2, and in stage 1 with fp32, it waits
for an all-reduce per parameter group, and for another one to average what all ranks have of experts. In stage 1 with
bf16 it sums the norm of experts over pipeline stages, without those that have none: the others would wait for ever.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.utils import combine_grad_norm_groups, is_model_parallel_parameter
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
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


def norm_of_partitions(optimizer: DeepSpeedZeroOptimizer) -> torch.Tensor:
    """2-norm of the gradients that ZeRO has partitioned, scalar fp32; infinite if it is not finite. Collective.

    Replaces `DeepSpeedZeroOptimizer.scaled_global_norm`, without offloading: one all-reduce for all parameter groups,
    of which a pipeline stage without experts has fewer.
    """
    squares = [_sum_of_squares(optimizer, group) for group in range(len(optimizer.bit16_groups))]
    square = torch.stack(squares).sum(0, keepdim=True)
    dist.all_reduce(square, group=optimizer.dp_process_group)
    dist.all_reduce(square, group=parallel_state.get_model_parallel_group())
    return combine_grad_norm_groups(square.sqrt())


def norm_with_experts(
    dense_norm: torch.Tensor, mpu: Any, expert_tensors: dict[str, list[torch.Tensor]], norm_type: float = 2
) -> torch.Tensor:
    """2-norm of all gradients, scalar fp32; -1 if it is not finite. Collective, also on stages without experts.

    Replaces DeepSpeed's `get_norm_with_moe_layers`.

    Args:
        dense_norm: of the dense parameters of all stages; -1 if DeepSpeed found that it is not finite.
        expert_tensors: the gradients of this rank's experts, by their group; none on a stage without experts.
    """
    assert norm_type == 2, "only the 2-norm is supported"
    gradients = [gradient for group in expert_tensors.values() for gradient in group]
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    square = torch.stack(norms).square().sum() if norms else torch.zeros_like(dense_norm)
    dist.all_reduce(square, group=parallel_state.get_expert_tensor_model_pipeline_parallel_group())
    norm = (dense_norm.square() + square).sqrt()
    return torch.where(torch.isfinite(norm) & (dense_norm >= 0), norm, -1)


def _sum_of_squares(optimizer: DeepSpeedZeroOptimizer, group: int) -> torch.Tensor:
    """Of this rank's partition of a parameter group; what all tensor-parallel ranks hold counts on the first."""
    gradients = (g for g in optimizer.averaged_gradients[group] if not getattr(g, "_zero_padding", False))
    norms = [
        torch.linalg.vector_norm(gradient, dtype=torch.float64)
        for gradient, parameter in zip(gradients, optimizer.params_in_partition[group], strict=False)
        if is_model_parallel_parameter(parameter) or optimizer.model_parallel_rank == 0
    ]
    return torch.stack(norms).square().sum().float() if norms else torch.zeros((), device=torch.cuda.current_device())
