"""How a router chooses experts, is kept balanced, and what it is charged: eq. 7 of arXiv 2506.18945, in plain torch.

    s = softmax(x W^T), or sigmoid(x W^T)             scores of the N experts
    g = s where s is among its K largest, else 0      gates; normalised and scaled if asked
    N Σ_i f_i P_i                                     auxiliary loss: share of the choices times mean score
    b_i + rate · sign(mean load - load_i)             expert bias, which moves the choice and needs no loss

Letters at the end of a name are its dimensions: B batch, S sequence, T = B·S tokens, D hidden, N experts, K chosen
for a token, G groups of experts, g experts of a group, R routings.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from coe_megatron.errors import ConfigError

ScoreFunction = Literal["softmax", "sigmoid"]
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
        # With softmax and K = 1 the gate would always be 1, and the router would get no gradient.
        constant = self.renormalise and k == 1 and function == "softmax"
        _require(not constant, "router.renormalise", True, "False for softmax with topk 1")
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
    """Where T tokens go in one iteration, and the gates.

    Attributes:
        gates_TN: g, zero for an expert that was not chosen; fp32, or the tokens' dtype where that is wider.
        chosen_TN: bool, True for exactly K experts of each token.
        logits_TN: the router's output, dtype of the gates.
        scores_TN: softmax or sigmoid of the logits, without bias, normalisation or scaling.
    """

    gates_TN: Tensor
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

    The score of a group is the sum of its best K / group_topk experts.
    """
    assert settings.num_groups is not None and settings.group_topk is not None
    ranking_TGg = ranking_TN.unflatten(1, (settings.num_groups, -1))
    group_scores_TG = ranking_TGg.topk(settings.topk // settings.group_topk, dim=2).values.sum(dim=2)
    best_TG = top_experts(group_scores_TG, settings.group_topk)
    return ranking_TGg.masked_fill(~best_TG.unsqueeze(2), -math.inf).flatten(1)


def gates(scores_TN: Tensor, chosen_TN: Tensor, settings: RouterSettings) -> Tensor:
    """g of eq. 7: the scores of the chosen experts, normalised and scaled as set, else zero; [T, N]."""
    gates_TN = scores_TN.masked_fill(~chosen_TN, 0.0)
    if settings.renormalise or (settings.score_function == "sigmoid" and settings.topk > 1):
        gates_TN = gates_TN / (gates_TN.sum(dim=1, keepdim=True) + TINY)
    return gates_TN * settings.scaling


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
        masked_TN: bool, experts that a token must not choose; None for none.
    """
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    logits_TN = functional.linear(x_TD.to(wide), weight_ND.to(wide))
    if masked_TN is not None:
        logits_TN = logits_TN.masked_fill(masked_TN, -math.inf)
    scores_TN = scores(logits_TN, settings.score_function)
    # To renormalise, Megatron-Core takes the softmax after the choice; groups are then scored by logits.
    after_choice = settings.score_function == "softmax" and settings.renormalise
    ranking_TN = logits_TN if after_choice else scores_TN
    if bias_N is not None:
        ranking_TN = ranking_TN + bias_N
    if settings.group_topk is not None:
        ranking_TN = within_best_groups(ranking_TN, settings)
    if masked_TN is not None:  # a bias lifts scores of 0
        ranking_TN = ranking_TN.masked_fill(masked_TN, -math.inf)
    chosen_TN = top_experts(ranking_TN, settings.topk)
    return Routing(gates(scores_TN, chosen_TN, settings), chosen_TN, logits_TN, scores_TN)


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


def expert_load(routing: Routing, valid_BS: Tensor) -> Tensor:
    """int64 [N]: how many valid tokens chose each expert, with bias and groups in force."""
    return (routing.chosen_TN & valid_BS.reshape(-1, 1)).sum(dim=0)


def updated_bias(bias_RN: Tensor, load_RN: Tensor, rate: float) -> Tensor:
    """One step of loss-free balancing (arXiv 2408.15664): b_i + rate · sign(mean load - load_i); [R, N] or [N]."""
    load_RN = load_RN.to(bias_RN.dtype)
    return bias_RN + rate * torch.sign(load_RN.mean(dim=-1, keepdim=True) - load_RN)
