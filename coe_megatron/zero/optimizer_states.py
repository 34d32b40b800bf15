"""Whole tensors of a parameter out of ZeRO's partitions, and back: its weight, fp32 master and AdamW's two moments.

Stages 1 and 2 cut a group of parameters, laid end to end, into equal parts without regard to where a parameter ends;
stage 3 cuts every parameter. DeepSpeed's `safe_get_full_...` and `safe_set_full_...` put a parameter together and take
it apart. Its reads are collective: all ranks that share a parameter call them in the same order. Values come back bit
by bit, but for a zero's sign.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import deepspeed
import torch
from deepspeed import DeepSpeedEngine as Engine
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)

from coe_megatron.zero import expert_groups

MASTER = "fp32_param"
MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = (MASTER, *MOMENTS)


def read(engine: Engine, parameter: torch.nn.Parameter, kind: str) -> torch.Tensor:
    """One of KINDS of a parameter of this rank, whole, fp32, on the parameter's device."""
    if engine.zero_optimization_stage() == 0:
        return parameter.detach() if kind == MASTER else engine.optimizer.state[parameter][kind]
    if kind == MASTER:
        return safe_get_full_fp32_param(parameter)
    return safe_get_full_optimizer_state(parameter, kind)


@torch.no_grad()
def write(engine: Engine, parameter: torch.nn.Parameter, kind: str, value: torch.Tensor) -> None:
    """Set one of KINDS from a whole tensor; each rank keeps its part. Weights of stages 1 and 2 are not changed."""
    stage = engine.zero_optimization_stage()
    value = value.to(parameter.device)
    if stage == 0:
        read(engine, parameter, kind).copy_(value)
    elif stage == 3:
        key = None if kind == MASTER else kind
        partition, _ = engine.optimizer._get_fp32_opt_state_partition(parameter, False, optim_state_key=key)
        # DeepSpeed's own setter reads beyond the end where the last part is padded.
        partition.copy_(_part(parameter, value, partition.numel()))
    elif kind == MASTER:
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, kind)


@contextmanager
def gathered(engine: Engine) -> Iterator[None]:
    """While this lasts, weights that stage 3 cuts are whole on every rank, to be read; otherwise they are so anyway."""
    if engine.zero_optimization_stage() < 3:
        yield
        return
    # A forward pass without a backward pass, an evaluation, leaves weights behind that it has begun to gather ahead.
    engine.empty_partition_cache()
    parameters = list(engine.module.parameters())
    with ExitStack() as stack:
        for experts in (True, False):  # each family has ranks of its own to gather from
            family = [parameter for parameter in parameters if expert_groups.is_expert(parameter) == experts]
            stack.enter_context(deepspeed.zero.GatheredParameters(family))
        yield


def write_weight(engine: Engine, parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Set a weight from a whole tensor, of stage 3 this rank's part of it."""
    if engine.zero_optimization_stage() < 3:
        parameter.data.copy_(value)
        return
    part = parameter.ds_tensor  # type: ignore[attr-defined]
    part.data.copy_(_part(parameter, value, part.numel()))
    if parameter.shape == value.shape:  # it is whole just now, as small ones are most of the time
        parameter.data.copy_(value)


def _part(parameter: torch.nn.Parameter, value: torch.Tensor, size: int) -> torch.Tensor:
    """This rank's part, of `size` elements, of a whole tensor that stage 3 cuts; the last part is padded."""
    ranks = parameter.ds_zero_partition_world_size  # type: ignore[attr-defined]
    padded = torch.nn.functional.pad(value.flatten(), (0, size * ranks - value.numel()))
    return padded.view(ranks, size)[parameter.ds_zero_partition_rank]  # type: ignore[attr-defined]


def steps(engine: Engine) -> int:
    """Steps that AdamW has taken (a step with gradients that are not finite is none)."""
    return int(next(_adam_states(engine))["step"])


def set_steps(engine: Engine, count: int) -> None:
    """Make AdamW's bias correction go on from `count` steps."""
    for state in _adam_states(engine):
        state["step"].fill_(count)


def create(engine: Engine) -> None:
    """Make AdamW's states, which torch would make in the first step, and link them to the parameters."""
    for partition in partitions(engine):
        adam(engine).state[partition] = {
            "step": torch.zeros((), device=partition.device),  # where fused AdamW wants it
            **{moment: torch.zeros_like(partition, requires_grad=False) for moment in MOMENTS},
        }
    if engine.zero_optimization_stage() in (1, 2):
        # DeepSpeed does this itself, but not before the end of the first step.
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def adam(engine: Engine) -> torch.optim.Optimizer:
    """The AdamW inside."""
    return engine.optimizer if engine.zero_optimization_stage() == 0 else engine.optimizer.optimizer


def partitions(engine: Engine) -> list[torch.Tensor]:
    """What AdamW steps on this rank: parameters (stage 0), or its parts of them laid end to end."""
    if engine.zero_optimization_stage() == 3:
        return engine.optimizer.fp32_partitioned_groups_flat
    return [partition for group in adam(engine).param_groups for partition in group["params"]]


def _adam_states(engine: Engine) -> Iterator[dict[str, torch.Tensor]]:
    return (adam(engine).state[partition] for partition in partitions(engine))
