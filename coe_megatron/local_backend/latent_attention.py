"""Multi-latent attention with the norms and linear layers that its spec names."""

from typing import Any

from megatron.core.transformer.multi_latent_attention import MLASelfAttention


class LatentAttention(MLASelfAttention):
    """Megatron's multi-latent attention, which also accepts `qk_layernorm` without `q_lora_rank`.

    The query then has no latent and no norm; only the latent of keys and values is normalised, as in the paper's model.
    Megatron-Core 0.19.2 refuses this unless Transformer Engine fuses a norm of the hidden state into the query's
    projection; 0.16.1 builds it.
    """

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) for name in names}
