"""The feed-forward of a Chain-of-Experts layer: routers, experts, and the iterations through them.

T: tokens, D: hidden (in a latent space its width), N: experts, K: experts per token, F: width of an expert, B: batch,
S: sequence.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention_coe import linear, make_norm
from .configuration_coe import CoEConfig

TINY = 1e-20  # keeps a sum of gates that all underflowed from dividing by zero


class FeedForward(nn.Module):
    """w2 (silu(first half of w1 x) * second half), or w2 gelu(w1 x)."""

    def __init__(self, config: CoEConfig, width: int, hidden: int) -> None:
        super().__init__()
        self.gated = config.hidden_act == "silu"
        self.w1 = linear(hidden, width * (1 + self.gated))
        self.w2 = linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(activation(self.w1(x), self.gated))


def activation(inner: Tensor, gated: bool) -> Tensor:
    if not gated:
        return F.gelu(inner)
    gate, value = inner.chunk(2, dim=-1)
    return F.silu(gate) * value


class Experts(nn.Module):
    """N feed-forwards: w1 [N, 2F or F, D], w2 [N, D, F]."""

    def __init__(self, config: CoEConfig) -> None:
        super().__init__()
        self.gated = config.hidden_act == "silu"
        count, width, hidden = config.num_experts, config.moe_intermediate_size, chain_width(config)
        self.w1 = nn.Parameter(torch.empty(count, width * (1 + self.gated), hidden))
        self.w2 = nn.Parameter(torch.empty(count, hidden, width))

    def forward(self, x_TD: Tensor, gates_TK: Tensor, chosen_TK: Tensor) -> Tensor:
        """The sum of each token's experts, weighted by its gates, [T, D]."""
        out_TD = torch.zeros_like(x_TD)
        for expert in chosen_TK.unique().tolist():
            token, slot = torch.where(chosen_TK == expert)
            inner = activation(F.linear(x_TD[token], self.w1[expert]), self.gated)
            rows = F.linear(inner * gates_TK[token, slot, None].to(inner.dtype), self.w2[expert])
            out_TD.index_add_(0, token, rows)
        return out_TD


class Router(nn.Module):
    """Scores experts in fp32, chooses K for each token, and weighs them."""

    def __init__(self, config: CoEConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, chain_width(config)))

    def forward(
        self, x_TD: Tensor, topk: int, bias_N: Tensor | None, masked_TN: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gates [T, K], experts [T, K], and logits [T, N]; a token must not choose masked experts."""
        config, wide = self.config, torch.promote_types(x_TD.dtype, torch.float32)
        logits_TN = F.linear(x_TD.to(wide), self.weight.to(wide))
        if masked_TN is not None:
            logits_TN = logits_TN.masked_fill(masked_TN, -math.inf)
        softmax = config.scoring_func == "softmax"
        scores_TN = logits_TN.softmax(dim=-1) if softmax else logits_TN.sigmoid()
        ranking_TN = logits_TN if softmax and config.norm_topk_prob else scores_TN
        if bias_N is not None:
            ranking_TN = ranking_TN + bias_N.to(wide)
        if config.topk_group is not None:
            ranking_TN = self._within_best_groups(ranking_TN, topk)
        if masked_TN is not None:  # a bias lifts scores of 0
            ranking_TN = ranking_TN.masked_fill(masked_TN, -math.inf)
        chosen_TK = ranking_TN.topk(topk, dim=1).indices
        gates_TK = scores_TN.gather(1, chosen_TK)
        if config.norm_topk_prob or (not softmax and topk > 1):
            gates_TK = gates_TK / (gates_TK.sum(dim=1, keepdim=True) + TINY)
        return gates_TK * config.routed_scaling_factor, chosen_TK, logits_TN

    def _within_best_groups(self, ranking_TN: Tensor, topk: int) -> Tensor:
        """-inf outside each token's best groups; a group's score is the sum of its best experts."""
        groups, best = self.config.n_group, self.config.topk_group
        assert groups is not None and best is not None
        ranking = ranking_TN.unflatten(1, (groups, -1))
        scores = ranking.topk(topk // best, dim=2).values.sum(dim=2)
        allowed = torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.topk(best, dim=1).indices, True)
        return ranking.masked_fill(~allowed.unsqueeze(2), -math.inf).flatten(1)


def chain_width(config: CoEConfig) -> int:
    """Dimensions in which the chain iterates."""
    return config.chain_latent or config.hidden_size


class Streams(nn.Module):
    """n streams between iterations: X(t) = R_t X(t-1) + o_t F_t(i_t X(t-1)), X(0) = n times x(0).

    weights: i_t [n], o_t [n] and R_t [n, n] in one vector for each iteration.
    """

    def __init__(self, count: int, iterations: int) -> None:
        super().__init__()
        self.count = count
        self.weights = nn.ParameterList(torch.ones(count * (count + 2)) for _ in range(iterations))

    def _parts(self, t: int) -> tuple[Tensor, Tensor, Tensor]:
        read, write, mix = self.weights[t].float().split([self.count, self.count, self.count**2])
        return read, write, mix.view(self.count, self.count)

    def read(self, t: int, start: Tensor, kept: Tensor, written: Tensor) -> Tensor:
        """Input of iteration t (from 0); `kept` [n] is how much of x(0) is in each stream, `written` the rest."""
        read, _, _ = self._parts(t)
        return ((read @ kept) * start + torch.tensordot(read, written, 1)).to(start.dtype)

    def write(self, t: int, kept: Tensor, written: Tensor, increment: Tensor) -> tuple[Tensor, Tensor]:
        """`kept` and `written` after iteration t."""
        _, write, mix = self._parts(t)
        return mix @ kept, torch.tensordot(mix, written, 1) + torch.tensordot(
            write, increment.float()[None], 0
        ).squeeze(1)


class Chain(nn.Module):
    """A layer with experts: C iterations, or one of a layer that is no chain."""

    def __init__(self, config: CoEConfig, is_chain: bool) -> None:
        super().__init__()
        self.config = config
        self.iterations = config.chain_iterations if is_chain else 1
        self.topk = config.num_experts_per_tok * (1 if is_chain else config.chain_iterations)
        self.norm_placement = config.chain_norm_placement if is_chain else "prenorm"
        self.residual = config.chain_residual if is_chain else "inner"
        self.no_return = config.chain_no_return and is_chain
        self.routings = 1 if config.chain_gating == "fixed" else self.iterations
        routers = self.iterations if config.chain_gating == "independent" else 1
        gains = self.iterations if is_chain else 0
        later_norms = self.iterations - 1 if self.norm_placement == "iteration_norm" else 0
        self.routers = nn.ModuleList(Router(config) for _ in range(routers))
        self.experts = Experts(config)
        shared = config.shared_expert_intermediate_size
        width, rank = chain_width(config), config.chain_modulation_rank if is_chain else None
        self.shared_experts = FeedForward(config, shared, width) if shared else None
        self.shared_gate = linear(width, 1) if shared and config.shared_expert_gate else None
        self.later_norms = nn.ModuleList(make_norm(config, config.hidden_size) for _ in range(later_norms))
        self.increment_gains = self._gains(gains if config.chain_learned_scale else 0)
        self.state_gains = self._gains(gains if config.chain_conditioned else 0)
        self.modulation_down = linear(width, rank) if rank else None
        self.modulation_up = nn.ModuleList(linear(rank, width) for _ in range(gains) if rank)
        self.streams = Streams(config.chain_streams, gains) if is_chain and config.chain_streams else None
        self.latent_down = linear(config.hidden_size, width) if config.chain_latent else None
        self.latent_up = linear(width, config.hidden_size) if config.chain_latent else None
        biases = self.routings if config.use_expert_bias else 0
        self.expert_bias = nn.ParameterList(
            nn.Parameter(torch.zeros(config.num_experts), requires_grad=False) for _ in range(biases)
        )

    def _gains(self, count: int) -> nn.ParameterList:
        return nn.ParameterList(torch.ones(chain_width(self.config)) for _ in range(count))

    def forward(self, h: Tensor, norm: nn.Module) -> tuple[Tensor, list[Tensor]]:
        """h [B, S, D] after the layer, and the logits of its routings.

        Args:
            norm: of the residual stream; with `iteration_norm` of the first iteration.
        """
        own_norms = self.norm_placement == "iteration_norm"
        u = h if own_norms else norm(h)
        x = start = u if self.latent_down is None else self.latent_down(u)
        kept = torch.ones(self.config.chain_streams or 0, device=h.device)
        written = torch.zeros(len(kept), *start.shape, device=h.device)
        norms = [norm, *self.later_norms] if own_norms else [nn.Identity()] * self.iterations
        delta: Tensor | None = None
        masked: Tensor | None = None
        routings: list[tuple[Tensor, Tensor, Tensor]] = []
        for t in range(self.iterations):
            x = x if self.streams is None else self.streams.read(t, start, kept, written)
            inputs = norms[t](x)
            if self.modulation_down is not None:
                inputs = (1 + self.modulation_up[t](F.silu(self.modulation_down(inputs)))) * inputs
            inputs = self.state_gains[t] * inputs if len(self.state_gains) else inputs
            if t < self.routings:
                routings.append(self._route(t, inputs, masked))
            gates_TK, chosen_TK, logits_TN = routings[-1]  # `fixed` has the first alone
            if self.no_return:
                visited = torch.zeros_like(logits_TN, dtype=torch.bool).scatter(1, chosen_TK, True)
                masked = visited if masked is None else masked | visited
            increment = self._experts(inputs, gates_TK, chosen_TK)
            increment = self.increment_gains[t] * increment if len(self.increment_gains) else increment
            delta = increment if delta is None or self.residual != "inner" else delta + increment
            base = {"inner": x, "init": start}.get(self.residual)
            x = increment if base is None else increment + base
            if self.streams is not None:
                kept, written = self.streams.write(t, kept, written, increment)
                delta = written.mean(0).to(h.dtype)
        assert delta is not None
        delta = delta if self.latent_up is None else self.latent_up(delta)
        return (u if self.norm_placement == "reference" else h) + delta, [logits for *_, logits in routings]

    def _route(self, t: int, inputs: Tensor, masked_TN: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        router = self.routers[t if len(self.routers) > 1 else 0]
        bias_N = self.expert_bias[t] if len(self.expert_bias) else None
        return router(inputs.flatten(0, 1), self.topk, bias_N, masked_TN)

    def _experts(self, inputs: Tensor, gates_TK: Tensor, chosen_TK: Tensor) -> Tensor:
        out = self.experts(inputs.flatten(0, 1), gates_TK, chosen_TK).view_as(inputs)
        if self.shared_experts is None:
            return out
        shared = self.shared_experts(inputs)
        return out + (shared if self.shared_gate is None else shared * self.shared_gate(inputs).sigmoid())


class DenseLayer(FeedForward):
    """A layer without experts."""

    def __init__(self, config: CoEConfig) -> None:
        super().__init__(config, config.intermediate_size, config.hidden_size)

    def forward(self, h: Tensor, norm: nn.Module) -> tuple[Tensor, list[Tensor]]:  # type: ignore[override]
        """As `Chain.forward`."""
        return h + super().forward(norm(h)), []
