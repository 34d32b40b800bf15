"""Chain-of-Experts (arXiv 2506.18945) in plain torch, on one device, with a loop over the experts.

Read here what the method computes; the fast implementation (`model.layer`) is tested against this module:

    x(0) = u = norm(h)                                h: the residual stream that enters the sub-layer
    F_t(x) = Σ_i g[t,i] E_i(x) + Σ_m S_m(x)           routed and shared experts, the same for all t (eq. 5, 8)
    x(t) = F_t(x(t-1)) + r(t),  t = 1 .. C            r: x(t-1) inner, x(0) init (eq. 10), 0 outer (eq. 9)
    Δ = Σ_t F_t (inner) or F_C(x(C-1)) (init, outer)  what the chain adds to its input
    h' = h + Δ (prenorm) or u + Δ (reference)         output of the sub-layer

With the norm placement `iteration_norm` x(0) = h, F_t acts on norm_t(x(t-1)), and h' = h + Δ. `chain.routing` computes
the gates g; `chain.variants` has options that are not in the paper.

Suffixes: B batch, S sequence, T = B·S tokens, D hidden (or `latent`), N experts, C iterations, R routings, F ffn.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from coe_megatron.chain.routing import Losses, RouterSettings, Routing, expert_load, route, router_losses, updated_bias
from coe_megatron.chain.settings import ChainSettings
from coe_megatron.chain.variants import Variants
from coe_megatron.errors import ConfigError

Activation = Literal["swiglu", "gelu"]


def feed_forward(x_TD: Tensor, w1: Tensor, w2: Tensor, activation: Activation) -> Tensor:
    """One expert, E or S: `swiglu` w2 · (silu(first half of w1 x) * second half) or `gelu` w2 · gelu(w1 x).

    x and the result are [T, D], w1 is [2F, D] for swiglu, else [F, D], w2 [D, F]: the orientation of nn.Linear.
    """
    inner_TF = functional.linear(x_TD, w1)
    if activation == "swiglu":
        gate_TF, value_TF = inner_TF.chunk(2, dim=1)
        return functional.linear(functional.silu(gate_TF) * value_TF, w2)
    return functional.linear(functional.gelu(inner_TF), w2)


def routed_experts(x_TD: Tensor, routing: Routing, w1: Tensor, w2: Tensor, activation: Activation) -> Tensor:
    """Σ_i g[t,i] E_i(x) of eq. 5; w1 is [N, 2F or F, D], w2 [N, D, F]; [T, D] in the dtype of x."""
    sum_TD = torch.zeros_like(x_TD)
    for i in range(w1.shape[0]):
        tokens = routing.chosen_TN[:, i].nonzero().squeeze(1)  # may be none: the gradient is then zero, not None
        output = routing.gates_TN[tokens, i, None] * feed_forward(x_TD[tokens], w1[i], w2[i], activation)
        sum_TD = sum_TD.index_add(0, tokens, output.to(x_TD.dtype))
    return sum_TD


@dataclass(frozen=True)
class ChainOutput:
    """Result of a forward pass.

    Attributes:
        stream: h' [B, S, D], in the dtype of h.
        losses: for each of the C iterations its losses by name (`seq_aux_loss`, `aux_loss`, `z_loss`), scalars
            with their coefficients in them; none without a coefficient, none where `fixed` reuses.
        routings: the routing that drove each of the C iterations; with `fixed` gating C times the first.
        valid_BS: bool, False for padding.
    """

    stream: Tensor
    losses: list[Losses]
    routings: list[Routing]
    valid_BS: Tensor

    @property
    def total_loss(self) -> Tensor:
        """Sum of all losses, a scalar: what to add to the loss of the model."""
        parts = [loss for iteration in self.losses for loss in iteration.values()]
        return torch.stack(parts).sum() if parts else self.stream.new_zeros(())

    @property
    def loads(self) -> Tensor:
        """int64 [C, N]: how many valid tokens each expert served in each iteration."""
        return torch.stack([expert_load(routing, self.valid_BS) for routing in self.routings])


class ChainOfExperts(nn.Module):
    """The MoE sub-layer of a transformer layer as a chain, from residual stream to residual stream, with its norm.

    Parameters and buffers:
        router_weights: [N, D] each; C of them with `independent` gating, else 1.
        expert_biases: buffer [R, N], or None without `expert_bias`; a bias for each routing (R is C, or 1 if `fixed`)
            even where the router is shared, since each iteration has a load of its own.
        w1, w2: the N routed experts, [N, 2F or F, D] and [N, D, F].
        shared_w1, shared_w2: the shared experts as one of width M·F, oriented alike without N, or None.
        norm_gains: [D] each; C of them with `iteration_norm`, else 1.
        variants: the learned gains of `chain.variants`, if there are any.

    Args:
        hidden, ffn: D, and F of one routed expert.
        router, chain: how to route among N experts, and how to iterate.
        shared_ffn: M·F, the width of all shared experts together; 0 for none.
        activation, norm_eps: of every expert and every RMSNorm.

    Raises:
        ConfigError: the activation is unknown, or the chain needs more experts than there are.
    """

    expert_biases: Tensor | None

    def __init__(
        self,
        hidden: int,
        ffn: int,
        router: RouterSettings,
        chain: ChainSettings,
        *,
        shared_ffn: int = 0,
        activation: Activation = "swiglu",
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if activation not in get_args(Activation):
            raise ConfigError(f"layer.activation is {activation!r}: it must be swiglu or gelu")
        chain.require_experts(router.num_experts, router.topk, router.num_groups)
        self.router, self.chain, self.activation, self.norm_eps = router, chain, activation, norm_eps
        self.num_routings = 1 if chain.gating == "fixed" else chain.iterations
        routers = chain.iterations if chain.gating == "independent" else 1
        norms = chain.iterations if chain.norm_placement == "iteration_norm" else 1
        experts, halves = router.num_experts, 2 if activation == "swiglu" else 1
        width = chain.width(hidden)
        self.router_weights = nn.ParameterList(torch.empty(experts, width) for _ in range(routers))
        self.norm_gains = nn.ParameterList(torch.ones(hidden) for _ in range(norms))
        self.variants = Variants(chain, hidden)
        self.w1 = nn.Parameter(torch.empty(experts, halves * ffn, width))
        self.w2 = nn.Parameter(torch.empty(experts, width, ffn))
        self.shared_w1 = nn.Parameter(torch.empty(halves * shared_ffn, width)) if shared_ffn else None
        self.shared_w2 = nn.Parameter(torch.empty(width, shared_ffn)) if shared_ffn else None
        self.register_buffer("expert_biases", torch.zeros(self.num_routings, experts) if router.expert_bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The authors' initialisation: normal 0.02, routers kaiming-uniform with a = √5."""
        for weight in (self.w1, self.w2, self.shared_w1, self.shared_w2):
            if weight is not None:
                nn.init.normal_(weight, std=0.02)
        for weight_ND in self.router_weights:
            nn.init.kaiming_uniform_(weight_ND, a=math.sqrt(5))

    def forward(self, h_BSD: Tensor, padding_mask_BS: Tensor | None = None) -> ChainOutput:
        """Run the chain (eq. 5, 8 to 10) on the residual stream.

        Args:
            h_BSD: residual stream [B, S, D].
            padding_mask_BS: bool, True for padding, which passes through the experts but counts in no loss and no load.
        """
        padding_BS = h_BSD.new_zeros(h_BSD.shape[:2]) if padding_mask_BS is None else padding_mask_BS
        valid_BS = ~padding_BS.bool()
        h_TD = h_BSD.flatten(0, 1)
        u_TD = h_TD if self.chain.norm_placement == "iteration_norm" else self._norm(h_TD, 0)
        start_TD = self.variants.enter(u_TD)
        x_TD = self.variants.state(start_TD, []) if self.chain.streams else start_TD
        delta_TD, routings, increments, masked_TN = torch.zeros_like(start_TD), list[Routing](), list[Tensor](), None
        for t in range(self.chain.iterations):
            input_TD = self._iteration_input(t, x_TD)
            routings.append(self._route(t, input_TD, masked_TN) if t < self.num_routings else routings[0])  # `fixed`
            masked_TN = self.variants.masked(masked_TN, routings[t].chosen_TN)
            f_TD = self.variants.increment(t, self._experts(input_TD, routings[t]))
            # Not x(C) - x(0), which loses digits and differs from a MoE at C = 1.
            delta_TD = delta_TD + f_TD if self.chain.sums_increments else f_TD
            increments.append(f_TD)
            x_TD = f_TD + {"inner": x_TD, "init": start_TD, "outer": torch.zeros_like(x_TD)}[self.chain.residual]
            if self.chain.streams:
                x_TD, delta_TD = self.variants.state(start_TD, increments), self.variants.total(increments)
        base_TD = u_TD if self.chain.norm_placement == "reference" else h_TD
        return ChainOutput(
            (base_TD + self.variants.leave(delta_TD)).view_as(h_BSD),
            self._losses(routings, valid_BS),
            routings,
            valid_BS,
        )

    @torch.no_grad()
    def update_expert_biases(self, loads_CN: Tensor, rate: float) -> None:
        """Move each routing's bias against its load (`ChainOutput.loads`, summed over a step's batches)."""
        if self.expert_biases is not None:
            self.expert_biases.copy_(updated_bias(self.expert_biases, loads_CN[: self.num_routings], rate))

    def _route(self, t: int, input_TD: Tensor, masked_TN: Tensor | None) -> Routing:
        weight_ND = self.router_weights[t if self.chain.gating == "independent" else 0]
        bias_N = None if self.expert_biases is None else self.expert_biases[t]
        return route(input_TD, weight_ND, self.router, bias_N, masked_TN)

    def _experts(self, input_TD: Tensor, routing: Routing) -> Tensor:
        """F_t: routed and shared experts."""
        f_TD = routed_experts(input_TD, routing, self.w1, self.w2, self.activation)
        if self.shared_w1 is None or self.shared_w2 is None:
            return f_TD
        return f_TD + feed_forward(input_TD, self.shared_w1, self.shared_w2, self.activation)

    def _iteration_input(self, t: int, x_TD: Tensor) -> Tensor:
        """Input of router and experts in iteration t: x or norm_t(x), or a variant's function of it."""
        own_norm = self.chain.norm_placement == "iteration_norm"
        return self.variants.iteration_input(t, self._norm(x_TD, t) if own_norm else x_TD)

    def _norm(self, x_TD: Tensor, t: int) -> Tensor:
        return functional.rms_norm(x_TD, x_TD.shape[1:], self.norm_gains[t], self.norm_eps)

    def _losses(self, routings: list[Routing], valid_BS: Tensor) -> list[Losses]:
        """Losses of each iteration; none where `fixed` gating reuses a routing."""
        scale = 1.0 if self.chain.aux_loss_reduction == "sum" else 1.0 / self.num_routings
        own = [router_losses(routing, self.router, valid_BS, scale) for routing in routings[: self.num_routings]]
        return own + [{} for _ in routings[self.num_routings :]]
