"""The Chain-of-Experts layer for Megatron-Core: Megatron's MoELayer, passed through C times.

    x(0) = u,  x(t) = F_t(x(t-1)) + r(t),  F_t(x) = sum_i g[t,i] E_i(x) + sum_m S_m(x)        (paper eq. 5, 8)

One set of experts and shared experts, one router and one token dispatcher per iteration. What Megatron's layer does
once (route, dispatch, experts, combine) this one repeats through the same methods; the rest is the residual r(t) and
what leaves the layer. Increments F_t are summed as they come: x(C) - x(0) computed by subtraction loses them in bf16.
The variants of ChainSettings put gains in it: a_t F_t(c_t x) wherever F_t(x) stands here.

S: sequence, B: micro-batch, D: hidden size, T = S * B.
"""

import math
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.profiler import record_function

from coe_megatron.chain.settings import ChainSettings, Recompute
from coe_megatron.errors import ConfigError
from coe_megatron.local_backend.norm import Norm
from coe_megatron.model.capacity import filled_up, rows_per_expert
from coe_megatron.model.chain_probe import ChainProbe
from coe_megatron.model.dispatchers import AllToAllDispatcher
from coe_megatron.model.recompute import RoutingRecord, recompute_mode, replayed
from coe_megatron.model.router import CoERouter
from coe_megatron.model.unsupported import refuse_for_layer


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
        if topk is not None or chain.scaled_init:  # which concern this layer alone
            config = copy(config)
        if topk is not None:
            config.moe_router_topk = topk
        if chain.scaled_init:
            config.output_layer_init_method = partial(_scaled, config.output_layer_init_method, chain.iterations)
        _refuse_unsupported(config, chain)
        recompute = recompute_mode(config, recompute)
        assert submodules is not None, "CoELayer needs submodules: take them from coe_layer_spec"
        groups = pg_collection or get_default_pg_collection()
        router = partial(CoERouter, chain=chain)
        super().__init__(config, replace(submodules, router=router), layer_number, groups)
        self.chain, self.recompute = chain, recompute
        self.watch: ChainProbe | None = None  # set by stats.reset_routing for a step whose metrics are logged
        self.later_routers = torch.nn.ModuleList(
            router(
                config=config,
                pg_collection=groups,
                leader=self.router if chain.gating == "shared_router" else None,
            )
            for _ in range(self.router.num_routers - 1)
        )
        if config.perform_initialization:
            self.set_routers_apart()
        # With overlap the shared experts assert that each pass reaches its end.
        self._replayed = partial(replayed, to_the_end=self.shared_expert_overlap)
        # A dispatcher keeps the state of one pass on itself and owns no weights: one for each iteration.
        stock: type = type(self.token_dispatcher)  # type: ignore[has-type]
        make = AllToAllDispatcher if stock is MoEAlltoAllTokenDispatcher else stock
        self.dispatchers = [
            make(self.num_local_experts, self.local_expert_indices, config=config, pg_collection=groups)
            for _ in range(chain.iterations)
        ]
        if self.shared_expert_overlap:  # with one iteration only, see _refuse_unsupported
            self.dispatchers[0].set_shared_experts(self.shared_experts)
        norms = chain.iterations if chain.norm_placement == "iteration_norm" else 0
        self.norms = torch.nn.ModuleList(
            build_module(norm, config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
            for _ in range(norms)
        )
        self.increment_gains = self._gains(chain.iterations if chain.learned_scale else 0, chain.increment_scale)
        self.state_gains = self._gains(chain.iterations if chain.conditioned else 0, 1.0)

    def _gains(self, count: int, value: float) -> torch.nn.ParameterList:
        """So many gains [D]; like a norm's they are on every tensor-parallel rank, which sees a part of the tokens."""
        gains = torch.nn.ParameterList(
            torch.full(
                (self.config.hidden_size,),
                value,
                dtype=self.config.params_dtype,
                device=torch.cuda.current_device(),
            )
            for _ in range(count)
        )
        for gain in gains:
            gain.sequence_parallel = self.config.sequence_parallel
        return gains

    @property
    def routers(self) -> list[CoERouter]:
        """The routers in the order of their iterations (one alone with `fixed` gating)."""
        return [self.router, *self.later_routers]

    @torch.no_grad()
    def set_routers_apart(self) -> None:
        """With `chain.routers_apart` later routers take the first one's weights, rolled; call it after initialising."""
        if not self.chain.routers_apart:
            return
        for t, router in enumerate(self.routers):
            shift = t * self.config.num_moe_experts // self.chain.iterations
            router.weight.copy_(self.router.weight.roll(shift, 0))

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
        """Run the chain.

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
        routes: list[RoutingRecord | None] = [None] * len(self.routers)
        if torch.is_grad_enabled() and self.recompute in ("iteration", "layer"):
            routes = [RoutingRecord() for _ in routes]
        run = self._replayed if self.recompute == "layer" else _called
        return run(self._run_chain, hidden_states, padding_mask, routes), None

    def _run_chain(
        self, start: torch.Tensor, padding_mask: torch.Tensor | None, routes: list[RoutingRecord | None]
    ) -> torch.Tensor:
        """x(0) -> what leaves the layer; `increment` is x(C) - x(0), with `outer` x(C) (eq. 9)."""
        iterate = partial(self._replayed if self.recompute == "iteration" else _called, self._iterate)
        note = partial(self._note, self._watch(routes[0]), start, padding_mask)
        step, probs, choices, *scored = iterate(0, start, padding_mask, routes[0])
        note(0, start, step, choices)
        given = (probs, choices) if self.chain.gating == "fixed" else ()
        state, increment, visited = start, step, None
        for t in range(1, self.chain.iterations):
            state = self._next_state(start, state, step)
            if self.chain.no_return:
                visited = choices if visited is None else visited | choices
            earlier = scored if t == len(self.routers) - 1 else ()
            route = None if given else routes[t]
            step, probs, choices, *of_this = iterate(t, state, padding_mask, route, visited, *given, *earlier)
            note(t, state, step, choices)
            scored += of_this
            increment = increment + step if self.chain.residual == "inner" else step
        if self.chain.norm_placement != "reference":
            return increment
        # The stream that goes on is u + increment; the dropout that Megatron applies to h's increment is applied here.
        return start + torch.nn.functional.dropout(increment, self.config.hidden_dropout, self.training)

    def _next_state(self, start: torch.Tensor, state: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """x(t) = F_t(x(t-1)) + r(t): r is x(t-1), x(0) or nothing (eq. 8, 10, 9)."""
        if self.chain.residual == "outer":
            return step
        return step + (state if self.chain.residual == "inner" else start)

    def _watch(self, route: RoutingRecord | None) -> ChainProbe | None:
        """Who watches this pass: nobody in evaluation and when it is recomputed."""
        recomputed = route is not None and route.is_known
        return self.watch if self.training and torch.is_grad_enabled() and not recomputed else None

    @torch.no_grad()
    def _note(
        self,
        watch: ChainProbe | None,
        start: torch.Tensor,
        padding_mask: torch.Tensor | None,
        t: int,
        state: torch.Tensor,
        step: torch.Tensor,
        choices: torch.Tensor,
    ) -> None:
        """Tell the watch of iteration t; here and not in _iterate, whose second passes go backwards."""
        if watch is None:
            return
        watch.note(t, choices, state, step, self._next_state(start, state, step), padding_mask)

    def _iterate(
        self,
        t: int,
        state: torch.Tensor,
        padding_mask: torch.Tensor | None,
        route: RoutingRecord | None,
        visited: torch.Tensor | None = None,
        *earlier: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """a_t F_t(c_t x): Megatron's MoE pass with iteration t's norm, router and dispatcher.

        Args:
            visited: bool [T, N], where tokens have been and must not go; None if they may.
            earlier: of iterations before this one, as single tensors so that recomputing knows them: the routing to use
                again (`fixed`), or the scores and choices to balance together with this one's (`joint`).

        Returns:
            a_t F_t(c_t x) [S, B, D], the routing it used (gates and choices [T, N]) and, if a later iteration's loss
            asks for them, scores and choices.
        """
        with record_function(f"layer {self.layer_number}, iteration {t + 1}"):  # a mark in a profile
            hidden = self._seen(t, state)
            self.token_dispatcher = self.dispatchers[t]
            shared = None if t > 0 and self.chain.shared_once else self.shared_experts_compute(hidden)
            routing = earlier
            scored: tuple[torch.Tensor, ...] = ()
            if t < len(self.routers):
                routing = self.routers[t](hidden, padding_mask, route, visited, earlier)
                scored = self.routers[t].take_scored()
            dispatched, probs = self.dispatch(*self.preprocess(hidden, *routing))
            output, _ = self.routed_experts_compute(dispatched, probs)
            return self._scaled(t, self.postprocess(self.combine(output), shared)), *routing, *scored

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

    def _seen(self, t: int, state: torch.Tensor) -> torch.Tensor:
        """What router and experts of iteration t see of the state."""
        if self.norms:
            return self.norms[t](state)
        return state * self.state_gains[t] if self.chain.conditioned else state

    def _scaled(self, t: int, step: torch.Tensor) -> torch.Tensor:
        """a_t F_t."""
        if self.chain.learned_scale:
            return step * self.increment_gains[t]
        return step if self.chain.increment_scale == 1 else step * self.chain.increment_scale


def _called(function: Callable, *args: Any) -> Any:
    return function(*args)


@torch.no_grad()
def _scaled(initialise: Callable[[torch.Tensor], object], iterations: int, weight: torch.Tensor) -> torch.Tensor:
    """What leads out of an expert, as `chain.scaled_init` has it."""
    initialise(weight)
    return weight.div_(math.sqrt(iterations))


def _refuse_unsupported(config: TransformerConfig, chain: ChainSettings) -> None:
    refuse_for_layer(config)
    chain.require_experts(config.num_moe_experts, config.moe_router_topk, config.moe_router_num_groups)
    if chain.no_return and config.moe_router_fusion:
        raise ConfigError("moe_router_fusion is True: with chain.no_return it must be False")
    if chain.no_return and config.moe_router_load_balancing_type == "sinkhorn":
        raise ConfigError("moe_router_load_balancing_type is 'sinkhorn': with chain.no_return use an auxiliary loss")
    if chain.iterations > 1 and config.moe_shared_expert_overlap:
        raise ConfigError(
            "moe_shared_expert_overlap is True: the shared experts keep the state of one pass, so with more than one "
            "iteration it must be False"
        )
