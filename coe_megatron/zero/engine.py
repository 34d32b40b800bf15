"""The DeepSpeed engine of a Megatron model, and the few calls a training loop makes on it.

    for micro_batch in step:        # `accumulation` of them
        loss = token_losses(engine(...)).sum() / tokens_of_the_step
        backward(engine, loss)
        engine.step()               # counts micro-batches; weights change after the last one
    norm = gradient_norm(engine)

`zero.train_step` does this, for pipelines too.

The gradients are:

* of the token loss: the mean over the counted tokens of the global batch, at every ZeRO stage; the stages differ only
  in clipping. The training loop divides the token losses of a micro-batch by the number of counted tokens in the step
  (all ranks, all micro-batches), and the quotients are summed over ranks and micro-batches;
* of auxiliary losses, which Megatron attaches inside the model (load balancing, z-loss): the mean over ranks and
  micro-batches, so that their coefficients mean the same in any layout.

This is the complete list of factors on a step's losses and gradients. The factors of a pipeline are applied in
`zero.train_step`.

Token loss:

* `training.loop.Pretraining._train_step`: the sum of a micro-batch's token losses / counted tokens of the step.
* `zero.train_step.train_step`: times 1, or NaN for a step to skip. In a pipeline also times micro-batches and times
  replicas / CP, because Megatron's schedule divides by micro-batches / CP and DeepSpeed by replicas.
* `zero.engine.backward`: without a pipeline, times replicas; DeepSpeed's division by micro-batches is off.

Auxiliary losses, before they are attached to gates or logits:

* `model.router_losses._with_divided_coefficients`: with `chain.aux_loss_reduction: mean` coefficients / C.
* Megatron's TopKRouter: the coefficient; `seq_aux_loss` / sequences of the micro-batch.
* `model.router_losses.RouterWithLosses.apply_z_loss`: / ranks that hold parts of the same sequence, times this rank's
  fraction of their tokens.
* `model.router_losses.RouterWithLosses.attach_and_log_load_balancing_loss`: the global loss times data-parallel ranks.
* In a layer of multi-token prediction that is repeated: / the number of times.
* `model.router_state.weigh_over_step`, with `moe.auxiliary_mean: step`: the sequence loss times (tokens of the
  micro-batch / mean of the step) squared; the z-loss / mean of the step, not / tokens of the micro-batch.
* Both of these methods: times tokens if Megatron divides every gradient by them (`calculate_per_token_loss`, which
  `build_model` does not set).

Auxiliary losses, in the backward pass (MoEAuxLossAutoScaler):

* `zero.engine.backward`: their gradient is 1 / micro-batches, times context-parallel ranks, each of which adds the part
  of its tokens. In a pipeline Megatron's schedule sets the same.

Gradients:

* `zero.engine._reduce_sequence_parallel_gradients`: summed over tensor-parallel ranks if each has its own tokens, not
  divided.
* DeepSpeed: summed over replicas (data parallel and context parallel) and divided by their number; an expert's over its
  own replicas, and divided by the same number, since these have seen the tokens of all ranks.
* Clipping: by DeepSpeed, in stage 0 by `zero.grad_clip.clip`. The norm in stages 1 and 2: `zero.grad_clip`.

For reports only, `model.router_losses.RouterWithLosses._track` adds 1/C of a loss to Megatron's tracker, and
`model.routing_stats` and `training.evaluation` take means.
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
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime.zero import stage_1_and_2
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
from coe_megatron.model.layer import CoELayer, routers
from coe_megatron.zero import expert_groups, grad_clip, optimizer_states

Engine: TypeAlias = deepspeed.DeepSpeedEngine


def build_engine(
    model: torch.nn.Module,
    optimizer: OptimizerSettings,
    training: TrainingSettings,
    zero_settings: ZeroSettings,
    accumulation: int,
) -> Engine:
    """Build the DeepSpeed engine: AdamW, ZeRO, gradient clipping and, with bf16, fp32 masters and gradient sums.

    Megatron's groups must exist, and all ranks must have built equal weights. Optimizer states are allocated here, not
    in the first step: a model too large for memory fails now, and a checkpoint can be loaded at once.

    Args:
        accumulation: micro-batches per step on each rank.

    Returns:
        The engine; `engine.module` is the model.

    Raises:
        ConfigError: DeepSpeed does not know a key or value of `zero.deepspeed`.
    """
    _prepare_deepspeed()
    _reduce_sequence_parallel_gradients(model)
    deepspeed_json = zero_settings.deepspeed
    native = {} if deepspeed_json is None else run_on_rank0(partial(read_native, deepspeed_json))
    sizes = ZeroSizes.of(sum(parameter.numel() for parameter in model.parameters()), native)
    if zero_settings.stage == 3:
        set_z3_leaf_modules(model, [CoELayer], raise_if_not_found=False)  # gathered once per pass, not C times
    # DeepSpeed reports its memory on stdout, which is reserved for the output of programs.
    with expert_groups.expert_placeholder(model), redirect_stdout(io.StringIO()):
        groups = _parameter_groups(model, optimizer, zero_settings.stage == 1 and training.precision == "bf16")
        # Fused AdamW allocates no temporaries as large as the parameters, which would set the memory peak on few ranks.
        adam = torch.optim.AdamW(groups, lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps, fused=True)
        try:
            engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=adam,
                mpu=MegatronGroups(),
                config=merged(_config(optimizer, training, zero_settings, sizes, accumulation), native),
                dist_init_required=False,
            )
        except ValidationError as error:  # of zero.deepspeed: our own config is valid
            first = error.errors()[0]
            raise ConfigError(
                f"zero.deepspeed is {deepspeed_json}: {'.'.join(map(str, first['loc']))}: {first['msg']}"
            ) from error
    # By default stage 0, and stage 1 in bf16, copy up to 500 million gradients into one buffer.
    engine.allreduce_gradients = partial(engine.allreduce_gradients, bucket_size=sizes.reduce_bucket)
    if isinstance(engine.optimizer, stage_1_and_2.DeepSpeedZeroOptimizer) and not zero_settings.offload_optimizer:
        engine.optimizer.scaled_global_norm = partial(grad_clip.norm_of_partitions, engine.optimizer)
    if isinstance(engine.optimizer, bf16_optimizer.BF16_Optimizer) and expert_groups.are_separate():
        engine.optimizer.has_moe_layers = True  # on a stage without experts too, which takes part in the norm
        engine.optimizer.expert_gradients = getattr(engine.optimizer, "expert_gradients", {})
    if zero_settings.stage == 0:
        engine.clip_fp32_gradients = partial(_clip_gradients, engine)  # replaces DeepSpeed's, see `grad_clip`
    optimizer_states.create(engine)
    return engine


def backward(engine: Engine, loss: torch.Tensor) -> None:
    """Backpropagate one micro-batch and add its gradients to those of the step, scaled as the module's docstring says.

    DeepSpeed divides every summed gradient by the number of replicas. It does so for experts too: their
    gradients are summed over their replicas only, but these replicas have seen the tokens of all ranks. The factor
    `dp_world_size` undoes this division, and `scale_wrt_gas` switches off the division by the accumulation. The
    gradient of an auxiliary loss has the scale set on Megatron's scaler, whatever `loss` is; with the division by the
    replicas it becomes the mean over data-parallel ranks.
    """
    ranks = parallel_state.get_context_parallel_world_size()  # Megatron's schedules have the same factor
    scale = torch.full((1,), ranks / engine.gradient_accumulation_steps(), device=loss.device)
    MoEAuxLossAutoScaler.set_loss_scale(scale)
    engine.backward(loss * engine.dp_world_size, scale_wrt_gas=False)


def set_lr(engine: Engine, lr: float) -> None:
    """Set the learning rate from the next step on."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def gradient_norm(engine: Engine) -> float | torch.Tensor:
    """The 2-norm of all gradients of the last step, before clipping, equal on all ranks; on the device in bf16.

    It is not finite if the step was skipped, that is, if a gradient was not finite.
    """
    return engine.get_global_grad_norm()


def was_applied(norm: float) -> bool:
    """Whether a step of this `gradient_norm` was applied, not skipped: it changed weights, states and step count."""
    return math.isfinite(norm)


def _reduce_sequence_parallel_gradients(model: torch.nn.Module) -> None:
    """All-reduce gradients of parameters that every tensor-parallel rank holds but applies to its own tokens only.

    This happens in a gradient hook, because ZeRO 2 and 3 consume gradients within the backward pass.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return
    for parameter in model.parameters():
        if getattr(parameter, "sequence_parallel", False):
            parameter.register_hook(partial(_all_reduce, group))


def _all_reduce(group: torch.distributed.ProcessGroup, gradient: torch.Tensor) -> torch.Tensor:
    summed = gradient.clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(summed, group=group)
    return summed


def _clip_gradients(engine: Engine) -> None:
    engine._global_grad_norm = grad_clip.clip(engine.module, engine.gradient_clipping())


def _config(
    optimizer: OptimizerSettings,
    training: TrainingSettings,
    zero_settings: ZeroSettings,
    sizes: ZeroSizes,
    accumulation: int,
) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": training.micro_batch,
        "gradient_accumulation_steps": accumulation,
        # In a pipeline Megatron's schedule runs the backward passes, and the engine reduces gradients in `step`.
        "managed_gradient_accumulation": _one_stage(),
        "gradient_clipping": optimizer.clip
        or (math.inf if zero_settings.stage == 0 else 0.0),  # inf: only compute the norm
        "zero_optimization": _zero_config(zero_settings) | sizes.as_native(),
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW is as fast on a CPU, and needs no compiler
        # Stage 1 adds each gradient to its fp32 sum at once: it keeps none in bf16, and pipelines work.
        "bf16": {"enabled": training.precision == "bf16", "immediate_grad_update": True},
        # Gradients are summed over micro-batches and ranks in fp32, whatever the dtype of the weights.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        # The training loop reports progress, timing and memory.
        "steps_per_print": sys.maxsize,
        "timers": {"throughput": {"enabled": False}},
    }


def _zero_config(settings: ZeroSettings) -> dict[str, Any]:
    offloaded = {"offload_optimizer": settings.offload_optimizer, "offload_param": settings.offload_parameters}
    return {
        "stage": settings.stage,
        "overlap_comm": settings.stage > 0 and _one_stage(),
        **{name: {"device": "cpu"} for name, enabled in offloaded.items() if enabled},
    }


def _one_stage() -> bool:
    return parallel_state.get_pipeline_model_parallel_world_size() == 1


def _parameter_groups(
    model: torch.nn.Module, optimizer: OptimizerSettings, matrices_first: bool
) -> list[dict[str, Any]]:
    """Groups by weight decay (matrices, routers if configured) and, as DeepSpeed requires, by dense and expert.

    Args:
        matrices_first: order matrices before vectors, among dense parameters and among experts. Stage 1 in bf16 then
            reduces matrices in place; after a small group it would copy them to reduce both in one bucket. Otherwise
            matrices come last, where AdamW steps them with the least other memory in use.
    """

    exempt = set() if optimizer.decay_routers else {p for _, _, router in routers(model) for p in router.parameters()}
    found: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and parameter not in exempt
            found.setdefault((expert_groups.is_expert(parameter), decays), []).append(parameter)
    kinds = (True, False) if matrices_first else (False, True)
    return [
        {
            "params": found[expert, decays],
            "weight_decay": optimizer.weight_decay if decays else 0.0,
            "name": expert_groups.group_name() if expert else "dense",
            "moe": expert,
        }
        for expert in (False, True)
        for decays in kinds
        if (expert, decays) in found
    ]


def _prepare_deepspeed() -> None:
    """Send DeepSpeed's warnings to stderr, set its device, and keep it from compiling anything at the start.

    DeepSpeed logs to stdout by default. It reads the device from LOCAL_RANK only, even in a process that torchrun did
    not start. On CPU it would compile a shared-memory all-reduce that only its inference uses; an empty table of
    compatible ops prevents that, so no C++ compiler is needed. Stage 3 asks for the number of devices before each
    reduction, and on CPU DeepSpeed starts numactl to count them, unless LOCAL_SIZE has their number. After a step it
    would gather the weights of one parameter group after the other.
    """
    stage_1_and_2.all_gather_dp_groups = bf16_optimizer.all_gather_dp_groups = _gather_weights
    bf16_optimizer.get_norm_with_moe_layers = grad_clip.norm_with_experts
    for handler in logging.getLogger("DeepSpeed").handlers:
        if type(handler) is logging.StreamHandler:
            handler.setStream(sys.stderr)
    os.environ.setdefault("LOCAL_RANK", str(torch.cuda.current_device()) if torch.cuda.is_available() else "0")
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__ = {}
        os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    import_deepspeed_muon()


def _gather_weights(
    groups_flat: list[torch.Tensor],
    partitioned_param_groups: list[list[torch.Tensor]],
    dp_process_group: list[torch.distributed.ProcessGroup],
    **_sizes: int,
) -> None:
    """All-gather each parameter group's partitions [P / ranks] into its weights [P], all groups at once."""
    gathering = [
        torch.distributed.all_gather_into_tensor(flat, partitions[group.rank()], group, async_op=True)
        for flat, partitions, group in zip(groups_flat, partitioned_param_groups, dp_process_group, strict=True)
        if group.size() > 1
    ]
    for work in gathering:
        work.wait()
