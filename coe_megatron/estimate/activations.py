"""Closed forms of the memory between forward and backward pass: what is kept, what is recomputed, and the peak.

Needs no torch. Tests hold every form against the tensors that the built Megatron model keeps on the CPU. On CUDA
torch's RMSNorm is one kernel, which need not keep the normed input, and dropout masks are bytes: the forms
should be upper bounds there; nothing was measured. Rows that a capacity turns away are counted, a router's fp64 is not.

Tensor parallelism comes with sequence parallelism, as Megatron has it for experts: between layers a rank has T / TP
tokens, inside attention and shared experts all T with 1 / TP of the width. So all but token numbers and rotary angles
is cut, the gathered input of a product is not kept (it is gathered again), and the logits are those of V / TP words.

Letters: T tokens of a micro-batch on a rank, b bytes of an element, D hidden, N experts, K chosen for a token, F ffn.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Literal, get_args

from coe_megatron.chain.settings import Recompute
from coe_megatron.errors import ConfigError
from coe_megatron.estimate.closed_forms import ModelShape, forward_flops

Scores = Literal["softmax", "renormalised", "sigmoid"]

_FP32 = 4
_INDEX = 8  # torch counts in int64
_OF_CHAINS = ("norms", "state", "routers", "experts", "shared")


@dataclass(frozen=True)
class Pass:
    """What a forward and backward pass of one rank depends on besides the model.

    Attributes:
        micro_batch: sequences of S tokens.
        element: b, bytes of an element of weights and hidden states; routers and losses take fp32 anyway.
        recompute: what the backward pass computes again. `none`; `experts`, what lies between the two products of an
            expert; `iteration`, each iteration of a chain on its own; `layer`, a whole chain at once.
        scores: `softmax` over all experts, `renormalised` over the chosen ones, or `sigmoid`.
        balanced: the routers have an auxiliary loss.
        z_loss: they have a z-loss.
        jitter: noise on their input.
        dropout: of the hidden states (that of attention weights has a fused kernel on CUDA, and is not counted).
        expert_parallel: EP, the ranks that divide the experts among them.
        tensor: TP, the ranks that cut everything else; and the sequence between layers.
        expert_tensor: ETP, the ranks that cut every expert: each gets the rows of all of them.
        first, last: the rank has the embedding; the output layer and the loss.
        in_flight: micro-batches that a pipeline keeps at once on this rank.
    """

    micro_batch: int
    element: int = 4
    recompute: Recompute = "none"
    scores: Scores = "softmax"
    balanced: bool = True
    z_loss: bool = False
    jitter: bool = False
    dropout: bool = False
    expert_parallel: int = 1
    tensor: int = 1
    expert_tensor: int = 1
    first: bool = True
    last: bool = True
    in_flight: int = 1


@dataclass(frozen=True)
class Activations:
    """Bytes on one rank for one micro-batch.

    Routing is taken to be uniform: with expert parallelism as many rows reach a rank as it sends.

    Attributes:
        kept: by kind, what lies between the passes. `state`: the inputs of the iterations and what each passes on;
            `routers`: scores, choices, and the order of the rows; `output`: logits (their softmax) and loss.
        recomputed: the most that the backward pass computes again at once.
        logits_gradient: what the loss's gradient takes beside the softmax, which it overwrites.
        gradients: what the backward pass of an iteration's experts holds beside that: gradients of their rows and, over
            more than one iteration, of one layer's experts, which autograd adds up before it hands them on.
        in_flight: micro-batches of which `kept` is there at once; the backward pass is in one of them.
    """

    kept: dict[str, int]
    recomputed: int
    logits_gradient: int
    gradients: int
    in_flight: int = 1

    @property
    def peak(self) -> int:
        """Bytes where the backward pass holds most: at the logits, or in the last chain when the logits are gone."""
        total = sum(self.kept.values())
        in_pass = max(total + self.logits_gradient, total - self.kept["output"] + self.recomputed + self.gradients)
        return (self.in_flight - 1) * total + in_pass


def activations(shape: ModelShape, run: Pass) -> Activations:
    """What the model keeps on one rank for one micro-batch, and its peak.

    Args:
        shape: the whole model, or the layers of the rank's pipeline stage.
    """
    whole, tokens = run.micro_batch * shape.seq_length, _tokens(shape, run)
    dense = shape.layers - shape.num_moe_layers
    kinds = [(count, _chain(kind, run)) for count, kind in shape.moe_kinds]
    own_norms = sum(count for count, kind in shape.moe_kinds if kind.chain.norm_placement == "iteration_norm")
    norms = run.last + 2 * shape.layers - own_norms
    kept = {
        "embedding": whole * _INDEX * run.first,
        "attention": shape.layers * _attention(shape, run),
        "dense": dense * tokens * run.element * (shape.hidden + _feed_forward(shape, shape.dense_ffn)),
        **{kind: sum(count * chain[kind] for count, chain in kinds) for kind in _OF_CHAINS},
        "dropout": tokens * run.element * shape.hidden * (run.first + 2 * shape.layers) if run.dropout else 0,
        "output": _output(shape, run) * run.last,
    }
    kept["norms"] += norms * tokens * _norm(shape, run, shape.hidden)
    logits_gradient = tokens * shape.vocab * run.element * run.last if run.element < _FP32 else 0
    of_layers = [(_recomputed(kind, run), _gradients(kind, run)) for _, kind in shape.moe_kinds]
    recomputed, gradients = max(of_layers, key=sum, default=(0, 0))
    return Activations(kept, recomputed, logits_gradient, gradients, run.in_flight)


@dataclass(frozen=True)
class Segment:
    """A part of a pass: the embedding, a layer's attention, its feed-forward, or the output layer with the loss.

    Attributes:
        kept: bytes that it keeps for its backward pass.
        working: bytes that its backward pass takes beside that.
        late: bytes of both that are left when the first gradient of its weights is there; a chain's are added up over
            its iterations, and come with the first of these.
        last: the same at the other gradients.
    """

    kept: int
    working: int
    late: int
    last: int


def segments(shape: ModelShape, run: Pass) -> list[Segment]:
    """What `activations` adds up, in the order of a forward pass: embedding, attention and feed-forward of each layer,
    and output layer; empty where the rank has none.
    """
    tokens = _tokens(shape, run)
    state = tokens * run.element * shape.hidden
    dropout = state if run.dropout else 0
    norm = tokens * _norm(shape, run, shape.hidden)
    ffn = tokens * run.element * _feed_forward(shape, shape.dense_ffn)
    attention = _whole(norm + _attention(shape, run) + dropout, 4 * state)
    dense = _whole(norm + state + ffn + dropout, state + ffn)
    kinds = [_moe_segment(kind, run, norm, dropout) for _, kind in shape.moe_kinds]
    pattern = shape.moe_layers if isinstance(shape.moe_layers, tuple) else (1,) * shape.layers
    found = [_whole(run.micro_batch * shape.seq_length * _INDEX + dropout, state) if run.first else _whole(0, 0)]
    for is_moe, is_chain in zip(pattern, shape.chains or pattern, strict=True):
        # Of two kinds chains are the first.
        found += [attention, (kinds[0] if is_chain else kinds[-1]) if is_moe else dense]
    logits = tokens * shape.vocab * run.element if run.element < _FP32 else 0
    return [*found, _whole(_output(shape, run) + norm, logits + state) if run.last else _whole(0, 0)]


def _whole(kept: int, working: int) -> Segment:
    return Segment(kept, working, kept + working, kept + working)


def _moe_segment(shape: ModelShape, run: Pass, norm: int, dropout: int) -> Segment:
    own_norms, c = shape.chain.norm_placement == "iteration_norm", shape.chain.iterations
    kept = sum(_chain(shape, run).values()) + (0 if own_norms else norm) + dropout
    recomputed = _recomputed(shape, run)
    there = kept // c + recomputed // (c if run.recompute == "layer" else 1)
    rows, state = _tokens(shape, run) * shape.topk * run.element, run.expert_tensor * shape.hidden
    # The experts' second product comes first; after the first one, nothing but the gradient of their input is left.
    return Segment(
        kept,
        recomputed + _gradients(shape, run),
        late=there + rows * (state + shape.expert_ffn),
        last=there - rows * ((shape.ffn_matrices - 1) * shape.expert_ffn + _between(shape)),
    )


def _tokens(shape: ModelShape, run: Pass) -> int:
    """Tokens of a micro-batch whose hidden states lie on this rank."""
    return run.micro_batch * shape.seq_length // run.tensor


def _output(shape: ModelShape, run: Pass) -> int:
    """The last hidden states, the softmax of the logits, and of every position label, mask and loss."""
    states = _tokens(shape, run) * (run.element * shape.hidden + _FP32 * shape.vocab)
    return states + run.micro_batch * shape.seq_length * (_INDEX + 1 + _FP32)


def extra_flops(shape: ModelShape, recompute: Recompute) -> int:
    """FLOPs a token that recomputing adds to `training_flops`: matrix products alone, so none for `experts`."""
    if recompute not in get_args(Recompute):
        raise ConfigError(f"recompute is {recompute!r}: it must be one of {', '.join(get_args(Recompute))}")
    if recompute in ("none", "experts"):
        return 0
    flops = forward_flops(shape)
    return flops.routers + flops.experts + flops.shared


def _chain(shape: ModelShape, run: Pass) -> dict[str, int]:
    """What one layer keeps, of a shape whose MoE layers are all of one kind; by kind of what is kept."""
    tokens, c = _tokens(shape, run), shape.chain.iterations
    state = tokens * run.element * shape.hidden
    routes = shape.routings * tokens * shape.topk * _INDEX
    kept = dict.fromkeys(_OF_CHAINS, 0)
    if run.recompute == "layer":
        return kept | {"state": state, "routers": routes}
    if run.recompute == "iteration":
        given = tokens * shape.experts * (_FP32 + 1) if c > shape.routings else 0
        masked = tokens * shape.experts * (c - 1) if shape.chain.no_return else 0
        return kept | {"state": c * state, "routers": routes + given + masked}
    for kind_of_iteration, times in _iterations(shape).items():
        for kind, size in _iteration(shape, run, kind_of_iteration).items():
            kept[kind] += times * size
    return kept


@dataclass(frozen=True)
class _Iteration:
    """In what the iterations of a chain differ.

    Attributes:
        routes: or uses a routing again.
        masks: keeps a mask of its own, of two or more earlier iterations; of one it is that one's own choice.
    """

    routes: bool
    masks: bool


def _iterations(shape: ModelShape) -> Counter[_Iteration]:
    """How many iterations of each kind a chain has."""
    return Counter(
        _Iteration(t < shape.routings, t > 1 and shape.chain.no_return) for t in range(shape.chain.iterations)
    )


def _recomputed(shape: ModelShape, run: Pass) -> int:
    """The most that the backward pass computes again at once: of one iteration, or of a chain."""
    if run.recompute == "none":
        return 0
    if run.recompute == "experts":
        return _tokens(shape, run) * shape.topk * run.element * _between(shape)
    each = [(sum(_iteration(shape, run, kind).values()), times) for kind, times in _iterations(shape).items()]
    known = shape.routings * _tokens(shape, run) * shape.topk * _INDEX  # the routes, kept anyway
    state = _tokens(shape, run) * run.element * shape.hidden  # as is the input of what is recomputed
    if run.recompute == "iteration":
        return max(size for size, _ in each) - known // shape.routings - state
    return sum(times * size for size, times in each) - known - state


def _gradients(shape: ModelShape, run: Pass) -> int:
    """See Activations.gradients."""
    experts = shape.experts // run.expert_parallel * shape.ffn_matrices * shape.hidden * shape.expert_ffn
    experts //= run.expert_tensor
    return _row_gradients(shape, run) + run.element * (experts if shape.chain.iterations > 1 else 0)


def _row_gradients(shape: ModelShape, run: Pass) -> int:
    rows = _tokens(shape, run) * shape.topk
    return run.element * rows * (run.expert_tensor * shape.hidden + shape.ffn_matrices * shape.expert_ffn)


def _iteration(shape: ModelShape, run: Pass, kind: _Iteration) -> dict[str, int]:
    """What one iteration keeps where nothing is recomputed but, perhaps, in the experts.

    Its input is kept for the first products of router and shared experts; who routes copies of it alone does not.
    """
    tokens, b = _tokens(shape, run), run.element
    reads_input = bool(shape.shared_ffn) or (kind.routes and not run.jitter)
    jittered = 2 * b * shape.hidden if kind.routes and run.jitter else 0
    own_norm = shape.chain.norm_placement == "iteration_norm"
    states = reads_input + shape.gains // shape.chain.iterations  # F_t and x, for their gains' gradients
    return {
        "norms": tokens * _norm(shape, run, shape.hidden) if own_norm else 0,
        "state": states * tokens * b * shape.hidden,
        "routers": tokens * (jittered + _router(shape, run, kind.routes) + shape.experts * kind.masks),
        "experts": tokens * shape.topk * _row(shape, run),
        "shared": tokens * b * _feed_forward(shape, shape.shared_ffn) if shape.shared_ffn else 0,
    }


def _router(shape: ModelShape, run: Pass, routed: bool) -> int:
    """Bytes a token: to sort its copies (the gates and choices of all experts, the order of rows), and to choose."""
    n, k = shape.experts, shape.topk
    order = n * (_FP32 + 1) + k * _INDEX
    if not routed:
        return order
    chosen = k * _INDEX
    scores = {"softmax": n, "renormalised": k, "sigmoid": n + (k + 1 if k > 1 else 0)}[run.scores] * _FP32
    losses = (n * run.balanced + (n + 1) * run.z_loss) * _FP32
    return order + chosen + scores + losses


def _row(shape: ModelShape, run: Pass) -> int:
    """Bytes of a token's copy in an expert: its input, the first product, its gate, and what `experts` recomputes."""
    first = (2 if shape.swiglu else 1) * shape.expert_ffn
    between = 0 if run.recompute == "experts" else _between(shape)
    return run.element * (run.expert_tensor * shape.hidden + first + between) + run.expert_tensor * _FP32


def _between(shape: ModelShape) -> int:
    """Elements of a row between the products: SiLU, its product with the other half (or GELU), and that weighted."""
    return (3 if shape.swiglu else 2) * shape.expert_ffn


def _feed_forward(shape: ModelShape, ffn: int) -> int:
    """Elements a token behind the input of Megatron's feed-forward: two halves, one again, SiLU, product; or GELU."""
    return (5 if shape.swiglu else 2) * ffn


def _norm(shape: ModelShape, run: Pass, width: int) -> int:
    """Bytes a row: RMSNorm keeps its input and the normed one in fp32, LayerNorm its input and two moments."""
    return run.element * (width + 2) if shape.layer_norm else _FP32 * (2 * width + 1)


def _attention(shape: ModelShape, run: Pass) -> int:
    """Bytes of one layer: its input, what makes queries, keys and values of it, the kernel's part, and the angles."""
    tokens, b = _tokens(shape, run), run.element
    kernel = _FP32 * shape.heads  # a logarithm for each head and position; never S x S weights
    if shape.attention == "mla":
        per_token, angles = _latent_attention(shape, run), shape.qk_rope
    else:
        per_token, angles = _grouped_attention(shape, run), shape.head_width
    # Sine and cosine, for queries and keys apart.
    return tokens * (b * shape.hidden + per_token + kernel) + shape.seq_length * b * 4 * angles


def _grouped_attention(shape: ModelShape, run: Pass) -> int:
    """Bytes a token: keys and queries before rotation stay, since values are a part of the same tensor."""
    b, size, heads, groups = run.element, shape.head_width, shape.heads, shape.kv_groups or shape.heads
    straight = b * size * (heads + 2 * groups)
    rotated, out = b * size * (heads + groups), b * size * heads
    if not shape.qk_layernorm:
        return straight + rotated + out
    rows = heads + groups
    normed = rows * _norm(shape, run, size)
    if shape.layer_norm or b == _FP32:  # the input of a norm in its own dtype is a part of `straight`
        normed -= rows * size * b
        normed += b * size * heads if groups < heads else 0  # but grouped queries are copied
    return straight + normed + rotated + out


def _latent_attention(shape: ModelShape, run: Pass) -> int:
    """Bytes a token: the latents and their norms, then queries, keys and values of all heads."""
    b, rank, queries = run.element, shape.kv_lora_rank, shape.q_lora_rank
    latents = b * rank + _norm(shape, run, rank)
    if shape.layer_norm or b == _FP32:
        latents += b * shape.qk_rope  # the norm's input is a part of a tensor that holds the shared key too
    if queries is not None:
        latents += b * queries + _norm(shape, run, queries)
    size, value = shape.qk_nope + shape.qk_rope, shape.v_head_dim
    # Short values are padded for the kernel, and its output is cut to their size.
    values = 2 * size + value if value < size else 2 * value
    return latents + b * shape.heads * (2 * size + values)
