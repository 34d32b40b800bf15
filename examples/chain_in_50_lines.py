"""A two-iteration Chain-of-Experts model learns running sums modulo 7 on a CPU, in seconds and without Megatron.

A row is x1 s1 x2 s2 ..., where s_t = (s_{t-1} + x_t) mod 7. Only the sums are predictable, and only they count.
"""

import torch

from coe_megatron.chain.language_model import ChainLanguageModel, ModelSettings, next_token_loss
from coe_megatron.chain.routing import RouterSettings
from coe_megatron.chain.settings import ChainSettings

MODULUS = 7


def batch(rows: int = 32, terms: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [rows, 2 * terms], and a mask of the sums."""
    x = torch.randint(MODULUS, (rows, terms))
    sums = x.cumsum(dim=1) % MODULUS
    tokens = torch.stack([x, sums], dim=2).flatten(1)
    return tokens, (torch.arange(2 * terms) % 2 == 1).expand_as(tokens)


def main(steps: int = 200, seed: int = 0) -> list[float]:
    """Train from a seed; returns the loss of every step."""
    torch.manual_seed(seed)
    router = RouterSettings(num_experts=8, topk=2, seq_aux_coeff=0.001)
    chain = ChainSettings(iterations=2, gating="independent", residual="inner")
    model = ChainLanguageModel(ModelSettings(MODULUS, 48, 2, 4, 48, router, chain, shared_ffn=48))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        tokens, counted = batch()
        output = model(tokens)
        loss = next_token_loss(output.logits, tokens, counted)
        optimizer.zero_grad()
        (loss + output.balance_loss).backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {steps} steps (guessing: {torch.tensor(MODULUS).log():.3f})")
    for number, layer in enumerate(output.chains, 1):
        for iteration, load in enumerate(layer.loads.tolist(), 1):
            print(f"layer {number}, iteration {iteration}: tokens per expert {load}")
    return losses


if __name__ == "__main__":
    main()
