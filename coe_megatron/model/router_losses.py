"""The losses of one router: Megatron's auxiliary and z-loss, recorded by (layer, iteration). Their scaling is here.

    aux: coefficient * N sum_i f_i P_i             f_i: share of the choices, P_i: mean score (arXiv 2101.03961)
    z:   coefficient * mean (log sum_i exp logit_i)^2                                         (arXiv 2202.08906)

With `step_tokens` tokens weigh the same in all micro-batches of a step, also where these have unequal padding: the mean
of the z-loss is over that number of tokens, and f and P of a sequence are relative to the mean length in the step, not
in its micro-batch.

What scales them, in this order: the coefficient, divided by the number of routers with `chain.aux_loss_reduction:
mean`; for the z-loss the ranks that have parts of the same sequence; with `calculate_per_token_loss` the tokens, by
which Megatron divides every gradient later. The gradient is then scaled once more, see `coe_megatron.zero.engine`.

T: tokens, N: experts, C: iterations.
"""

from copy import copy
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, z_loss_func
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig

from coe_megatron.chain.settings import ChainSettings
from coe_megatron.local_backend.megatron_compat import per_token_ranks, track_loss
from coe_megatron.model.router_stats import RouterStats


class RouterWithLosses(TopKRouter):
    """Megatron's router as one of the `num_routers` of a chain, with losses and loads of its own in `stats`.

    Args:
        megatron_losses: scale losses as the installed release of Megatron-Core does where it is wrong:
            `global_aux_loss` is divided by the replicas; and with `calculate_per_token_loss` 0.16.1 divides all losses
            by the ranks of a sequence and `seq_aux_loss` by the rows of a micro-batch, and 0.19.2 multiplies them by
            the ranks of a sequence if there is padding.
    """

    # Of a micro-batch, the mean of those of a step; None for its own. Not for `calculate_per_token_loss`.
    step_tokens: torch.Tensor | None = None
    _is_recomputed = False  # set by CoERouter for a call
    _padding: torch.Tensor | None = None  # of the tokens that are routed, bool; set for a call

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        chain: ChainSettings,
        megatron_losses: bool = False,
        **later: Any,
    ) -> None:
        self.megatron_losses = megatron_losses
        self.num_routers = 1 if chain.gating == "fixed" else chain.iterations
        if chain.aux_loss_reduction == "mean":
            config = _with_divided_coefficients(config, self.num_routers)
        super().__init__(config=config, pg_collection=pg_collection, **later)
        self.stats = RouterStats()

    @property
    def is_in_prediction_layer(self) -> bool:
        """Whether its layer predicts tokens after the next one, and is numbered by itself, as in 0.19.2 alone."""
        return getattr(self, "is_mtp_layer", False)

    @property
    def _repetitions(self) -> int:
        """How often its layer is called in a pass: `mtp_num_layers` times where one layer predicts all later tokens."""
        is_repeated = self.is_in_prediction_layer and self.config.mtp_use_repeated_layer
        return self.config.mtp_num_layers if is_repeated else 1

    @property
    def is_counting(self) -> bool:
        """False in evaluation, and when a pass is recomputed."""
        return self.training and torch.is_grad_enabled() and not self._is_recomputed

    def attach_and_log_load_balancing_loss(
        self,
        activation,
        aux_loss_coeff,
        aux_loss,
        aux_loss_name,
        reduce_group,
        valid_token_count=None,
        **averaging,
    ):
        """Megatron's method; also records the loss here, and adds 1/C of it to Megatron's tracker."""
        if aux_loss_name == "seq_load_balancing_loss" and self.step_tokens is not None:
            aux_loss = aux_loss * (self._tokens_of_all_parts(len(activation)) / self.step_tokens).square()
        if self._repetitions > 1:
            aux_loss = aux_loss / self._repetitions
        if self.is_counting:
            loss = aux_loss.detach() / aux_loss_coeff  # what this rank's tokens add to the loss of all in reduce_group
            self.stats.add_loss(aux_loss_name, loss * reduce_group.size())
            self._track(aux_loss_name, loss, reduce_group=reduce_group, **averaging)
        replicas = reduce_group.size() // self.tp_cp_group.size()
        if replicas > 1 and not self.megatron_losses:  # what one's tokens add to a loss of all; gradients become means
            aux_loss = aux_loss * replicas
        if self.calculate_per_token_loss:  # Megatron then divides every gradient by the number of tokens
            tokens = self._tokens_of_all_parts(len(activation))
            if self.megatron_losses:
                counted = len(activation) if valid_token_count is None else valid_token_count
                tokens = counted * per_token_ranks(self.tp_cp_group)
            aux_loss = aux_loss * tokens
        return MoEAuxLossAutoScaler.apply(activation, aux_loss)

    def apply_z_loss(self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Attach the z-loss, the mean of (log sum_i exp logit_i)^2 (arXiv 2202.08906), to logits [T, N].

        Padding (mask [T] True) does not count.
        """
        coefficient = self.config.moe_z_loss_coeff
        if coefficient is None or not (self.training and torch.is_grad_enabled()):
            return logits
        coefficient = coefficient / self.tp_cp_group.size()
        loss = z_loss_func(logits, coefficient, padding_mask=padding_mask)
        tokens: float | torch.Tensor = logits.shape[0]
        if padding_mask is not None:
            own = (~padding_mask).sum()
            parts = self.tp_cp_group.size()
            tokens = self._mean_over_parts(own) if self.step_tokens is None else self.step_tokens / parts
            loss = loss * (own / tokens)  # a token weighs the same in whichever part of the sequence it is
        if self.is_counting:
            self.stats.add_loss("z_loss", loss.detach() / coefficient)
            self._track("z_loss", loss.detach() / coefficient / self._repetitions)
        if self.calculate_per_token_loss:  # Megatron then divides every gradient by the number of tokens
            parts = per_token_ranks(self.tp_cp_group) if self.megatron_losses else self.tp_cp_group.size()
            loss = loss * tokens * parts
        return MoEAuxLossAutoScaler.apply(logits, loss)

    def _mean_over_parts(self, tokens: torch.Tensor) -> torch.Tensor:
        """Mean of a count over the ranks that have parts of the same sequences; above 0."""
        return self._sum_over_parts(tokens).clamp(min=1) / self.tp_cp_group.size()

    def _tokens_of_all_parts(self, rows: int) -> torch.Tensor | int:
        """Tokens of the micro-batch without padding, on all ranks that have parts of its sequences."""
        if self._padding is None:
            return rows * self.tp_cp_group.size()
        return self._sum_over_parts((~self._padding).sum())

    def _sum_over_parts(self, tokens: torch.Tensor) -> torch.Tensor:
        total = tokens.clone()
        if self.tp_cp_group.size() > 1:
            torch.distributed.all_reduce(total, group=self.tp_cp_group)
        return total

    def _track(self, name: str, loss: torch.Tensor, **reduction: Any) -> None:
        layers = self.config.num_layers + (self.config.mtp_num_layers or 0)
        number = self.layer_number + (self.config.num_layers if self.is_in_prediction_layer else 0)
        track_loss(name, loss / self.num_routers, number, layers, **reduction)


def _with_divided_coefficients(config: TransformerConfig, num_routers: int) -> TransformerConfig:
    """With `mean` each of C routers gets an equal part of the coefficients of the auxiliary and z-losses."""
    divided, coefficient = copy(config), config.moe_aux_loss_coeff
    divided.moe_aux_loss_coeff = (
        [c / num_routers for c in coefficient] if isinstance(coefficient, list) else coefficient / num_routers
    )
    if config.moe_z_loss_coeff is not None:
        divided.moe_z_loss_coeff = config.moe_z_loss_coeff / num_routers
    return divided
