"""Which tensor of ours is which of theirs, and how one becomes the other; the same rules for export and import.

D: hidden, H: query heads, G: key/value heads, E: width of a head, F: width of a feed-forward.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from coe_megatron.config.settings import ModelSettings, RunConfig

Split = Callable[[Tensor], Sequence[Tensor]]
Merge = Callable[[Sequence[Tensor]], Tensor]


def _alone(tensor: Tensor) -> Sequence[Tensor]:
    return (tensor,)


def _only(tensors: Sequence[Tensor]) -> Tensor:
    (tensor,) = tensors
    return tensor


@dataclass(frozen=True)
class Rule:
    """A tensor of ours, and those of theirs that have its values.

    Attributes:
        ours: name, of the model or within a layer.
        theirs: names, of the model or within a layer; `{e}` stands for the number of an expert.
        split, merge: from ours to theirs, and back.
        experts: number of experts, each converted by itself, if `theirs` has `{e}`.
    """

    ours: str
    theirs: tuple[str, ...]
    split: Split = _alone
    merge: Merge = _only
    experts: int = 0


@dataclass(frozen=True)
class Constant:
    """A tensor of theirs that no choice of ours changes."""

    theirs: str
    shape: tuple[int, ...]
    value: float = 0.0

    def make(self) -> Tensor:
        """The tensor."""
        return torch.full(self.shape, self.value)


Rules = list[Rule | Constant]


def renamed(ours: str, theirs: str) -> Rule:
    """A tensor that has another name only."""
    return Rule(ours, (theirs,))


def norm(model: ModelSettings, ours: str, theirs: str) -> Iterator[Rule]:
    """A norm's gain, and with LayerNorm its bias; `ours` ends before `weight`."""
    for part in ("weight", "bias") if model.normalization == "LayerNorm" else ("weight",):
        yield renamed(ours + part, f"{theirs}.{part}")


def halves(ours: str, *theirs: str, experts: int = 0) -> Rule:
    """The gate and the value of a first product, which are one tensor of ours."""
    return Rule(ours, theirs, partial(torch.chunk, chunks=2, dim=-2), partial(torch.cat, dim=-2), experts)


def scaled(rule: Rule, factor: float) -> Rule:
    """Theirs are `factor` times as large."""
    return Rule(
        rule.ours,
        rule.theirs,
        lambda ours: [part * factor for part in rule.split(ours)],
        lambda theirs: rule.merge(theirs) / factor,
        rule.experts,
    )


def of_model(model: ModelSettings) -> Rules:
    """Embedding, final norm and output layer; the same names in all architectures."""
    output = [renamed("output_layer.weight", "lm_head.weight")] if model.untied_embeddings else []
    return [
        renamed("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        *norm(model, "decoder.final_layernorm.", "model.norm"),
        *output,
    ]


def attention(config: RunConfig) -> Rules:
    """A layer's attention and both of its norms; the same names in all architectures."""
    model = config.model
    first, second = "self_attention.linear_qkv.layer_norm_", "mlp.linear_fc1.layer_norm_"
    if model.mla is not None:
        first, second = "input_layernorm.", "pre_mlp_layernorm."
    return [
        *norm(model, first, "input_layernorm"),
        *norm(model, second, "post_attention_layernorm"),
        *(_grouped(model) if model.mla is None else _latent(model)),
        renamed("self_attention.linear_proj.weight", "self_attn.o_proj.weight"),
    ]


def _grouped(model: ModelSettings) -> Iterator[Rule]:
    yield queries_keys_values(model, "weight")
    if model.qkv_bias:
        yield queries_keys_values(model, "bias")
    if model.qk_layernorm:
        yield from norm(model, "self_attention.q_layernorm.", "self_attn.q_norm")
        yield from norm(model, "self_attention.k_layernorm.", "self_attn.k_norm")


def queries_keys_values(model: ModelSettings, part: str) -> Rule:
    """Megatron's [G, H / G + 2, E] rows, in each group first the queries, against three matrices (or biases)."""
    heads = model.num_attention_heads
    groups = model.num_query_groups or heads
    width = model.kv_channels or model.hidden_size // heads

    def split(ours: Tensor) -> Sequence[Tensor]:
        rows = ours.unflatten(0, (groups, heads // groups + 2, width))
        return [part.flatten(0, 2) for part in rows.split([heads // groups, 1, 1], dim=1)]

    def merge(theirs: Sequence[Tensor]) -> Tensor:
        return torch.cat([part.unflatten(0, (groups, -1, width)) for part in theirs], dim=1).flatten(0, 2)

    names = tuple(f"self_attn.{each}_proj.{part}" for each in "qkv")
    return Rule(f"self_attention.linear_qkv.{part}", names, split, merge)


def _latent(model: ModelSettings) -> Iterator[Rule]:
    assert model.mla is not None
    ours, theirs = "self_attention.", "self_attn."
    if model.mla.q_lora_rank is None:
        yield renamed(f"{ours}linear_q_proj.weight", f"{theirs}q_proj.weight")
    else:
        yield renamed(f"{ours}linear_q_down_proj.weight", f"{theirs}q_a_proj.weight")
        yield renamed(f"{ours}linear_q_up_proj.weight", f"{theirs}q_b_proj.weight")
        yield from norm(model, f"{ours}q_layernorm.", f"{theirs}q_a_layernorm")
    yield renamed(f"{ours}linear_kv_down_proj.weight", f"{theirs}kv_a_proj_with_mqa.weight")
    yield renamed(f"{ours}linear_kv_up_proj.weight", f"{theirs}kv_b_proj.weight")
    yield from norm(model, f"{ours}kv_layernorm.", f"{theirs}kv_a_layernorm")


def experts_alone(config: RunConfig, *names: str) -> Rules:
    """Each expert by itself: templates of the names of gate, value and second product."""
    *first, second = names
    count, ours = config.moe.num_experts, "mlp.experts.experts.linear_fc{}.weight"
    return [halves(ours.format(1), *first, experts=count), Rule(ours.format(2), (second,), experts=count)]


def feed_forward(ours: str, theirs: str) -> Rules:
    """A dense feed-forward or the shared experts, gate and value apart; prefixes of the names."""
    return [
        halves(f"{ours}linear_fc1.weight", f"{theirs}gate_proj.weight", f"{theirs}up_proj.weight"),
        renamed(f"{ours}linear_fc2.weight", f"{theirs}down_proj.weight"),
    ]
