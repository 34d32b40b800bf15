"""Closed forms: parameters, FLOPs and combinations of a Chain-of-Experts language model, as plain integers.

Does not import torch, so that a program can report the cost of a run quickly. Tests compare every form with the built
model.

Conventions: a multiply-add is 2 FLOPs, and only matrix products count. Attention counts all S positions for each token
although it is causal, as in Megatron-Core and most reports; a kernel that skips masked positions does less. Training is
3 x forward (the backward pass has two products for each one of the forward pass), without recomputation.
"""

import math
import operator
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from functools import cached_property
from typing import Literal, get_args

from coe_megatron.chain.settings import ChainSettings
from coe_megatron.errors import ConfigError

Attention = Literal["mha", "mla"]


@dataclass(frozen=True)
class ModelShape:
    """All sizes of a model that its parameters and FLOPs depend on.

    Attributes:
        layers: transformer layers.
        hidden: D.
        vocab: rows of the embedding, including padding.
        heads: attention heads.
        seq_length: S, tokens per sequence.
        experts: N routed experts of a MoE layer.
        topk: K, experts per token in one iteration.
        expert_ffn: F, of one routed expert.
        shared_ffn: total width of the shared experts; 0 for none.
        dense_ffn: width of the feed-forward of dense layers; may be 0 if there are none.
        moe_layers: number of MoE layers, or a 0/1 per layer; None for all layers.
        chains: a 0/1 per layer: which MoE layers are chains; plain ones choose C·K experts at once. None for all.
        attention: `mha` (with kv_groups) or `mla` (with the five fields at the end).
        kv_groups: key/value heads of `mha`; None for `heads`.
        head_dim: of `mha`; None for hidden / heads.
        kv_lora_rank: of `mla`, the width of the compressed keys and values.
        q_lora_rank: of `mla`, the width of compressed queries; None projects queries directly from the hidden state.
        qk_nope: of `mla`, dimensions of a query head without rotary position.
        qk_rope: of `mla`, dimensions with rotary position; all heads share one key of this width.
        v_head_dim: of `mla`, the size of a value head.
        qk_layernorm: norms on the queries and keys of `mha`; `mla` always normalises its latents.
        qk_norm_over_heads: with `qk_layernorm`, these norms are over all heads together.
        qkv_bias: queries, keys and values of `mha` have biases.
        shared_gate: the shared experts' output has a learned gate.
        layer_norm: every norm is a LayerNorm (with a bias) instead of an RMSNorm.
        swiglu: the first matrix of every feed-forward has two halves.
        untied_embeddings: the output layer has its own weights.
        chain: iterations, gating, norm placement.

    Raises:
        ConfigError: a field has no valid value; the message names the field, the value and the valid ones.
    """

    layers: int
    hidden: int
    vocab: int
    heads: int
    seq_length: int
    experts: int
    topk: int
    expert_ffn: int
    shared_ffn: int = 0
    dense_ffn: int = 0
    moe_layers: int | tuple[int, ...] | None = None
    chains: tuple[int, ...] | None = None
    attention: Attention = "mha"
    kv_groups: int | None = None
    head_dim: int | None = None
    kv_lora_rank: int = 0
    q_lora_rank: int | None = None
    qk_nope: int = 0
    qk_rope: int = 0
    v_head_dim: int = 0
    qk_layernorm: bool = False
    qk_norm_over_heads: bool = False
    qkv_bias: bool = False
    shared_gate: bool = False
    layer_norm: bool = False
    swiglu: bool = True
    untied_embeddings: bool = True
    chain: ChainSettings = field(default_factory=ChainSettings)

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "vocab", "heads", "seq_length", "experts", "topk", "expert_ffn"):
            self._require(getattr(self, name) >= 1, name, "at least 1")
        self._require(self.topk <= self.experts, "topk", f"at most experts, {self.experts}")
        self.chain.require_experts(self.experts, self.topk, groups=None)
        self.chain.width(self.hidden)
        self._require(self.attention in get_args(Attention), "attention", "mha or mla")
        if self.attention == "mla":
            for name in ("kv_lora_rank", "qk_nope", "qk_rope", "v_head_dim"):
                self._require(getattr(self, name) >= 1, name, "at least 1 for mla")
        elif self.head_dim is None:
            self._require(self.hidden % self.heads == 0, "heads", f"a divisor of hidden, {self.hidden}")
        if isinstance(self.moe_layers, tuple):
            self._require(len(self.moe_layers) == self.layers, "moe_layers", f"{self.layers} numbers")
        self._require(0 <= self.num_moe_layers <= self.layers, "moe_layers", f"at most {self.layers}")
        if self.chains is not None:
            self._check_chains(self.chains)
        needs_dense = self.num_moe_layers < self.layers
        self._require(self.dense_ffn >= needs_dense, "dense_ffn", "at least 1 if a layer is dense")

    def _check_chains(self, chains: tuple[int, ...]) -> None:
        self._require(len(chains) == self.layers, "chains", f"{self.layers} numbers")
        moe = (1,) * self.layers if self.moe_layers is None else self.moe_layers
        within = isinstance(moe, tuple) and all(map(operator.le, chains, moe))
        self._require(within, "chains", "1 only for MoE layers, which moe_layers must list")
        self._require(self.chain.iterations * self.topk <= self.experts, "topk", "at most experts / C with `chains`")

    def _require(self, valid: bool, name: str, values: str) -> None:
        if not valid:
            raise ConfigError(f"shape.{name} is {getattr(self, name)!r}: it must be {values}")

    @property
    def num_moe_layers(self) -> int:
        """Number of MoE layers."""
        if isinstance(self.moe_layers, tuple):
            return sum(map(bool, self.moe_layers))
        return self.layers if self.moe_layers is None else self.moe_layers

    @cached_property
    def moe_kinds(self) -> list[tuple[int, "ModelShape"]]:
        """Numbers of chains and plain MoE layers, if any, each with a shape whose MoE layers are all of this kind."""
        chains = self.num_moe_layers if self.chains is None else sum(self.chains)
        kinds = [(chains, replace(self, chains=None))] if chains else []
        if plain := self.num_moe_layers - chains:
            topk = self.chain.iterations * self.topk
            kinds.append((plain, replace(self, topk=topk, chain=self.chain.plain, chains=None)))
        return kinds

    @property
    def head_width(self) -> int:
        """Size of a head of `mha`."""
        return self.head_dim or self.hidden // self.heads

    @property
    def key_value_width(self) -> int:
        """Elements of keys and values per token, over all heads."""
        if self.attention == "mla":
            return self.heads * (self.qk_nope + self.qk_rope + self.v_head_dim)
        return 2 * (self.kv_groups or self.heads) * self.head_width

    @property
    def attention_biases(self) -> int:
        """Parameters of the biases of a layer's attention."""
        return self.head_width * (self.heads + 2 * (self.kv_groups or self.heads)) if self.qkv_bias else 0

    @property
    def qk_norm_widths(self) -> tuple[int, ...]:
        """Widths of the norms of queries and keys of `mha`; empty without `qk_layernorm`."""
        if not self.qk_layernorm:
            return ()
        counts = (self.heads, self.kv_groups or self.heads) if self.qk_norm_over_heads else (1, 1)
        return tuple(count * self.head_width for count in counts)

    @property
    def routings(self) -> int:
        """Routings of a token per layer: one with `fixed` gating, otherwise C."""
        return 1 if self.chain.gating == "fixed" else self.chain.iterations

    @property
    def routers(self) -> int:
        """Routers per layer: C with `independent` gating, otherwise one."""
        return self.chain.iterations if self.chain.gating == "independent" else 1

    @property
    def gains(self) -> int:
        """Learned gains of a chain, [D] each: one per iteration for `learned_scale`, and one for `conditioned`."""
        return self.chain.iterations * ((self.chain.learned_scale is not None) + self.chain.conditioned)

    @property
    def stream_weights(self) -> int:
        """Learned numbers of a chain's `streams`: n reads, n writes and n x n for mixing, per iteration."""
        n = self.chain.streams or 0
        return self.chain.iterations * n * (n + 2)

    @property
    def chain_width(self) -> int:
        """Dimensions in which a chain iterates: L with `latent`, otherwise D."""
        return self.chain.width(self.hidden)

    @property
    def modulation_matrices(self) -> list[int]:
        """Parameters of W1, and of W2_t of each iteration, with `modulation_rank`."""
        rank = self.chain.modulation_rank
        return [] if rank is None else [rank * self.chain_width] * (1 + self.chain.iterations)

    @property
    def latent_matrices(self) -> list[int]:
        """Parameters of the projections into the latent space and back, if there is one."""
        return [] if self.chain.latent is None else [self.chain_width * self.hidden] * 2

    @property
    def ffn_matrices(self) -> int:
        """Matrices of hidden x width in a feed-forward: 3 for SwiGLU, otherwise 2."""
        return 3 if self.swiglu else 2


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of the complete model by kind.

    Attributes:
        embedding, output: vocab x hidden each; output is 0 when tied.
        attention: matrices and biases of all layers.
        norms: gains (and biases) of all layers, of the latents of `mla`, and of the final norm.
        final_norm: the part of `norms` after the last layer.
        gains: learned gains and weights of streams of the chains (see ChainSettings).
        variants: matrices of the chains' variants: modulation, projections into a latent space and back.
        routers, experts, shared, dense: of all layers.
        idle_experts: the part of `experts` that one token cannot use: all but min(N, R·K) experts per layer.
    """

    embedding: int
    output: int
    attention: int
    norms: int
    final_norm: int
    gains: int
    variants: int
    routers: int
    experts: int
    shared: int
    dense: int
    idle_experts: int

    @property
    def total(self) -> int:
        """All parameters."""
        return self.without_embeddings + self.embedding + self.output

    @property
    def without_embeddings(self) -> int:
        """All parameters except embedding and output layer."""
        matrices = self.attention + self.variants + self.routers + self.experts + self.shared + self.dense
        return matrices + self.norms + self.gains

    @property
    def active(self) -> int:
        """The maximum number of parameters that one token uses.

        A chain may choose other experts in each of its R routings, so min(N, R·K) experts per layer count. Embedding
        and output layer count in full.
        """
        return self.total - self.idle_experts

    @property
    def active_without_embeddings(self) -> int:
        """`active` without embedding and output layer."""
        return self.without_embeddings - self.idle_experts


def parameters(shape: ModelShape) -> ParameterCount:
    """Parameters of the model by kind."""
    moe, dense, kinds = shape.num_moe_layers, shape.layers - shape.num_moe_layers, shape.moe_kinds
    expert = shape.ffn_matrices * shape.chain_width * shape.expert_ffn
    idle = sum(count * max(0, kind.experts - kind.routings * kind.topk) for count, kind in kinds)
    table = shape.vocab * shape.hidden
    return ParameterCount(
        embedding=table,
        output=table if shape.untied_embeddings else 0,
        attention=shape.layers * (_attention_matrices(shape) + shape.attention_biases),
        norms=_norm_gains(shape),
        final_norm=_vectors_per_norm(shape) * shape.hidden,
        gains=sum(count * (kind.gains * kind.chain_width + kind.stream_weights) for count, kind in kinds),
        variants=sum(count * sum(kind.modulation_matrices + kind.latent_matrices) for count, kind in kinds),
        routers=sum(count * kind.routers for count, kind in kinds) * shape.experts * shape.chain_width,
        experts=moe * shape.experts * expert,
        shared=moe * shape.chain_width * (shape.ffn_matrices * shape.shared_ffn + shape.shared_gate),
        dense=dense * shape.ffn_matrices * shape.hidden * shape.dense_ffn,
        idle_experts=idle * expert,
    )


def _attention_matrices(shape: ModelShape) -> int:
    """Parameters of the matrices of one layer's attention; also their multiply-adds per token."""
    d, heads = shape.hidden, shape.heads
    if shape.attention == "mha":
        width = shape.head_width
        groups = shape.kv_groups or heads
        return d * width * (heads + 2 * groups) + heads * width * d
    query = heads * (shape.qk_nope + shape.qk_rope)
    rank = shape.q_lora_rank
    queries = d * query if rank is None else d * rank + rank * query
    down = d * (shape.kv_lora_rank + shape.qk_rope)
    up = shape.kv_lora_rank * heads * (shape.qk_nope + shape.v_head_dim)
    return queries + down + up + heads * shape.v_head_dim * d


def _norm_gains(shape: ModelShape) -> int:
    """Parameters of norms: before and in attention, before the feed-forward (C with `iteration_norm`), final."""
    in_moe = sum(
        count * (kind.chain.iterations if kind.chain.norm_placement == "iteration_norm" else 1)
        for count, kind in shape.moe_kinds
    )
    in_dense = shape.layers - shape.num_moe_layers
    latents = shape.kv_lora_rank + (shape.q_lora_rank or 0)
    inside = latents if shape.attention == "mla" else sum(shape.qk_norm_widths)
    gains = (shape.layers + in_moe + in_dense + 1) * shape.hidden + shape.layers * inside
    return _vectors_per_norm(shape) * gains


def _vectors_per_norm(shape: ModelShape) -> int:
    """Parameters of a norm per dimension: a gain, and in LayerNorm a bias."""
    return 2 if shape.layer_norm else 1


@dataclass(frozen=True)
class Flops:
    """FLOPs per token by kind, over all layers.

    Attributes:
        attention: projections of attention.
        attention_scores: products with keys and values, over all S positions.
        routers: R routings per layer.
        experts: C·K experts per layer.
        shared: C passes per layer through the shared experts.
        dense: feed-forward of dense layers.
        variants: modulation in C iterations, and projections into a latent space and back.
        output: the output layer, tied or not.
    """

    attention: int
    attention_scores: int
    routers: int
    experts: int
    shared: int
    dense: int
    variants: int
    output: int

    @property
    def total(self) -> int:
        """All FLOPs per token."""
        return sum(getattr(self, kind.name) for kind in fields(self))

    def times(self, factor: int) -> "Flops":
        """Every kind times `factor`."""
        return Flops(**{kind.name: factor * getattr(self, kind.name) for kind in fields(self)})


def forward_flops(shape: ModelShape) -> Flops:
    """FLOPs of the forward pass for one token of a sequence of `seq_length`, by kind."""
    dense, kinds = shape.layers - shape.num_moe_layers, shape.moe_kinds
    feed_forward = 2 * shape.ffn_matrices * shape.chain_width  # per unit of an expert's width
    return Flops(
        attention=2 * shape.layers * _attention_matrices(shape),
        attention_scores=2 * shape.layers * shape.seq_length * _score_width(shape),
        routers=2 * sum(count * kind.routings for count, kind in kinds) * shape.experts * shape.chain_width,
        experts=shape.num_moe_layers * shape.chain.iterations * shape.topk * feed_forward * shape.expert_ffn,
        shared=sum(count * kind.chain.iterations for count, kind in kinds)
        * (feed_forward * shape.shared_ffn + 2 * shape.chain_width * shape.shared_gate),
        dense=2 * dense * shape.ffn_matrices * shape.hidden * shape.dense_ffn,
        variants=sum(count * (modulation_flops(kind) + 2 * sum(kind.latent_matrices)) for count, kind in kinds),
        output=2 * shape.vocab * shape.hidden,
    )


def modulation_flops(shape: ModelShape) -> int:
    """FLOPs per token of a chain's modulation: C times W1 and a W2_t."""
    return 2 * shape.chain.iterations * sum(shape.modulation_matrices[:2])


def training_flops(shape: ModelShape) -> Flops:
    """FLOPs of forward and backward pass for one token: 3 x forward, without recomputation."""
    return forward_flops(shape).times(3)


def _score_width(shape: ModelShape) -> int:
    """Multiply-adds per query and position: the widths of keys and values, over all heads."""
    if shape.attention == "mla":
        return shape.heads * (shape.qk_nope + shape.qk_rope + shape.v_head_dim)
    return shape.heads * 2 * shape.head_width


def expert_combinations(experts: int, topk: int, iterations: int = 1) -> int:
    """The number of possible expert choices of a token in a layer: binomial(N, K) ** C, with independent iterations.

    The paper claims 823 times more for CoE-2(4/64) than for MoE(8/64). Its own formula, this one, gives
    C(64,4)² / C(64,8) = 91.2.
    """
    return math.comb(experts, topk) ** iterations


def ranks_of_a_token(
    experts: int, topk: int, ranks: int, groups: int | None = None, group_topk: int | None = None
) -> float:
    """The mean number of ranks that hold at least one of a token's experts, with uniform routing.

    EP (1 - C(N - E, K) / C(N, K)) with E = N / EP experts on a rank. If experts come from M of G groups (group-limited
    routing), K experts are taken to be uniform among those of the M groups.

    Args:
        ranks: EP; neighbouring experts are on the same rank, and in the same group.
        groups, group_topk: G and M; None for none.
    """
    groups, chosen = (1, 1) if groups is None or group_topk is None else (groups, group_topk)
    local, size = experts // ranks, experts // groups

    def is_missed(here: int) -> Fraction:
        """The probability that none of the K is among `here` of the experts in the M groups."""
        among = chosen * size
        return Fraction(math.comb(among - here, topk), math.comb(among, topk))

    if ranks >= groups:  # a rank's experts are in one group
        return float(ranks * Fraction(chosen, groups) * (1 - is_missed(local)))
    own = groups // ranks
    missed = sum(
        Fraction(math.comb(own, here) * math.comb(groups - own, chosen - here), math.comb(groups, chosen))
        * is_missed(here * size)
        for here in range(min(own, chosen) + 1)
    )
    return float(ranks * (1 - missed))
