"""The Chain-of-Experts layer for Megatron-Core: Megatron's MoELayer, passed through C times.

    x(0) = u,  x(t) = F_t(x(t-1)) + r(t),  F_t(x) = sum_i g[t,i] E_i(x) + sum_m S_m(x)        (paper eq. 5, 8)

One set of experts and shared experts, and one router per iteration. What Megatron's layer does once (route, dispatch,
experts, combine) this one repeats through the same methods; the rest is the residual r(t) and what leaves the layer.
Increments F_t are summed as they come: x(C) - x(0) computed by subtraction loses them in bf16. `chain.variants` puts
gains in it: a_t F_t(c_t x) wherever F_t(x) stands here.

S: sequence, B: micro-batch, D: hidden size, T = S * B tokens, N: experts.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher, MoETokenDispatcher
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.profiler import record_function

from coe_megatron.chain.settings import ChainSettings, Recompute
from coe_megatron.chain.variants import Variants
from coe_megatron.errors import ConfigError
from coe_megatron.local_backend.norm import Norm
from coe_megatron.model.capacity import filled_up, rows_per_expert
from coe_megatron.model.chain_probe import ChainProbe
from coe_megatron.model.dispatchers import AllToAllDispatcher, for_one_pass
from coe_megatron.model.recompute import RoutingRecord, recompute_mode, recomputed
from coe_megatron.model.router import CoERouter, Routing
from coe_megatron.model.unsupported import refuse_for_chain, refuse_for_layer


@dataclass(frozen=True)
class Iteration:
    """What iteration t gives.

    Attributes:
        increment: a_t F_t(c_t x(t-1)), [S, B, D].
        routing: the gates and choices [T, N] that it used.
    """

    increment: torch.Tensor
    routing: Routing


class CoELayer(MoELayer):
    """C iterations over one set of experts; with C = 1 and `prenorm` it is Megatron's MoELayer.

    Iteration 1 uses `router`, as in the stock layer; iterations 2 to C use `later_routers`.

    Args:
        config: Megatron's, with `num_moe_experts`; what it says of a MoE layer holds in every iteration.
        submodules: Megatron's MoE submodules; the router among them is replaced by CoERouter.
        chain: the chain's settings.
        recompute: what the backward pass computes again instead of keeping it: nothing, each `iteration` on its own, or
            the `layer` (whole chain) at once; the `experts` do their part themselves. Megatron's `recompute_modules`
            `moe` and `moe_act` mean `layer` and `experts`.
        topk: K, if not the config's `moe_router_topk`.
        pg_collection: process groups; Megatron's global ones when None.

    Raises:
        ConfigError: the config asks for something that cannot go with a chain; the message says what and why.
    """

    token_dispatcher: MoETokenDispatcher

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules | None = None,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        chain: ChainSettings | None = None,
        norm: type = Norm,
        recompute: Recompute = "none",
        topk: int | None = None,
    ) -> None:
        chain = chain or ChainSettings()
        if topk is not None:  # which concerns this layer alone
            config = copy(config)
            config.moe_router_topk = topk
        refuse_for_layer(config)
        refuse_for_chain(config, chain)
        recompute = recompute_mode(config, recompute)
        assert submodules is not None, "CoELayer needs submodules: take them from coe_layer_spec"
        groups = pg_collection or get_default_pg_collection()
        router = partial(CoERouter, chain=chain)
        super().__init__(config, replace(submodules, router=router), layer_number, groups)
        self.chain, self.recompute = chain, recompute
        self.probe: ChainProbe | None = None  # set by routing_stats.reset_routing for a step whose metrics are logged
        tied_to = self.router if chain.gating == "shared_router" else None
        self.later_routers = torch.nn.ModuleList(
            router(config=config, pg_collection=groups, tied_to=tied_to) for _ in range(self.router.num_routers - 1)
        )
        # With overlap the shared experts assert that each pass reaches its end.
        self._recomputed = partial(recomputed, to_the_end=self.shared_expert_overlap)
        if type(self.token_dispatcher) is MoEAlltoAllTokenDispatcher:
            self.token_dispatcher = AllToAllDispatcher(
                self.num_local_experts, self.local_expert_indices, config=config, pg_collection=groups
            )
            if self.shared_expert_overlap:
                self.token_dispatcher.set_shared_experts(self.shared_experts)
        self.norms = torch.nn.ModuleList(
            build_module(norm, config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
            for _ in range(chain.iterations if chain.norm_placement == "iteration_norm" else 0)
        )
        self.variants = Variants(chain, config.hidden_size).to(
            device=torch.cuda.current_device(), dtype=config.params_dtype
        )
        for gain in self.variants.parameters():  # like a norm's: every tensor-parallel rank sees a part of the tokens
            gain.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    @property
    def routers(self) -> list[CoERouter]:
        """The routers in the order of their iterations (one alone with `fixed` gating)."""
        return [self.router, *self.later_routers]

    def set_layer_number(self, layer_number: int) -> None:
        """Tell the layer and every router its 1-based number in the model."""
        super().set_layer_number(layer_number)
        for router in self.routers[1:]:
            router.set_layer_number(layer_number)

    def forward(
        self,
        hidden_states: torch.Tensor,
        intermediate_tensors: None = None,
        padding_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, None]:
        """Run the chain: x(0) = u, x(t) = F_t(x(t-1)) + r(t) for t = 1 .. C (paper eq. 5, 8 to 10).

        Args:
            hidden_states: [S, B, D]: u = norm(h), or h itself with `iteration_norm`.
            padding_mask: [B, S] bool, True at padding, which counts in no loss, load or expert bias; where experts have
                a capacity, it is that of the real tokens, and no expert takes padding.

        Returns:
            [S, B, D], what the transformer layer adds to h (with `reference`: what takes h's place), and no bias.
        """
        assert intermediate_tensors is None, "CUDA graphs are not supported by CoELayer"
        if self.training and self.attn_tp_group.size() > 1 and not self.config.sequence_parallel:
            raise ConfigError("sequence_parallel is False: MoE layers with tensor parallelism need it in training")
        if padding_mask is not None:
            padding_mask = padding_mask.transpose(0, 1).bool()
        recomputes = torch.is_grad_enabled() and self.recompute in ("iteration", "layer")
        records = [RoutingRecord() if recomputes else None for _ in range(self.chain.iterations)]
        run = self._recomputed if self.recompute == "layer" else _called
        return run(self._run_chain, hidden_states, padding_mask, records), None

    def _run_chain(
        self, start: torch.Tensor, padding_mask: torch.Tensor | None, records: list[RoutingRecord | None]
    ) -> torch.Tensor:
        """x(0) [S, B, D] -> what leaves the layer: the sum of all F_t (`inner`) or F_C; with `reference` u and that."""
        iterate = partial(self._recomputed if self.recompute == "iteration" else _called, self._iterate)
        probe = self._active_probe(records[0])
        state, total = start, start
        masked_TN: torch.Tensor | None = None
        given: Routing | None = None
        for t in range(self.chain.iterations):
            done = iterate(t, state, padding_mask, records[t], masked_TN, given)
            total = total + done.increment if t > 0 and self.chain.residual == "inner" else done.increment
            if probe is not None:  # here and not in _iterate, whose second passes go backwards
                with torch.no_grad():
                    after = self._next_state(start, state, done.increment)
                probe.record(t, done.routing.chosen_TN, state, done.increment, after, padding_mask)
            if t + 1 < self.chain.iterations:
                state = self._next_state(start, state, done.increment)
                masked_TN = self.variants.masked(masked_TN, done.routing.chosen_TN)
                given = done.routing if self.chain.gating == "fixed" else None
        if self.chain.norm_placement != "reference":
            return total
        # The stream that goes on is u + total; the dropout that Megatron applies to h's increment is applied here.
        return start + torch.nn.functional.dropout(total, self.config.hidden_dropout, self.training)

    def _iterate(
        self,
        t: int,
        state: torch.Tensor,
        padding_mask: torch.Tensor | None,
        record: RoutingRecord | None,
        masked_TN: torch.Tensor | None,
        given: Routing | None,
    ) -> Iteration:
        """One pass of Megatron's MoE layer: F_t(x) = sum_i g[t,i] E_i(x) + sum_m S_m(x), through the variants' hook.

        Args:
            state: x(t-1), [S, B, D].
            masked_TN: bool [T, N], the experts that tokens must not go to; None if they may.
            given: the routing to use again (`fixed`); None to route.
        """
        with record_function(f"layer {self.layer_number}, iteration {t + 1}"), self._own_dispatcher():
            hidden = self._iteration_input(t, state)
            shared = self.shared_experts_compute(hidden)
            routing = given or self.routers[t](hidden, padding_mask, record, masked_TN)
            rows, gates = self.dispatch(*self.preprocess(hidden, *routing))
            rows, _ = self.routed_experts_compute(rows, gates)
            output = self.postprocess(self.combine(rows), shared)
            return Iteration(self.variants.increment(t, output), routing)

    def _next_state(self, start: torch.Tensor, state: torch.Tensor, increment: torch.Tensor) -> torch.Tensor:
        """x(t) = F_t(x(t-1)) + r(t): r is x(t-1), x(0) or nothing (eq. 8, 10, 9)."""
        if self.chain.residual == "outer":
            return increment
        return increment + (state if self.chain.residual == "inner" else start)

    def _iteration_input(self, t: int, state: torch.Tensor) -> torch.Tensor:
        """What router and experts of iteration t see of x(t-1): norm_t of it, or what a variant makes of it."""
        return self.norms[t](state) if self.norms else self.variants.iteration_input(t, state)

    def _active_probe(self, record: RoutingRecord | None) -> ChainProbe | None:
        """The probe that is told of this pass; None in evaluation and when the pass is recomputed."""
        is_recomputed = record is not None and record.is_known
        return self.probe if self.training and torch.is_grad_enabled() and not is_recomputed else None

    @contextmanager
    def _own_dispatcher(self) -> Iterator[None]:
        """Megatron's methods write a pass's state on `token_dispatcher`: meanwhile that is a copy for this pass."""
        kept, self.token_dispatcher = self.token_dispatcher, for_one_pass(self.token_dispatcher)
        try:
            yield
        finally:  # checkpointing leaves a pass that it recomputes by an exception
            self.token_dispatcher = kept

    def preprocess(
        self, hidden_states: torch.Tensor, probs: torch.Tensor, routing_map: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As the stock method; where the config pads to the capacity, experts are filled up here and nowhere else."""
        config = self.config
        if config.moe_pad_expert_input_to_capacity:
            topk, factor = config.moe_router_topk, config.moe_expert_capacity_factor
            rows = rows_per_expert(len(routing_map), topk, config.num_moe_experts, factor)
            routing_map = filled_up(routing_map, rows)
        return super().preprocess(hidden_states, probs, routing_map)


def _called(function: Callable, *args: Any) -> Any:
    return function(*args)


def coe_layers(model: torch.nn.Module) -> Iterator[CoELayer]:
    """All Chain-of-Experts layers of a model, in order."""
    return (layer for layer in model.modules() if isinstance(layer, CoELayer))


def routers(model: torch.nn.Module) -> Iterator[tuple[int, int, CoERouter]]:
    """(layer number, iteration, router) of every router in a model, both counted from 1."""
    for layer in coe_layers(model):
        for t, router in enumerate(layer.routers):
            yield layer.layer_number, t + 1, router
