"""A small CoE model under DeepSpeed and a few of its steps, for the tests of `zero` and `checkpoint`.

Whatever the layout, a step sees the same ROWS rows: of the micro-batches that cut them, rank r takes every
(number of ranks)-th. Rows differ in length, so a mean of means would not be the mean over tokens.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.utils import safe_get_full_grad
from megatron.core import parallel_state
from megatron.core.models.common.embeddings import RotaryEmbedding, YarnRotaryEmbedding
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from model_build import TOPK, make_config, make_gpt, make_mla_config

from coe_megatron.chain.settings import ChainSettings
from coe_megatron.config.settings import OptimizerSettings, TrainingSettings, ZeroSettings
from coe_megatron.distributed.process_groups import replicas
from coe_megatron.model import coe_block_spec
from coe_megatron.model.router_state import update_router_state, weigh_over_step
from coe_megatron.model.stage_parts import StageParts
from coe_megatron.sequence_parts import own_part
from coe_megatron.training import evaluation
from coe_megatron.training.loop import mean_tokens
from coe_megatron.zero import engine as zero
from coe_megatron.zero.train_step import train_step

ROWS, SEQUENCE, VOCAB = 8, 16, 64
Named = dict[str, torch.Tensor]
_engines: WeakSet[DeepSpeedEngine] = WeakSet()  # whose groups still stand


@dataclass
class Trace:
    """What steps left behind on this rank: gradients of the first step, norm and loss of each, final weights."""

    gradients: Named = field(default_factory=dict)
    norms: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    weights: Named = field(default_factory=dict)


def use_groups(
    tensor: int = 1,
    pipeline: int = 1,
    expert: int = 1,
    expert_tensor: int = 1,
    context: int = 1,
    virtual_pipeline: int | None = None,
) -> None:
    """Other process groups on the same ranks; those before them end: they would leave some fifty threads each time."""
    torch.distributed.barrier()  # no rank is in the midst of one
    _, *groups = parallel_state._global_process_group_list  # the first stands for that of all ranks
    while groups:
        torch.distributed.destroy_process_group(groups.pop())
    parallel_state.destroy_model_parallel()
    while _engines:
        _engines.pop().destroy()  # or its hooks keep it, and the groups it knows, whose threads wake all the time
    for rotary in (RotaryEmbedding, YarnRotaryEmbedding):
        rotary.forward.cache_clear()  # which keeps the embeddings of 32 models, with their groups
    gc.collect()  # an engine is a circle
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=expert_tensor,
        context_parallel_size=context,
        virtual_pipeline_model_parallel_size=virtual_pipeline,
    )


def make_engine(
    micro_batch: int = 2,
    precision: str = "fp32",
    dropout: float = 0.0,
    chain: ChainSettings | None = None,
    layers: int = 2,
    seed: int = 1,
    stage: int = 1,
    offload: str = "",
    native: str | None = None,
    optimizer: OptimizerSettings | None = None,
    balancing: str = "seq_aux_loss",
    topk: int = TOPK,
    latents: dict[str, Any] | None = None,
    spoil: Callable[[torch.nn.Module], None] = lambda model: None,
    **of_spec: Any,
) -> DeepSpeedEngine:
    """Eight experts a layer, two iterations, both auxiliary losses with large coefficients; clipping bites.

    `latents` are settings of multi-latent attention. `spoil` may do something to the model before DeepSpeed sees it;
    `of_spec` goes to `coe_block_spec`.
    """
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    ranks = parallel_state.get_data_parallel_world_size()
    config = (make_config if latents is None else partial(make_mla_config, **latents))(
        num_layers=layers,
        hidden_size=32,
        hidden_dropout=dropout,
        attention_dropout=dropout,
        moe_shared_expert_intermediate_size=24,
        moe_router_topk=topk,
        moe_router_load_balancing_type=balancing,
        moe_aux_loss_coeff=0.1,
        moe_z_loss_coeff=0.01,
        expert_model_parallel_size=parallel_state.get_expert_model_parallel_world_size(),
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        expert_tensor_parallel_size=parallel_state.get_expert_tensor_parallel_world_size(),
        sequence_parallel=parallel_state.get_tensor_model_parallel_world_size() > 1,
        context_parallel_size=parallel_state.get_context_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        virtual_pipeline_model_parallel_size=parallel_state.get_virtual_pipeline_model_parallel_world_size(),
        overlap_p2p_comm=parallel_state.get_virtual_pipeline_model_parallel_world_size() is not None,
        batch_p2p_comm=parallel_state.get_virtual_pipeline_model_parallel_world_size() is None,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=precision == "bf16",
        hetereogenous_dist_checkpoint=chain is not None and chain.layers is not None,
    )

    def part_of_stage(number: int | None) -> torch.nn.Module:
        place = {
            "pre_process": parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=number),
            "post_process": parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=number),
            "vp_stage": number,
        }
        spec = coe_block_spec(config, chain or ChainSettings(iterations=2), vp_stage=number, **of_spec)
        return make_gpt(config, spec, vocab=VOCAB, **place)

    parts = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    model = part_of_stage(None) if parts is None else StageParts(map(part_of_stage, range(parts)))
    spoil(model)
    training = TrainingSettings(global_batch=ROWS, micro_batch=micro_batch, precision=precision)
    optimizer = optimizer or OptimizerSettings(lr=1e-2, clip=0.1)
    settings = ZeroSettings(
        stage=stage,
        offload_optimizer="optimizer" in offload,
        offload_parameters="parameters" in offload,
        deepspeed=native,
    )
    engine = zero.build_engine(model, optimizer, training, settings, ROWS // (micro_batch * ranks))
    _engines.add(engine)
    return engine


def take_steps(
    engine: DeepSpeedEngine,
    first: int,
    count: int,
    mean_of_means: bool = False,
    spoil_loss: float = 1.0,
    rate: float = 1e-2,
    padding: bool = False,
    documents: bool = False,
    auxiliary_mean: str = "micro_batch",
) -> Trace:
    """Train on the rows of steps `first` to `first + count - 1`; `mean_of_means` is the wrong way to weigh rows.

    With `padding` the model is told which positions are padding; with `documents` rows have several documents, and
    attention stays in one.
    """
    trace, forward = Trace(), partial(_forward, padding=padding)

    def loss_of(losses: torch.Tensor, batch: Named) -> torch.Tensor:
        counts = batch["counts"]
        total = counts.sum() * (ROWS // len(counts)) if mean_of_means else batch["total"]
        return (losses.float() * counts).sum() * spoil_loss / total

    for step in range(first, first + count):
        zero.set_lr(engine, rate / (1 + step))
        batches = list(micro_batches(step, engine.train_micro_batch_size_per_gpu(), documents))
        if auxiliary_mean == "step":
            weigh_over_step(engine.module, mean_tokens([{"padding_mask": ~batch["counts"]} for batch in batches]))
        with _seen_before_the_step(engine, trace) if step == first else nullcontext():
            loss = train_step(engine, batches, forward, loss_of)
        update_router_state(engine.module)
        trace.norms.append(float(zero.gradient_norm(engine)))
        trace.losses.append(float(_summed(loss)))
    trace.weights = {name: weight.detach().clone() for name, weight in engine.module.named_parameters()}
    return trace


@contextmanager
def _seen_before_the_step(engine: DeepSpeedEngine, trace: Trace) -> Iterator[None]:
    """Meanwhile the engine notes its gradients when they are reduced, before it changes or uses them."""
    take_step = engine._take_model_step

    def look_first(*args: Any) -> None:
        trace.gradients = gradients(engine)
        take_step(*args)

    engine._take_model_step = look_first
    yield
    engine._take_model_step = take_step


def _forward(model: torch.nn.Module, batch: Named, padding: bool) -> torch.Tensor:
    if padding:  # as programs do
        return evaluation.forward(model, {**batch, "padding_mask": ~batch["counts"]})
    return model(batch["tokens"], batch["position_ids"], batch.get("attention_mask"), labels=batch["labels"])


def micro_batches(step: int, size: int, documents: bool = False) -> Iterator[Named]:
    """This rank's micro-batches: tokens, labels, positions [B, S], which labels count [B, S], and the step's `total`.

    With `documents` also an attention mask [B, 1, S, S].
    """
    generator = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(VOCAB, (ROWS, SEQUENCE + 1), generator=generator)
    lengths = torch.randint(1, SEQUENCE + 1, (ROWS, 1), generator=generator)
    counts = torch.arange(SEQUENCE) < lengths
    starts = torch.rand(ROWS, SEQUENCE, generator=generator) < 0.2
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    context = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
    for number in range(rank, ROWS // size, ranks):
        rows = slice(number * size, (number + 1) * size)
        batch = {
            "tokens": tokens[rows, :-1],
            "labels": tokens[rows, 1:].contiguous(),
            "counts": counts[rows],
            "position_ids": torch.arange(SEQUENCE).expand(size, -1),
        }
        if documents:
            own = starts[rows].cumsum(1)
            same = own[:, :, None] == own[:, None, :]
            batch["attention_mask"] = ~(same & torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).tril())[:, None]
        dims = {name: 2 if name == "attention_mask" else 1 for name in batch}
        yield {name: own_part(tensor, dims[name], *context) for name, tensor in batch.items()} | {"total": counts.sum()}


def gradients(engine: DeepSpeedEngine) -> Named:
    """The whole gradient of every parameter, as the optimizer will see it (before clipping)."""
    return {name: safe_get_full_grad(parameter).float().clone() for name, parameter in engine.module.named_parameters()}


def joined(ranks: list[Trace], layout: str) -> Trace:
    """One whole model from what each rank holds: the experts of two EP ranks in a row, of all else rank 0's."""
    whole = Trace(dict(ranks[0].gradients), ranks[0].norms, ranks[0].losses, dict(ranks[0].weights))
    if layout.startswith("ep2"):
        for name in (name for name in whole.weights if ".experts." in name):
            whole.gradients[name] = torch.cat([rank.gradients[name] for rank in ranks[:2]])
            whole.weights[name] = torch.cat([rank.weights[name] for rank in ranks[:2]])
    return whole


def _summed(value: torch.Tensor) -> torch.Tensor:
    torch.distributed.all_reduce(value, group=replicas())
    return value
