"""Multi-latent attention with the norms and linear layers that its spec names."""

from typing import Any

from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor


class LatentAttention(MLASelfAttention):
    """Megatron's multi-latent attention, which also accepts `qk_layernorm` without `q_lora_rank`.

    The query then has no latent and no norm; only the latent of keys and values is normalised, as in the paper's model.
    Megatron-Core 0.19.2 refuses this unless Transformer Engine fuses a norm of the hidden state into the query's
    projection; 0.16.1 builds it.

    With tensor parallelism the latent of keys and values is handed on by rows of the sequence, as Transformer Engine's
    projection does. Both releases otherwise hand on whole sequences, and then omit what the heads of other ranks add to
    the gradient of the key with rotary position, which all heads share.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        projection = self.linear_kv_down_proj
        if isinstance(projection, ColumnParallelLinear) and self.config.sequence_parallel:
            projection.register_forward_hook(_by_rows)

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) for name in names}


def _by_rows(projection: ColumnParallelLinear, _: Any, output: tuple[Tensor, None]) -> tuple[Tensor, None]:
    """From the whole sequence with a part of the latent, [S, B, L / TP], to its rows with all of it, [S / TP, B, L]."""
    latent_SBL = gather_from_tensor_model_parallel_region(output[0], group=projection.tp_group)
    return scatter_to_sequence_parallel_region(latent_SBL, group=projection.tp_group), output[1]
