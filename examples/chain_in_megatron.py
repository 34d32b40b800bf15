"""A Chain-of-Experts in Megatron-Core's own GPTModel learns a few random sequences by heart: one process, GPU or CPU.

What a program of your own needs around the model stands in `start`, once and before the model is built.
"""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig

from coe_megatron.chain.settings import ChainSettings
from coe_megatron.modules import coe_layer_spec
from coe_megatron.parallel import without_cuda, without_te

VOCABULARY, ROWS, LENGTH = 512, 8, 32


def start(seed: int) -> torch.device:
    """Make this process Megatron's only rank; under torchrun leave out store, rank and world size."""
    without_te.install()  # both do nothing where there is nothing to replace
    without_cuda.install()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel(expert_model_parallel_size=1)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    return device


def build() -> GPTModel:
    """Two layers, each a chain of two iterations with two of sixteen experts and one shared expert."""
    config = TransformerConfig(
        num_layers=2, hidden_size=64, num_attention_heads=4, normalization="RMSNorm", add_bias_linear=False,
        gated_linear_unit=True, activation_func=torch.nn.functional.silu, hidden_dropout=0.0, attention_dropout=0.0,
        num_moe_experts=16, moe_router_topk=2, moe_ffn_hidden_size=32, moe_shared_expert_intermediate_size=32,
        moe_router_pre_softmax=True, moe_token_dispatcher_type="alltoall", moe_aux_loss_coeff=0.01,
    )  # fmt: skip
    spec = coe_layer_spec(config, ChainSettings(iterations=2))
    return GPTModel(config, spec, VOCABULARY, max_sequence_length=LENGTH, position_embedding_type="rope")


def train(model: GPTModel, device: torch.device, steps: int) -> list[float]:
    """Learn one batch of random tokens; the loss in nats a token of every step."""
    row = torch.randint(VOCABULARY, (ROWS, LENGTH + 1), device=device)
    tokens, labels = row[:, :-1], row[:, 1:]
    positions = torch.arange(LENGTH, device=device).expand(ROWS, -1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(tokens, positions, None, labels=labels).mean()  # attention is causal without a mask
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(steps: int = 40, seed: int = 0) -> list[float]:
    """Build and train from a seed; returns the loss of every step."""
    device = start(seed)
    losses = train(build().to(device), device, steps)
    for step in range(0, steps, 10):
        print(f"step {step + 1:>3}  loss {losses[step]:.3f}")
    print(f"step {steps:>3}  loss {losses[-1]:.3f}")
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    main()
