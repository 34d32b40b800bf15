"""The DeepSpeed engine of a Megatron model, and the few calls a training loop makes on it.

    for micro_batch in step:        # `accumulation` of them
        loss = token_losses(engine(...)).sum() / tokens_of_the_step
        backward(engine, loss)
        engine.step()               # counts micro-batches; the weights change after the last
    norm = gradient_norm(engine)

`zero.passes` does this, for pipelines too.

What the gradients are (all scaling is done by `backward`, nowhere else):

* of the loss: the SUM over ranks and micro-batches. So the loop divides the token losses of a micro-batch by the number
  of counting tokens in the whole step (all ranks, all micro-batches), and rows of any length weigh by their tokens;
* of auxiliary losses, which Megatron attaches inside the model (load balancing, z-loss): the MEAN over ranks and
  micro-batches, so that their coefficients mean the same with any layout.
"""

import io
import logging
import math
import os
import sys
from contextlib import redirect_stdout
from functools import partial
from typing import Any, TypeAlias

import deepspeed
import deepspeed.ops
import torch
from deepspeed.utils import set_z3_leaf_modules
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from pydantic import ValidationError

from coe_megatron.config.native import merged, read_native
from coe_megatron.config.settings import OptimizerSettings, TrainingSettings, ZeroSettings
from coe_megatron.config.zero_sizes import ZeroSizes
from coe_megatron.distributed.collectives import run_on_rank0
from coe_megatron.distributed.process_groups import MegatronGroups
from coe_megatron.errors import ConfigError
from coe_megatron.lean_imports import import_deepspeed_muon
from coe_megatron.model.layer import CoELayer
from coe_megatron.model.routing_stats import routers
from coe_megatron.zero import expert_groups, grad_clip, optimizer_states

Engine: TypeAlias = deepspeed.DeepSpeedEngine


def build_engine(
    model: torch.nn.Module,
    optimizer: OptimizerSettings,
    training: TrainingSettings,
    zero: ZeroSettings,
    accumulation: int,
) -> Engine:
    """Put a model under DeepSpeed: AdamW, ZeRO, gradient clipping and, with bf16, fp32 masters and gradient sums.

    Megatron's groups must exist, and all ranks must have built equal weights. Optimizer states exist from here on, not
    only from the first step: what does not fit into memory fails now, and a checkpoint can be loaded at once.

    Args:
        accumulation: micro-batches a step on each rank.

    Returns:
        The engine; `engine.module` is the model.

    Raises:
        ConfigError: DeepSpeed does not know a key or value of `zero.deepspeed`.
    """
    _prepare_deepspeed()
    _sum_over_sequence_parts(model)
    native = {} if zero.deepspeed is None else run_on_rank0(partial(read_native, zero.deepspeed))
    sizes = ZeroSizes.of(sum(parameter.numel() for parameter in model.parameters()), native)
    if zero.stage == 3:
        set_z3_leaf_modules(model, [CoELayer], raise_if_not_found=False)  # gathered once a pass, not C times
    # stdout is for what programs print; DeepSpeed reports its memory there.
    with expert_groups.announced(model), redirect_stdout(io.StringIO()):
        groups = _parameter_groups(model, optimizer, zero.stage == 1 and training.precision == "bf16")
        # Fused it makes no tensors as large as what it steps, which would be the peak of a step on few ranks.
        adam = torch.optim.AdamW(groups, lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps, fused=True)
        try:
            engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=adam,
                mpu=MegatronGroups(),
                config=merged(_config(optimizer, training, zero, sizes, accumulation), native),
                dist_init_required=False,
            )
        except ValidationError as error:  # ours is valid
            first = error.errors()[0]
            raise ConfigError(
                f"zero.deepspeed is {zero.deepspeed}: {'.'.join(map(str, first['loc']))}: {first['msg']}"
            ) from error
    # Stage 0, and stage 1 in bf16, would otherwise copy up to 500 million gradients end to end.
    engine.allreduce_gradients = partial(engine.allreduce_gradients, bucket_size=sizes.reduce_bucket)
    if zero.stage == 0:
        engine.clip_fp32_gradients = partial(_clip_whole, engine)  # in place of DeepSpeed's, see `whole`
    optimizer_states.create(engine)
    return engine


def backward(engine: Engine, loss: torch.Tensor) -> None:
    """Backpropagate one micro-batch; its gradients add to those of the step (the module's docstring says how).

    DeepSpeed divides what it sums by the number of data-parallel ranks: for experts too, although an expert sums over
    its replicas only, because these have seen the tokens of all ranks. The factor here undoes it. Its division by the
    accumulation is switched off. An auxiliary loss has a gradient of Megatron's scale, whatever `loss` is; with the
    division by the ranks this one makes it the mean.
    """
    scale = torch.full((1,), 1 / engine.gradient_accumulation_steps(), device=loss.device)  # as Megatron's schedules do
    MoEAuxLossAutoScaler.set_loss_scale(scale)
    engine.backward(loss * engine.dp_world_size, scale_wrt_gas=False)


def set_lr(engine: Engine, lr: float) -> None:
    """Set the learning rate of the coming steps."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def gradient_norm(engine: Engine) -> float:
    """The 2-norm of all gradients of the last step, before clipping.

    Infinite when a gradient was not finite; such a step was left out.
    """
    return float(engine.get_global_grad_norm())


def was_applied(engine: Engine) -> bool:
    """Whether the last step changed anything: weights, optimizer states and their step counts; equal on all ranks."""
    return math.isfinite(gradient_norm(engine))


def _sum_over_sequence_parts(model: torch.nn.Module) -> None:
    """Sequence parallelism: a parameter that every tensor-parallel rank has, but for its part of the tokens.

    Its gradients are summed as they come: ZeRO 2 and 3 take them away within the backward pass.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return
    for parameter in model.parameters():
        if getattr(parameter, "sequence_parallel", False):
            parameter.register_hook(partial(_all_reduced, group))


def _all_reduced(group: torch.distributed.ProcessGroup, gradient: torch.Tensor) -> torch.Tensor:
    summed = gradient.clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(summed, group=group)
    return summed


def _clip_whole(engine: Engine) -> None:
    engine._global_grad_norm = grad_clip.clip(engine.module, engine.gradient_clipping())


def _config(
    optimizer: OptimizerSettings, training: TrainingSettings, zero: ZeroSettings, sizes: ZeroSizes, accumulation: int
) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": training.micro_batch,
        "gradient_accumulation_steps": accumulation,
        # In a pipeline Megatron's schedule calls the backward passes; the engine reduces when it steps.
        "managed_gradient_accumulation": _one_stage(),
        "gradient_clipping": optimizer.clip or (math.inf if zero.stage == 0 else 0.0),  # inf: only take the norm
        "zero_optimization": _zero_config(zero) | sizes.as_native(),
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW is as fast on a CPU, and needs no compiler
        # Stage 1 adds a gradient to its fp32 sum as it comes, so it keeps none in bf16, and pipelines work.
        "bf16": {"enabled": training.precision == "bf16", "immediate_grad_update": True},
        # Gradients are summed, over micro-batches and over ranks, in fp32 whatever the weights are.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        # Progress, timing and memory are reported by the training loop.
        "steps_per_print": sys.maxsize,
        "timers": {"throughput": {"enabled": False}},
    }


def _zero_config(zero: ZeroSettings) -> dict[str, Any]:
    offloaded = {"offload_optimizer": zero.offload_optimizer, "offload_param": zero.offload_parameters}
    return {
        "stage": zero.stage,
        "overlap_comm": zero.stage > 0 and _one_stage(),
        **{name: {"device": "cpu"} for name, asked in offloaded.items() if asked},
    }


def _one_stage() -> bool:
    return parallel_state.get_pipeline_model_parallel_world_size() == 1


def _parameter_groups(
    model: torch.nn.Module, optimizer: OptimizerSettings, matrices_first: bool
) -> list[dict[str, Any]]:
    """Groups by weight decay (matrices, routers if asked) and, as DeepSpeed demands, by dense and expert parameters.

    Args:
        matrices_first: before vectors of their kind. So stage 1 in bf16 reduces them where they lie: behind a small
            group they would be copied to be reduced with it. Elsewhere the last group is stepped with least beside it.
    """

    def in_order(expert: bool, decays: bool) -> tuple[bool, bool]:
        return expert, decays != matrices_first

    spared = set() if optimizer.decay_routers else {p for _, _, router in routers(model) for p in router.parameters()}
    found: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and parameter not in spared
            found.setdefault((expert_groups.is_expert(parameter), decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": optimizer.weight_decay if decays else 0.0,
            "name": expert_groups.group_name() if expert else "dense",
            "moe": expert,
        }
        for (expert, decays), parameters in sorted(
            found.items(), key=lambda item: (item[0][0], item[0][1] != matrices_first)
        )
    ]


def _prepare_deepspeed() -> None:
    """Warnings to stderr, the rank's device, no compiler of C++, nor of torch until it is called.

    DeepSpeed logs to stdout. It learns the device from LOCAL_RANK alone, also in a process that torchrun did not start.
    And on CPU it would first compile a shared-memory all-reduce that only its inference uses: an empty table of
    compatible ops spares the start that, and the machine a C++ compiler.
    """
    for handler in logging.getLogger("DeepSpeed").handlers:
        if type(handler) is logging.StreamHandler:
            handler.setStream(sys.stderr)
    os.environ.setdefault("LOCAL_RANK", str(torch.cuda.current_device()) if torch.cuda.is_available() else "0")
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__ = {}
    import_deepspeed_muon()
