"""What one rank computes in a micro-batch: matrix products, and the bytes and number of its other operations.

The products are those of `closed_forms.forward_flops`, with the rows and widths that a rank has; a test adds them up.
Other operations are counted by formulas that were fitted to traces of the local backend on the CPU, in bytes that they
read and write; a test compares them with traces. Where torch has a fused kernel on CUDA they are upper bounds.

Letters as in `estimate.activations`: T tokens of a micro-batch on a rank, b bytes of an element, D hidden, K experts
per token in an iteration, F ffn, N experts.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from coe_megatron.estimate.activations import PassSettings
from coe_megatron.estimate.closed_forms import ModelShape, ranks_of_a_token

_FP32 = 4


@dataclass(frozen=True)
class Product:
    """Equal matrix products of the forward pass, [rows, inner] x [inner, outer].

    Attributes:
        kind: the kind of FLOPs, as in `closed_forms.Flops`.
        count: how many; of grouped products, one for each expert.
        again: how many times as long the backward pass takes.
        part: of the FLOPs that is computed: attention kernels leave out later positions.
        in_fp32: whether it is computed in fp32 in any precision.
    """

    kind: str
    rows: float
    inner: float
    outer: float
    count: float = 1
    grouped: bool = False
    again: float = 2
    part: float = 1
    in_fp32: bool = False

    @property
    def flops(self) -> float:
        """Of the forward pass."""
        return 2 * self.count * self.rows * self.inner * self.outer


@dataclass(frozen=True)
class Moves:
    """Operations other than products.

    Attributes:
        bytes: that they read and write.
        operations: how many, products included.
    """

    bytes: float
    operations: float


@dataclass(frozen=True)
class Work:
    """A part of a micro-batch's pass.

    Attributes:
        products: of the forward pass.
        forward, backward: other operations.
    """

    products: tuple[Product, ...]
    forward: Moves
    backward: Moves


_NOTHING = Work((), Moves(0, 0), Moves(0, 0))


@dataclass(frozen=True)
class Rank:
    """The sizes of a rank's pass, from which its work follows.

    Attributes:
        shape: the layers of its pipeline stage.
        settings: of the pass.
    """

    shape: ModelShape
    settings: PassSettings

    @property
    def positions(self) -> int:
        """Tokens that attention and shared experts see: those of the rank's part of the sequences."""
        return self.settings.micro_batch * self.shape.seq_length // self.settings.context

    @property
    def tokens(self) -> float:
        """T."""
        return self.positions / self.settings.tensor

    def parts(self, chunks: int = 1) -> Iterator[tuple[int, Work, bool]]:
        """All of a pass: how often, the work, and whether it is part of a chain, which may be recomputed.

        Args:
            chunks: into which the tokens of MoE layers are split.
        """
        shape = self.shape
        yield 1, self.embedding(), False
        yield shape.layers, self.attention(), False
        yield shape.layers - shape.num_moe_layers, self.dense(), False
        for count, kind in shape.moe_kinds:
            yield count, self.around_chain(kind), False
            yield count * chunks * kind.routings, self.iteration(kind, True, chunks), True
            yield count * chunks * (kind.chain.iterations - kind.routings), self.iteration(kind, False, chunks), True
        yield 1, self.output(), False

    def embedding(self) -> Work:
        """The rows of the tokens, and the sum of their gradients."""
        return Work((), Moves(*self._sized(2, 2)), Moves(*self._sized(3, 3))) if self.settings.first else _NOTHING

    def _sized(self, states: float, operations: float) -> tuple[float, float]:
        return states * self.tokens * self.shape.hidden * self.settings.element_bytes, operations

    def attention(self) -> Work:
        """Of a layer: projections, rotary positions, scores, and both norms and residuals."""
        shape, tensor, b = self.shape, self.settings.tensor, self.settings.element_bytes
        heads, state = shape.heads / tensor, self.tokens * shape.hidden * b
        if shape.attention == "mla":
            query, value = shape.qk_nope + shape.qk_rope, shape.v_head_dim
            widths = self.positions * heads * b * (2 * query + 2 * value)
            latents = self.tokens * b * (shape.kv_lora_rank + shape.qk_rope + (shape.q_lora_rank or 0))
            moved, starts = (_MLA_FORWARD, _MLA_BACKWARD), (44, 89)
        else:
            query = value = shape.head_width
            widths = self.positions * b * (heads * query * 2 + shape.key_value_width / tensor)
            latents = 0.0
            moved, starts = (_MHA_FORWARD, _MHA_BACKWARD), (33, 59)
        forward, backward = (_weighted(each, state, widths, latents) for each in moved)
        return Work(
            tuple(self._attention_products(query, value)), Moves(forward, starts[0]), Moves(backward, starts[1])
        )

    def _attention_products(self, query: int, value: int) -> Iterator[Product]:
        shape, settings, rows = self.shape, self.settings, self.positions
        heads = shape.heads / settings.tensor
        if shape.attention == "mla":
            down = (shape.kv_lora_rank + shape.qk_rope) / settings.tensor
            yield Product("attention", rows, shape.hidden, down)
            yield Product("attention", rows, shape.kv_lora_rank, heads * (shape.qk_nope + value))
            if shape.q_lora_rank:
                yield Product("attention", rows, shape.hidden, shape.q_lora_rank / settings.tensor)
                yield Product("attention", rows, shape.q_lora_rank, heads * query)
            else:
                yield Product("attention", rows, shape.hidden, heads * query)
        else:
            yield Product("attention", rows, shape.hidden, heads * query + shape.key_value_width / settings.tensor)
        yield Product("attention", rows, heads * value, shape.hidden)
        pairs = settings.micro_batch * heads
        own = shape.seq_length / settings.context
        # The backward pass of flash attention computes the scores again.
        yield Product("attention_scores", own, query, shape.seq_length, pairs, again=2.5, part=0.5)
        yield Product("attention_scores", own, shape.seq_length, value, pairs, again=2.5, part=0.5)

    def dense(self) -> Work:
        """The feed-forward of a dense layer."""
        shape, inner = self.shape, self.positions * self.shape.dense_ffn / self.settings.tensor
        moved = inner * self.settings.element_bytes
        products = tuple(self._feed_forward("dense", shape.hidden, shape.dense_ffn, self.positions))
        return Work(products, Moves(11 * moved, 8), Moves(20 * moved, 14))

    def iteration(self, kind: ModelShape, routed: bool, chunks: int) -> Work:
        """Router, experts and shared experts of one iteration of a kind of MoE layer, for one of so many chunks.

        Args:
            routed: whether it has a routing of its own.
        """
        settings, b = self.settings, self.settings.element_bytes
        tokens, positions = self.tokens / chunks, self.positions / chunks
        width, tensor = kind.chain_width, self.settings.tensor
        ffn, experts = kind.expert_ffn / settings.expert_tensor, kind.experts / settings.expert_parallel
        rows = tokens * kind.topk * settings.expert_tensor  # uniform: a rank gets as many as it sends
        halves = kind.ffn_matrices - 1
        products = [
            Product("experts", rows / experts, width, halves * ffn, experts, grouped=True),
            Product("experts", rows / experts, ffn, width, experts, grouped=True),
        ]
        if routed:
            products.append(Product("routers", tokens, width, kind.experts, in_fp32=True))
        if kind.shared_ffn:
            products += self._feed_forward("shared", width, kind.shared_ffn, positions)
            if kind.shared_gate:
                products.append(Product("shared", tokens, width, 1))
        if (rank := kind.chain.modulation_rank) is not None:
            products += [Product("variants", tokens, width, rank), Product("variants", tokens, rank, width)]
        sizes = (
            tokens * width * b,
            rows * width * b,
            rows * ffn * b,
            tokens * kind.experts * _FP32 * routed,
            positions * kind.shared_ffn / tensor * b,
            experts * kind.ffn_matrices * width * ffn * b,
        )
        forward, backward = (_weighted(each, *sizes) for each in (_CHAIN_FORWARD, _CHAIN_BACKWARD))
        starts = (59, 56) if routed else (33, 40)
        sent = self._sent(kind, sizes[0], sizes[3])
        return Work(
            tuple(products),
            Moves(forward + sent[0].bytes, starts[0] + sent[0].operations),
            Moves(backward + sent[1].bytes, starts[1] + sent[1].operations),
        )

    def _sent(self, kind: ModelShape, state: float, scores: float) -> tuple[Moves, Moves]:
        """What a rank does with the rows that it sends and gets, besides sending them; forward and backward."""
        settings = self.settings
        if settings.expert_parallel * settings.expert_tensor == 1:
            return _NOTHING.forward, _NOTHING.backward
        copies = float(kind.topk)
        found, starts = (_SENT_FORWARD, _SENT_BACKWARD), (18, 5)
        if settings.deduplicated:
            copies = ranks_of_a_token(kind.experts, kind.topk, settings.expert_parallel, *settings.groups)
            found, starts = (_DEDUPLICATED_FORWARD, _DEDUPLICATED_BACKWARD), (29, 8)
        forward, backward = (_weighted(each, state, copies * state, kind.topk * state, scores) for each in found)
        return Moves(max(0.0, forward), starts[0]), Moves(max(0.0, backward), starts[1])

    def around_chain(self, kind: ModelShape) -> Work:
        """Norms of further iterations, and projections into a latent space and back."""
        state = self.tokens * self.shape.hidden * self.settings.element_bytes
        norms = kind.chain.iterations - 1 if kind.chain.norm_placement == "iteration_norm" else 0
        products: tuple[Product, ...] = ()
        if kind.chain.latent is not None:
            products = (
                Product("variants", self.tokens, kind.hidden, kind.chain_width),
                Product("variants", self.tokens, kind.chain_width, kind.hidden),
            )
        return Work(products, Moves(7 * norms * state, 6 * norms), Moves(24 * norms * state, 16 * norms))

    def output(self) -> Work:
        """The last norm, the logits, their loss."""
        if not self.settings.last:
            return _NOTHING
        shape, tensor = self.shape, self.settings.tensor
        logits = self.positions * shape.vocab / tensor * _FP32
        state = self.tokens * shape.hidden * self.settings.element_bytes
        product = Product("output", self.positions, shape.hidden, shape.vocab / tensor)
        return Work((product,), Moves(9 * logits + 12 * state, 24), Moves(6 * logits + 24 * state, 18))

    def _feed_forward(self, kind: str, width: int, ffn: int, rows: float) -> Iterator[Product]:
        inner, halves = ffn / self.settings.tensor, self.shape.ffn_matrices - 1
        yield Product(kind, rows, width, halves * inner)
        yield Product(kind, rows, inner, width)


def _weighted(weights: tuple[float, ...], *sizes: float) -> float:
    return sum(weight * size for weight, size in zip(weights, sizes, strict=True))


# Bytes per byte of: states, queries with keys and values and outputs, latents.
_MHA_FORWARD, _MHA_BACKWARD = (32.0, 3.4, 0.0), (25.0, 9.4, 0.0)
_MLA_FORWARD, _MLA_BACKWARD = (18.0, 4.7, 5.5), (13.0, 6.4, 32.0)
# Of: states, rows of experts, their inner width, scores, the inner width of shared experts, weights of the experts.
_CHAIN_FORWARD, _CHAIN_BACKWARD = (15.0, 2.3, 6.9, 10.6, 10.0, 0.0), (30.0, 4.3, 25.0, 2.0, 16.3, 1.5)
# Of: states, copies of them that are sent, rows of experts, scores.
_SENT_FORWARD, _SENT_BACKWARD = (-2.7, 0.0, 8.6, 4.0), (-7.6, 0.0, 11.4, 1.5)
_DEDUPLICATED_FORWARD, _DEDUPLICATED_BACKWARD = (0.0, 4.1, 2.3, 11.0), (0.0, 3.9, 2.1, 2.6)
