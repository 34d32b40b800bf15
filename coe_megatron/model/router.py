"""The router of one iteration: Megatron's TopKRouter, with losses and loads kept by (layer, iteration).

What differs from the stock router, and why:

* auxiliary and z-losses are also recorded in `stats` of this very router, and 1/C of each goes into Megatron's tracker,
  which has one slot a layer and so shows the mean over iterations (`router_losses`);
* a padding mask reaches the load counts of the expert bias without an error (the stock code broadcasts it wrongly);
* an expert's capacity is that of the real tokens, and padding takes none of it (`model.capacity`);
* noise on its input is for training: the stock code draws it in evaluation as well;
* experts can be masked: their logits are -inf (`chain.no_return`);
* a pass that is recomputed takes the choices of the first one, whatever its logits have become, and counts nothing.

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
from coe_megatron.model.recompute import Choice, RoutingRecord
from coe_megatron.model.router_losses import RouterWithLosses

_DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


class Routing(NamedTuple):
    """Where T tokens go, as Megatron's routers return it.

    Attributes:
        gates_TN: g, zero for an expert that was not chosen.
        chosen_TN: bool, at most K experts of each token.
    """

    gates_TN: torch.Tensor
    chosen_TN: torch.Tensor


class CoERouter(RouterWithLosses):
    """Router W_t of iteration t: g = s where s is among its K largest, else 0, s = softmax(x W_t^T) (paper eq. 7).

    Args:
        config: Megatron's; what it says of routing holds for every iteration.
        chain: the chain's settings.
        tied_to: the router whose weights this one uses (gating `shared_router`); None for weights of its own.
    """

    global_tokens_per_expert: torch.Tensor | None
    ga_steps: torch.Tensor
    router_replay: RouterReplay | Choice | None
    input_jitter: Any

    # What one call has to know; set on the copy that runs it, never on the router itself.
    _record: RoutingRecord | None = None
    _masked_TN: torch.Tensor | None = None

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        chain: ChainSettings | None = None,
        tied_to: "CoERouter | None" = None,
    ) -> None:
        chain = chain or ChainSettings(iterations=1)
        self.capacity_factor = config.moe_expert_capacity_factor
        if self.capacity_factor is not None:  # `routing` applies it, which can keep to a record
            config = copy(config)
            config.moe_expert_capacity_factor = None
        super().__init__(config, pg_collection, chain)
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
        """As the stock method: input [S, B, D] -> gates and choices [T, N].

        Megatron's methods take no arguments of ours, so what a call has to know is on a copy of the router, which
        shares its weights, its buffers' tensors and its statistics, and goes when the call ends.

        Args:
            padding_mask: [S, B] bool, True at padding.
            record: written if it is empty; else followed, and nothing is counted.
            masked_TN: bool [T, N], where a token must not go; None for nowhere.
        """
        call = copy(self)
        call._buffers = dict(self._buffers)
        call._record, call._masked_TN = record, masked_TN
        call._is_recomputed = record is not None and record.is_known
        if record is not None or masked_TN is not None:
            call.router_replay = Choice(record or RoutingRecord(), masked_TN, self.router_replay)
        routing = Routing(*super(CoERouter, call).forward(input, padding_mask))
        self.input_jitter = call.input_jitter  # made in the first call
        return routing

    def apply_input_jitter(self, input: torch.Tensor) -> torch.Tensor:
        """As the stock method in training; elsewhere the input, and no random number is drawn."""
        return super().apply_input_jitter(input) if self.training else input

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Logits [S, B, N] = x W_t^T in the router's dtype (`moe_router_dtype`, else the input's)."""
        owner = self.tied_to or self
        dtype = _DTYPES.get(self.config.moe_router_dtype, input.dtype)
        return router_gating_linear(input, owner.weight, owner.bias, dtype)

    def routing(self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None) -> Routing:
        """As the stock method: logits [S, B, N] -> gates and choices [T, N].

        Masked experts get logits of -inf, so that they are in no score, entropy or loss.
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
        """As the stock method; a pass that is recomputed averages what the first one did, and adds nothing to it."""
        if self._record is not None and self.global_tokens_per_expert is not None:
            if self._record.counted is None:
                self._record.counted = self.global_tokens_per_expert.clone(), self.ga_steps.clone()
            else:
                self.global_tokens_per_expert, self.ga_steps = (before.clone() for before in self._record.counted)
        return super()._apply_global_aux_loss(*args, **kwargs)

    def _within_capacity(
        self, gates_TN: torch.Tensor, chosen_TN: torch.Tensor, padding_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """The choices [T, N] that no expert turns away."""
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
        """Nothing: the stock method counts here, but a capacity is still to be applied. See `_count`."""

    def _count(self, chosen_TN: torch.Tensor, padding_mask: torch.Tensor | None) -> None:
        """Count each expert's load: for the statistics, and for the expert bias if it is on."""
        counted_TN = chosen_TN if padding_mask is None else chosen_TN & ~padding_mask.reshape(-1, 1)
        load_N = counted_TN.sum(dim=0)
        self.stats.add_load(load_N)
        if self.enable_expert_bias:
            self.local_tokens_per_expert += load_N
