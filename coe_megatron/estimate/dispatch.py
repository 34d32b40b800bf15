"""How tokens should travel to their experts: what `auto` stands for in `moe.dispatcher` and `moe.overlap_chunks`.

`resolved` replaces `auto` once, before anything is built or estimated. The choice follows from the config, the layout
and the report that `parallel.network` names, so that a dry run and all attempts of a run agree.

Nothing measured applies without a report, to expert-parallel groups inside a node, where the check measures nothing,
and to devices that no packaged machine file has. Then bytes decide: `deduplicated` if it sends at most 0.9 of what
`alltoall` does, since it has more work with its rows; and one chunk, since chunks send the same bytes in more
collectives.

With a measurement, the simplest candidate is taken that is predicted to be within 5 % of the fastest
(`estimate.step_time`): the speed of devices may be an assumption, and more chunks mean more and smaller kernels. What a
chunk can hide is the work of the others.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from coe_megatron.config.settings import Dispatcher, MoESettings, RunConfig
from coe_megatron.estimate.exchange_time import BACKWARD, FORWARD, has_megatrons_dispatcher
from coe_megatron.estimate.machine import Machine
from coe_megatron.estimate.measured_network import read_network
from coe_megatron.estimate.run_shape import RunShape
from coe_megatron.estimate.step_time import moe_seconds
from coe_megatron.estimate.traffic import Sent, expert_nodes, expert_traffic
from coe_megatron.text import duration

_CHUNKS = (1, 2, 4)
_FEWER_BYTES, _LESS_TIME = 0.9, 0.95


@dataclass(frozen=True)
class Candidate:
    """A way to dispatch tokens, in the pipeline stage that takes longest.

    Attributes:
        dispatcher, chunks: `moe.dispatcher` and `moe.overlap_chunks`.
        sent: bytes per rank and step.
        across_nodes: the part of `sent` that leaves the node.
        collectives: of a rank in a step, for sizes and for rows; None if Megatron's dispatcher sends the tokens.
        seconds: predicted for a step in MoE layers; None if nothing measured applies.
    """

    dispatcher: Dispatcher
    chunks: int
    sent: int
    across_nodes: int
    collectives: int | None
    seconds: float | None

    def __str__(self) -> str:
        return f"{self.dispatcher}, {self.chunks} chunk{'s' * (self.chunks > 1)}"


@dataclass(frozen=True)
class Dispatch:
    """How a run dispatches tokens, and how it could.

    Attributes:
        taken: as its settings say.
        auto: what `auto` takes for both settings.
        candidates: what `auto` compares, `alltoall` in one chunk first.
        basis: what the comparison rests on.
    """

    taken: Candidate
    auto: Candidate
    candidates: tuple[Candidate, ...]
    basis: str

    def __str__(self) -> str:
        text = f"{self._facts(self.taken)} ({self.basis})"
        return text if self.taken == self.auto else f"{text}; auto would take {self._facts(self.auto)}"

    def _facts(self, each: Candidate) -> str:
        plain = self.candidates[0]
        facts = [] if each.sent == plain.sent else [f"{each.sent / plain.sent:.2f} of the bytes of alltoall"]
        if each.seconds is not None and plain.seconds is not None:
            compared = "" if each == plain else f", {duration(plain.seconds)} with {plain}"
            facts.append(f"predicted {duration(each.seconds)} per step in MoE layers{compared}")
        return ": ".join([str(each), *([", ".join(facts)] if facts else [])])

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def resolved(config: RunConfig, vocab_size: int, world_size: int | None = None) -> RunShape:
    """The shape of a run whose config has what `auto` stands for.

    Args:
        vocab_size, world_size: as for `RunShape.of`.

    Raises:
        ConfigError: `parallel.network` does not name a report of the node check.
    """
    dispatchers, chunks = _options(config, config.moe)
    simplest = replace(config, moe=replace(config.moe, dispatcher=dispatchers[0], overlap_chunks=chunks[0]))
    report = config.parallel.network
    network = None if report is None else read_network(report)
    run = replace(RunShape.of(simplest, vocab_size, world_size), network=network)
    if len(dispatchers) * len(chunks) == 1:
        return run
    best = _choose(_candidates(run, dispatchers, chunks))
    return _with(run, best.dispatcher, best.chunks)


def dispatch(run: RunShape) -> Dispatch | None:
    """How a run dispatches tokens; None without expert parallelism."""
    if run.layout.expert == 1:
        return None
    moe = run.config.moe
    candidates = _candidates(run, *_options(run.config, replace(moe, dispatcher="auto", overlap_chunks="auto")))
    taken = _candidate(_with(run, moe.dispatcher, moe.resolved_chunks()))
    return Dispatch(taken, _choose(candidates), candidates, _basis(run))


def _options(config: RunConfig, moe: MoESettings) -> tuple[Sequence[Dispatcher], Sequence[int]]:
    """The dispatchers and numbers of chunks from which to choose, the simplest ones first.

    Megatron's dispatchers, which a capacity and `allgather` need, know neither deduplication nor chunks. A chunk has at
    least one position of the sequence.
    """
    is_ours = moe.capacity_factor is None and moe.dispatcher != "allgather" and config.parallel.expert > 1
    positions = config.model.seq_length // (config.parallel.tensor * config.parallel.context)
    dispatchers: Sequence[Dispatcher] = ("alltoall", "deduplicated") if is_ours else ("alltoall",)
    chunks = [count for count in _CHUNKS if count <= positions] if is_ours else [1]
    return (
        dispatchers if moe.dispatcher == "auto" else [moe.dispatcher],
        chunks if moe.overlap_chunks == "auto" else [moe.overlap_chunks],
    )


def _candidates(run: RunShape, dispatchers: Sequence[Dispatcher], chunks: Sequence[int]) -> tuple[Candidate, ...]:
    """Chunks only if their effect is known."""
    known = chunks if _measured(run) is not None else chunks[:1]
    return tuple(_candidate(_with(run, dispatcher, count)) for count, dispatcher in product(known, dispatchers))


def _measured(run: RunShape) -> Machine | None:
    """The machine with the measured network between its nodes; None if tokens stay inside a node, or it is unknown."""
    return run.network.machine if run.network is not None and expert_nodes(run) > 1 else None


def _choose(candidates: Sequence[Candidate]) -> Candidate:
    """The first candidate of which the best is not clearly better."""
    seconds = [each.seconds for each in candidates if each.seconds is not None]
    if len(seconds) == len(candidates):
        return next(each for each, own in zip(candidates, seconds, strict=True) if min(seconds) >= _LESS_TIME * own)
    fewest = min(each.sent for each in candidates)
    return next(each for each in candidates if fewest > _FEWER_BYTES * each.sent or each.sent == fewest)


def _candidate(run: RunShape) -> Candidate:
    """What the settings of a run amount to."""
    shapes = {stage: run.stage_model(stage) for stage in range(run.layout.pipeline)}
    different = {(shape.moe_layers, shape.chains): stage for stage, shape in shapes.items()}
    stages = (_of_stage(run, stage) for stage in different.values())
    return max(stages, key=lambda each: (each.seconds or 0.0, each.sent))


def _of_stage(run: RunShape, stage: int) -> Candidate:
    moe, sent = run.config.moe, sum(expert_traffic(run, stage).values(), Sent(0, 0))
    machine, collectives = _measured(run), _collectives(run, stage)
    seconds = None if machine is None or collectives is None else moe_seconds(run, machine, stage)
    return Candidate(moe.dispatcher, moe.resolved_chunks(), sent.total, sent.across_nodes, collectives, seconds)


def _collectives(run: RunShape, stage: int) -> int | None:
    """One for the sizes of each routing, and all-to-alls in each pass of an iteration."""
    if has_megatrons_dispatcher(run):
        return None
    is_repeated = run.config.moe.recompute in ("iteration", "layer")
    in_iteration = sum(FORWARD) * (1 + is_repeated) + sum(BACKWARD)
    kinds = run.stage_model(stage).moe_kinds
    of_chunk = sum(count * (kind.routings + in_iteration * kind.chain.iterations) for count, kind in kinds)
    return run.micro_batches * run.config.moe.resolved_chunks() * of_chunk


def _with(run: RunShape, dispatcher: Dispatcher, chunks: int) -> RunShape:
    return run.changed(replace(run.config, moe=replace(run.config.moe, dispatcher=dispatcher, overlap_chunks=chunks)))


def _basis(run: RunShape) -> str:
    network = run.network
    if run.config.moe.capacity_factor is not None:
        return "the only choice with moe.capacity_factor"
    if network is None:
        return "by bytes alone: parallel.network is null"
    if network.speeds is None:
        return f"by bytes alone: {network.name} has no measurement over all nodes"
    if expert_nodes(run) == 1:
        return f"by bytes alone: tokens stay inside nodes of {run.config.parallel.ranks_per_node} ranks"
    if network.machine is None:
        return f"by bytes alone: the speed of {network.device or 'the devices'} is unknown"
    return f"{network.name}: {network.speeds}"
