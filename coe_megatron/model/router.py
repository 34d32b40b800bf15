"""The router of one iteration: Megatron's TopKRouter, with losses and loads kept by (layer, iteration).

Differences from Megatron's router:

* auxiliary and z-losses are also recorded in this router's `stats`, and 1/C of each goes into Megatron's tracker, which
  has one slot per layer and so shows the mean over iterations (`router_losses`);
* the load counts of the expert bias respect the padding mask (Megatron broadcasts it wrongly);
* an expert's capacity is computed without padding, which takes none of it (`model.capacity`);
* input jitter is applied in training only (Megatron applies it in evaluation too);
* experts can be masked: their logits are -inf (`chain.no_return`);
* recomputation uses the choices of the first pass, even if logits differ in their last bits, and counts nothing.

S: sequence, B: micro-batch, T = S * B tokens, D: hidden, N: experts.
"""

import math
from copy import copy
from typing import Any, NamedTuple

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import router_gating_linear
from megatron.core.transformer.moe.router_replay import RouterReplay
from megatron.core.transformer.transformer_config import TransformerConfig

from coe_megatron.chain.settings import ChainSettings
from coe_megatron.model.capacity import within_capacity
from coe_megatron.model.exchange import Sizes
from coe_megatron.model.recompute import Chosen, ReplayedTopK, RoutingRecord
from coe_megatron.model.router_losses import RouterWithLosses

_DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


class Routing(NamedTuple):
    """Result of a router.

    Attributes:
        gates_TN: g, Megatron's `probs`; zero for an expert that was not chosen. None where only `gates_TK` are needed.
        chosen_TN: bool, Megatron's `routing_map`; at most K experts per token.
        gates_TK, experts_TK: the gates of the chosen experts before any was dropped, and these, int64.
        logits: [S, B, N] of a part of the tokens, whose losses are still owed; else None.
        sizes: what ranks told each other when they sent tokens by this routing; None before.
    """

    gates_TN: torch.Tensor | None
    chosen_TN: torch.Tensor
    gates_TK: torch.Tensor
    experts_TK: torch.Tensor
    logits: torch.Tensor | None = None
    sizes: Sizes | None = None


class CoERouter(RouterWithLosses):
    """Router W_t of iteration t: g = s where s is among its K largest, else 0, s = softmax(x W_t^T) (paper eq. 7).

    Args:
        config: Megatron's; its routing settings apply to every iteration.
        chain: the chain's settings.
        tied_to: the router whose weights this one shares (gating `shared_router`); None for its own weights.
        megatron_losses: as for RouterWithLosses.
        later: arguments that later releases of Megatron-Core pass (`is_mtp_layer`).
    """

    global_tokens_per_expert: torch.Tensor | None
    ga_steps: torch.Tensor
    router_replay: RouterReplay | ReplayedTopK | None
    input_jitter: Any
    has_sparse_gates = False  # set by a layer that needs no gates [T, N]

    # Arguments of one call, set only on the copy that runs it (`_for_call`).
    _record: RoutingRecord | None = None
    _masked_TN: torch.Tensor | None = None
    _is_part = False
    _logits: torch.Tensor | None = None  # results of that call
    _is_sparse = False

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        chain: ChainSettings | None = None,
        tied_to: "CoERouter | None" = None,
        megatron_losses: bool = False,
        **later: Any,
    ) -> None:
        chain = chain or ChainSettings(iterations=1)
        self.capacity_factor = config.moe_expert_capacity_factor
        if self.capacity_factor is not None:  # `routing` applies it, which can keep to a record
            config = copy(config)
            config.moe_expert_capacity_factor = None
        super().__init__(config, pg_collection, chain, megatron_losses, **later)
        self._tied_to = (tied_to,)  # in a tuple, so that torch does not take it for a child
        if tied_to is not None:
            del self.weight, self.bias
        self.to(torch.cuda.current_device())  # the stock router moves its weight in the first forward pass

    @property
    def tied_to(self) -> "CoERouter | None":
        """The router whose weights this one uses; None if it has its own."""
        return self._tied_to[0]

    def forward(
        self,
        input: torch.Tensor,
        padding_mask: torch.Tensor | None = None,
        record: RoutingRecord | None = None,
        masked_TN: torch.Tensor | None = None,
        is_part: bool = False,
    ) -> Routing:
        """Megatron's method with more arguments: input [S, B, D] -> gates and choices [T, N].

        Args:
            padding_mask: [S, B] bool, True at padding.
            record: filled if it is empty; otherwise its choices are used, and nothing is counted.
            masked_TN: bool [T, N], experts that a token must not choose; None for none.
            is_part: whether the input is a part of the tokens: `with_losses` then takes the logits of all parts.
        """
        record = record or RoutingRecord()
        call = self._for_call(record, masked_TN, is_part)
        gates, chosen_TN = super(CoERouter, call).forward(input, padding_mask)
        self.input_jitter = call.input_jitter  # created in the first call
        experts_TK = record.experts_TK
        if experts_TK is None:  # Megatron did not ask
            experts_TK = chosen_TN.to(torch.int8).topk(self.topk).indices
        if call._is_sparse:
            return Routing(None, chosen_TN, gates, experts_TK, call._logits)
        return Routing(gates, chosen_TN, Chosen.apply(gates, experts_TK), experts_TK, call._logits)

    def with_losses(
        self,
        output: torch.Tensor,
        logits: list[torch.Tensor],
        padding_mask: torch.Tensor | None,
        record: RoutingRecord | None,
        is_recomputed: bool,
    ) -> torch.Tensor:
        """`output`, to which the losses of all parts together are attached.

        Args:
            output: any tensor of the model's graph.
            logits: of the parts, [S, B, N] each.
            padding_mask: of all parts, as in `forward`.
            record: that of the first part.
            is_recomputed: whether the parts were routed as their records said.
        """
        call = self._for_call(record or RoutingRecord(), None, is_part=False)
        call.router_replay, call._is_recomputed = None, is_recomputed
        gates, _ = call._gates_and_choices(torch.cat(logits), padding_mask)
        if call.is_counting:
            self.stats.calls += 1
        return _Attached.apply(output, gates)

    def _for_call(self, record: RoutingRecord, masked_TN: torch.Tensor | None, is_part: bool) -> "CoERouter":
        """A copy that holds the arguments of one call, which Megatron's methods do not pass on.

        It shares weights, buffers' tensors and statistics with the router.
        """
        call = copy(self)
        call._buffers = dict(self._buffers)
        call._record, call._masked_TN, call._is_part = record, masked_TN, is_part
        call._is_recomputed = record.is_known
        call.router_replay = ReplayedTopK(record, masked_TN, self.router_replay)
        return call

    def is_aux_loss_enabled(self) -> bool:
        """Megatron's method; False for a part of the tokens."""
        return not self._is_part and super().is_aux_loss_enabled()

    def apply_z_loss(self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None) -> torch.Tensor:
        """See RouterWithLosses; does nothing for a part of the tokens."""
        return logits if self._is_part else super().apply_z_loss(logits, padding_mask)

    def apply_input_jitter(self, input: torch.Tensor) -> torch.Tensor:
        """Megatron's method in training; otherwise the input, without drawing random numbers."""
        return super().apply_input_jitter(input) if self.training else input

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Logits [S, B, N] = x W_t^T in the router's dtype (`moe_router_dtype`, else the input's)."""
        owner = self.tied_to or self
        dtype = _DTYPES.get(self.config.moe_router_dtype, input.dtype)
        return router_gating_linear(input, owner.weight, owner.bias, dtype)

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Megatron's method: logits [S, B, N] -> gates and choices [T, N].

        Logits of masked experts are -inf, so that scores, entropy and losses exclude them.
        """
        if self._masked_TN is not None:
            logits = logits.masked_fill(self._masked_TN.view_as(logits), -math.inf)
        if self.stats.detailed and self.is_counting:
            self.stats.add_entropy(logits, self.score_function, padding_mask)
        gates, chosen_TN = self._gates_and_choices(logits, padding_mask)
        if self.capacity_factor is not None:
            chosen_TN = self._within_capacity(gates.detach(), chosen_TN, padding_mask)
            gates = gates * chosen_TN
        if self.is_counting:
            self._count(chosen_TN, padding_mask)
        self._logits = logits if self._is_part else None
        return gates, chosen_TN

    def _gates_and_choices(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Megatron's routing: gates [T, N], or [T, K] if these are enough, and choices [T, N].

        For softmax scores it is done here: Megatron chooses twice, for the experts and for the auxiliary loss, and
        spreads gates over all experts.
        """
        config, self._padding = self.config, padding_mask
        self._is_sparse = (
            self.has_sparse_gates
            and self.score_function == "softmax"
            and self.routing_type not in ("sinkhorn", "quantile_balancing")
            and not (config.moe_router_group_topk or config.moe_router_fusion)
            and logits.dtype == torch.float32
        )
        return self._softmax_routing(logits, padding_mask) if self._is_sparse else super().routing(logits, padding_mask)

    def _softmax_routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [S, B, N] -> gates [T, K] with the losses attached, and choices [T, N]."""
        length, batch, experts = logits.shape
        padding_T = None if padding_mask is None else padding_mask.flatten()
        logits_TN = self.apply_z_loss(logits.view(-1, experts), padding_T)
        balances = self.training and torch.is_grad_enabled() and self.is_aux_loss_enabled()
        before = self.config.moe_router_pre_softmax
        scores_TN = logits_TN.softmax(-1) if before or balances else logits_TN
        gates_TK, experts_TK = self._choose(scores_TN if before else logits_TN)
        gates_TK = gates_TK if before else gates_TK.softmax(-1)
        if self.config.moe_router_topk_scaling_factor:
            gates_TK = gates_TK * self.config.moe_router_topk_scaling_factor
        chosen_TN = torch.zeros_like(logits_TN, dtype=torch.bool).scatter_(1, experts_TK, True)
        if balances:
            counted_TN, is_masked = chosen_TN, padding_T is not None
            if padding_T is not None:
                counted_TN, scores_TN = (each * ~padding_T.unsqueeze(1) for each in (chosen_TN, scores_TN))
            gates_TK = self._apply_aux_loss(gates_TK, scores_TN, counted_TN, is_masked)
            gates_TK = self._apply_seq_aux_loss(gates_TK, scores_TN, counted_TN, length, batch, is_masked)
            gates_TK = self._apply_global_aux_loss(gates_TK, scores_TN, counted_TN, is_masked)
        return gates_TK, chosen_TN

    def _choose(self, scores_TN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The K largest scores and their experts, or what the replay says."""

        def largest(
            scores_TN: torch.Tensor, topk: int, num_groups: None = None, group_topk: None = None
        ) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.topk(scores_TN, topk)

        if self.router_replay is None:
            return largest(scores_TN, self.topk)
        return self.router_replay.get_replay_topk(scores_TN, self.topk, None, None, largest)

    def _apply_global_aux_loss(self, *args, **kwargs):
        """Megatron's method; recomputation averages the counts of the first pass, and adds nothing to them."""
        if self._record is not None and self.global_tokens_per_expert is not None:
            if self._record.counted is None:
                self._record.counted = self.global_tokens_per_expert.clone(), self.ga_steps.clone()
            else:
                self.global_tokens_per_expert, self.ga_steps = (before.clone() for before in self._record.counted)
        return super()._apply_global_aux_loss(*args, **kwargs)

    def _within_capacity(
        self, gates_TN: torch.Tensor, chosen_TN: torch.Tensor, padding_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """The choices [T, N] that are not dropped."""
        if self._record is not None and self._record.kept_TN is not None:
            return self._record.kept_TN
        kept_TN = within_capacity(
            gates_TN,
            chosen_TN,
            None if padding_mask is None else padding_mask.flatten(),
            topk=self.topk,
            factor=self.capacity_factor,
            policy=self.config.moe_token_drop_policy,
        )
        if self._record is not None:
            self._record.kept_TN = kept_TN
        return kept_TN

    def _apply_expert_bias(self, routing_map: torch.Tensor, padding_mask: torch.Tensor | None = None) -> None:
        """Do nothing: Megatron counts here, before a capacity is applied; `_count` does it after."""

    def _count(self, chosen_TN: torch.Tensor, padding_mask: torch.Tensor | None) -> None:
        """Add to each expert's load, for the statistics and, if it is on, the expert bias."""
        counted_TN = chosen_TN if padding_mask is None else chosen_TN & ~padding_mask.reshape(-1, 1)
        load_N = counted_TN.sum(dim=0)
        self.stats.add_load(load_N, calls=not self._is_part)
        if self.enable_expert_bias:
            self.local_tokens_per_expert += load_N


class _Attached(torch.autograd.Function):
    """A tensor whose gradient calls for that of another one, which is zero: the losses attached to it add theirs."""

    @staticmethod
    def forward(ctx, output: torch.Tensor, gates_TN: torch.Tensor) -> torch.Tensor:
        ctx.gates = gates_TN.shape, gates_TN.dtype
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shape, dtype = ctx.gates
        return gradient, gradient.new_zeros(shape, dtype=dtype)
