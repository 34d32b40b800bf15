"""Trains a Chain-of-Experts with Megatron-Core until it has memorised a few random sequences, on GPUs or CPUs.

    python examples/chain_in_megatron.py
    torchrun --nproc-per-node 2 examples/chain_in_megatron.py --expert 2
    torchrun --nproc-per-node 2 examples/chain_in_megatron.py --pipeline 2
    torchrun --nproc-per-node 2 examples/chain_in_megatron.py --context 2
    torchrun --nproc-per-node 4 examples/chain_in_megatron.py --expert 2 --pipeline 2

Process groups, model, data-parallel wrapper and schedule are Megatron's; the optimizer is torch's. A chain needs only
the layer spec in `build` and, on some machines, two lines in `start`.
"""

import argparse
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig

from coe_megatron.chain.settings import ChainSettings
from coe_megatron.local_backend import megatron_compat, without_cuda
from coe_megatron.model import coe_layer_spec
from coe_megatron.sequence_parts import own_part

VOCABULARY, LENGTH, ROWS, MICRO_BATCH = 512, 32, 8, 2


def start(expert: int, pipeline: int, context: int, seed: int) -> torch.device:
    """Initialise process groups (of torchrun's ranks, or of one process) and seeds; returns this rank's device."""
    megatron_compat.install()  # both do nothing if nothing needs to be replaced
    without_cuda.install()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", dist.get_node_local_rank(fallback_rank=0))
        torch.cuda.set_device(device)
    single = {} if dist.is_torchelastic_launched() else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **single)
    parallel_state.initialize_model_parallel(
        pipeline_model_parallel_size=pipeline, expert_model_parallel_size=expert, context_parallel_size=context
    )
    torch.manual_seed(seed)  # data, equal on all ranks
    model_parallel_cuda_manual_seed(seed + 100 * parallel_state.get_pipeline_model_parallel_rank())  # weights
    return device


def configure(expert: int, pipeline: int, context: int) -> TransformerConfig:
    """Two layers with two of sixteen experts and one shared expert."""
    return TransformerConfig(
        num_layers=2, hidden_size=64, num_attention_heads=4, normalization="RMSNorm", add_bias_linear=False,
        gated_linear_unit=True, activation_func=torch.nn.functional.silu, hidden_dropout=0.0, attention_dropout=0.0,
        num_moe_experts=16, moe_router_topk=2, moe_ffn_hidden_size=32, moe_shared_expert_intermediate_size=32,
        moe_router_pre_softmax=True, moe_token_dispatcher_type="alltoall",
        moe_router_load_balancing_type="seq_aux_loss", moe_aux_loss_coeff=0.01, moe_z_loss_coeff=0.001,
        expert_model_parallel_size=expert, pipeline_model_parallel_size=pipeline, pipeline_dtype=torch.float32,
        context_parallel_size=context,
        finalize_model_grads_func=finalize_model_grads,  # the schedule calls it after the last micro-batch
    )  # fmt: skip


def build(config: TransformerConfig, chain: ChainSettings, device: torch.device) -> DistributedDataParallel:
    """This rank's stage of the model, with its shard of the experts."""
    model = GPTModel(
        config,
        coe_layer_spec(config, chain),
        VOCABULARY,
        max_sequence_length=LENGTH,
        position_embedding_type="rope",
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )
    return DistributedDataParallel(config, DistributedDataParallelConfig(), model.to(device))


def forward_step(batches: Iterator[torch.Tensor], model: DistributedDataParallel) -> tuple[torch.Tensor, Callable]:
    """Run one micro-batch through this stage; returns its output and the loss function of the last stage."""
    row = next(batches)  # [MICRO_BATCH, LENGTH + 1]
    whole = row[:, :-1], torch.arange(LENGTH, device=row.device).expand(len(row), -1), row[:, 1:]
    place = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
    tokens, positions, labels = (own_part(each, 1, *place) for each in whole)  # [MICRO_BATCH, LENGTH / CP]
    return model(tokens, positions, None, labels=labels), token_loss  # attention is causal without a mask


def token_loss(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum and number of a micro-batch's losses [MICRO_BATCH, LENGTH / CP], and their mean, which the schedule returns.

    Megatron averages the means of micro-batches and scales auxiliary losses accordingly. If micro-batches differ in
    tokens, `calculate_per_token_loss` averages over tokens.
    """
    number = torch.tensor(losses.numel(), dtype=torch.int, device=losses.device)
    return losses.sum(), number, losses.detach().mean()


def gradient_norm(model: DistributedDataParallel) -> float:
    """The gradient norm of the complete model: stages hold different dense weights, and expert ranks different experts.

    With tensor parallelism, weights that are replicated on its ranks would have to be counted once.
    """
    dense, experts = torch.zeros(2, device=next(model.parameters()).device)
    for parameter in model.parameters():
        is_dense = getattr(parameter, "allreduce", True)
        (dense if is_dense else experts).add_(parameter.main_grad.square().sum())
    dist.all_reduce(dense, group=parallel_state.get_model_parallel_group())
    dist.all_reduce(experts, group=parallel_state.get_expert_tensor_model_pipeline_parallel_group())
    return float((dense + experts).sqrt())


def train_step(
    model: DistributedDataParallel, optimizer: torch.optim.Optimizer, rows: torch.Tensor, clip: float = 1.0
) -> tuple[float, float]:
    """One step on this rank's shard of rows [ROWS, LENGTH + 1]; returns loss in nats per token, and gradient norm.

    The loss is over the rows of all ranks, on the last stage (0 on the others); the norm is before clipping.
    """
    group = parallel_state.get_data_parallel_group()
    batches = rows.chunk(group.size())[group.rank()].split(MICRO_BATCH)
    model.zero_grad_buffer()
    optimizer.zero_grad()  # to None: Megatron adds `grad` to `main_grad` in the backward pass
    losses = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=model,
        num_microbatches=len(batches),
        seq_length=LENGTH,
        micro_batch_size=MICRO_BATCH,
    )
    norm = gradient_norm(model)
    model.scale_gradients(min(1.0, clip / norm))
    for parameter in model.parameters():
        parameter.grad = parameter.main_grad
    optimizer.step()
    loss = sum(losses, torch.zeros((), device=rows.device)) / len(batches)
    dist.all_reduce(
        loss, op=dist.ReduceOp.AVG, group=parallel_state.get_data_parallel_group(with_context_parallel=True)
    )
    return float(loss), norm


def main(steps: int = 40, seed: int = 0) -> None:
    """Build and train from a seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--expert", type=int, default=1, help="ranks that share the experts of a layer")
    parser.add_argument("--pipeline", type=int, default=1, help="stages of layers")
    parser.add_argument("--context", type=int, default=1, help="ranks that have parts of the same sequences")
    layout = vars(parser.parse_args())
    device = start(**layout, seed=seed)
    model = build(configure(**layout), ChainSettings(iterations=2), device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rows = torch.randint(VOCABULARY, (ROWS, LENGTH + 1), device=device)
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    prints = parallel_state.is_pipeline_last_stage() and replica == 0
    for step in range(1, steps + 1):
        loss, norm = train_step(model, optimizer, rows)
        if prints and step in (1, *range(10, steps, 10), steps):
            print(f"step {step:>3}  loss {loss:.3f}  gradient norm {norm:.3f}")
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
