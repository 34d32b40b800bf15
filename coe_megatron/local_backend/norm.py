"""torch's RMSNorm and LayerNorm with the constructor and parameter marks that Megatron-Core expects."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from coe_megatron.errors import ConfigError

_NORMS = {"RMSNorm": torch.nn.RMSNorm, "LayerNorm": torch.nn.LayerNorm}


class Norm:
    """Builds torch's norm for a Megatron config; works with sequence parallelism, unlike Megatron's own wrapper.

    With sequence parallelism every tensor-parallel rank sees a part of the tokens, so the gradient of the gain must be
    summed over these ranks. `gain.sequence_parallel` marks it for this reduction.

    Raises:
        ConfigError: `config.normalization` is neither RMSNorm nor LayerNorm, or the config needs a zero-centred gain.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5):
        if config.normalization not in _NORMS:
            raise ConfigError(f"normalization is {config.normalization!r}: it must be one of {', '.join(_NORMS)}")
        if config.layernorm_zero_centered_gamma:
            raise ConfigError("layernorm_zero_centered_gamma is True: it needs Transformer Engine's norm")
        norm = _NORMS[config.normalization](
            hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device()
        )
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm
