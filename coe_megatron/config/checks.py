"""Rules that involve several settings; each reports a violation in one line. Does not import torch."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from coe_megatron.alignment import row_multiple
from coe_megatron.config import layout
from coe_megatron.config.layout import moe_pattern
from coe_megatron.config.native import read_native
from coe_megatron.config.settings import DataSettings, ModelSettings, MoESettings, RunConfig
from coe_megatron.errors import ConfigError

_MOST_ITERATIONS = 20_000  # over all layers: per-iteration estimates of more would take minutes


def check(config: RunConfig, world_size: int | None = None) -> None:
    """Raise ConfigError for the first broken rule.

    Args:
        world_size: number of ranks; None means `parallel.world_size`, or the fewest that the layout allows.
    """
    for problem in problems(config, world_size):
        raise ConfigError(problem)


def problems(config: RunConfig, world_size: int | None = None) -> Iterator[str]:
    """Every broken rule, one line each."""
    yield from _model(config.model)
    yield from _moe(config.moe, config.model.num_layers)
    iterations, layers = config.chain.iterations, config.model.num_layers
    if iterations > (most := _MOST_ITERATIONS // layers):
        yield f"chain.iterations is {iterations}: with {layers} layers it must be at most {most}"
    yield from _chain_layers(config)
    try:
        config.chain.require_experts(config.moe.num_experts, config.moe.topk, config.moe.num_groups)
        config.chain.width(config.model.hidden_size)
    except ConfigError as error:
        yield str(error)
    yield from _alignment(config)
    yield from _backend(config)
    yield from _data(config.data)
    yield from _training(config)
    yield from layout.problems(config, world_size)
    yield from _steps(config, world_size)
    yield from _zero(config)


def _chain_layers(config: RunConfig) -> Iterator[str]:
    layers, pattern = config.chain.layers or (), moe_pattern(config)
    for number in layers:
        if number > config.model.num_layers:
            yield f"chain.layers has {number}: the model has layers 1 to {config.model.num_layers} (model.num_layers)"
        elif number <= len(pattern) and not pattern[number - 1]:
            yield f"chain.layers has {number}: that layer is dense (moe.layer_freq {config.moe.layer_freq})"


def _model(model: ModelSettings) -> Iterator[str]:
    heads = model.num_attention_heads
    if model.mla is None and model.kv_channels is None and model.hidden_size % heads:
        yield (
            f"model.num_attention_heads is {heads}: it must divide model.hidden_size ({model.hidden_size}), "
            "or model.kv_channels must be set"
        )
    if model.mla is not None and model.mla.qk_pos_emb_head_dim % 2:
        yield f"model.mla.qk_pos_emb_head_dim is {model.mla.qk_pos_emb_head_dim}: rotary positions need an even number"
    if model.mla is None and (model.kv_channels or model.hidden_size // heads) % 2:
        size = model.kv_channels or model.hidden_size // heads
        yield f"model.kv_channels is {size}: rotary positions need an even head size"
    if model.num_query_groups is not None and heads % model.num_query_groups:
        yield f"model.num_query_groups is {model.num_query_groups}: it must divide model.num_attention_heads ({heads})"
    if model.mla is not None and model.qkv_bias:
        yield "model.qkv_bias is true: with model.mla leave it false"
    if model.qk_norm_over_heads and (model.mla is not None or not model.qk_layernorm):
        yield "model.qk_norm_over_heads is true: it needs model.qk_layernorm, and no model.mla"
    if model.mla is not None and model.num_query_groups is not None:
        yield f"model.num_query_groups is {model.num_query_groups}: with model.mla leave it null"


def _moe(moe: MoESettings, layers: int) -> Iterator[str]:
    if moe.topk > moe.num_experts:
        yield f"moe.topk is {moe.topk}: it must be at most moe.num_experts ({moe.num_experts})"
    if moe.shared_expert_gate and not moe.num_shared_experts:
        yield "moe.shared_expert_gate is true: it needs shared experts, and moe.num_shared_experts is 0"
    if isinstance(moe.layer_freq, list) and len(moe.layer_freq) != layers:
        yield f"moe.layer_freq has {len(moe.layer_freq)} entries: it must have one per layer ({layers})"
    if isinstance(moe.layer_freq, list) and 1 not in moe.layer_freq:
        yield f"moe.layer_freq is {moe.layer_freq}: at least one layer must have experts"
    if (moe.num_groups is None) != (moe.group_topk is None):
        yield "moe.num_groups and moe.group_topk must be given together"
    if moe.num_groups is not None and moe.group_topk is not None:
        yield from _groups(moe, moe.num_groups, moe.group_topk)
    if moe.expert_bias and moe.score_function != "sigmoid":
        yield f"moe.expert_bias is true: it needs moe.score_function sigmoid, not {moe.score_function}"
    if moe.renormalise and moe.score_function == "sigmoid":
        yield "moe.renormalise is true: sigmoid gates are renormalised anyway, leave it false"
    if moe.score_function == "softmax" and moe.renormalise and moe.topk == 1:
        yield "moe.renormalise is true: with moe.topk 1 every gate would be 1, so the router would learn nothing"
    if moe.pad_to_capacity and moe.capacity_factor is None:
        yield "moe.pad_to_capacity is true: it needs a moe.capacity_factor"
    if moe.pad_to_capacity and moe.dispatcher == "allgather":
        yield "moe.pad_to_capacity is true: it needs moe.dispatcher alltoall, not allgather"
    if moe.capacity_factor is not None and moe.dispatcher == "deduplicated":
        yield "moe.capacity_factor is given: it needs moe.dispatcher alltoall or allgather, not deduplicated"
    chunks = 1 if moe.overlap_chunks == "auto" else moe.overlap_chunks
    if chunks > 1 and (moe.capacity_factor is not None or moe.dispatcher == "allgather"):
        reason = "a moe.capacity_factor" if moe.capacity_factor is not None else "moe.dispatcher allgather"
        yield f"moe.overlap_chunks is {chunks}: it must be 1 with {reason}"


def _groups(moe: MoESettings, groups: int, chosen: int) -> Iterator[str]:
    if moe.num_experts % groups:
        yield f"moe.num_groups is {groups}: it must divide moe.num_experts ({moe.num_experts})"
    elif chosen > groups:
        yield f"moe.group_topk is {chosen}: it must be at most moe.num_groups ({groups})"
    elif moe.topk % chosen:
        yield f"moe.group_topk is {chosen}: it must divide moe.topk ({moe.topk})"
    elif moe.topk > chosen * (moe.num_experts // groups):
        yield f"moe.topk is {moe.topk}: the {chosen} chosen groups hold {chosen * (moe.num_experts // groups)} experts"


def _alignment(config: RunConfig) -> Iterator[str]:
    """Row sizes that torch's grouped matrix product accepts."""
    multiple = row_multiple(config.training.element_bytes)
    for name, value in (
        ("model.hidden_size", config.model.hidden_size),
        ("moe.ffn_hidden_size", config.moe.ffn_hidden_size),
        ("chain.latent", config.chain.latent or 0),
    ):
        if value % multiple:
            yield f"{name} is {value}: in {config.training.precision} it must be a multiple of {multiple}"


def _backend(config: RunConfig) -> Iterator[str]:
    """What Transformer Engine does otherwise, or not at all."""
    if config.model.backend == "local":
        return
    engine = "with model.backend transformer_engine"
    if config.training.precision == "fp32":
        yield f"training.precision is fp32: {engine} use bf16, since its fp32 products are rounded to TF32"
    if config.moe.recompute == "experts":
        yield f"moe.recompute is experts: {engine} use none, iteration or layer"
    if config.model.mla is not None and config.model.mla.pad_values:
        yield f"model.mla.pad_values is true: {engine} leave it false, its attention has kernels for such values"
    if config.model.qk_norm_over_heads:
        yield f"model.qk_norm_over_heads is true: {engine} it must be false"
    if config.data.reset_at_documents:
        yield f"data.reset_at_documents is true: {engine} it must be false, since its causal attention takes no mask"


def _data(data: DataSettings) -> Iterator[str]:
    if data.reset_at_documents and data.samples == "row":
        yield "data.reset_at_documents is true: it requires data.samples packed, since a row is a single document"
    if data.answer_tokens is not None and data.samples != "row":
        yield f"data.answer_tokens is {data.answer_tokens}: it requires data.samples row, or leave it null"
    if data.blend is not None and not data.blend:
        yield "data.blend is []: it must name at least one folder, or be null"
    if data.validation is not None and not data.validation:
        yield "data.validation is {}: it must name at least one folder, or be null"
    for name in data.validation or {}:
        if not name.strip() or "/" in name or not name.isprintable():
            yield f"data.validation has the name {name!r}: a name is text on one line without slashes"
    names = Counter(Path(part.path).name for part in data.blend or [] if data.validation is None)
    if names and names.most_common(1)[0][1] > 1:
        name = names.most_common(1)[0][0]
        yield f"data.blend has two folders named {name!r}: give data.validation, so that their losses have names"


def _training(config: RunConfig) -> Iterator[str]:
    if config.training.global_batch % config.training.micro_batch:
        yield (
            f"training.micro_batch is {config.training.micro_batch}: it must divide "
            f"training.global_batch ({config.training.global_batch})"
        )
    if config.optimizer.min_lr > config.optimizer.lr:
        yield f"optimizer.min_lr is {config.optimizer.min_lr}: it must be at most optimizer.lr ({config.optimizer.lr})"
    if config.optimizer.min_lr and config.optimizer.decay == "constant":
        yield f"optimizer.min_lr is {config.optimizer.min_lr}: with optimizer.decay constant it has no meaning, use 0"
    if config.optimizer.decay == "wsd" and config.optimizer.warmup + config.optimizer.cooldown > 1:
        yield (
            f"optimizer.cooldown is {config.optimizer.cooldown}: with optimizer.warmup ({config.optimizer.warmup}) "
            "the sum must be at most 1"
        )


def _steps(config: RunConfig, world_size: int | None) -> Iterator[str]:
    """Settings that name steps, ranks or folders of runs."""
    steps, profile = config.training.steps, config.profile
    if late := [step for step in config.training.milestones if step > steps]:
        yield f"training.milestones has {late[0]}: the run ends with step {steps} (training.steps)"
    if profile.first_step is not None and profile.first_step > steps:
        yield f"profile.first_step is {profile.first_step}: the run ends with step {steps} (training.steps)"
    if profile.first_step is not None and not profile.ranks:
        yield "profile.ranks is []: it must name at least one rank"
    ranks = config.parallel.world_size or world_size
    if profile.first_step is not None and ranks and max(profile.ranks, default=0) >= ranks:
        yield f"profile.ranks is {profile.ranks}: the run has ranks 0 to {ranks - 1}"
    sources = {"warm_start": config.training.warm_start, "branch_from": config.training.branch_from}
    for name, source in sources.items():
        if source is not None and Path(source).is_relative_to(config.output):
            yield f"training.{name} is {source}: it must name another run than output, which resumes by itself"
    if None not in sources.values():
        yield f"training.branch_from is {config.training.branch_from}: training.warm_start is set too; use one of them"


def _zero(config: RunConfig) -> Iterator[str]:
    zero = config.zero
    if zero.stage == 0 and config.training.precision == "bf16":
        yield "zero.stage is 0: it has no fp32 master weights; use 1, 2 or 3, or training.precision fp32"
    if zero.stage == 0 and zero.offload_optimizer:
        yield "zero.offload_optimizer is true: it needs zero.stage 1, 2 or 3"
    if zero.deepspeed is not None:
        try:
            native = read_native(zero.deepspeed)
        except ConfigError as error:
            yield str(error)
        else:
            stages = config.parallel.pipeline
            if stages > 1 and native.get("zero_optimization", {}).get("overlap_comm"):
                yield (
                    f"zero.deepspeed is {zero.deepspeed}: it sets zero_optimization.overlap_comm true, which "
                    f"parallel.pipeline ({stages}) does not support: gradients are reduced after all micro-batches"
                )
    if zero.stage != 3 and zero.offload_parameters:
        yield f"zero.offload_parameters is true: it needs zero.stage 3, not {zero.stage}"
