"""Chain-of-Experts language models (arXiv 2506.18945) for Hugging Face transformers.

A transformer whose feed-forward goes through C iterations over the same experts, each with a router of its own:

    x(0) = u = norm(h)                                     h: the residual stream
    F_t(x) = sum_i g[t,i] E_i(x) + S(x)                    routed and shared experts, the same for all t
    x(t) = F_t(x(t-1)) + r(t)                              r: x(t-1) `inner`, x(0) `init`, 0 `outer`
    delta = sum_t F_t (inner) or F_C (init, outer)
    h' = h + delta (`prenorm`) or u + delta (`reference`); `iteration_norm`: x(0) = h, F_t acts on norm_t(x(t-1))

B: batch, S: sequence, P: all positions so far, D: hidden, T = B * S, N: experts, V: vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from .attention_coe import Attention, LatentAttention, linear, make_norm, rotary
from .chain_coe import Chain, DenseLayer, Experts, Router
from .configuration_coe import CoEConfig

# Releases of transformers name it differently.
CACHE = "cache" if "cache" in MoeCausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class CoELayer(nn.Module):
    """Attention and feed-forward, each with a norm before."""

    def __init__(self, config: CoEConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = make_norm(config, config.hidden_size)
        self.self_attn = (LatentAttention if config.kv_lora_rank else Attention)(config, layer)
        self.post_attention_layernorm = make_norm(config, config.hidden_size)
        is_chain = bool(config.chain_layers[layer])
        self.mlp = Chain(config, is_chain) if config.moe_layers[layer] else DenseLayer(config)

    def forward(self, h: Tensor, *attention: Any) -> tuple[Tensor, list[Tensor]]:
        h = h + self.self_attn(self.input_layernorm(h), *attention)
        return self.mlp(h, self.post_attention_layernorm)


class CoEPreTrainedModel(PreTrainedModel):
    config_class = CoEConfig
    base_model_prefix = "model"
    _no_split_modules = ("CoELayer",)
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = ("expert_bias",)

    def _init_weights(self, module: nn.Module) -> None:
        std = getattr(self.config, "initializer_range", 0.02)
        weights = {nn.Linear: ("weight",), nn.Embedding: ("weight",), Router: ("weight",), Experts: ("w1", "w2")}
        for name in weights.get(type(module), ()):
            nn.init.normal_(getattr(module, name), std=std)


class CoEModel(CoEPreTrainedModel):
    """The transformer without its output layer."""

    def __init__(self, config: CoEConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(CoELayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = make_norm(config, config.hidden_size)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Hidden states of the embedding, every layer and the final norm [B, S, D]; logits of all routings."""
        h = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        earlier = 0 if cache is None else cache.get_seq_length()
        mask = allowed(h, earlier, attention_mask)
        if position_ids is None:
            position_ids = positions(h, earlier, attention_mask)
        states, logits, angles = [h], [], rotary(self.config, position_ids)
        for layer in self.layers:
            h, of_layer = layer(h, angles, mask, cache)
            states.append(h)
            logits += of_layer
        return [*states, self.norm(h)], logits


def allowed(h: Tensor, earlier: int, attention_mask: Tensor | None) -> Tensor:
    """[B, 1, S, P] bool: a position looks at itself and at earlier ones that are no padding."""
    batch, length = h.shape[:2]
    place = torch.arange(earlier + length, device=h.device)
    queries = place[earlier:, None]
    mask = (place <= queries)[None, None]
    if attention_mask is None:
        return mask.expand(batch, 1, -1, -1)
    if attention_mask.ndim == 4:
        return attention_mask.bool() if attention_mask.dtype != h.dtype else attention_mask == 0
    valid = attention_mask.bool()[:, None, None, : earlier + length]
    return mask & valid | (place == queries)  # padding looks at itself, or it would come to NaN


def positions(h: Tensor, earlier: int, attention_mask: Tensor | None) -> Tensor:
    """[B, S]: the number of earlier positions that are no padding."""
    batch, length = h.shape[:2]
    if attention_mask is None or attention_mask.ndim != 2:
        return torch.arange(earlier, earlier + length, device=h.device).expand(batch, -1)
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, earlier : earlier + length]


class CoEForCausalLM(CoEPreTrainedModel, GenerationMixin):
    """The language model."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (transformers' own form)

    def __init__(self, config: CoEConfig) -> None:
        super().__init__(config)
        self.model = CoEModel(config)
        self.lm_head = linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **more: Any,
    ) -> MoeCausalLMOutputWithPast:
        """The logits of the token after each position.

        Args:
            input_ids: int64 [B, S].
            attention_mask: [B, P], 0 at padding on either side; None for none.
            position_ids: int64 [B, S]; counted without padding when None.
            cache, past_key_values: keys and values of the positions before these.
            inputs_embeds: [B, S, D] instead of input_ids.
            labels: int64 [B, S], -100 where a token does not count; they are shifted here.
            logits_to_keep: number of last positions, or their indices; 0 for all.

        Returns:
            logits [B, S, V]; `loss`, the mean cross-entropy of the labels, without the routers' auxiliary losses;
            if asked for, hidden states [B, S, D] of the embedding and of every layer, and `router_logits`, fp32 [T, N]
            of every routing, layer by layer, and there iteration by iteration.
        """
        cache = past_key_values if cache is None else cache
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if cache is None and use_cache and not self.training:
            cache = DynamicCache()
        states, routings = self.model(input_ids, attention_mask, position_ids, cache, inputs_embeds)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(states[-1][:, keep])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
        wanted = (output_hidden_states, self.config.output_hidden_states)
        shows_states = wanted[1] if wanted[0] is None else wanted[0]
        shows_routers = self.config.output_router_logits if output_router_logits is None else output_router_logits
        return MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: cache},
            hidden_states=(*states[:-2], states[-1]) if shows_states else None,
            router_logits=tuple(routings) if shows_routers else None,
        )
