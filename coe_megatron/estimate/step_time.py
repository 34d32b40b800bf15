"""The predicted time of a step, by where it goes: what a rank computes, sends and waits for, on a machine.

A stage's pass through a micro-batch is the sum of its matrix products at the machine's speed for their shape, of the
bytes that other operations move, and of what the host needs to start them: all of it, or where the device works
meanwhile only what exceeds the device's time. To this come collectives that nothing hides:

* tokens to their experts and back, chunk by chunk (`estimate.exchange_time`), with the host's waits for the sizes;
* those of tensor and context parallelism, and messages between pipeline stages that wait for each other;
* gradients, as far as they take longer than the backward pass that hides them (nothing hides them in stage 0, in
  stage 1 with bf16, and in a pipeline), and the weights that stages 1 and 2 gather after the update;
* stage 3's gathers, as far as they take longer than the passes that hide them.

A collective takes the longer one of its time inside a node and across nodes, where the ranks of a node share its
adapters. Ranks that share the cores of a node (`Machine.cores`) slow each other down, less while some of them wait, and
nothing is hidden if there is no core to spare. In a pipeline the stage that takes longest sets the pace.
"""

from dataclasses import dataclass
from functools import cached_property

from coe_megatron.estimate.closed_forms import ModelShape
from coe_megatron.estimate.exchange_time import PassSeconds, has_megatrons_dispatcher, layer_seconds
from coe_megatron.estimate.machine import Machine, Way
from coe_megatron.estimate.operations import Moves, Product, Rank
from coe_megatron.estimate.parameter_shards import ParameterShards, parameter_shards
from coe_megatron.estimate.run_shape import RunShape
from coe_megatron.estimate.traffic import (
    Group,
    Sent,
    expert_traffic,
    groups,
    one_way,
    sequence_traffic,
    tensor_collectives,
    traffic,
)
from coe_megatron.text import aligned, duration

_BAR = 40  # columns of the longest part
_FP32 = 4
_NORM_READS = 2 * _FP32  # bytes per parameter of its gradient: its norm is taken, and it is scaled
UPDATE_BYTES = 7 * _FP32  # per parameter: AdamW reads and writes weights and two moments, and reads gradients
_STAGE_3_OPERATIONS = 220  # per layer and pass: DeepSpeed's hooks of its modules take the host as long
_GRADIENT_MOVES = 10  # elements per parameter and backward pass: sums over micro-batches, copies into buckets


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step in the pipeline stage that takes longest.

    Attributes:
        parts: by where they go; only what nothing hides. `moves` are operations other than products; `starts` is the
            time that the host needs beyond that of the device; `imbalance` what the busiest rank takes longer.
        forward: seconds of the forward pass of a micro-batch.
    """

    parts: dict[str, float]
    forward: float

    @property
    def total(self) -> float:
        """All seconds."""
        return sum(self.parts.values())

    def bars(self) -> list[str]:
        """The parts as lines of text with bars, the longest one first."""
        longest = max(self.parts.values())
        rows = [
            (
                f"  {name.replace('_', '-')}",
                duration(seconds),
                f"{seconds / self.total:.1%}",
                "█" * max(1, round(_BAR * seconds / longest)),
            )
            for name, seconds in sorted(self.parts.items(), key=lambda part: -part[1])
        ]
        return aligned(rows, "<>><")


@dataclass(frozen=True)
class Costs:
    """Seconds of a rank's operations and collectives on a machine."""

    run: RunShape
    machine: Machine

    @property
    def slowdown(self) -> float:
        """How many times slower a rank is because others share its cores."""
        return self.machine.slowdown(self.run.ranks_on_a_node)

    @property
    def hides(self) -> bool:
        """Whether collectives go on beside work: on devices, and where a node has a core to spare."""
        cores = self.machine.cores
        return cores is None or cores > self.run.ranks_on_a_node

    def waits(self, imbalance: float) -> float:
        """What the busiest rank takes longer, over the mean; ranks that wait leave it the cores that they share."""
        return max(0.0, imbalance / self.slowdown - 1)

    def product(self, each: Product) -> float:
        """The forward pass of a product: by FLOPs, or by the bytes of its matrices if that takes longer."""
        precision = "fp32" if each.in_fp32 else self.run.config.training.precision
        arithmetic = self.machine.arithmetic(precision)
        rates = arithmetic.grouped if each.grouped else arithmetic.products
        width = (each.inner * each.outer) ** 0.5
        size = _FP32 if precision == "fp32" else self.run.element_bytes
        elements = each.rows * each.inner + each.inner * each.outer + each.rows * each.outer
        moved = each.count * self.machine.memory.seconds(size * elements)
        return self.slowdown * each.part * max(each.flops / rates.at(each.rows, width), moved)

    def moves(self, each: Moves) -> float:
        """Elementwise operations."""
        return self.slowdown * self.machine.memory.seconds(each.bytes, max(1.0, each.operations))

    def starts(self, operations: float, device: float) -> float:
        """What the host needs to start operations beyond the device's seconds; all of it if they work in turns."""
        host = self.slowdown * self.machine.host.operation * operations
        return max(0.0, host - device) if self.machine.host.is_asynchronous else host

    def collective(self, way: str, sent: Sent, group: Group, times: float = 1) -> float:
        """So many collectives of a kind, which send so much in total from each rank."""
        if group.size == 1:
            return 0.0
        inside, ranks = getattr(self.machine.inside, way), self.run.ranks_on_a_node
        own = sent.inside_node * (ranks if self.machine.cores else 1) / inside.bandwidth
        if self.machine.across is None or not group.others_across:
            return own + times * (inside.start + inside.hop * (group.size - 2))
        across = getattr(self.machine.across, way)
        others = sent.across_nodes * max(1.0, ranks / self.machine.adapters) / across.bandwidth
        return max(own, others) + times * _latency(way, inside, across, group)


def _latency(name: str, inside: Way, across: Way, group: Group) -> float:
    """Of a collective between nodes: a ring goes from rank to rank, most of which are neighbours in a node."""
    if name != "ring":
        return across.start + across.hop * (group.size - 2)
    hops = float(group.size * group.ring_across)  # between nodes
    return across.start + across.hop * (hops - 2) + inside.hop * (group.size - hops)


def idle_passes(stages: int, slowdown: float) -> float:
    """Passes of a micro-batch for which a pipeline stage waits; stages that wait leave others the cores they share.

    Args:
        slowdown: of ranks that all work.
    """
    return sum(max(1 / slowdown, working / stages) for working in range(1, stages))


def step_time(run: RunShape, machine: Machine, imbalance: float = 1.0) -> StepTime:
    """The time of a step.

    Args:
        imbalance: the load of the busiest rank's experts over the mean, as measured in a run.
    """
    costs, different = Costs(run, machine), {}
    for stage in range(run.layout.pipeline):
        shape = run.stage_model(stage)
        is_end = stage in (0, run.layout.pipeline - 1)
        different[shape.layers, shape.moe_layers, shape.chains, stage if is_end else None] = stage
    return max((_of_stage(costs, stage, imbalance) for stage in different.values()), key=lambda found: found.total)


def products_and_moves(costs: Costs) -> float:
    """Seconds of a micro-batch in the first pipeline stage, both directions, without collectives."""
    passes = _Passes(costs, 0)
    return sum(sum(passes.work(backward).values()) for backward in (False, True))


def moe_seconds(run: RunShape, machine: Machine, stage: int) -> float:
    """Seconds of a step in the MoE layers of a pipeline stage, without idle time of the pipeline."""
    return run.micro_batches * _Passes(Costs(run, machine), stage).moe_layers()


def inner_collectives(costs: Costs) -> float:
    """Seconds of a micro-batch in the first pipeline stage in which tokens, hidden states, keys and values travel."""
    passes, run = _Passes(costs, 0), costs.run
    links = groups(run.layout, run.config.parallel.ranks_per_node)
    inner = sum(passes.collectives(name, sent, links[name]) for name, sent in sequence_traffic(run, 0).items())
    return inner + sum(passes.exchange())


def _of_stage(costs: Costs, stage: int, imbalance: float) -> StepTime:
    run, links = costs.run, groups(costs.run.layout, costs.run.config.parallel.ranks_per_node)
    passes = _Passes(costs, stage)
    sent = traffic(run, stage, passes.shards)
    forward, backward = passes.work(backward=False), passes.work(backward=True)
    parts = {kind: forward.get(kind, 0.0) + backward.get(kind, 0.0) for kind in {**forward, **backward}}
    exchange = passes.exchange()
    parts["imbalance"] = costs.waits(imbalance) * (parts["experts"] + sum(exchange))
    parts["all_to_all"] = sum(exchange)
    passing = {name: passes.collectives(name, sent[name], links[name]) for name in ("tensor", "context", "pipeline")}
    parts |= passing
    parts = {name: run.micro_batches * seconds for name, seconds in parts.items()}
    parts["bubble"] = (
        sum(parts.values())
        * idle_passes(run.layout.pipeline, costs.slowdown)
        / (run.layout.virtual_pipeline * run.micro_batches)
    )
    hidden_by = sum(backward.values()) + exchange[1]
    parts |= _replicas(costs, passes.shards, sent, links, hidden_by, sum(forward.values()) + exchange[0] + hidden_by)
    parts["update"] = _update(costs, passes.shards) + costs.slowdown * costs.machine.host.step
    forward_pass = sum(forward.values()) + exchange[0] + sum(passing.values()) / 2
    return StepTime({name: seconds for name, seconds in parts.items() if seconds}, forward_pass)


@dataclass(frozen=True)
class _Passes:
    """A micro-batch's passes through a pipeline stage."""

    costs: Costs
    stage: int

    @cached_property
    def _rank(self) -> Rank:
        run = self.costs.run
        return Rank(run.stage_model(self.stage), run.stage_pass(self.stage))

    @cached_property
    def shards(self) -> ParameterShards:
        """The parameters of the stage on a rank."""
        return parameter_shards(self.costs.run, self.stage)

    def work(self, backward: bool) -> dict[str, float]:
        """Seconds by kind, in one direction; backward with what is recomputed."""
        costs, found = self.costs, {"moves": 0.0}
        operations, recompute = 0.0, costs.run.config.moe.recompute
        for count, work, is_chain in self._rank.parts(costs.run.config.moe.resolved_chunks()):
            repeats = is_chain and backward and recompute in ("iteration", "layer")
            for each in work.products:
                times = (each.again if backward else 1) + repeats
                found[each.kind] = found.get(each.kind, 0.0) + count * times * costs.product(each)
            for moves in [work.backward, *([work.forward] if repeats else [])] if backward else [work.forward]:
                found["moves"] += count * costs.moves(moves)
                operations += count * moves.operations
        if backward:
            moved = _GRADIENT_MOVES * costs.run.element_bytes * self.shards.total
            found["moves"] += costs.moves(Moves(moved, 1))
        if costs.run.config.zero.stage == 3:
            operations += _STAGE_3_OPERATIONS * self._rank.shape.layers
        return found | {"starts": costs.starts(operations, sum(found.values()))}

    def exchange(self) -> tuple[float, float]:
        """Seconds in which nothing but tokens' journeys is under way, forward and backward."""
        run = self.costs.run
        if run.layout.expert * run.layout.expert_tensor == 1:
            return 0.0, 0.0
        if has_megatrons_dispatcher(run):
            sent = sum(expert_traffic(run, self.stage).values(), Sent(0, 0))
            group = groups(run.layout, run.config.parallel.ranks_per_node)["expert"]
            times = 2 * sum(count * kind.chain.iterations for count, kind in self._rank.shape.moe_kinds)
            seconds = self.costs.collective("ring", sent, group, 2 * times * run.micro_batches) / run.micro_batches
            return seconds / 2, seconds / 2
        each = [self._exposed(count, kind) for count, kind in self._rank.shape.moe_kinds]
        return sum(forward for forward, _ in each), sum(backward for _, backward in each)

    def moe_layers(self) -> float:
        """Seconds in MoE layers with the journeys of their tokens, both directions."""
        run, kinds = self.costs.run, self._rank.shape.moe_kinds
        return sum(count * sum(layer_seconds(run, kind, self._chunk(kind))) for count, kind in kinds)

    def _exposed(self, count: int, kind: ModelShape) -> tuple[float, float]:
        run, each = self.costs.run, self._chunk(kind)
        forward, backward = layer_seconds(run, kind, each)
        chunks = run.config.moe.resolved_chunks()
        work = chunks * (kind.routings * each.router + kind.chain.iterations * (each.shared + each.experts))
        repeats = run.config.moe.recompute in ("iteration", "layer")
        return count * (forward - work), count * (backward - (2 + repeats) * work)

    def _chunk(self, kind: ModelShape) -> PassSeconds:
        """Of a chunk in an iteration, forward."""
        run, costs, chunks = self.costs.run, self.costs, self.costs.run.config.moe.resolved_chunks()
        group = groups(run.layout, run.config.parallel.ranks_per_node)["expert"]
        work, products = self._rank.iteration(kind, True, chunks), {"routers": 0.0, "shared": 0.0, "experts": 0.0}
        for product in work.products:
            name = product.kind if product.kind in products else "experts"
            products[name] += costs.product(product)
        latency = costs.collective("all_to_all", Sent(0, 0), group)
        sizes = costs.collective("ring", Sent(0, 0), group) if run.layout.expert_tensor > 1 else latency
        return PassSeconds(
            way=costs.collective("all_to_all", one_way(run, kind), group, 0.0) / chunks,
            latency=latency,
            sizes=sizes + costs.machine.host.wait,
            router=products["routers"],
            shared=products["shared"],
            experts=products["experts"] + costs.moves(work.forward),
            at_once=2 if costs.machine.cores else 1,
            hides=costs.hides,
        )

    def collectives(self, name: str, sent: Sent, group: Group) -> float:
        """Seconds of those of tensor, context or pipeline parallelism."""
        run, shape = self.costs.run, self._rank.shape
        if name == "pipeline":
            if run.layout.virtual_pipeline > 1 and self.costs.hides:
                return 0.0  # the messages of a part travel while the other parts work
            times = 2 * run.layout.virtual_pipeline
            return self.costs.collective("point_to_point", sent, group, times * run.micro_batches) / run.micro_batches
        if name == "tensor":
            times = tensor_collectives(run, self.stage)
        else:  # ranks that share sequences average what routers have counted
            times = 2 * shape.layers + sum(count * kind.routings for count, kind in shape.moe_kinds)
        return self.costs.collective("ring", sent, group, times * run.micro_batches) / run.micro_batches


def _replicas(
    costs: Costs, shards: ParameterShards, sent: dict[str, Sent], links: dict[str, Group], backward: float, both: float
) -> dict[str, float]:
    """Gradients and weights, as far as nothing hides them.

    Args:
        backward, both: seconds of a micro-batch's backward pass, and of both passes.
    """
    run, stage = costs.run, costs.run.config.zero.stage
    group = max(links["data"], links["expert_data"], key=lambda each: each.size)
    rounds = run.micro_batches if stage > 1 else 1
    buckets = rounds * max(1, shards.total // shards.sizes.reduce_bucket)
    gradients = costs.collective("ring", sent["gradients"], group, buckets)
    at_the_end = stage == 0 or run.layout.pipeline > 1 or (stage == 1 and run.element_bytes < _FP32)
    hidden = 0.0 if at_the_end or not (costs.hides and shards.sizes.overlap) else rounds * backward
    modules = 2 * run.micro_batches * len(shards.segments) if stage == 3 else buckets
    weights = costs.collective("ring", sent["weights"], group, modules) if stage else 0.0
    hides_weights = run.micro_batches * both if stage == 3 and costs.hides else 0.0
    return {"gradients": max(0.0, gradients - hidden), "weights": max(0.0, weights - hides_weights)}


def _update(costs: Costs, shards: ParameterShards) -> float:
    """The norm of the gradients, and AdamW on the rank's partition, on the device or in host memory."""
    run, host = costs.run, costs.machine.host
    size = shards.total if run.config.zero.stage == 0 else shards.partition
    norm = costs.moves(Moves(_NORM_READS * size, 2)) + host.wait
    if run.config.zero.offload_optimizer:
        moved = (_FP32 + run.element_bytes) * size
        return norm + costs.slowdown * (moved / host.transfer + UPDATE_BYTES * size / host.update)
    return norm + costs.moves(Moves((UPDATE_BYTES + run.element_bytes * (run.element_bytes < _FP32)) * size, 1))
