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
from coe_megatron.model.recompute import ReplayedTopK, RoutingRecord
from coe_megatron.model.router_losses import RouterWithLosses

_DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


class Routing(NamedTuple):
    """Result of a router, which unpacks to Megatron's `probs, routing_map`.

    Attributes:
        gates_TN: g, Megatron's `probs`; zero for an expert that was not chosen.
        chosen_TN: bool, Megatron's `routing_map`; at most K experts per token.
    """

    gates_TN: torch.Tensor
    chosen_TN: torch.Tensor


class CoERouter(RouterWithLosses):
    """Router W_t of iteration t: g = s where s is among its K largest, else 0, s = softmax(x W_t^T) (paper eq. 7).

    Args:
        config: Megatron's; its routing settings apply to every iteration.
        chain: the chain's settings.
        tied_to: the router whose weights this one shares (gating `shared_router`); None for its own weights.
        later: arguments that later releases of Megatron-Core pass (`is_mtp_layer`).
    """

    global_tokens_per_expert: torch.Tensor | None
    ga_steps: torch.Tensor
    router_replay: RouterReplay | ReplayedTopK | None
    input_jitter: Any

    # Arguments of one call, set only on the copy that runs it (`_for_call`).
    _record: RoutingRecord | None = None
    _masked_TN: torch.Tensor | None = None

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        chain: ChainSettings | None = None,
        tied_to: "CoERouter | None" = None,
        **later: Any,
    ) -> None:
        chain = chain or ChainSettings(iterations=1)
        self.capacity_factor = config.moe_expert_capacity_factor
        if self.capacity_factor is not None:  # `routing` applies it, which can keep to a record
            config = copy(config)
            config.moe_expert_capacity_factor = None
        super().__init__(config, pg_collection, chain, **later)
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
    ) -> Routing:
        """Megatron's method with two more arguments: input [S, B, D] -> gates and choices [T, N].

        Args:
            padding_mask: [S, B] bool, True at padding.
            record: filled if it is empty; otherwise its choices are used, and nothing is counted.
            masked_TN: bool [T, N], experts that a token must not choose; None for none.
        """
        call = self._for_call(record, masked_TN)
        routing = Routing(*super(CoERouter, call).forward(input, padding_mask))
        self.input_jitter = call.input_jitter  # created in the first call
        return routing

    def _for_call(self, record: RoutingRecord | None, masked_TN: torch.Tensor | None) -> "CoERouter":
        """A copy that holds the arguments of one call, which Megatron's methods do not pass on.

        It shares weights, buffers' tensors and statistics with the router.
        """
        call = copy(self)
        call._buffers = dict(self._buffers)
        call._record, call._masked_TN = record, masked_TN
        call._is_recomputed = record is not None and record.is_known
        if record is not None or masked_TN is not None:
            call.router_replay = ReplayedTopK(record or RoutingRecord(), masked_TN, self.router_replay)
        return call

    def apply_input_jitter(self, input: torch.Tensor) -> torch.Tensor:
        """Megatron's method in training; otherwise the input, without drawing random numbers."""
        return super().apply_input_jitter(input) if self.training else input

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Logits [S, B, N] = x W_t^T in the router's dtype (`moe_router_dtype`, else the input's)."""
        owner = self.tied_to or self
        dtype = _DTYPES.get(self.config.moe_router_dtype, input.dtype)
        return router_gating_linear(input, owner.weight, owner.bias, dtype)

    def routing(self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None) -> Routing:
        """Megatron's method: logits [S, B, N] -> gates and choices [T, N].

        Logits of masked experts are -inf, so that scores, entropy and losses exclude them.
        """
        if self._masked_TN is not None:
            logits = logits.masked_fill(self._masked_TN.view_as(logits), -math.inf)
        if self.stats.detailed and self.is_counting:
            self.stats.add_entropy(logits, self.score_function, padding_mask)
        gates_TN, chosen_TN = super().routing(logits, padding_mask)
        if self.capacity_factor is not None:
            chosen_TN = self._within_capacity(gates_TN.detach(), chosen_TN, padding_mask)
            gates_TN = gates_TN * chosen_TN
        if self.is_counting:
            self._count(chosen_TN, padding_mask)
        return Routing(gates_TN, chosen_TN)

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
        self.stats.add_load(load_N)
        if self.enable_expert_bias:
            self.local_tokens_per_expert += load_N
