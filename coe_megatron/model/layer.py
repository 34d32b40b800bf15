"""The Chain-of-Experts layer for Megatron-Core: C iterations of Megatron's MoELayer.

    x(0) = u,  x(t) = F_t(x(t-1)) + r(t),  F_t(x) = sum_i g[t,i] E_i(x) + sum_m S_m(x)        (paper eq. 5, 8)
    r(t) = x(t-1) (inner), x(0) (init) or 0 (outer);  delta = sum_t F_t (inner) or F_C        (eq. 8, 10, 9)
    output: delta, which the transformer layer adds to h; with `reference` u + delta, which replaces h

One set of experts and shared experts, and one router per iteration. Each iteration calls the methods of Megatron's
layer (route, dispatch, experts, combine). delta is summed from increments, since x(C) - x(0) loses digits in bf16.
`chain.variants` replaces F_t(x) by a_t F_t(c_t x), mixes increments, or projects into a latent space around the loop.

S: sequence, B: micro-batch, D: hidden size (L within a chain with `latent`), T = S * B tokens, N: experts.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
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
from coe_megatron.local_backend.expert_mlp import Assignment, WeightGradients
from coe_megatron.local_backend.experts import GroupedExperts
from coe_megatron.local_backend.norm import Norm
from coe_megatron.model.capacity import filled_up, rows_per_expert
from coe_megatron.model.chain_probe import ChainProbe
from coe_megatron.model.chunks import Chunk, Iteration, Pass, Steps, in_turns
from coe_megatron.model.dispatchers import AllToAllDispatcher, for_one_pass
from coe_megatron.model.exchange import Exchange, RowSums
from coe_megatron.model.recompute import RoutingRecord, recompute_mode, recomputed
from coe_megatron.model.router import CoERouter, Routing
from coe_megatron.model.unsupported import (
    needs_stock_dispatcher,
    refuse_for_chain,
    refuse_for_exchange,
    refuse_for_layer,
)


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
        deduplicated: a token travels once to each rank with some of its experts (`moe.dispatcher`).
        overlap_chunks: parts of the tokens that go through the chain in turns (`moe.overlap_chunks`).
        megatron_losses: scale losses of routers as Megatron-Core does where it is wrong; see RouterWithLosses.
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
        deduplicated: bool = False,
        overlap_chunks: int = 1,
        megatron_losses: bool = False,
        **later: Any,
    ) -> None:
        chain, hidden = chain or ChainSettings(), config.hidden_size
        if topk is not None or chain.latent is not None:  # for this layer only
            config = copy(config)
            config.moe_router_topk, config.hidden_size = topk or config.moe_router_topk, chain.width(hidden)
        refuse_for_layer(config)
        refuse_for_chain(config, chain)
        refuse_for_exchange(config, deduplicated, overlap_chunks)
        recompute = recompute_mode(config, recompute)
        assert submodules is not None, "CoELayer needs submodules: take them from coe_layer_spec"
        groups = pg_collection or get_default_pg_collection()
        router = partial(CoERouter, chain=chain, megatron_losses=megatron_losses)
        super().__init__(config, replace(submodules, router=router), layer_number, groups, **later)
        self.chain, self.recompute = chain, recompute
        self.probe: ChainProbe | None = None  # set by routing_stats.reset_routing for a step whose metrics are logged
        of_router = {name: value for name, value in later.items() if name == "is_mtp_layer"}
        tied_to = self.router if chain.gating == "shared_router" else None
        self.later_routers = torch.nn.ModuleList(
            router(config=config, pg_collection=groups, tied_to=tied_to, **of_router)
            for _ in range(self.router.num_routers - 1)
        )
        self.overlap_chunks, self.exchange = overlap_chunks, None
        if needs_stock_dispatcher(config) is None:
            self.exchange = Exchange(config.num_moe_experts, groups.ep, groups.expt_tp, groups.tp_ep, deduplicated)
        elif type(self.token_dispatcher) is MoEAlltoAllTokenDispatcher:
            self.token_dispatcher = AllToAllDispatcher(
                self.num_local_experts, self.local_expert_indices, config=config, pg_collection=groups
            )
            if self.shared_expert_overlap:
                self.token_dispatcher.set_shared_experts(self.shared_experts)
        for each in self.routers:
            each.has_sparse_gates = self.exchange is not None
        self.norms = torch.nn.ModuleList(
            build_module(norm, config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
            for _ in range(chain.iterations if chain.norm_placement == "iteration_norm" else 0)
        )
        self.variants = Variants(chain, hidden).to(device=torch.cuda.current_device(), dtype=config.params_dtype)
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
        records = [
            [RoutingRecord() if recomputes else None for _ in range(self.chain.iterations)]
            for _ in range(min(self.overlap_chunks, len(hidden_states)))
        ]
        run_chain = self._recompute_if(self.recompute == "layer", self._run_chain)
        return run_chain(hidden_states, padding_mask, records), None

    def _run_chain(
        self, start: torch.Tensor, padding_mask: torch.Tensor | None, records: list[list[RoutingRecord | None]]
    ) -> torch.Tensor:
        """u [S, B, D] -> delta, or u + delta with `reference`; as many chunks of tokens as there are `records`."""
        u, start = start, self.variants.enter(start)
        is_recomputed = _is_known(records[0][0])
        gradients = self.experts.weight_gradients() if isinstance(self.experts, GroupedExperts) else None
        chunks = self._chunks(start, padding_mask, records)
        if self.recompute == "iteration":
            for t in range(self.chain.iterations):
                passes = [chunk.next_pass(t) for chunk in chunks]
                for chunk, iteration in zip(
                    chunks, recomputed(self._iterate_all, t, passes, padding_mask, gradients), strict=True
                ):
                    self._advance(chunk, t, iteration)
        else:
            in_turns([self._through_chain(chunk, gradients) for chunk in chunks])
        delta = chunks[0].delta if len(chunks) == 1 else torch.cat([chunk.delta for chunk in chunks])
        for t in range(len(chunks[0].logits)):
            logits = [chunk.logits[t] for chunk in chunks]
            delta = self.routers[t].with_losses(delta, logits, padding_mask, records[0][t], is_recomputed)
        delta = self.variants.leave(delta)
        if self.chain.norm_placement != "reference":
            return delta
        # Megatron applies hidden_dropout to what it adds to h; with `reference` it adds nothing, so it is applied here.
        return u + torch.nn.functional.dropout(delta, self.config.hidden_dropout, self.training)

    def _chunks(
        self, start: torch.Tensor, padding_mask: torch.Tensor | None, records: list[list[RoutingRecord | None]]
    ) -> list[Chunk]:
        """Neighbouring positions of all sequences, in about equal parts."""
        counts = self.training and torch.is_grad_enabled() and not _is_known(records[0][0])
        probe = self.probe if counts else None
        parts = len(records)
        masks = [None] * parts if padding_mask is None else padding_mask.tensor_split(parts)
        state = partial(self.variants.state, increments=[]) if self.chain.streams else lambda start: start
        return [
            Chunk(part, state(part), part, mask, record, copy(probe))
            for part, mask, record in zip(start.tensor_split(parts), masks, records, strict=True)
        ]

    def _through_chain(self, chunk: Chunk, gradients: WeightGradients | None) -> Steps[None]:
        """All iterations of a chunk."""
        for t in range(self.chain.iterations):
            self._advance(chunk, t, (yield from self._iterate(t, chunk.next_pass(t), gradients)))

    def _iterate_all(
        self, t: int, passes: list[Pass], padding_mask: torch.Tensor | None, gradients: WeightGradients | None
    ) -> list[Iteration]:
        """Iteration t of all chunks, with its losses."""
        is_recomputed = _is_known(passes[0].record)
        iterations = in_turns([self._iterate(t, each, gradients) for each in passes])
        logits = [each.routing.logits for each in iterations if each.routing.logits is not None]
        if not logits:
            return iterations
        first = iterations[0].increment
        with_losses = self.routers[t].with_losses(first, logits, padding_mask, passes[0].record, is_recomputed)
        iterations[0] = iterations[0]._replace(increment=with_losses)
        return [each._replace(routing=each.routing._replace(logits=None)) for each in iterations]

    def _advance(self, chunk: Chunk, t: int, iteration: Iteration) -> None:
        """Take the result of iteration t."""
        increment, routing = iteration
        chunk.delta = chunk.delta + increment if t > 0 and self.chain.sums_increments else increment
        if routing.logits is not None:
            chunk.logits.append(routing.logits)
        is_last = t + 1 == self.chain.iterations
        if self.chain.streams:
            chunk.increments.append(increment)
            if is_last or chunk.probe is not None:
                chunk.delta = self.variants.total(chunk.increments)
        if is_last and chunk.probe is None:
            return  # nothing needs x(C)
        before, chunk.state = chunk.state, self._next_state(chunk, increment)
        if chunk.probe is not None:  # here, since recomputation runs the iterations in reverse order
            states = before, increment, chunk.state, chunk.delta
            chunk.probe.record(t, routing.chosen_TN, *states, chunk.padding_mask)
        chunk.masked_TN = self.variants.masked(chunk.masked_TN, routing.chosen_TN)
        if self.chain.gating == "fixed":
            gates_TN = routing.gates_TN if self.exchange is None else None
            chunk.reused = routing._replace(logits=None, gates_TN=gates_TN)

    def _iterate(self, t: int, given: Pass, gradients: WeightGradients | None) -> Steps[Iteration]:
        """One pass through the MoE layer: F_t(x) = sum_i g[t,i] E_i(x) + sum_m S_m(x), or a variant of it.

        It yields where rows are under way to other ranks.
        """
        with record_function(f"layer {self.layer_number}, iteration {t + 1}"):
            hidden = self._iteration_input(t, given.state)
            if self.exchange is None:
                # Before the router: Megatron's all-gather returns gradients in a buffer that shared experts overwrite.
                shared = self.shared_experts_compute(hidden)
            routing = given.reused
            if routing is None:
                is_part = self.overlap_chunks > 1
                routing = self.routers[t](hidden, given.padding_mask, given.record, given.masked_TN, is_part)
            if self.exchange is None:
                output = self._megatron_pass(hidden, routing, shared)
                return Iteration(self.variants.increment(t, output), routing)
            tokens_TD = hidden.view(-1, hidden.shape[-1])
            sizes = routing.sizes or (given.record.sizes if given.record else None)
            outgoing = self.exchange.depart(tokens_TD, routing.gates_TK, routing.experts_TK, sizes)
            if given.record:
                given.record.sizes = outgoing.sizes
            shared = self.shared_experts_compute(hidden)
            yield
            returning = self.exchange.work(outgoing, partial(self._sum_of_experts, gradients=gradients))
            yield
            output = self.exchange.arrive(returning, len(tokens_TD)).view_as(hidden)
            output = output if shared is None else output + shared
            return Iteration(self.variants.increment(t, output), routing._replace(sizes=outgoing.sizes))

    def _sum_of_experts(self, assignment: Assignment, gradients: WeightGradients | None) -> torch.Tensor:
        """The weighted sum of each token's experts on this rank, [M, D]."""
        if isinstance(self.experts, GroupedExperts):
            return self.experts(assignment, gradients=gradients)
        index_R = assignment.index_R
        rows_RD = assignment.tokens_MD.index_select(0, index_R)
        output_RD, bias = self.experts(rows_RD, assignment.counts_E, assignment.gates_R)
        assert bias is None, "add_bias_linear is not supported"
        return RowSums.apply(output_RD, index_R, len(assignment.tokens_MD))

    def _megatron_pass(self, hidden: torch.Tensor, routing: Routing, shared: torch.Tensor | None) -> torch.Tensor:
        """Megatron's methods, for what only its dispatchers can do."""
        assert routing.gates_TN is not None
        with self._own_dispatcher():
            rows, gates = self.dispatch(*self.preprocess(hidden, routing.gates_TN, routing.chosen_TN))
            rows, _ = self.routed_experts_compute(rows, gates)
            return self.postprocess(self.combine(rows), shared)

    def _next_state(self, chunk: Chunk, increment: torch.Tensor) -> torch.Tensor:
        """x(t) = F_t(x(t-1)) + r(t), [S, B, D] (eq. 8, 10, 9), or what streams make of the increments so far."""
        if self.chain.streams:
            return self.variants.state(chunk.start, chunk.increments)
        match self.chain.residual:
            case "inner":
                return increment + chunk.state
            case "init":
                return increment + chunk.start
            case "outer":
                return increment

    def _iteration_input(self, t: int, state: torch.Tensor) -> torch.Tensor:
        """Input of router and experts in iteration t: x(t-1) or norm_t of it, or a variant's function of that."""
        return self.variants.iteration_input(t, self.norms[t](state) if self.norms else state)

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


def _is_known(record: RoutingRecord | None) -> bool:
    """Whether this is a second pass."""
    return record is not None and record.is_known


def coe_layers(model: torch.nn.Module) -> Iterator[CoELayer]:
    """All Chain-of-Experts layers of a model, in order."""
    return (layer for layer in model.modules() if isinstance(layer, CoELayer))


def routers(model: torch.nn.Module) -> Iterator[tuple[int, int, CoERouter]]:
    """(layer number, iteration, router) of every router in a model, both counted from 1."""
    for layer in coe_layers(model):
        for t, router in enumerate(layer.routers):
            yield layer.layer_number, t + 1, router
