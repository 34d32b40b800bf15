"""A small CoE model under DeepSpeed and a few of its steps, for the tests of `zero` and `checkpoint`.

Whatever the layout, a step sees the same ROWS rows: of the micro-batches that cut them, rank r takes every
(number of ranks)-th. Rows differ in length, so a mean of means would not be the mean over tokens.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.utils import safe_get_full_grad
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from modules_build import make_config, make_gpt

from coe_megatron.chain.settings import ChainSettings
from coe_megatron.config.settings import OptimizerSettings, TrainingSettings, ZeroSettings
from coe_megatron.modules import coe_block_spec
from coe_megatron.zero import engine as zero

ROWS, SEQUENCE, VOCAB = 8, 12, 64
Named = dict[str, torch.Tensor]


@dataclass
class Trace:
    """What steps left behind on this rank: gradients of the first step, norm and loss of each, final weights."""

    gradients: Named = field(default_factory=dict)
    norms: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    weights: Named = field(default_factory=dict)


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
    spoil: Callable[[torch.nn.Module], None] = lambda model: None,
) -> DeepSpeedEngine:
    """Eight experts a layer, two iterations, both auxiliary losses with large coefficients; clipping bites.

    `spoil` may do something to the model before DeepSpeed sees it.
    """
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    config = make_config(
        num_layers=layers,
        hidden_size=32,
        hidden_dropout=dropout,
        attention_dropout=dropout,
        moe_shared_expert_intermediate_size=24,
        moe_router_load_balancing_type="seq_aux_loss",
        moe_aux_loss_coeff=0.1,
        moe_z_loss_coeff=0.01,
        expert_model_parallel_size=parallel_state.get_expert_model_parallel_world_size(),
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        expert_tensor_parallel_size=parallel_state.get_expert_tensor_parallel_world_size(),
        sequence_parallel=parallel_state.get_tensor_model_parallel_world_size() > 1,
        params_dtype=dtype,
        bf16=precision == "bf16",
    )
    model = make_gpt(config, coe_block_spec(config, chain or ChainSettings(iterations=2)), vocab=VOCAB)
    spoil(model)
    training = TrainingSettings(global_batch=ROWS, micro_batch=micro_batch, precision=precision)
    ranks = parallel_state.get_data_parallel_world_size()
    optimizer = OptimizerSettings(lr=1e-2, clip=0.1)
    settings = ZeroSettings(
        stage=stage,
        offload_optimizer="optimizer" in offload,
        offload_parameters="parameters" in offload,
        deepspeed=native,
    )
    return zero.build_engine(model, optimizer, training, settings, ROWS // (micro_batch * ranks))


def take_steps(
    engine: DeepSpeedEngine, first: int, count: int, mean_of_means: bool = False, spoil_loss: float = 1.0
) -> Trace:
    """Train on the rows of steps `first` to `first + count - 1`; `mean_of_means` is the wrong way to weigh rows."""
    trace = Trace()
    for step in range(first, first + count):
        zero.set_lr(engine, 1e-2 / (1 + step))
        loss = torch.zeros(())
        for tokens, counts, total in micro_batches(step, engine.train_micro_batch_size_per_gpu()):
            parts = ROWS // len(tokens)
            divisor = int(counts.sum()) * parts if mean_of_means else total
            loss += _pass(engine, tokens, counts, divisor / spoil_loss)
            if step == first and engine.is_gradient_accumulation_boundary():
                trace.gradients = gradients(engine)
            engine.step()
        trace.norms.append(zero.gradient_norm(engine))
        trace.losses.append(float(_summed(loss)))
    trace.weights = {name: weight.detach().clone() for name, weight in engine.module.named_parameters()}
    return trace


def micro_batches(step: int, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """This rank's micro-batches: tokens [B, S + 1], which labels count [B, S], and how many count in the whole step."""
    generator = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(VOCAB, (ROWS, SEQUENCE + 1), generator=generator)
    lengths = torch.randint(1, SEQUENCE + 1, (ROWS, 1), generator=generator)
    counts = torch.arange(SEQUENCE) < lengths
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    for number in range(rank, ROWS // size, ranks):
        rows = slice(number * size, (number + 1) * size)
        yield tokens[rows], counts[rows], int(counts.sum())


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


def _pass(engine: DeepSpeedEngine, tokens: torch.Tensor, counts: torch.Tensor, total: float) -> torch.Tensor:
    positions = torch.arange(SEQUENCE).expand(len(tokens), -1)
    losses = engine(tokens[:, :-1], positions, None, labels=tokens[:, 1:].contiguous())
    loss = (losses.float() * counts).sum() / total
    zero.backward(engine, loss)
    return loss.detach()


def _summed(value: torch.Tensor) -> torch.Tensor:
    torch.distributed.all_reduce(value, group=parallel_state.get_data_parallel_group())
    return value
