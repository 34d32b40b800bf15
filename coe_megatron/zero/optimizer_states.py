"""Gathers a parameter's full tensors from ZeRO's partitions and writes them back: weight, fp32 master, AdamW moments.

Stages 1 and 2 flatten a parameter group and split it into equal partitions, regardless of where a parameter ends; stage
3 partitions every parameter. DeepSpeed's `safe_get_full_...` and `safe_set_full_...` gather and scatter a parameter.
Reads are collective: all ranks that hold a parameter call them in the same order. Values are restored bit by bit,
except for the sign of zeros.
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
    """One of KINDS of a parameter of this rank: the full tensor, fp32, on the parameter's device; collective."""
    if engine.zero_optimization_stage() == 0:
        return parameter.detach() if kind == MASTER else engine.optimizer.state[parameter][kind]
    if kind == MASTER:
        return safe_get_full_fp32_param(parameter)
    return safe_get_full_optimizer_state(parameter, kind)


@torch.no_grad()
def write(engine: Engine, parameter: torch.nn.Parameter, kind: str, value: torch.Tensor) -> None:
    """Set one of KINDS from a full tensor; each rank keeps its partition. Stages 1 and 2 do not change weights."""
    stage = engine.zero_optimization_stage()
    value = value.to(parameter.device)
    if stage == 0:
        read(engine, parameter, kind).copy_(value)
    elif stage == 3:
        key = None if kind == MASTER else kind
        partition, _ = engine.optimizer._get_fp32_opt_state_partition(parameter, False, optim_state_key=key)
        # DeepSpeed's setter reads past the end when the last partition is padded.
        partition.copy_(_partition(parameter, value, partition.numel()))
    elif kind == MASTER:
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, kind)


@contextmanager
def gathered_weights(engine: Engine) -> Iterator[None]:
    """Within this context every rank can read full weights: stage 3 gathers them, other stages hold them anyway."""
    if engine.zero_optimization_stage() < 3:
        yield
        return
    # A forward pass without a backward pass (evaluation) leaves prefetched weights behind.
    engine.empty_partition_cache()
    parameters = list(engine.module.parameters())
    with ExitStack() as stack:
        for experts in (True, False):  # experts and dense parameters gather over different groups
            family = [parameter for parameter in parameters if expert_groups.is_expert(parameter) == experts]
            stack.enter_context(deepspeed.zero.GatheredParameters(family))
        yield


def write_weight(engine: Engine, parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Set a weight from a full tensor; in stage 3 only this rank's partition of it."""
    if engine.zero_optimization_stage() < 3:
        parameter.data.copy_(value)
        return
    partition = parameter.ds_tensor  # type: ignore[attr-defined]
    partition.data.copy_(_partition(parameter, value, partition.numel()))
    if parameter.shape == value.shape:  # it is gathered now, as small parameters usually are
        parameter.data.copy_(value)


def _partition(parameter: torch.nn.Parameter, value: torch.Tensor, size: int) -> torch.Tensor:
    """This rank's partition of a full tensor in stage 3: `size` elements, zero-padded at the end."""
    ranks = parameter.ds_zero_partition_world_size  # type: ignore[attr-defined]
    padded = torch.nn.functional.pad(value.flatten(), (0, size * ranks - value.numel()))
    return padded.view(ranks, size)[parameter.ds_zero_partition_rank]  # type: ignore[attr-defined]


def steps(engine: Engine) -> int:
    """AdamW's step count, without skipped steps."""
    return int(next(_adam_states(engine))["step"])


def set_steps(engine: Engine, count: int) -> None:
    """Set AdamW's step count, which its bias correction depends on."""
    for state in _adam_states(engine):
        state["step"].fill_(count)


def create(engine: Engine) -> None:
    """Allocate AdamW's states, which torch would do in the first step, and link them to the parameters."""
    for partition in partitions(engine):
        adam(engine).state[partition] = {
            "step": torch.zeros((), device=partition.device),  # fused AdamW needs it on this device
            **{moment: torch.zeros_like(partition, requires_grad=False) for moment in MOMENTS},
        }
    if engine.zero_optimization_stage() in (1, 2):
        # DeepSpeed does this itself only at the end of the first step.
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def adam(engine: Engine) -> torch.optim.Optimizer:
    """The AdamW that DeepSpeed wraps."""
    return engine.optimizer if engine.zero_optimization_stage() == 0 else engine.optimizer.optimizer


def partitions(engine: Engine) -> list[torch.Tensor]:
    """The tensors that AdamW updates on this rank: parameters (stage 0), or flat partitions of them."""
    if engine.zero_optimization_stage() == 3:
        return engine.optimizer.fp32_partitioned_groups_flat
    return [partition for group in adam(engine).param_groups for partition in group["params"]]


def _adam_states(engine: Engine) -> Iterator[dict[str, torch.Tensor]]:
    return (adam(engine).state[partition] for partition in partitions(engine))
