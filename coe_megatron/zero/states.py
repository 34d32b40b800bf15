"""Whole fp32 tensors of a parameter out of ZeRO's partitions, and back: its master weight and AdamW's two moments.

ZeRO cuts a group of parameters, laid end to end, into equal parts without regard to where a parameter ends. DeepSpeed's
`safe_get_full_...` and `safe_set_full_...` put a parameter together and take it apart. Its reads are collective: all
ranks that share a parameter call them in the same order. Values come back bit by bit, but for a zero's sign.
"""

from collections.abc import Iterator

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)

MASTER = "fp32_param"
MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = (MASTER, *MOMENTS)


def read(parameter: torch.nn.Parameter, kind: str) -> torch.Tensor:
    """One of KINDS of a parameter of this rank, whole, fp32, on the parameter's device."""
    if kind == MASTER:
        return safe_get_full_fp32_param(parameter)
    return safe_get_full_optimizer_state(parameter, kind)


def write(parameter: torch.nn.Parameter, kind: str, value: torch.Tensor) -> None:
    """Set one of KINDS from a whole tensor; each rank keeps its part. The parameter itself is not changed."""
    value = value.to(parameter.device)
    if kind == MASTER:
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, kind)


def steps(engine: deepspeed.DeepSpeedEngine) -> int:
    """Steps that AdamW has taken (a step with gradients that are not finite is none)."""
    return int(next(_adam_states(engine))["step"])


def set_steps(engine: deepspeed.DeepSpeedEngine, count: int) -> None:
    """Make AdamW's bias correction go on from `count` steps."""
    for state in _adam_states(engine):
        state["step"].fill_(count)


def create(engine: deepspeed.DeepSpeedEngine) -> None:
    """Make AdamW's states, which torch would make in the first step, and link them to the parameters."""
    adam = engine.optimizer.optimizer
    for group in adam.param_groups:
        for partition in group["params"]:
            adam.state[partition] = {
                "step": torch.tensor(0.0),
                **{moment: torch.zeros_like(partition, requires_grad=False) for moment in MOMENTS},
            }
    # DeepSpeed does this itself, but not before the end of the first step.
    engine.optimizer._lazy_init_hp_params_optimizer_state()


def _adam_states(engine: deepspeed.DeepSpeedEngine) -> Iterator[dict[str, torch.Tensor]]:
    adam = engine.optimizer.optimizer
    return (adam.state[partition] for group in adam.param_groups for partition in group["params"])
