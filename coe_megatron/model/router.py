"""The router of one iteration: Megatron's TopKRouter, with losses and loads kept by (layer, iteration).

What differs from the stock router, and why:

* auxiliary and z-losses are also noted in `stats` of this very router, because Megatron's tracker has one slot a layer
  and C routers would add up in it. Into the tracker goes 1/C of each, so that it shows the mean over iterations;
* with `mean` the coefficients are those of the config divided by the number of routers;
* with `joint` the last iteration's router has the auxiliary loss of all of them, of their scores and choices
  in a row, as if their sequences were one; it is noted there, and not divided in the tracker;
* a padding mask reaches the load counts of the expert bias without an error (the stock code broadcasts it wrongly);
* an expert's capacity is that of the real tokens, and padding takes none of it (`dispatch.capacity`);
* noise on its input is for training: the stock code draws it in evaluation as well;
* on watched steps it also notes the entropy of its distribution over the experts;
* a pass that is recomputed takes the routes of the first one, whatever its logits have become, and counts nothing.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    router_gating_linear,
    save_to_aux_losses_tracker,
    z_loss_func,
)
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay
from megatron.core.transformer.transformer_config import TransformerConfig

from coe_megatron.chain.settings import ChainSettings
from coe_megatron.model.capacity import within_capacity
from coe_megatron.model.recompute import RoutingRecord

_DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


@dataclass
class RoutingStats:
    """What one router saw since `reset_routing`; sums over micro-batches, on the router's device, this rank only.

    Attributes:
        losses: name -> sum of the loss without its coefficient (1.0 each for a perfectly balanced aux loss).
        load: [N] float64, token copies that reached each expert (padding not counted).
        calls: micro-batches seen.
        watched: whether to note what only the metrics need.
        entropy: where watched, sum over counted tokens of the entropy in nats of the distribution over experts.
    """

    losses: dict[str, torch.Tensor] = field(default_factory=dict)
    load: torch.Tensor | None = None
    calls: int = 0
    watched: bool = False
    entropy: torch.Tensor | float = 0.0

    def add_loss(self, name: str, value: torch.Tensor) -> None:
        self.losses[name] = self.losses.get(name, 0.0) + value.detach()

    def add_load(self, load_N: torch.Tensor) -> None:
        self.load = load_N.double() if self.load is None else self.load + load_N
        self.calls += 1


class CoERouter(TopKRouter):
    """Router W_t of iteration t (paper eq. 7).

    Args:
        config: Megatron's; what it says of routing holds for every iteration.
        chain: the chain's settings.
        leader: the router whose weights this one uses (gating `shared_router`); None for weights of its own.
    """

    router_replay: RouterReplay | RoutingRecord | None
    global_tokens_per_expert: torch.Tensor | None
    ga_steps: torch.Tensor

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        chain: ChainSettings | None = None,
        leader: "CoERouter | None" = None,
    ) -> None:
        chain = chain or ChainSettings(iterations=1)
        self.num_routers = 1 if chain.gating == "fixed" else chain.iterations
        config = _with_balance(config, chain, self.num_routers)
        self.capacity_factor = config.moe_expert_capacity_factor
        if self.capacity_factor is not None:  # `routing` applies it, which can keep to a route
            config = copy(config)
            config.moe_expert_capacity_factor = None
        super().__init__(config=config, pg_collection=pg_collection)
        self._leader = (leader,)  # in a tuple, so that torch does not take it for a child
        self.stats = RoutingStats()
        self._route: RoutingRecord | None = None  # of the call in progress
        self._replays = False
        self._is_joint = chain.aux_loss_reduction == "joint"
        self._earlier: Sequence[torch.Tensor] = ()  # for the call in progress
        self._scored: tuple[torch.Tensor, ...] = ()  # by the last call
        if leader is not None:
            del self.weight, self.bias
        self.to(torch.cuda.current_device())  # the stock router moves its weight in the first forward pass

    @property
    def leader(self) -> "CoERouter | None":
        """The router whose weights this one uses; None if it has its own."""
        return self._leader[0]

    @property
    def is_counting(self) -> bool:
        """False in evaluation, and when a pass is recomputed."""
        return self.training and torch.is_grad_enabled() and not self._replays

    def forward(
        self,
        input: torch.Tensor,
        padding_mask: torch.Tensor | None = None,
        route: RoutingRecord | None = None,
        masked_TN: torch.Tensor | None = None,
        earlier: Sequence[torch.Tensor] = (),
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As the stock method: input [S, B, D] -> gates and choices [T, N].

        Args:
            padding_mask: [S, B] bool, True at padding.
            route: written if it is empty; else followed, and nothing is counted or noted.
            masked_TN: bool [T, N], where a token must not go; None for nowhere.
            earlier: with `joint`, to the last router: what `take_scored` gave after each call before.
        """
        if route is None and masked_TN is not None:
            route = RoutingRecord()
        self._earlier = earlier
        try:
            with nullcontext() if route is None else self._following(route, masked_TN):
                return super().forward(input, padding_mask)
        finally:
            self._earlier = ()

    @contextmanager
    def _following(self, route: RoutingRecord, masked_TN: torch.Tensor | None) -> Iterator[None]:
        """Meanwhile the choice is that of a route, if it is known, and else it is noted there."""
        stock, self.router_replay = self.router_replay, route
        self._route, self._replays, route.stock, route.masked_TN = route, route.is_known, stock, masked_TN
        try:
            yield
        finally:
            self._route, self._replays, self.router_replay, route.masked_TN = None, False, stock, None

    def take_scored(self) -> tuple[torch.Tensor, ...]:
        """Scores and choices [T, N] of the last call that a later router's loss has to count (`joint`), or nothing."""
        scored, self._scored = self._scored, ()
        return scored

    def apply_input_jitter(self, input: torch.Tensor) -> torch.Tensor:
        """As the stock method in training; elsewhere the input, and no random number is drawn."""
        return super().apply_input_jitter(input) if self.training else input

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Logits [S, B, N] = x W_t^T in the router's dtype (`moe_router_dtype`, else the input's)."""
        owner = self.leader or self
        dtype = _DTYPES.get(self.config.moe_router_dtype, input.dtype)
        return router_gating_linear(input, owner.weight, owner.bias, dtype)

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As the stock method: logits [S, B, N] -> gates and choices [T, N]; notes the entropy on watched steps.

        Barred experts get logits of -inf, so that they are in no score, entropy or loss.
        """
        if self._route is not None and self._route.masked_TN is not None:
            logits = logits.masked_fill(self._route.masked_TN.view_as(logits), -math.inf)
        if self.stats.watched and self.is_counting:
            self.stats.entropy = self.stats.entropy + _summed_entropy(logits, self.score_function, padding_mask)
        probs, routing_map = super().routing(logits, padding_mask)
        if self.capacity_factor is not None:
            routing_map = self._within_capacity(probs.detach(), routing_map, padding_mask)
            probs = probs * routing_map
        if self.is_counting:
            self._count(routing_map, padding_mask)
        return probs, routing_map

    def attach_and_log_load_balancing_loss(
        self,
        activation,
        aux_loss_coeff,
        aux_loss,
        aux_loss_name,
        reduce_group,
        reduce_group_has_dp=False,
        valid_token_count=None,
    ):
        """As the stock method; the loss is also noted here, and 1/C of it goes into Megatron's tracker."""
        if self.is_counting:
            loss = aux_loss.detach() / aux_loss_coeff  # what this rank's tokens add to the loss of all in reduce_group
            self.stats.add_loss(aux_loss_name, loss * reduce_group.size())
            share = loss if self._is_joint else loss / self.num_routers
            self._track(aux_loss_name, share, reduce_group, reduce_group_has_dp)
        if self.calculate_per_token_loss:  # Megatron then divides every gradient by the number of tokens
            tokens = activation.shape[0] if valid_token_count is None else valid_token_count / self._joined
            aux_loss = aux_loss * tokens
        return MoEAuxLossAutoScaler.apply(activation, aux_loss)

    def apply_z_loss(self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Attach the z-loss of arXiv 2202.08906 to logits [T, N]; padding (mask [T] True) does not count."""
        coefficient = self.config.moe_z_loss_coeff
        if coefficient is None or not (self.training and torch.is_grad_enabled()):
            return logits
        coefficient = coefficient / self.tp_cp_group.size()
        loss = z_loss_func(logits, coefficient, padding_mask=padding_mask)
        tokens: float | torch.Tensor = logits.shape[0]
        if padding_mask is not None:
            own = (~padding_mask).sum()
            tokens = self._mean_over_parts(own)
            loss = loss * (own / tokens)  # a token weighs the same in whichever part of the sequence it is
        if self.is_counting:
            self.stats.add_loss("z_loss", loss.detach() / coefficient)
            self._track("z_loss", loss.detach() / coefficient / self.num_routers)
        if self.calculate_per_token_loss:  # Megatron then divides every gradient by the number of tokens
            loss = loss * tokens
        return MoEAuxLossAutoScaler.apply(logits, loss)

    def _mean_over_parts(self, tokens: torch.Tensor) -> torch.Tensor:
        """Mean of a count over the ranks that have parts of the same sequences; above 0."""
        ranks = self.tp_cp_group.size()
        total = tokens.clone()
        if ranks > 1:
            torch.distributed.all_reduce(total, group=self.tp_cp_group)
        return total.clamp(min=1) / ranks

    def _track(self, name: str, loss: torch.Tensor, *reduced: Any) -> None:
        layers = self.config.num_layers + (self.config.mtp_num_layers or 0)
        save_to_aux_losses_tracker(name, loss, self.layer_number, layers, *reduced)

    @property
    def _joined(self) -> int:
        """How many iterations' scores and choices the auxiliary loss of the call in progress counts."""
        return 1 + len(self._earlier) // 2

    def _is_deferred(self, scores: torch.Tensor, choices: torch.Tensor) -> bool:
        """Whether a later router has the auxiliary loss of these scores and choices, which are then kept for it."""
        if not self._is_joint or self._joined == self.num_routers:
            return False
        self._scored = (scores, choices)
        return True

    def _in_a_row(self, scores: torch.Tensor, choices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, N] each, behind those of earlier iterations if there are any: [C T, N], sequences of C S tokens."""
        if not self._earlier:
            return scores, choices
        return torch.cat([*self._earlier[::2], scores]), torch.cat([*self._earlier[1::2], choices])

    def _apply_aux_loss(self, probs, scores_for_aux_loss, routing_map, *args, **kwargs):
        """As the stock method, over all iterations with `joint` balance."""
        if self._is_deferred(scores_for_aux_loss, routing_map):
            return probs
        return super()._apply_aux_loss(probs, *self._in_a_row(scores_for_aux_loss, routing_map), *args, **kwargs)

    def _apply_seq_aux_loss(self, probs, scores_for_aux_loss, routing_map, seq_length, *args, **kwargs):
        """As the stock method, over all iterations with `joint` balance."""
        if self._is_deferred(scores_for_aux_loss, routing_map):
            return probs
        in_a_row = self._in_a_row(scores_for_aux_loss, routing_map)
        return super()._apply_seq_aux_loss(probs, *in_a_row, seq_length * self._joined, *args, **kwargs)

    def _apply_global_aux_loss(self, probs, scores_for_aux_loss, routing_map, *args, **kwargs):
        """As the stock method, over all iterations with `joint` balance.

        A pass that is recomputed averages what the first one did, and adds nothing to it.
        """
        if self._is_deferred(scores_for_aux_loss, routing_map):
            return probs
        apply = partial(
            super()._apply_global_aux_loss, probs, *self._in_a_row(scores_for_aux_loss, routing_map), *args, **kwargs
        )
        if self._route is None or self.global_tokens_per_expert is None:
            return apply()
        now = self.global_tokens_per_expert, self.ga_steps
        if self._route.counted is None:
            self._route.counted = now[0].clone(), now[1].clone()
            return apply()
        self.global_tokens_per_expert, self.ga_steps = (before.clone() for before in self._route.counted)
        try:
            return apply()
        finally:
            self.global_tokens_per_expert, self.ga_steps = now

    def _within_capacity(
        self, gates: torch.Tensor, chosen: torch.Tensor, padding_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """The choices [T, N] that no expert turns away."""
        if self._route is not None and self._route.kept_TN is not None:
            return self._route.kept_TN
        kept = within_capacity(
            gates,
            chosen,
            None if padding_mask is None else padding_mask.flatten(),
            topk=self.topk,
            factor=self.capacity_factor,
            policy=self.config.moe_token_drop_policy,
        )
        if self._route is not None:
            self._route.kept_TN = kept
        return kept

    def _apply_expert_bias(self, routing_map: torch.Tensor, padding_mask: torch.Tensor | None = None) -> None:
        """Nothing: the stock method counts here, but a capacity is still to be applied. See `_count`."""

    def _count(self, routing_map: torch.Tensor, padding_mask: torch.Tensor | None) -> None:
        """Count each expert's load from routing_map [T, N]: for the statistics, and for the expert bias if it is on."""
        counted = routing_map if padding_mask is None else routing_map & ~padding_mask.reshape(-1, 1)
        load_N = counted.sum(dim=0)
        self.stats.add_load(load_N)
        if self.enable_expert_bias:
            self.local_tokens_per_expert += load_N


@torch.no_grad()
def _summed_entropy(logits: torch.Tensor, score_function: str, padding_mask: torch.Tensor | None) -> torch.Tensor:
    """Sum over tokens of the entropy of softmax(logits [S, B, N]) or of sigmoids over their sum; a float64 scalar."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if score_function == "softmax":
        shares = wide.softmax(dim=-1)
    else:
        shares = torch.nn.functional.normalize(wide.sigmoid(), p=1, dim=-1)
    entropies = torch.special.entr(shares).sum(dim=-1).double()
    return entropies.sum() if padding_mask is None else (entropies * ~padding_mask).sum()


def _with_balance(config: TransformerConfig, chain: ChainSettings, num_routers: int) -> TransformerConfig:
    """The config with the coefficients that one of C routers gets: all of it (`sum`) or an equal part (`mean`).

    With `joint` the auxiliary loss has all of its coefficient, being one loss, and the z-loss of each router a part.
    """
    if chain.aux_loss_reduction == "sum" or num_routers == 1:
        return config
    scaled = copy(config)
    if chain.aux_loss_reduction == "mean":
        coefficient = config.moe_aux_loss_coeff
        scaled.moe_aux_loss_coeff = (
            [c / num_routers for c in coefficient] if isinstance(coefficient, list) else coefficient / num_routers
        )
    if config.moe_z_loss_coeff is not None:
        scaled.moe_z_loss_coeff = config.moe_z_loss_coeff / num_routers
    return scaled
