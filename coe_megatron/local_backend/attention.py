"""Core attention with torch's scaled_dot_product_attention, without S x S scores in memory on CPU and CUDA.

Attention dropout on the CPU is the exception: torch computes it without a fused kernel.

With context parallelism each rank has two chunks of the queries (`sequence_parts`), and gathers keys and values of all
ranks: one all-gather in the forward pass, one reduce-scatter of their gradients in the backward pass. A causal chunk
attends to a prefix of the keys; no rank computes more scores than another.

S: sequence, B: batch, A: heads on this rank, G: key/value heads on this rank, H: query/key head size, V: value head
size. Multi-latent attention uses V different from H; grouped-query attention G smaller than A.
"""

from contextlib import nullcontext, suppress

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from coe_megatron.errors import ConfigError
from coe_megatron.sequence_parts import chunks_of, in_order


class SDPACoreAttention(MegatronModule):
    """Replaces Megatron's `DotProductAttention`; also supports MLA with `k_channels` and `v_channels`.

    Args:
        softmax_scale: factor of the scores; 1/sqrt(H) when None.
        attention_dropout: dropout of the attention weights; from the config when None.

    Attributes:
        pads_values: on CUDA too pad values to the size of keys if they are shorter (MLA). torch's flash attention
            needs equal sizes, its memory-efficient kernel does not. On CPU values are always padded: there torch has no
            other kernel, and would materialise all S x S weights.

    Raises:
        ConfigError: the config needs something that torch's attention does not support (sliding window, query-key
            layer scaling, a non-standard softmax).
    """

    pads_values = False

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        _refuse_unsupported(config)
        self.attn_mask_type = attn_mask_type
        self.context = None
        if config.context_parallel_size > 1:
            self.context = pg_collection.cp if pg_collection else parallel_state.get_context_parallel_group()
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: object | None = None,
    ) -> torch.Tensor:
        """Attention; as in Megatron, a given mask replaces the mask type, which applies otherwise.

        Args:
            query: [S, B, A, H]; key: [S, B, G, H]; value: [S, B, G, V]; with context parallelism S / CP of each.
            attention_mask: bool, broadcastable to [B, A, S, S], True where attention is masked; or None. With context
                parallelism it has the rows of this rank's queries.

        Returns:
            [S, B, A * V]; with context parallelism S / CP.
        """
        assert attention_bias is None, "attention bias is not supported by SDPACoreAttention"
        assert packed_seq_params is None, "packed sequences are not supported by SDPACoreAttention"
        mask_type = self.attn_mask_type if attn_mask_type is None else attn_mask_type
        value_size = value.shape[3]
        if self.context is not None:
            key, value = _gathered(key, value, self.context)
        if value_size < key.shape[3] and (self.pads_values or not value.is_cuda):
            value = F.pad(value, (0, key.shape[3] - value_size))
        causal = attention_mask is None and mask_type == AttnMaskType.causal
        dropout = self.dropout if self.training else 0.0
        # With sequence parallelism Megatron's block has already entered the fork; leaving a nested one would reset it.
        fork = dropout and not self.config.sequence_parallel
        with get_cuda_rng_tracker().fork() if fork else nullcontext():
            if causal and self.context is not None:
                chunks = zip(query.chunk(2), chunks_of(self.context.rank(), self.context.size()), strict=True)
                ends = [(chunk, (number + 1) * len(chunk)) for chunk, number in chunks]
                out = torch.cat(
                    [self._attend(chunk, key[:end], value[:end], None, True, dropout) for chunk, end in ends]
                )
            else:
                out = self._attend(query, key, value, attention_mask, causal, dropout)
        return out[..., :value_size].flatten(2)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        causal: bool,
        dropout: float,
    ) -> torch.Tensor:
        """[S, B, A, V] of queries [S, B, A, H], and keys and values of as many positions or, before them, more."""
        query_BASH, key_BGSH, value_BGSV = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        mask = None if attention_mask is None else ~attention_mask
        square = len(query) == len(key)
        if causal and not square:
            mask = _causal(len(query), len(key), query.device)
        out_BASV = F.scaled_dot_product_attention(
            query_BASH,
            key_BGSH,
            value_BGSV,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=causal and square,
            scale=self.softmax_scale,
            enable_gqa=key.shape[2] != query.shape[2],
        )
        return out_BASV.permute(2, 0, 1, 3)


def _causal(queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """Which of the keys the last queries attend to: on CUDA a note for torch's kernels, else bool [queries, keys]."""
    if device.type == "cuda":
        from torch.nn.attention.bias import causal_lower_right  # with torch's compiler, which nothing else needs

        with suppress(RuntimeError):  # torch cannot make it under a TorchDispatchMode, such as one that counts FLOPs
            return causal_lower_right(queries, keys)
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def _gathered(
    key: torch.Tensor, value: torch.Tensor, group: torch.distributed.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [S, B, G, ...] of the whole sequence from those of the parts [S / CP, B, G, ...]."""
    sizes = [key.shape[3], value.shape[3]]
    parts = gather_from_sequence_parallel_region(torch.cat([key, value], dim=3), group=group)
    key, value = in_order(parts, group.size()).split(sizes, dim=3)
    return key, value


def _refuse_unsupported(config: TransformerConfig) -> None:
    unsupported = {
        "window_size": config.window_size is not None,
        "apply_query_key_layer_scaling": config.apply_query_key_layer_scaling,
        "softmax_type": config.softmax_type != "vanilla",
        "qk_clip": config.qk_clip,
        "log_max_attention_logit": config.log_max_attention_logit,
    }
    for name, is_set in unsupported.items():
        if is_set:
            raise ConfigError(
                f"{name} is {getattr(config, name)!r}: scaled_dot_product_attention does not support it; "
                "leave it at Megatron's default or use Transformer Engine's attention"
            )
