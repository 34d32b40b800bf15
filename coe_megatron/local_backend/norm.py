"""torch's RMSNorm and LayerNorm with the constructor and parameter marks that Megatron-Core expects."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from coe_megatron.errors import ConfigError


class Norm:
    """Builds torch's norm for a Megatron config; works with sequence parallelism, unlike Megatron's own wrapper.

    With sequence parallelism every tensor-parallel rank sees a part of the tokens, so the gradient of the gain must be
    summed over these ranks. `gain.sequence_parallel` marks it for this reduction.

    Raises:
        ConfigError: `config.normalization` is neither RMSNorm nor LayerNorm, or the config needs a zero-centred gain.
    """

    kinds: dict[str, type] = {"RMSNorm": torch.nn.RMSNorm, "LayerNorm": torch.nn.LayerNorm}  # noqa: RUF012

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5):
        if config.normalization not in cls.kinds:
            raise ConfigError(f"normalization is {config.normalization!r}: it must be one of {', '.join(cls.kinds)}")
        if config.layernorm_zero_centered_gamma:
            raise ConfigError("layernorm_zero_centered_gamma is True: it needs Transformer Engine's norm")
        norm = cls.kinds[config.normalization](
            cls.heads(config) * hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device()
        )
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm

    @staticmethod
    def heads(config: TransformerConfig) -> int:
        """The number of vectors of `hidden_size` that are normalised as one."""
        return 1


class _OverHeads:
    """Normalises [..., heads, width] over the last two axes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.flatten(-2)).view_as(x)  # type: ignore[misc]


class _RMSNormOverHeads(_OverHeads, torch.nn.RMSNorm): ...


class _LayerNormOverHeads(_OverHeads, torch.nn.LayerNorm): ...


class QueryNorm(Norm):
    """One norm over all heads of the queries (`model.qk_norm_over_heads`)."""

    kinds = {"RMSNorm": _RMSNormOverHeads, "LayerNorm": _LayerNormOverHeads}  # noqa: RUF012

    @staticmethod
    def heads(config: TransformerConfig) -> int:
        return config.num_attention_heads


class KeyNorm(QueryNorm):
    """One norm over all heads of the keys."""

    @staticmethod
    def heads(config: TransformerConfig) -> int:
        return config.num_query_groups
