"""Chain-of-Experts (arXiv 2506.18945) in plain torch, on one device, looping over the experts in plain sight.

This is what the fast implementations are tested against, and the place to read what they compute:

    x(0) = u = norm(h)                                h: the residual stream that enters the sub-layer
    F_t(x) = Σ_i g[t,i] E_i(x) + Σ_m S_m(x)           routed and shared experts, the same for all t (eq. 5, 8)
    x(t) = F_t(x(t-1)) + r(t),  t = 1 .. C            r: x(t-1) inner, x(0) init (eq. 10), 0 outer (eq. 9)
    Δ = Σ_t F_t (inner) or F_C(x(C-1)) (init, outer)  what the chain adds to its input
    h' = h + Δ (prenorm) or u + Δ (reference)         what leaves the sub-layer

With the norm placement `iteration_norm` x(0) = h, F_t acts on norm_t(x(t-1)), and h' = h + Δ.

Variants (all off by default, see ChainSettings):

    x(t) = a_t ⊙ F_t(c_t ⊙ x(t-1)) + r(t)             a_t ⊙ F_t takes the place of F_t in Δ as well
    a_t                                               a constant (`increment_scale`) or learned (`learned_scale`)
    c_t                                               learned (`conditioned`)
    F_t without S_m for t > 1                         the shared experts act once (`shared_once`)
    logit[t,i] = -inf if i was chosen before t        a token goes to an expert once (`no_return`)

Letters at the end of a name are its dimensions: B batch, S sequence, T = B·S tokens, D hidden, N experts, K
chosen for a token, G groups of experts, g experts of a group, C iterations, R routings (C, or 1 if `fixed`), F ffn.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from coe_megatron.chain.settings import ChainSettings
from coe_megatron.errors import ConfigError

ScoreFunction = Literal["softmax", "sigmoid"]
Activation = Literal["swiglu", "gelu"]
Losses = dict[str, Tensor]  # by name: seq_aux_loss, aux_loss, z_loss

TINY = 1e-20  # keeps a sum of sigmoids that all underflowed from dividing by zero


def _require(valid: bool, name: str, value: object, valid_values: str) -> None:
    if not valid:
        raise ConfigError(f"{name} is {value!r}: it must be {valid_values}")


def _is_count(value: object, highest: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= highest


@dataclass(frozen=True)
class RouterSettings:
    """How a router scores experts, chooses K of them and is kept balanced.

    Attributes:
        num_experts: N.
        topk: K, the experts a token visits in one iteration.
        score_function: `softmax` over N, or a `sigmoid` for each expert.
        renormalise: divide softmax weights by their sum over the chosen K; done to sigmoid weights where K > 1.
        scaling: every weight is multiplied by it at the end.
        num_groups: G, into how many equal groups the experts fall; None for no grouping.
        group_topk: from how many groups a token may choose; None for no grouping.
        seq_aux_coeff: coefficient of the balancing loss taken over each sequence.
        aux_coeff: coefficient of the balancing loss taken over the whole batch.
        z_coeff: coefficient of the z-loss.
        expert_bias: balance without a loss: a bias moves the choice, never the weights (arXiv 2408.15664).

    Raises:
        ConfigError: a field has no valid value; the message names the field, the value and the valid ones.
    """

    num_experts: int
    topk: int
    score_function: ScoreFunction = "softmax"
    renormalise: bool = False
    scaling: float = 1.0
    num_groups: int | None = None
    group_topk: int | None = None
    seq_aux_coeff: float = 0.0
    aux_coeff: float = 0.0
    z_coeff: float = 0.0
    expert_bias: bool = False

    def __post_init__(self) -> None:
        n, k, function = self.num_experts, self.topk, self.score_function
        _require(_is_count(n), "router.num_experts", n, "an integer of at least 1")
        _require(_is_count(k, n), "router.topk", k, f"an integer from 1 to num_experts, {n}")
        _require(function in get_args(ScoreFunction), "router.score_function", function, "softmax or sigmoid")
        # Softmax and K = 1 would give a weight of 1 whatever the router says, and no gradient would reach it.
        pinned = self.renormalise and k == 1 and function == "softmax"
        _require(not pinned, "router.renormalise", True, "False for softmax with topk 1")
        _require(0.0 < self.scaling < math.inf, "router.scaling", self.scaling, "a positive number")
        for name in ("seq_aux_coeff", "aux_coeff", "z_coeff"):
            value = getattr(self, name)
            _require(0.0 <= value < math.inf, f"router.{name}", value, "0 (off) or a positive number")
        biased_softmax = self.expert_bias and function == "softmax"  # Megatron-Core refuses it too
        _require(not biased_softmax, "router.expert_bias", True, "False unless score_function is sigmoid")
        if self.num_groups is not None or self.group_topk is not None:
            self._check_groups()

    def _check_groups(self) -> None:
        groups, best, n, k = self.num_groups, self.group_topk or 0, self.num_experts, self.topk
        divides = isinstance(groups, int) and _is_count(groups, n) and n % groups == 0
        _require(divides, "router.num_groups", groups, f"a divisor of num_experts, {n}, with group_topk")
        size = n // (groups or 1)
        fits = _is_count(best, groups or 1) and k % best == 0 and k // best <= size
        valid = f"a divisor of topk, {k}, up to {groups}: so many groups of {size} experts must hold topk"
        _require(fits, "router.group_topk", self.group_topk, valid)


@dataclass(frozen=True)
class Routing:
    """Where T tokens go in one iteration, and how much each expert's answer counts.

    Attributes:
        weights_TN: g, zero for an expert that was not chosen; fp32, or the tokens' dtype where that is wider.
        chosen_TN: bool, True for exactly K experts of each token.
        logits_TN: the router's output, dtype of the weights.
        scores_TN: softmax or sigmoid of the logits, without bias, normalisation or scaling.
    """

    weights_TN: Tensor
    chosen_TN: Tensor
    logits_TN: Tensor
    scores_TN: Tensor


def scores(logits_TN: Tensor, score_function: ScoreFunction) -> Tensor:
    """s of eq. 7: softmax over the N experts, or a sigmoid for each; [T, N], at least fp32."""
    wide_TN = logits_TN.to(torch.promote_types(logits_TN.dtype, torch.float32))
    return wide_TN.softmax(dim=1) if score_function == "softmax" else wide_TN.sigmoid()


def top_experts(ranking_TN: Tensor, topk: int) -> Tensor:
    """Bool [T, N]: the `topk` experts of each token that rank highest."""
    chosen_TN = torch.zeros_like(ranking_TN, dtype=torch.bool)
    return chosen_TN.scatter(1, ranking_TN.topk(topk, dim=1).indices, True)


def within_best_groups(ranking_TN: Tensor, settings: RouterSettings) -> Tensor:
    """The ranking [T, N] with -inf outside each token's best groups (group-limited, arXiv 2405.04434).

    A group is worth the sum of its best K / group_topk experts: what it brings if the choice falls evenly.
    """
    assert settings.num_groups is not None and settings.group_topk is not None
    ranking_TGg = ranking_TN.unflatten(1, (settings.num_groups, -1))
    worth_TG = ranking_TGg.topk(settings.topk // settings.group_topk, dim=2).values.sum(dim=2)
    best_TG = top_experts(worth_TG, settings.group_topk)
    return ranking_TGg.masked_fill(~best_TG.unsqueeze(2), -math.inf).flatten(1)


def gate_weights(scores_TN: Tensor, chosen_TN: Tensor, settings: RouterSettings) -> Tensor:
    """g of eq. 7: the scores of the chosen experts, normalised and scaled as set, else zero; [T, N]."""
    weights_TN = scores_TN.masked_fill(~chosen_TN, 0.0)
    if settings.renormalise or (settings.score_function == "sigmoid" and settings.topk > 1):
        weights_TN = weights_TN / (weights_TN.sum(dim=1, keepdim=True) + TINY)
    return weights_TN * settings.scaling


def route(
    x_TD: Tensor,
    weight_ND: Tensor,
    settings: RouterSettings,
    bias_N: Tensor | None = None,
    masked_TN: Tensor | None = None,
) -> Routing:
    """Eq. 7: score the experts for each token, choose K, and weigh them.

    Args:
        x_TD: tokens, any floating dtype; logits are taken in fp32, or in a wider dtype of the tokens.
        weight_ND: W_t.
        settings: how to score, choose and weigh.
        bias_N: added to the scores for the choice alone.
        masked_TN: bool, where a token must not go: as if the expert were not there; None for nowhere.
    """
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    logits_TN = functional.linear(x_TD.to(wide), weight_ND.to(wide))
    if masked_TN is not None:
        logits_TN = logits_TN.masked_fill(masked_TN, -math.inf)
    scores_TN = scores(logits_TN, settings.score_function)
    # To renormalise, Megatron-Core takes the softmax after the choice; a group is then worth its logits.
    after_choice = settings.score_function == "softmax" and settings.renormalise
    ranking_TN = logits_TN if after_choice else scores_TN
    if bias_N is not None:
        ranking_TN = ranking_TN + bias_N
    if settings.group_topk is not None:
        ranking_TN = within_best_groups(ranking_TN, settings)
    if masked_TN is not None:  # a bias lifts scores of 0
        ranking_TN = ranking_TN.masked_fill(masked_TN, -math.inf)
    chosen_TN = top_experts(ranking_TN, settings.topk)
    return Routing(gate_weights(scores_TN, chosen_TN, settings), chosen_TN, logits_TN, scores_TN)


def sequence_aux_loss(routing: Routing, settings: RouterSettings, valid_BS: Tensor) -> Tensor:
    """N Σ_i f_i P_i in each sequence, averaged over the sequences; a scalar, 1 where routing is uniform.

    f_i is the share of choices that fell on expert i, P_i its mean score, the scores summing to 1. As in
    Megatron-Core, f counts the plain top K of the scores: bias and groups, which balance by themselves, stay
    out. Tokens where `valid_BS` (bool) is False count nowhere.
    """
    probs_TN = routing.scores_TN
    if settings.score_function == "sigmoid":
        probs_TN = probs_TN / (probs_TN.sum(dim=1, keepdim=True) + TINY)
    choice_TN = top_experts(probs_TN, settings.topk).to(probs_TN.dtype)
    padding_BS1 = ~valid_BS.unsqueeze(2)
    choice_BSN = choice_TN.unflatten(0, valid_BS.shape).masked_fill(padding_BS1, 0.0)
    probs_BSN = probs_TN.unflatten(0, valid_BS.shape).masked_fill(padding_BS1, 0.0)
    # Megatron-Core divides by the mean number of valid tokens, not by each sequence's own, so a long sequence
    # weighs more than a short one. At least one token: a batch of padding alone costs 0 rather than NaN.
    length = valid_BS.sum().clamp(min=1).to(probs_TN.dtype) / valid_BS.shape[0]
    f_BN = choice_BSN.sum(dim=1) / (length * settings.topk)
    p_BN = probs_BSN.sum(dim=1) / length
    return settings.num_experts * (f_BN * p_BN).sum(dim=1).mean()


def batch_aux_loss(routing: Routing, settings: RouterSettings, valid_BS: Tensor) -> Tensor:
    """N Σ_i f_i P_i over the batch (arXiv 2101.03961), read as one long sequence; a scalar."""
    return sequence_aux_loss(routing, settings, valid_BS.reshape(1, -1))


def z_loss(routing: Routing, valid_BS: Tensor) -> Tensor:
    """Mean over valid tokens of (log Σ_i exp logit_i)²: keeps logits small (arXiv 2202.08906); a scalar."""
    valid_T = valid_BS.flatten()
    squares_T = routing.logits_TN.logsumexp(dim=1).square().masked_fill(~valid_T, 0.0)
    return squares_T.sum() / valid_T.sum().clamp(min=1)


def router_losses(routing: Routing, settings: RouterSettings, valid_BS: Tensor, scale: float = 1.0) -> Losses:
    """The losses that the settings ask for, by name, each times its coefficient and `scale`; scalars."""
    losses: Losses = {}
    if settings.seq_aux_coeff:
        losses["seq_aux_loss"] = scale * settings.seq_aux_coeff * sequence_aux_loss(routing, settings, valid_BS)
    if settings.aux_coeff:
        losses["aux_loss"] = scale * settings.aux_coeff * batch_aux_loss(routing, settings, valid_BS)
    if settings.z_coeff:
        losses["z_loss"] = scale * settings.z_coeff * z_loss(routing, valid_BS)
    return losses


def in_a_row(routings: list[Routing], valid_BS: Tensor) -> tuple[Routing, Tensor]:
    """C routings of the same tokens as one of B sequences with C·S tokens each, and which of these are valid."""

    def behind_each_other(name: str) -> Tensor:
        parts_BSN = [getattr(routing, name).unflatten(0, valid_BS.shape) for routing in routings]
        return torch.cat(parts_BSN, dim=1).flatten(0, 1)

    whole = Routing(**{field.name: behind_each_other(field.name) for field in fields(Routing)})
    return whole, valid_BS.repeat(1, len(routings))


def expert_load(routing: Routing, valid_BS: Tensor) -> Tensor:
    """int64 [N]: how many valid tokens chose each expert, with bias and groups in force."""
    return (routing.chosen_TN & valid_BS.reshape(-1, 1)).sum(dim=0)


def updated_expert_bias(bias_N: Tensor, load_N: Tensor, rate: float) -> Tensor:
    """One step of loss-free balancing (arXiv 2408.15664): b_i + rate · sign(mean load - load_i); [N]."""
    load_N = load_N.to(bias_N.dtype)
    return bias_N + rate * torch.sign(load_N.mean() - load_N)


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
        answer = routing.weights_TN[tokens, i, None] * feed_forward(x_TD[tokens], w1[i], w2[i], activation)
        sum_TD = sum_TD.index_add(0, tokens, answer.to(x_TD.dtype))
    return sum_TD


@dataclass(frozen=True)
class ChainOutput:
    """What one pass through the layer gives.

    Attributes:
        stream: h' [B, S, D], in the dtype of h.
        losses: for each of the C iterations its losses by name (`seq_aux_loss`, `aux_loss`, `z_loss`), scalars
            with coefficient and balance in them; none without a coefficient, none where `fixed` reuses. With `joint`
            balance the auxiliary losses of all iterations are the last one's.
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
    """The whole sub-layer, from residual stream to residual stream, norm included.

    Parameters and buffers:
        router_weights: [N, D] each; C of them with `independent` gating, else 1.
        expert_biases: buffer [R, N], or None without `expert_bias`; a bias for each routing even where the router
            is shared, since each iteration has a load of its own.
        w1, w2: the N routed experts, [N, 2F or F, D] and [N, D, F].
        shared_w1, shared_w2: the shared experts as one of width M·F, oriented alike without N, or None.
        norm_gains: [D] each; C of them with `iteration_norm`, else 1.
        increment_gains: a_t, [D] each; C of them with `learned_scale`, else none.
        state_gains: c_t, [D] each; C of them with `conditioned`, else none.

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
        _require(activation in get_args(Activation), "layer.activation", activation, "swiglu or gelu")
        chain.require_experts(router.num_experts, router.topk, router.num_groups)
        self.router, self.chain, self.activation, self.norm_eps = router, chain, activation, norm_eps
        self.num_routings = 1 if chain.gating == "fixed" else chain.iterations
        routers = chain.iterations if chain.gating == "independent" else 1
        norms = chain.iterations if chain.norm_placement == "iteration_norm" else 1
        n, halves = router.num_experts, 2 if activation == "swiglu" else 1
        self.router_weights = nn.ParameterList(torch.empty(n, hidden) for _ in range(routers))
        self.norm_gains = nn.ParameterList(torch.empty(hidden) for _ in range(norms))
        increments, states = (chain.iterations * on for on in (chain.learned_scale, chain.conditioned))
        self.increment_gains = nn.ParameterList(torch.empty(hidden) for _ in range(increments))
        self.state_gains = nn.ParameterList(torch.empty(hidden) for _ in range(states))
        self.w1 = nn.Parameter(torch.empty(n, halves * ffn, hidden))
        self.w2 = nn.Parameter(torch.empty(n, hidden, ffn))
        self.shared_w1 = nn.Parameter(torch.empty(halves * shared_ffn, hidden)) if shared_ffn else None
        self.shared_w2 = nn.Parameter(torch.empty(hidden, shared_ffn)) if shared_ffn else None
        biases = torch.zeros(self.num_routings, n) if router.expert_bias else None
        self.register_buffer("expert_biases", biases)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The authors' initialisation: normal 0.02, routers kaiming-uniform with a = √5, gains 1; a_t its scale.

        With `routers_apart` W_t is W_0 with its rows rolled by ⌊t·N/C⌋; with `scaled_init` w2 start √C times smaller.
        """
        out_std = 0.02 / math.sqrt(self.chain.iterations) if self.chain.scaled_init else 0.02
        for weight, std in ((self.w1, 0.02), (self.w2, out_std), (self.shared_w1, 0.02), (self.shared_w2, out_std)):
            if weight is not None:
                nn.init.normal_(weight, std=std)
        for weight_ND in self.router_weights:
            nn.init.kaiming_uniform_(weight_ND, a=math.sqrt(5))
        if self.chain.routers_apart:
            first_ND, n = self.router_weights[0].detach(), self.router.num_experts
            for t, weight_ND in enumerate(self.router_weights):
                weight_ND.data = first_ND.roll(t * n // self.chain.iterations, dims=0)
        for gain_D in (*self.norm_gains, *self.state_gains):
            nn.init.ones_(gain_D)
        for gain_D in self.increment_gains:
            nn.init.constant_(gain_D, self.chain.increment_scale)

    def forward(self, h_BSD: Tensor, padding_mask_BS: Tensor | None = None) -> ChainOutput:
        """Run the chain (eq. 5, 8 to 10) on the residual stream.

        Args:
            h_BSD: residual stream [B, S, D].
            padding_mask_BS: bool, True for padding, which passes through the experts like any token but counts in
                no loss and no load.
        """
        valid_BS = torch.ones(h_BSD.shape[:2], dtype=torch.bool, device=h_BSD.device)
        if padding_mask_BS is not None:
            valid_BS = ~padding_mask_BS.bool()
        h_TD = h_BSD.flatten(0, 1)
        x_TD = start_TD = h_TD if self.chain.norm_placement == "iteration_norm" else self._norm(h_TD, 0)
        delta_TD, routings = torch.zeros_like(h_TD), list[Routing]()
        for t in range(self.chain.iterations):
            n_TD = self._seen(x_TD, t)
            routings.append(self._route(n_TD, t, routings) if t < self.num_routings else routings[0])
            f_TD = self._increment_gain(t) * self._experts(n_TD, routings[t], t)
            # Δ is a sum of increments: x(C) - x(0) would lose digits, and differ from a plain MoE at C = 1.
            delta_TD = delta_TD + f_TD if self.chain.residual == "inner" else f_TD
            residual_TD = {"inner": x_TD, "init": start_TD, "outer": torch.zeros_like(x_TD)}[self.chain.residual]
            x_TD = f_TD + residual_TD
        base_TD = start_TD if self.chain.norm_placement == "reference" else h_TD
        stream_BSD = (base_TD + delta_TD).view_as(h_BSD)
        return ChainOutput(stream_BSD, self._losses(routings, valid_BS), routings, valid_BS)

    @torch.no_grad()
    def update_expert_biases(self, loads_CN: Tensor, rate: float) -> None:
        """Move each routing's bias against its load (`ChainOutput.loads`, summed over a step's batches)."""
        if self.expert_biases is not None:
            for t, bias_N in enumerate(self.expert_biases):
                bias_N.copy_(updated_expert_bias(bias_N, loads_CN[t], rate))

    def _route(self, n_TD: Tensor, t: int, earlier: list[Routing]) -> Routing:
        weight_ND = self.router_weights[t if self.chain.gating == "independent" else 0]
        bias_N = None if self.expert_biases is None else self.expert_biases[t]
        visited_TN = None
        if self.chain.no_return and earlier:
            visited_TN = torch.stack([routing.chosen_TN for routing in earlier]).any(dim=0)
        return route(n_TD, weight_ND, self.router, bias_N, visited_TN)

    def _experts(self, n_TD: Tensor, routing: Routing, t: int) -> Tensor:
        """F_t: routed and, unless they have acted once and for all, shared experts."""
        f_TD = routed_experts(n_TD, routing, self.w1, self.w2, self.activation)
        done = t > 0 and self.chain.shared_once
        if self.shared_w1 is not None and self.shared_w2 is not None and not done:
            f_TD = f_TD + feed_forward(n_TD, self.shared_w1, self.shared_w2, self.activation)
        return f_TD

    def _seen(self, x_TD: Tensor, t: int) -> Tensor:
        """What router and experts of iteration t see of the state: x, norm_t(x), or c_t ⊙ x."""
        if self.chain.norm_placement == "iteration_norm":
            return self._norm(x_TD, t)
        return self.state_gains[t] * x_TD if self.chain.conditioned else x_TD

    def _increment_gain(self, t: int) -> Tensor | float:
        """a_t: what F_t is multiplied by."""
        return self.increment_gains[t] if self.chain.learned_scale else self.chain.increment_scale

    def _norm(self, x_TD: Tensor, t: int) -> Tensor:
        gain_D = self.norm_gains[t]
        return functional.rms_norm(x_TD, gain_D.shape, gain_D, self.norm_eps)

    def _losses(self, routings: list[Routing], valid_BS: Tensor) -> list[Losses]:
        """Losses of each iteration; a routing that `fixed` gating uses again is not charged again.

        With `joint` balance the last one has the auxiliary losses of all, taken over their summed load.
        """
        scale = 1.0 if self.chain.aux_loss_reduction == "sum" else 1.0 / self.num_routings
        fresh, reused = routings[: self.num_routings], routings[self.num_routings :]
        if self.chain.aux_loss_reduction == "joint":
            alone, together = replace(self.router, seq_aux_coeff=0.0, aux_coeff=0.0), replace(self.router, z_coeff=0.0)
            charged = [router_losses(routing, alone, valid_BS, scale) for routing in fresh]
            whole, whole_valid_BS = in_a_row(fresh, valid_BS)
            charged[-1] |= router_losses(whole, together, whole_valid_BS)
        else:
            charged = [router_losses(routing, self.router, valid_BS, scale) for routing in fresh]
        return charged + [{} for _ in reused]
