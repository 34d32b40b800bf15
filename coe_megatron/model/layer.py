"""The Chain-of-Experts layer for Megatron-Core: C iterations of Megatron's MoELayer.

    x(0) = u,  x(t) = F_t(x(t-1)) + r(t),  F_t(x) = sum_i g[t,i] E_i(x) + sum_m S_m(x)        (paper eq. 5, 8)
    r(t) = x(t-1) (inner), x(0) (init) or 0 (outer);  delta = sum_t F_t (inner) or F_C        (eq. 8, 10, 9)
    output: delta, which the transformer layer adds to h; with `reference` u + delta, which replaces h

One set of experts and shared experts, and one router per iteration. Each iteration calls the methods of Megatron's
layer (route, dispatch, experts, combine). delta is summed from increments, since x(C) - x(0) loses digits in bf16.
`chain.variants` replaces F_t(x) by a_t F_t(c_t x).

S: sequence, B: micro-batch, D: hidden size, T = S * B tokens, N: experts.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

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


class Iteration(NamedTuple):
    """Result of iteration t.

    Attributes:
        increment: a_t F_t(c_t x(t-1)), [S, B, D].
        routing: its gates and choices [T, N].
    """

    increment: torch.Tensor
    routing: Routing


class CoELayer(MoELayer):
    """C iterations over one set of experts; with C = 1 and `prenorm` it is Megatron's MoELayer.

    Iteration 1 uses `router`, as in the stock layer; iterations 2 to C use `later_routers`.

    Args:
        config: Megatron's, with `num_moe_experts`; its MoE settings apply to every iteration.
        submodules: Megatron's MoE submodules, whose router is replaced by CoERouter.
        layer_number: 1-based, in the model.
        pg_collection: process groups; None takes Megatron's global ones.
        chain: the chain's settings.
        norm: class of the norms of `iteration_norm`.
        recompute: activations that the backward pass recomputes (`moe.recompute`); `experts` is done by the experts
            module. Megatron's `recompute_modules` `moe` and `moe_act` mean `layer` and `experts`.
        topk: K; None takes the config's `moe_router_topk`.
        later: arguments that later releases of Megatron-Core pass (`is_mtp_layer`, `name`).

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
        **later: Any,
    ) -> None:
        chain = chain or ChainSettings()
        if topk is not None:  # for this layer only
            config = copy(config)
            config.moe_router_topk = topk
        refuse_for_layer(config)
        refuse_for_chain(config, chain)
        recompute = recompute_mode(config, recompute)
        assert submodules is not None, "CoELayer needs submodules: take them from coe_layer_spec"
        groups = pg_collection or get_default_pg_collection()
        router = partial(CoERouter, chain=chain)
        super().__init__(config, replace(submodules, router=router), layer_number, groups, **later)
        self.chain, self.recompute = chain, recompute
        self.probe: ChainProbe | None = None  # set by routing_stats.reset_routing for a step whose metrics are logged
        of_router = {name: value for name, value in later.items() if name == "is_mtp_layer"}
        tied_to = self.router if chain.gating == "shared_router" else None
        self.later_routers = torch.nn.ModuleList(
            router(config=config, pg_collection=groups, tied_to=tied_to, **of_router)
            for _ in range(self.router.num_routers - 1)
        )
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
        for gain in self.variants.parameters():  # as for a norm: each tensor-parallel rank has a part of the tokens
            gain.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    @property
    def routers(self) -> list[CoERouter]:
        """The routers in the order of their iterations (one alone with `fixed` gating)."""
        return [self.router, *self.later_routers]

    def set_layer_number(self, layer_number: int) -> None:
        """Set the 1-based number of the layer in the model, for its routers too."""
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
            padding_mask: [B, S] bool, True at padding, which is excluded from losses, loads and the expert bias, and
                from the experts if they have a capacity, which is computed from the other tokens.

        Returns:
            delta [S, B, D], or u + delta with `reference`, and None for Megatron's bias.
        """
        assert intermediate_tensors is None, "CUDA graphs are not supported by CoELayer"
        if self.training and self.attn_tp_group.size() > 1 and not self.config.sequence_parallel:
            raise ConfigError("sequence_parallel is False: MoE layers with tensor parallelism need it in training")
        if padding_mask is not None:
            padding_mask = padding_mask.transpose(0, 1).bool()
        recomputes = torch.is_grad_enabled() and self.recompute in ("iteration", "layer")
        records = [RoutingRecord() if recomputes else None for _ in range(self.chain.iterations)]
        run_chain = self._recompute_if(self.recompute == "layer", self._run_chain)
        return run_chain(hidden_states, padding_mask, records), None

    def _run_chain(
        self, start: torch.Tensor, padding_mask: torch.Tensor | None, records: list[RoutingRecord | None]
    ) -> torch.Tensor:
        """x(0) [S, B, D] -> delta, or u + delta with `reference`."""
        iterate = self._recompute_if(self.recompute == "iteration", self._iterate)
        probe = self._active_probe(records[0])
        state = delta = start  # the first iteration replaces delta
        masked_TN: torch.Tensor | None = None
        reused: Routing | None = None
        for t in range(self.chain.iterations):
            increment, routing = iterate(t, state, padding_mask, records[t], masked_TN, reused)
            delta = delta + increment if t > 0 and self.chain.sums_increments else increment
            if t + 1 == self.chain.iterations and probe is None:
                break  # nothing needs x(C)
            before, state = state, self._next_state(start, state, increment)
            if probe is not None:  # here, since recomputation runs the iterations in reverse order
                probe.record(t, routing.chosen_TN, before, increment, state, padding_mask)
            masked_TN = self.variants.masked(masked_TN, routing.chosen_TN)
            reused = routing if self.chain.gating == "fixed" else None
        if self.chain.norm_placement != "reference":
            return delta
        # Megatron applies hidden_dropout to what it adds to h; with `reference` it adds nothing, so it is applied here.
        return start + torch.nn.functional.dropout(delta, self.config.hidden_dropout, self.training)

    def _iterate(
        self,
        t: int,
        state: torch.Tensor,
        padding_mask: torch.Tensor | None,
        record: RoutingRecord | None,
        masked_TN: torch.Tensor | None,
        reused: Routing | None,
    ) -> Iteration:
        """One pass of Megatron's MoE layer: F_t(x) = sum_i g[t,i] E_i(x) + sum_m S_m(x), or a variant of it.

        Args:
            state: x(t-1), [S, B, D].
            masked_TN: bool [T, N], experts that tokens must not choose; None for none.
            reused: the routing to use (`fixed`); None to route.
        """
        with record_function(f"layer {self.layer_number}, iteration {t + 1}"), self._own_dispatcher():
            hidden = self._iteration_input(t, state)
            shared = self.shared_experts_compute(hidden)
            routing = reused or self.routers[t](hidden, padding_mask, record, masked_TN)
            rows, gates = self.dispatch(*self.preprocess(hidden, *routing))
            rows, _ = self.routed_experts_compute(rows, gates)
            output = self.postprocess(self.combine(rows), shared)
            return Iteration(self.variants.increment(t, output), routing)

    def _next_state(self, start: torch.Tensor, state: torch.Tensor, increment: torch.Tensor) -> torch.Tensor:
        """x(t) = F_t(x(t-1)) + r(t), [S, B, D] (eq. 8, 10, 9)."""
        match self.chain.residual:
            case "inner":
                return increment + state
            case "init":
                return increment + start
            case "outer":
                return increment

    def _iteration_input(self, t: int, state: torch.Tensor) -> torch.Tensor:
        """Input of router and experts in iteration t: x(t-1), norm_t of it, or a variant's function of it."""
        return self.norms[t](state) if self.norms else self.variants.iteration_input(t, state)

    def _active_probe(self, record: RoutingRecord | None) -> ChainProbe | None:
        """The probe to notify; None in evaluation and recomputation."""
        is_recomputed = record is not None and record.is_known
        return self.probe if self.training and torch.is_grad_enabled() and not is_recomputed else None

    def _recompute_if(self, enabled: bool, function: Callable) -> Callable:
        """`function`, recomputed in the backward pass if `enabled`."""
        # With overlap the shared experts assert that each pass runs to its end.
        return partial(recomputed, function, to_the_end=self.shared_expert_overlap) if enabled else function

    @contextmanager
    def _own_dispatcher(self) -> Iterator[None]:
        """Replace `token_dispatcher`, on which Megatron's methods keep state, by a copy for this iteration."""
        kept, self.token_dispatcher = self.token_dispatcher, for_one_pass(self.token_dispatcher)
        try:
            yield
        finally:  # checkpointing ends a recomputed pass by an exception
            self.token_dispatcher = kept

    def preprocess(
        self, hidden_states: torch.Tensor, probs: torch.Tensor, routing_map: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Megatron's method; pads experts to their capacity if the config says so."""
        config = self.config
        if config.moe_pad_expert_input_to_capacity:
            topk, factor = config.moe_router_topk, config.moe_expert_capacity_factor
            rows = rows_per_expert(len(routing_map), topk, config.num_moe_experts, factor)
            routing_map = filled_up(routing_map, rows)
        return super().preprocess(hidden_states, probs, routing_map)


def coe_layers(model: torch.nn.Module) -> Iterator[CoELayer]:
    """All Chain-of-Experts layers of a model, in order."""
    return (layer for layer in model.modules() if isinstance(layer, CoELayer))


def routers(model: torch.nn.Module) -> Iterator[tuple[int, int, CoERouter]]:
    """(layer number, iteration, router) of every router in a model, both counted from 1."""
    for layer in coe_layers(model):
        for t, router in enumerate(layer.routers):
            yield layer.layer_number, t + 1, router
