"""Closed forms of activation memory: what the forward pass keeps, what the backward pass recomputes, and the peak.

Does not import torch. Tests compare every form with the tensors that the Megatron model keeps on the CPU. On CUDA, the
forms should be upper bounds, but this is not measured: torch's RMSNorm is a single kernel, which need not keep the
normalised input, and dropout masks take bytes. Dropped tokens are counted, and fp64 in a router is not. The forms are
those of `model.backend` local; Transformer Engine's modules keep other tensors, which are not counted. With context
parallelism torch's attention has a mask on the CPU, S / 2 CP by up to S in each layer, and none on CUDA; not counted.

Tensor parallelism includes sequence parallelism, which Megatron requires with experts: between layers a rank has T / TP
tokens; inside attention and shared experts it has all T tokens with 1 / TP of the width. So everything except token ids
and rotary angles is sharded, the gathered input of a product is not kept (the backward pass gathers it again), and a
rank has the logits of V / TP words.

Letters: T tokens of a micro-batch on a rank, b bytes of an element, D hidden, N experts, K experts per token, F ffn.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from coe_megatron.chain.settings import Recompute
from coe_megatron.errors import ConfigError
from coe_megatron.estimate.closed_forms import ModelShape, forward_flops, modulation_flops, ranks_of_a_token
from coe_megatron.estimate.expert_gradients import ExpertUse, expert_gradients

Scores = Literal["softmax", "renormalised", "sigmoid"]

_FP32 = 4
_INDEX = 8  # torch counts in int64
_OF_CHAINS = ("norms", "state", "routers", "experts", "shared")


@dataclass(frozen=True)
class PassSettings:
    """What the memory of a forward and backward pass of one rank depends on, besides the model.

    Attributes:
        micro_batch: number of sequences of S tokens.
        element_bytes: b, bytes of an element of weights and hidden states; routers and losses always use fp32.
        recompute: activations that the backward pass recomputes: `none`; `experts`, the activation function between an
            expert's two matrix products; `iteration`, one iteration of a chain at a time; `layer`, the whole chain at
            once.
        scores: `softmax` over all experts, `renormalised` over the chosen ones, or `sigmoid`.
        balanced: whether the routers have an auxiliary loss.
        z_loss: whether they have a z-loss.
        jitter: whether their input has noise.
        dropout: whether hidden states have dropout (dropout of attention weights is fused on CUDA and not counted).
        expert_parallel: EP, ranks that share the experts of a layer.
        tensor: TP, ranks that shard everything else, and the sequence between layers.
        context: CP, ranks that each have a part of every sequence; attention keeps keys and values of all parts.
        expert_tensor: ETP, ranks that shard each expert; each of them gets the rows of all.
        deduplicated: whether a token travels once to each rank, and not once for each expert.
        groups: of group-limited routing: how many there are, and how many a token may choose experts from.
        first, last: whether the rank has the embedding, and whether it has the output layer and the loss.
        in_flight: number of micro-batches that a pipeline keeps on this rank at the same time; a fraction where some
            are in a part of the stage only.
    """

    micro_batch: int
    element_bytes: int = 4
    recompute: Recompute = "none"
    scores: Scores = "softmax"
    balanced: bool = True
    z_loss: bool = False
    jitter: bool = False
    dropout: bool = False
    expert_parallel: int = 1
    tensor: int = 1
    context: int = 1
    expert_tensor: int = 1
    deduplicated: bool = False
    groups: tuple[int | None, int | None] = (None, None)
    first: bool = True
    last: bool = True
    in_flight: float = 1


@dataclass(frozen=True)
class Activations:
    """Bytes on one rank for one micro-batch, assuming uniform routing: each rank receives as many rows as it sends.

    Attributes:
        kept: by kind, what the forward pass keeps for the backward pass. `state`: inputs and outputs of iterations;
            `routers`: scores, choices, and the order of rows; `output`: logits (their softmax) and loss.
        recomputed: maximum of what the backward pass recomputes at a time.
        logits_gradient: gradient of the loss, in addition to the softmax, which it overwrites.
        gradients: gradients in the backward pass of one iteration's experts: those of their rows, and those of one
            layer's experts, which are summed over iterations.
        in_flight: number of micro-batches whose `kept` is allocated at the same time; one of them is in its backward
            pass.
    """

    kept: dict[str, int]
    recomputed: int
    logits_gradient: int
    gradients: int
    in_flight: float = 1

    @property
    def peak(self) -> int:
        """Bytes at the peak of the backward pass: at the logits, or in the last chain after the logits are freed."""
        total = sum(self.kept.values())
        in_pass = max(total + self.logits_gradient, total - self.kept["output"] + self.recomputed + self.gradients)
        # The output layer's backward pass follows its forward pass at once, also where other parts have several.
        return int((self.in_flight - 1) * (total - self.kept["output"])) + in_pass


def activations(shape: ModelShape, settings: PassSettings) -> Activations:
    """Activation memory of one rank for one micro-batch.

    Args:
        shape: the complete model, or the layers of the rank's pipeline stage.
    """
    all_tokens, tokens = _positions(shape, settings), _tokens(shape, settings)
    dense = shape.layers - shape.num_moe_layers
    kinds = [(count, _chain(kind, settings)) for count, kind in shape.moe_kinds]
    own_norms = sum(count for count, kind in shape.moe_kinds if kind.chain.norm_placement == "iteration_norm")
    norms = settings.last + 2 * shape.layers - own_norms
    kept = {
        "embedding": all_tokens * _INDEX * settings.first,
        "attention": shape.layers * _attention(shape, settings),
        "dense": dense * tokens * settings.element_bytes * (shape.hidden + _feed_forward(shape, shape.dense_ffn)),
        **{kind: sum(count * chain[kind] for count, chain in kinds) for kind in _OF_CHAINS},
        "dropout": tokens * settings.element_bytes * shape.hidden * (settings.first + 2 * shape.layers)
        if settings.dropout
        else 0,
        "output": _output(shape, settings) * settings.last,
    }
    kept["norms"] += norms * tokens * _norm(shape, settings, shape.hidden)
    logits_gradient = (
        tokens * shape.vocab * settings.element_bytes * settings.last if settings.element_bytes < _FP32 else 0
    )
    of_layers = [(_recomputed(kind, settings), _gradients(kind, settings)) for _, kind in shape.moe_kinds]
    recomputed, gradients = max(of_layers, key=sum, default=(0, 0))
    return Activations(kept, recomputed, logits_gradient, gradients, settings.in_flight)


@dataclass(frozen=True)
class Segment:
    """A part of a pass: the embedding, a layer's attention or feed-forward, or the output layer with the loss.

    Attributes:
        kept: bytes that its forward pass keeps.
        working: additional bytes in its backward pass.
        at_first_gradient: bytes of both that are left when its first weight gradient is complete; the gradients of a
            chain are summed over iterations, so they are complete in the backward pass of the first iteration.
        at_later_gradients: the same at the other gradients.
    """

    kept: int
    working: int
    at_first_gradient: int
    at_later_gradients: int


def segments(shape: ModelShape, settings: PassSettings) -> list[Segment]:
    """The parts of `activations` in the order of a forward pass: embedding, attention and feed-forward of each layer,
    output layer. A part that the rank does not have is empty.
    """
    tokens = _tokens(shape, settings)
    state = tokens * settings.element_bytes * shape.hidden
    dropout = state if settings.dropout else 0
    norm = tokens * _norm(shape, settings, shape.hidden)
    ffn = tokens * settings.element_bytes * _feed_forward(shape, shape.dense_ffn)
    attention = _segment(norm + _attention(shape, settings) + dropout, 4 * state)
    dense = _segment(norm + state + ffn + dropout, state + ffn)
    kinds = [_moe_segment(kind, settings, norm, dropout) for _, kind in shape.moe_kinds]
    pattern = shape.moe_layers if isinstance(shape.moe_layers, tuple) else (1,) * shape.layers
    found = [_segment(_positions(shape, settings) * _INDEX + dropout, state) if settings.first else _segment(0, 0)]
    for is_moe, is_chain in zip(pattern, shape.chains or pattern, strict=True):
        # `moe_kinds` has chains first.
        found += [attention, (kinds[0] if is_chain else kinds[-1]) if is_moe else dense]
    logits = tokens * shape.vocab * settings.element_bytes if settings.element_bytes < _FP32 else 0
    return [*found, _segment(_output(shape, settings) + norm, logits + state) if settings.last else _segment(0, 0)]


def _segment(kept: int, working: int) -> Segment:
    return Segment(kept, working, kept + working, kept + working)


def _moe_segment(shape: ModelShape, settings: PassSettings, norm: int, dropout: int) -> Segment:
    own_norms = shape.chain.norm_placement == "iteration_norm"
    kept = sum(_chain(shape, settings).values()) + (0 if own_norms else norm) + dropout
    recomputed = _recomputed(shape, settings)
    # The experts' gradients are handed on when those of all iterations are added up: only the gradient of x(0) is left.
    left = (0 if own_norms else norm) + dropout + _tokens(shape, settings) * settings.element_bytes * shape.hidden
    return Segment(kept, recomputed + _gradients(shape, settings), at_first_gradient=left, at_later_gradients=left)


def _positions(shape: ModelShape, settings: PassSettings) -> int:
    """Tokens of a micro-batch in this rank's part of the sequences."""
    return settings.micro_batch * shape.seq_length // settings.context


def _tokens(shape: ModelShape, settings: PassSettings) -> int:
    """Tokens of a micro-batch whose hidden states are on this rank."""
    return _positions(shape, settings) // settings.tensor


def _output(shape: ModelShape, settings: PassSettings) -> int:
    """The last hidden states, the softmax of the logits, and a label, mask and loss for every position."""
    states = _tokens(shape, settings) * (settings.element_bytes * shape.hidden + _FP32 * shape.vocab)
    return states + _positions(shape, settings) * (_INDEX + 1 + _FP32)


def extra_flops(shape: ModelShape, recompute: Recompute) -> int:
    """FLOPs per token that recomputation adds to `training_flops`: only matrix products, so none for `experts`."""
    if recompute not in get_args(Recompute):
        raise ConfigError(f"recompute is {recompute!r}: it must be one of {', '.join(get_args(Recompute))}")
    if recompute in ("none", "experts"):
        return 0
    flops = forward_flops(shape)
    variants = sum(count * modulation_flops(kind) for count, kind in shape.moe_kinds)
    if recompute == "layer":  # the projection back is not needed again
        variants += sum(count * 2 * sum(kind.latent_matrices[:1]) for count, kind in shape.moe_kinds)
    return flops.routers + flops.experts + flops.shared + variants


def _chain(shape: ModelShape, settings: PassSettings) -> dict[str, int]:
    """What one MoE layer keeps, by kind, for a shape whose MoE layers are all chains or all plain."""
    tokens, c = _tokens(shape, settings), shape.chain.iterations
    state = tokens * settings.element_bytes * shape.chain_width
    routes = shape.routings * tokens * shape.topk * _INDEX
    kept = dict.fromkeys(_OF_CHAINS, 0)
    if settings.recompute == "layer":
        return kept | {"state": tokens * settings.element_bytes * shape.hidden, "routers": routes}
    kept["state"] = _around(shape, settings)
    if settings.recompute == "iteration":
        given = tokens * (shape.experts + shape.topk * _FP32) if c > shape.routings else 0
        masked = tokens * shape.experts * (c - 1) if shape.chain.no_return else 0
        return kept | {"state": kept["state"] + c * state, "routers": routes + given + masked}
    for iteration in _iterations(shape):
        for kind, size in _iteration(shape, settings, iteration).items():
            kept[kind] += size
    return kept


def _around(shape: ModelShape, settings: PassSettings) -> int:
    """Bytes that a chain keeps outside of its iterations: u and Δ for the projections, and what streams mix."""
    mixed = shape.chain.iterations + 1 if shape.chain.streams else 0
    elements = mixed * shape.chain_width + (shape.hidden + shape.chain_width if shape.chain.latent else 0)
    return _tokens(shape, settings) * settings.element_bytes * elements


@dataclass(frozen=True)
class _Iteration:
    """Differences between the iterations of a chain.

    Attributes:
        routes: whether it has its own routing, or reuses an earlier one.
        masks: whether it keeps a mask of experts of two or more earlier iterations; for a single earlier iteration, the
            mask is that iteration's choice.
    """

    routes: bool
    masks: bool


def _iterations(shape: ModelShape) -> list[_Iteration]:
    """The iterations of a chain."""
    return [_Iteration(t < shape.routings, t > 1 and shape.chain.no_return) for t in range(shape.chain.iterations)]


def _recomputed(shape: ModelShape, settings: PassSettings) -> int:
    """The maximum that the backward pass recomputes at a time: of one iteration, or of a chain."""
    if settings.recompute == "none":
        return 0
    if settings.recompute == "experts":
        return _tokens(shape, settings) * shape.topk * settings.element_bytes * shape.expert_ffn
    each = [sum(_iteration(shape, settings, iteration).values()) for iteration in _iterations(shape)]
    known = shape.routings * _tokens(shape, settings) * shape.topk * _INDEX  # the choices, which are kept
    # The input of what is recomputed is kept too.
    elements = _tokens(shape, settings) * settings.element_bytes
    if settings.recompute == "iteration":
        return max(each) - known // shape.routings - elements * shape.chain_width
    return sum(each) + _around(shape, settings) - known - elements * shape.hidden


def _gradients(shape: ModelShape, settings: PassSettings) -> int:
    """See `Activations.gradients`."""
    tokens, b = _tokens(shape, settings), settings.element_bytes
    experts = shape.experts // settings.expert_parallel
    ffn, halves = shape.expert_ffn // settings.expert_tensor, shape.ffn_matrices - 1
    rows, received = tokens * shape.topk * settings.expert_tensor, tokens
    if not _is_local(settings):
        copies = _copies(shape, settings) if settings.deduplicated else shape.topk
        received = int(tokens * copies * settings.expert_tensor)
    recomputed = settings.recompute == "experts"
    use = ExpertUse(
        rows=rows,
        tokens=received,
        hidden=shape.chain_width,
        inner=halves * ffn,
        ffn=ffn,
        first=experts * halves * shape.chain_width * ffn,
        second=experts * shape.chain_width * ffn,
        recomputed=recomputed,
    )
    freed = 0  # the next iteration recomputes as much
    if settings.recompute != "iteration":
        kept = sum(_iteration(shape, settings, _iterations(shape)[-1]).values()) // b
        freed = max(0, kept - received * shape.chain_width - (0 if recomputed else rows * ffn))
    return b * expert_gradients(use, shape.chain.iterations, freed)


def _iteration(shape: ModelShape, settings: PassSettings, kind: _Iteration) -> dict[str, int]:
    """What one iteration keeps if at most its experts are recomputed.

    Its input is kept for the first products of router and shared experts, and on a single rank of the experts; several
    ranks keep the tokens that they received.
    """
    tokens, b = _tokens(shape, settings), settings.element_bytes
    reads_input = _is_local(settings) or bool(shape.shared_ffn) or (kind.routes and not settings.jitter)
    jittered = 2 * b * shape.chain_width if kind.routes and settings.jitter else 0
    own_norm = shape.chain.norm_placement == "iteration_norm"
    states = reads_input + shape.gains // shape.chain.iterations  # F_t and x, for the gradients of their gains
    rank = shape.chain.modulation_rank
    seen = 0 if rank is None else 2 * (shape.chain_width + rank)  # x, W1 x, its SiLU, and the modulation
    return {
        "norms": tokens * _norm(shape, settings, shape.hidden) if own_norm else 0,
        "state": tokens * b * (states * shape.chain_width + seen),
        "routers": tokens * (jittered + _router(shape, settings, kind.routes) + shape.experts * kind.masks),
        "experts": tokens * shape.topk * _row(shape, settings) + int(tokens * _received(shape, settings, kind.routes)),
        "shared": _shared(shape, settings),
    }


def _shared(shape: ModelShape, settings: PassSettings) -> int:
    """Bytes of the shared experts, and with a gate of their output and its sigmoid."""
    gated = shape.chain_width + 1 if shape.shared_gate else 0
    elements = _feed_forward(shape, shape.shared_ffn) + gated if shape.shared_ffn else 0
    return _tokens(shape, settings) * settings.element_bytes * elements


def _is_local(settings: PassSettings) -> bool:
    """Whether a rank has all experts."""
    return settings.expert_parallel * settings.expert_tensor == 1


def _router(shape: ModelShape, settings: PassSettings, routed: bool) -> int:
    """Bytes per token of routing, and of sending: each row's token, and the place of its gate or whether it has one."""
    n, k = shape.experts, shape.topk
    if _is_local(settings):
        sent = 0
    elif settings.deduplicated:
        sent = int(_copies(shape, settings) * (_INDEX + k))
    else:
        sent = 2 * k * _INDEX
    if not routed:
        return sent
    chosen = k * _INDEX
    scores = {"softmax": n, "renormalised": k, "sigmoid": n + (k + 1 if k > 1 else 0)}[settings.scores] * _FP32
    balanced = settings.balanced and settings.scores != "softmax"  # whose scores are kept anyway
    losses = (n * balanced + (n + 1) * settings.z_loss) * _FP32
    return sent + chosen + scores + losses


def _row(shape: ModelShape, settings: PassSettings) -> int:
    """Bytes of an expert's row: the place of its gate, the first product, and what `experts` recomputes."""
    first = (2 if shape.swiglu else 1) * shape.expert_ffn
    active = 0 if settings.recompute == "experts" else shape.expert_ffn
    return settings.element_bytes * (first + active) + settings.expert_tensor * _INDEX


def _received(shape: ModelShape, settings: PassSettings, routed: bool) -> float:
    """Bytes per token of what the experts get: gates, and unless they are this rank's own, tokens."""
    if _is_local(settings):
        return shape.topk * _FP32 * routed
    copies, slots = (_copies(shape, settings), shape.topk) if settings.deduplicated else (shape.topk, 1)
    return settings.expert_tensor * copies * (settings.element_bytes * shape.chain_width + slots * _FP32)


def _copies(shape: ModelShape, settings: PassSettings) -> float:
    """Ranks that hold some of a token's experts."""
    return ranks_of_a_token(shape.experts, shape.topk, settings.expert_parallel, *settings.groups)


def _feed_forward(shape: ModelShape, ffn: int) -> int:
    """Elements per token in a dense feed-forward, after its input: two halves, one copied, SiLU, product; or GELU."""
    return (5 if shape.swiglu else 2) * ffn


def _norm(shape: ModelShape, settings: PassSettings, width: int) -> int:
    """Bytes per row: RMSNorm keeps its input and output in fp32, LayerNorm its input and two moments."""
    return settings.element_bytes * (width + 2) if shape.layer_norm else _FP32 * (2 * width + 1)


def _attention(shape: ModelShape, settings: PassSettings) -> int:
    """Bytes of one layer: its input, queries, keys and values, the attention kernel, and rotary angles."""
    tokens, b = _tokens(shape, settings), settings.element_bytes
    kernel = _FP32 * shape.heads  # a logarithm per head and position; the S x S weights are not kept
    if shape.attention == "mla":
        per_token, angles = _latent_attention(shape, settings), shape.qk_rope
    else:
        per_token, angles = _grouped_attention(shape, settings), shape.head_width
    # Sine and cosine, separately for queries and keys.
    positions = shape.seq_length // settings.context
    return tokens * (b * shape.hidden + per_token + kernel) + positions * b * 4 * angles


def _grouped_attention(shape: ModelShape, settings: PassSettings) -> int:
    """Bytes per token: keys and queries before rotation stay allocated, since values are views of the same tensor."""
    b, size, heads, groups = settings.element_bytes, shape.head_width, shape.heads, shape.kv_groups or shape.heads
    straight = b * size * (heads + 2 * groups)
    rotated, out = b * size * (heads + groups), b * size * heads
    if settings.context > 1:  # keys and values are copied to be gathered, and two chunks of the output joined
        is_view = shape.qk_layernorm and not shape.qk_norm_over_heads and (shape.layer_norm or b == _FP32)
        straight *= is_view
        rotated, out = b * (size * heads + settings.context * shape.key_value_width), 2 * out
    if not shape.qk_layernorm:
        return straight + rotated + out
    rows = heads + groups
    normed = rows * _norm(shape, settings, size)
    if shape.qk_norm_over_heads:  # their inputs are copies
        normed = sum(_norm(shape, settings, width) for width in shape.qk_norm_widths)
    elif shape.layer_norm or b == _FP32:  # the norm's input is a view of `straight`
        normed -= rows * size * b
        normed += b * size * heads if groups < heads else 0  # except grouped queries, which are copied
    return straight + normed + rotated + out


def _latent_attention(shape: ModelShape, settings: PassSettings) -> int:
    """Bytes per token: the latents and their norms, then queries, keys and values of all heads."""
    b, rank, queries = settings.element_bytes, shape.kv_lora_rank, shape.q_lora_rank
    latents = b * rank + _norm(shape, settings, rank)
    if shape.layer_norm or b == _FP32:
        latents += b * shape.qk_rope  # the norm's input is a view of a tensor that also has the shared key
    if queries is not None:
        latents += b * queries + _norm(shape, settings, queries)
    size, value = shape.qk_nope + shape.qk_rope, shape.v_head_dim
    # If values are shorter than keys, they are padded for the kernel, and its output is sliced.
    padded, out = (size, size + value) if value < size else (0, value)
    if settings.context > 1:  # whose gathered keys and values are in one tensor, and two chunks of the output joined
        kept = size + settings.context * (size + value + padded) + (out if padded else 2 * out)
    else:
        kept = 2 * size + (padded or value) + out
    return latents + b * shape.heads * kept
