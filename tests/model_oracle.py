"""One training step of the MLP sub-layer, by our layer and by the oracle, and how far they are apart."""

from itertools import product
from typing import Any, get_args

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from model_build import BATCH, SEQUENCE, Named, gradient, parts_of

from coe_megatron.chain.method import ChainOfExperts
from coe_megatron.chain.settings import ChainSettings, Gating, NormPlacement, Residual

ITERATIONS = (1, 2, 3, 4)
CHAINS = list(product(get_args(Gating), get_args(Residual), get_args(NormPlacement)))
VARIANTS: dict[str, dict[str, Any]] = {
    "learned scale": {"learned_scale": 0.1},
    "learned scale, init": {"learned_scale": 0.5, "residual": "init"},
    "learned scale, outer, norms": {"learned_scale": 1.0, "residual": "outer", "norm_placement": "iteration_norm"},
    "conditioned": {"conditioned": True},
    "conditioned, shared router, outer": {"conditioned": True, "gating": "shared_router", "residual": "outer"},
    "conditioned, learned scale": {"conditioned": True, "learned_scale": 1.0, "gating": "fixed", "residual": "init"},
    "no return": {"no_return": True, "residual": "init"},
    "no return, one router": {"no_return": True, "gating": "shared_router"},
    "learned scale, reference, fixed": {"learned_scale": 1.0, "norm_placement": "reference", "gating": "fixed"},
    "modulation": {"modulation_rank": 3},
    "modulation, norms, learned scale": {
        "modulation_rank": 1,
        "norm_placement": "iteration_norm",
        "learned_scale": 1.0,
    },
    "latent": {"latent": 8},
    "latent, reference, modulation, outer": {
        "latent": 4,
        "norm_placement": "reference",
        "modulation_rank": 3,
        "residual": "outer",
    },
    "latent, init, fixed": {"latent": 12, "residual": "init", "gating": "fixed", "learned_scale": 1.0},
}
STREAMS: dict[str, dict[str, Any]] = {  # with at least two iterations
    "streams": {"streams": 2},
    "streams, norms": {"streams": 3, "norm_placement": "iteration_norm"},
    "streams, reference, fixed": {"streams": 2, "norm_placement": "reference", "gating": "fixed", "learned_scale": 1.0},
    "streams, latent, modulation": {"streams": 4, "latent": 8, "modulation_rank": 2},
}


def chain_of(combination: tuple[str, str, str], iterations: int, balance: str = "sum") -> ChainSettings:
    gating, residual, norm_placement = combination
    return ChainSettings(iterations, gating, residual, norm_placement, balance)


def make_batch(hidden: int, batch: int = BATCH, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual stream h and the gradient that reaches h', both [B, S, D]."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, SEQUENCE, hidden)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def layer_step(
    layer: TransformerLayer, h_BSD: torch.Tensor, grad_BSD: torch.Tensor, padding_BS: torch.Tensor | None = None
) -> Named:
    """h', the gradient of h, and every parameter's gradient under the oracle's name."""
    h_SBD = h_BSD.transpose(0, 1).contiguous().requires_grad_()
    out_SBD = layer._forward_mlp(h_SBD, padding_mask=padding_BS)
    out_SBD.backward(grad_BSD.transpose(0, 1))
    gradients = {name: gradient(parameter) for name, parameter in parts_of(layer).items()}
    return {"h'": out_SBD.detach().transpose(0, 1), "h": h_SBD.grad.transpose(0, 1), **gradients}


def oracle_step(
    oracle: ChainOfExperts, h_BSD: torch.Tensor, grad_BSD: torch.Tensor, padding_BS: torch.Tensor | None = None
) -> Named:
    """The same of the oracle; the load of each routing is there as well."""
    h_BSD = h_BSD.clone().requires_grad_()
    result = oracle(h_BSD, padding_BS)
    ((result.stream * grad_BSD).sum() + result.total_loss).backward()
    gradients = {name: gradient(parameter) for name, parameter in oracle.named_parameters()}
    return {"h'": result.stream.detach(), "h": h_BSD.grad, **gradients}
