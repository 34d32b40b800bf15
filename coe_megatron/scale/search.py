"""Searches for the fastest layout that fits: branch and bound over what divides the ranks.

A layout is a choice of TP, CP, PP, VPP, EP, ETP and the micro-batch. Its products and moves alone, with the pipeline's
bubble, are a lower bound of its step time that costs microseconds; layouts are tried in the order of this bound until
it exceeds the time of the last one that would be shown. A layout that is tried gets the fastest ZeRO stage, dispatcher
and recompute mode that fit; of each dispatcher the number of chunks is taken that is fastest without recomputation, and
a mode that recomputes less is taken to be faster. Optimizer states go to host memory only if nothing fits without.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from heapq import heapify, heappop, heappush
from itertools import product
from math import inf, lcm
from typing import Literal, NamedTuple, TypeAlias, get_args

from coe_megatron.chain.settings import Recompute
from coe_megatron.config import RunConfig
from coe_megatron.config.checks import problems
from coe_megatron.config.settings import Dispatcher
from coe_megatron.errors import ConfigError
from coe_megatron.estimate.exchange_time import has_megatrons_dispatcher
from coe_megatron.estimate.machine import Machine
from coe_megatron.estimate.memory import memory
from coe_megatron.estimate.run_shape import RunShape
from coe_megatron.estimate.step_time import (
    Costs,
    StepTime,
    idle_passes,
    inner_collectives,
    products_and_moves,
    step_time,
)

Stage: TypeAlias = Literal[0, 1, 2, 3]  # of ZeRO

MARGIN = 0.9  # of a device's memory should be taken: routing is uneven, and allocators leave gaps
_MOST_CONTEXT, _MOST_PARTS, _MOST_ROWS = 64, 8, 64
_MODES: tuple[Recompute, ...] = ("none", "experts", "iteration", "layer")
_CHUNKS = (1, 2, 4)


class Sizes(NamedTuple):
    """What divides the ranks, and the rows of a micro-batch; names as in `parallel` and `training`."""

    tensor: int
    context: int
    pipeline: int
    virtual_pipeline: int
    expert: int
    expert_tensor: int
    micro_batch: int


@dataclass(frozen=True)
class Found:
    """A layout that fits.

    Attributes:
        run: with all settings.
        time: of a step.
        needed: bytes of device memory per rank.
    """

    run: RunShape
    time: StepTime
    needed: int

    def why_slower(self, best: "Found") -> str:
        """Where it loses against a faster one: the parts that grew most, up to two."""
        names = {*self.time.parts, *best.time.parts}
        more = {name: self.time.parts.get(name, 0.0) - best.time.parts.get(name, 0.0) for name in names}
        worst = sorted((name for name in names if more[name] > 0), key=lambda name: -more[name])[:2]
        return ", ".join(f"{name.replace('_', '-')} +{more[name] / best.time.total:.1%}" for name in worst)


@dataclass(frozen=True)
class Result:
    """What a search found.

    Attributes:
        best: the fastest first.
        layouts: how many there are.
        tried: for how many a time was computed; the bound excludes the others.
    """

    best: list[Found]
    layouts: int
    tried: int


@dataclass(frozen=True)
class Search:
    """For the ranks of a run, on a machine.

    Attributes:
        run: the run without `auto`, on as many ranks as are to be used; how it divides them does not matter.
        available: bytes of device memory.
    """

    run: RunShape
    machine: Machine
    available: float

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return self.run.layout.world_size

    def best(self, count: int) -> Result:
        """The `count` fastest layouts.

        Raises:
            ConfigError: no layout fits; one line.
        """
        for offloads in (False, True):
            found = self._search(count, offloads)
            if found.best:
                return found
        if not found.layouts:
            others = range(self.ranks + 1, 2 * self.ranks + 1)
            more = next((f"; {ranks:,} would" for ranks in others if next(self._all_sizes(ranks), None)), "")
            raise ConfigError(f"no layout divides {self.ranks:,} ranks, batch, layers and experts{more}")
        room = f"{self.available / 2**30:,.0f} GiB"
        raise ConfigError(f"none of {found.layouts:,} layouts of {self.ranks:,} ranks fits into {room}")

    def _search(self, count: int, offloads: bool) -> Result:
        queue = [(self._bound(sizes, self._work), False, sizes) for sizes in self._layouts]
        heapify(queue)
        best: list[Found] = []
        tried = 0
        while queue:
            bound, is_tight, sizes = heappop(queue)
            if len(best) == count and bound >= best[-1].time.total:
                break
            if not is_tight:
                if next(problems(self._config(sizes, offloads), self.ranks), None) is None:
                    heappush(queue, (self._bound(sizes, self._work_and_ways), True, sizes))
                continue
            tried += 1
            base, limit = self._config(sizes, offloads), best[-1].time.total if len(best) == count else inf
            ways = self._ways_of(sizes._replace(pipeline=1, virtual_pipeline=1))
            dispatches = [
                replace(base, moe=replace(base.moe, dispatcher=dispatcher, overlap_chunks=chunks))
                for dispatcher, (_, chunks) in ways.items()
            ]
            if all(self._needed(self._leanest(each)) > self.available for each in dispatches):
                continue
            options = (self._fastest(each, limit) for each in dispatches)
            if (found := min(filter(None, options), key=lambda each: each.time.total, default=None)) is not None:
                best = sorted([*best, found], key=lambda each: each.time.total)[:count]
        return Result(best, len(self._layouts), tried)

    @cached_property
    def _layouts(self) -> list[Sizes]:
        return list(self._all_sizes(self.ranks))

    def _all_sizes(self, ranks: int) -> Iterator[Sizes]:
        config, batch = self.run.config, self.run.config.training.global_batch
        model, experts = config.model, config.moe.num_experts
        tensors = [size for size in _powers(self.machine.ranks_per_node) if model.num_attention_heads % size == 0]
        contexts = [size for size in _powers(_MOST_CONTEXT) if size == 1 or model.seq_length % (2 * size) == 0]
        for tensor, context, pipeline in product(tensors, contexts, _divisors(model.num_layers)):
            if ranks % (tensor * context * pipeline):
                continue
            data = ranks // (tensor * context * pipeline)
            parts = [size for size in _powers(_MOST_PARTS) if model.num_layers % (pipeline * size) == 0]
            rows = [size for size in _powers(_MOST_ROWS) if batch % (size * data) == 0]
            for expert, sharded in product(_divisors(experts), sorted({1, tensor})):
                if ranks % (pipeline * lcm(tensor * context, expert * sharded)):
                    continue
                for virtual, row in product(parts if pipeline > 1 else [1], rows):
                    if virtual == 1 or batch // (row * data) % pipeline == 0:
                        yield Sizes(tensor, context, pipeline, virtual, expert, sharded, row)

    def _bound(self, sizes: Sizes, seconds: Callable[[Sizes], float]) -> float:
        """The least seconds of a step: those of a micro-batch in all layers, spread over the stages, and the bubble."""
        data = self.ranks // (sizes.tensor * sizes.context * sizes.pipeline)
        micro_batches = self.run.config.training.global_batch // (sizes.micro_batch * data)
        slowdown = self.machine.slowdown(min(self.ranks, self.machine.ranks_per_node))
        bubble = idle_passes(sizes.pipeline, slowdown) / sizes.virtual_pipeline
        return (micro_batches + bubble) * seconds(sizes._replace(pipeline=1, virtual_pipeline=1)) / sizes.pipeline

    def _work(self, sizes: Sizes) -> float:
        """Products and moves of a micro-batch; nothing is recomputed."""
        if sizes not in self._works:
            self._works[sizes] = products_and_moves(Costs(self._plain(sizes), self.machine))
        return self._works[sizes]

    def _work_and_ways(self, sizes: Sizes) -> float:
        """The same, and the ways of tokens and hidden states, as fast as any dispatch makes them."""
        return self._work(sizes) + min(seconds for seconds, _ in self._ways_of(sizes).values())

    def _ways_of(self, sizes: Sizes) -> dict[Dispatcher, tuple[float, int]]:
        """Seconds of the ways in a micro-batch by dispatcher, and the number of chunks with which they are shortest."""
        if sizes not in self._ways:
            found: dict[Dispatcher, tuple[float, int]] = {}
            for run in self._dispatches(self._plain(sizes)):
                moe = run.config.moe
                each = inner_collectives(Costs(run, self.machine)), moe.resolved_chunks()
                found[moe.dispatcher] = min(found.get(moe.dispatcher, each), each)
            self._ways[sizes] = found
        return self._ways[sizes]

    @cached_property
    def _works(self) -> dict[Sizes, float]:
        return {}

    @cached_property
    def _ways(self) -> dict[Sizes, dict[Dispatcher, tuple[float, int]]]:
        return {}

    def _plain(self, sizes: Sizes) -> RunShape:
        """One micro-batch a step, without recomputation."""
        config, data = self._config(sizes, False), self.ranks // (sizes.tensor * sizes.context)
        training = replace(config.training, global_batch=sizes.micro_batch * data)
        return self.run.changed(replace(config, training=training, moe=replace(config.moe, recompute="none")))

    def _config(self, sizes: Sizes, offloads: bool) -> RunConfig:
        """Of these sizes, with a stage of ZeRO and a dispatch that are valid with all of them."""
        config, divided = self.run.config, sizes._asdict()
        micro_batch = divided.pop("micro_batch")
        is_ours = not has_megatrons_dispatcher(self.run)
        return replace(
            config,
            moe=replace(config.moe, dispatcher="alltoall", overlap_chunks=1) if is_ours else config.moe,
            parallel=replace(
                config.parallel, world_size=self.ranks, ranks_per_node=self.machine.ranks_per_node, **divided
            ),
            training=replace(config.training, micro_batch=micro_batch),
            zero=replace(config.zero, stage=1, offload_optimizer=offloads, offload_parameters=False),
        )

    def _fastest(self, base: RunConfig, limit: float) -> Found | None:
        """With the fastest ZeRO stage and recompute mode that fit; None if that takes `limit` seconds or more."""
        found = None
        for stage in self._stages(base):
            for mode in _MODES:
                run = self._changed(base, stage, mode)
                time = step_time(run, self.machine)
                if time.total >= limit:
                    break
                if (needed := self._needed(run)) <= self.available:
                    found, limit = Found(run, time, needed), time.total
                    break
        return found

    def _stages(self, base: RunConfig) -> tuple[Stage, ...]:
        """Stages of ZeRO that are valid."""
        return get_args(Stage)[base.training.precision != "fp32" : 2 if base.parallel.pipeline > 1 else None]

    def _leanest(self, base: RunConfig) -> RunShape:
        return self._changed(base, self._stages(base)[-1], _MODES[-1])

    def _changed(self, base: RunConfig, stage: Stage, mode: Recompute) -> RunShape:
        return self.run.changed(
            replace(base, zero=replace(base.zero, stage=stage), moe=replace(base.moe, recompute=mode))
        )

    def _needed(self, run: RunShape) -> int:
        """Bytes of device memory, in the first or the last pipeline stage."""
        return max(memory(run, each).total for each in {0, run.layout.pipeline - 1})

    def _dispatches(self, run: RunShape) -> Iterator[RunShape]:
        """The same run with every dispatcher and number of chunks that it may have."""
        if run.layout.expert == 1 or has_megatrons_dispatcher(run):
            yield run
            return
        dispatchers: tuple[Dispatcher, ...] = ("alltoall", "deduplicated")
        for dispatcher, chunks in product(dispatchers, _CHUNKS):
            if run.layout.tensor * run.layout.context * chunks <= run.model.seq_length:
                moe = replace(run.config.moe, dispatcher=dispatcher, overlap_chunks=chunks)
                yield run.changed(replace(run.config, moe=moe))


def _powers(most: int) -> list[int]:
    return [2**power for power in range(most.bit_length()) if 2**power <= most]


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
