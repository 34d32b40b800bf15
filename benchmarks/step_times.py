"""Times training steps of a whole model on random tokens, with losses, memory and, if asked for, kernels.

The model, the engine and the step are those of a run; there is no data, no logging and no checkpoint. One process; on
CUDA each step ends with a synchronisation, as a run's does when it reads the loss.
"""

import gc
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from layer_times import Stock
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, supported_activities

from coe_megatron.config import RunConfig
from coe_megatron.distributed import process_groups
from coe_megatron.estimate import closed_forms
from coe_megatron.estimate.run_estimate import estimate
from coe_megatron.estimate.run_shape import RunShape
from coe_megatron.model import coe_block_spec
from coe_megatron.model.build import build_model, transformer_config
from coe_megatron.model.routing_stats import reset_routing
from coe_megatron.training.devices import peak_flops
from coe_megatron.training.evaluation import forward, masked_loss_sum
from coe_megatron.training.memory_meter import MemoryMeter
from coe_megatron.zero.engine import Engine, build_engine
from coe_megatron.zero.train_step import Batch, train_step

_WARM_UP = 2
_KERNELS = 30  # of a profile, in the result
_CPU, _CUDA = ProfilerActivity.CPU, ProfilerActivity.CUDA


def time_steps(
    config: RunConfig, steps: int, stock: Stock | None = None, profiled: bool = False, weights: Path | None = None
) -> dict[str, Any]:
    """Train on the same random tokens in each step; Megatron's groups must exist, on one rank.

    Args:
        config: a run's; `model.vocab_size` must be set.
        steps: timed steps, after two that are not.
        stock: take Megatron's own MoE layer in the same model, or with `model.backend` transformer_engine all layers of
            Megatron's Transformer Engine spec.
        profiled: profile one more step.
        weights: read the initial weights from this file; write them there if it does not exist.

    Returns:
        For JSON: `seconds` of a step, `tokens_per_second`, `tflops`, `mfu` (None if the device's peak is unknown),
        `losses` of all steps, `memory` and `memory_predicted` in bytes by kind, `allocated_before` in bytes (0 on the
        CPU), and `kernels`.

    Raises:
        FloatingPointError: a loss is not finite.
    """
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    assert config.model.vocab_size is not None
    shape = RunShape.of(config, config.model.vocab_size, 1)
    engine = _engine(shape, stock, weights)
    meter, batches = MemoryMeter(engine), _batches(shape)
    losses, seconds = [], []
    try:
        for _ in range(_WARM_UP + steps):
            start = time.perf_counter()
            losses.append(_step(engine, batches, meter))
            seconds.append(time.perf_counter() - start)
        result = {"allocated_before": before, **_speed(shape, seconds[_WARM_UP:]), "losses": losses}
        result |= {"memory": meter.measured(), "memory_predicted": estimate(shape).measured}
        return result | ({"kernels": _kernels(engine, batches, meter)} if profiled else {})
    finally:
        _release(engine, meter)


def _engine(shape: RunShape, stock: Stock | None, weights: Path | None) -> Engine:
    config = shape.config
    model = build_model(config, shape.vocab_size, stock_block(config, stock) if stock else None)
    if weights is not None:
        _same_weights(model, weights)
    engine = build_engine(model, config.optimizer, config.training, config.zero, shape.micro_batches)
    process_groups.seed_dropout(config.training.seed)
    return engine


@torch.no_grad()
def _same_weights(model: torch.nn.Module, path: Path) -> None:
    """Read the weights from a file, or write them there if it does not exist."""
    if not path.exists():
        torch.save({name: weight.detach() for name, weight in model.named_parameters()}, path)
    found = torch.load(path, weights_only=True)
    for name, weight in model.named_parameters():
        weight.copy_(found[name])


def stock_block(config: RunConfig, stock: Stock) -> TransformerBlockSubmodules:
    """Specs with Megatron's own MoE layers: our block with those exchanged, or its own for Transformer Engine."""
    megatron = transformer_config(config)
    if stock == "transformer_engine":
        return get_gpt_decoder_block_spec(megatron, use_transformer_engine=True)
    block = coe_block_spec(megatron, config.chain)
    theirs = get_gpt_decoder_block_spec(megatron, use_transformer_engine=False, normalization=megatron.normalization)
    for layer, other in zip(block.layer_specs, theirs.layer_specs, strict=True):
        layer.submodules.mlp = other.submodules.mlp
    return block


def _release(engine: Engine, meter: MemoryMeter) -> None:
    """Free the memory of an engine, which DeepSpeed's hooks keep alive, for the next one in this process."""
    for tensor in meter.tensors():
        tensor.data = tensor.new_empty(0)
    for parameter in engine.module.parameters():
        vars(parameter).clear()  # DeepSpeed's views of master weights and moments


def _batches(shape: RunShape) -> list[Batch]:
    """The micro-batches of a step, in CPU memory; the same on every device."""
    generator = torch.Generator().manual_seed(shape.config.training.seed)
    rows, length = shape.config.training.micro_batch, shape.config.model.seq_length
    batches = []
    for _ in range(shape.micro_batches):
        text = torch.randint(shape.vocab_size, (rows, length + 1), generator=generator)
        batches.append(
            {
                "tokens": text[:, :-1].contiguous(),
                "labels": text[:, 1:].contiguous(),
                "loss_mask": torch.ones(rows, length),
                "position_ids": torch.arange(length).expand(rows, -1).contiguous(),
                "padding_mask": torch.zeros(rows, length, dtype=torch.bool),
            }
        )
    return batches


def _step(engine: Engine, batches: list[Batch], meter: MemoryMeter) -> float:
    """One optimizer step; returns its loss in nats per token when the device is done."""
    tokens = len(batches) * batches[0]["tokens"].numel()
    reset_routing(engine.module)
    with meter.step():
        loss = train_step(
            engine,
            batches,
            forward,
            lambda losses, batch: masked_loss_sum(losses, batch) / tokens,
            meter.after_backward,
        )
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    if not math.isfinite(value := float(loss)):
        raise FloatingPointError(f"the loss of a step is {value}")
    return value


def _speed(shape: RunShape, seconds: list[float]) -> dict[str, Any]:
    """By the median step."""
    median = statistics.median(seconds)
    tokens = shape.config.training.global_batch * shape.config.model.seq_length
    flops = closed_forms.training_flops(shape.model).total * tokens / median
    peak = peak_flops(shape.config.training.precision)
    return {
        "seconds": {"minimum": min(seconds), "median": median},
        "tokens_per_second": tokens / median,
        "tflops": flops / 1e12,
        "mfu": flops / peak if peak else None,
    }


def _kernels(engine: Engine, batches: list[Batch], meter: MemoryMeter) -> dict[str, Any]:
    """Milliseconds on the device of one step by kernel, heaviest first; operators where the profiler sees no device."""
    with profile(activities={*supported_activities()} & {_CPU, _CUDA}, acc_events=True) as profiled:
        _step(engine, batches, meter)
    rows = profiled.key_averages()
    kernels = [row for row in rows if row.device_type == DeviceType.CUDA and not row.is_user_annotation]
    times = {row.key: (row.self_device_time_total, row.count) for row in kernels}
    times = times or {row.key: (row.self_cpu_time_total, row.count) for row in rows}
    heaviest = sorted(times.items(), key=lambda item: -item[1][0])[:_KERNELS]
    return {
        "of": "CUDA kernels" if kernels else "CPU operators",
        "milliseconds": sum(spent for spent, _ in times.values()) / 1e3,
        "heaviest": [{"name": name, "milliseconds": spent / 1e3, "calls": calls} for name, (spent, calls) in heaviest],
    }
