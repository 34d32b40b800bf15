"""Attention with rotary positions: grouped-query and multi-latent, with a cache of keys and values.

B: batch, S: sequence, P: all positions so far, D: hidden, H: heads, E: width of a head.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_coe import CoEConfig


def make_norm(config: CoEConfig, width: int) -> nn.Module:
    kind = nn.RMSNorm if config.norm == "rms_norm" else nn.LayerNorm
    return kind(width, eps=config.norm_eps)


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


def rotary(config: CoEConfig, positions_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of all angles, fp32 [B, 1, S, E] (arXiv 2104.09864, YaRN: 2309.00071)."""
    width = config.qk_rope_head_dim if config.kv_lora_rank else config.head_dim
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=positions_BS.device) / width
    frequencies, scale = 1.0 / config.rope_theta**exponents, 1.0
    if config.yarn:
        yarn = config.yarn
        slow = 1.0 / (yarn["factor"] * config.rope_theta**exponents)
        kept = 1 - _ramp(yarn["original_max_position_embeddings"], config.rope_theta, width, exponents)
        frequencies = slow * (1 - kept) + frequencies * kept
        scale = yarn_scale(yarn["factor"], yarn["mscale"]) / yarn_scale(yarn["factor"], yarn["mscale_all_dim"])
    angles = positions_BS[:, None, :, None].float() * torch.cat([frequencies, frequencies])
    return angles.cos() * scale, angles.sin() * scale


def _ramp(length: float, theta: float, width: int, exponents: Tensor) -> Tensor:
    """For each frequency 0 where it turns fast, 1 where it turns slowly: over 32 turns to 1 in `length` positions."""

    def dimension(turns: float) -> float:
        return width * math.log(length / (2 * math.pi * turns)) / (2 * math.log(theta))

    low, high = max(math.floor(dimension(32.0)), 0), min(math.ceil(dimension(1.0)), width - 1)
    steps = torch.arange(len(exponents), dtype=torch.float32, device=exponents.device)
    return ((steps - low) / (high - low or 0.001)).clamp(0, 1)


def yarn_scale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pairs (j, j + E/2) of [B, H, S, E]."""
    cosine, sine = (each.to(x.dtype) for each in angles)
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-second, first], dim=-1) * sine


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; keys and values of a group serve several query heads."""

    def __init__(self, config: CoEConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer, width = config, layer, config.head_dim
        queries, keys = config.num_attention_heads * width, config.num_key_value_heads * width
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.o_proj = linear(config.num_attention_heads * width, config.hidden_size)
        if config.qk_layernorm:
            widths = (queries, keys) if config.qk_norm_over_heads else (width, width)
            self.q_norm, self.k_norm = (make_norm(config, each) for each in widths)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor, cache: Any) -> Tensor:
        """[B, S, D] -> [B, S, D]; mask [B, 1, S, P] bool, True where a position may look."""
        config = self.config
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if config.qk_layernorm and config.qk_norm_over_heads:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (each.unflatten(2, (-1, config.head_dim)).transpose(1, 2) for each in (q, k, v))
        if config.qk_layernorm and not config.qk_norm_over_heads:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, angles), rotate(k, angles)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        grouped = k.shape[1] != q.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class LatentAttention(nn.Module):
    """Multi-latent attention (arXiv 2405.04434): keys and values are expanded from a latent, positions are apart."""

    def __init__(self, config: CoEConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
        assert rank is not None
        queries = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
        if config.q_lora_rank is None:
            self.q_proj = linear(hidden, queries)
        else:
            self.q_a_proj = linear(hidden, config.q_lora_rank)
            self.q_a_layernorm = make_norm(config, config.q_lora_rank)
            self.q_b_proj = linear(config.q_lora_rank, queries)
        self.kv_a_proj_with_mqa = linear(hidden, rank + config.qk_rope_head_dim)
        self.kv_a_layernorm = make_norm(config, rank)
        self.kv_b_proj = linear(rank, heads * (config.qk_nope_head_dim + config.v_head_dim))
        self.o_proj = linear(heads * config.v_head_dim, hidden)
        self.scale = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
        if config.yarn:
            self.scale *= yarn_scale(config.yarn["factor"], config.yarn["mscale_all_dim"]) ** 2

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor, cache: Any) -> Tensor:
        """As `Attention.forward`."""
        config, heads = self.config, self.config.num_attention_heads
        q = self.q_proj(x) if config.q_lora_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.unflatten(2, (heads, -1)).transpose(1, 2)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([config.kv_lora_rank, config.qk_rope_head_dim], dim=2)
        expanded = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(2, (heads, -1)).transpose(1, 2)
        k, v = expanded.split([config.qk_nope_head_dim, config.v_head_dim], dim=3)
        q, q_rope = q.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=3)
        k_rope = rotate(self._halves(k_rope.unsqueeze(1)), angles).expand(-1, heads, -1, -1)
        q = torch.cat([q, rotate(self._halves(q_rope), angles)], dim=3)
        k = torch.cat([k, k_rope], dim=3)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        padded = F.pad(v, (0, q.shape[3] - v.shape[3])) if v.shape[3] < q.shape[3] else v  # kernels want equal widths
        out = F.scaled_dot_product_attention(q, k, padded, attn_mask=mask, scale=self.scale)
        return self.o_proj(out[..., : v.shape[3]].transpose(1, 2).flatten(2))

    @staticmethod
    def _halves(x: Tensor) -> Tensor:
        """The pairs of neighbours that turn, as pairs (j, j + E/2)."""
        return torch.cat([x[..., 0::2], x[..., 1::2]], dim=-1)
