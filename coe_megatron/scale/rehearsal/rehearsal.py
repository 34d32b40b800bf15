"""Rehearses a run of any number of ranks in one process: makes what each rank would have, checks it, and counts."""

import sys
from dataclasses import dataclass

from coe_megatron.errors import ConfigError
from coe_megatron.estimate import closed_forms
from coe_megatron.estimate.parameter_shards import parameter_shards
from coe_megatron.estimate.run_estimate import size
from coe_megatron.estimate.run_shape import RunShape
from coe_megatron.local_backend import megatron_compat, without_cuda
from coe_megatron.scale.rehearsal import files, groups, job, samples, shards
from coe_megatron.scale.rehearsal.ranks import as_rank, build_without_storage, groups_made
from coe_megatron.scale.rehearsal.shards import RankShards

_SHOWN = 10_000  # bytes: smaller files of a checkpoint are not named


def rehearse(run: RunShape) -> dict[str, str]:
    """Facts about the run's ranks, by what was checked or counted; creates and destroys process groups.

    Raises:
        ConfigError: a check fails; one line.
    """
    megatron_compat.install()
    without_cuda.install()
    held = shards.build_all(run)
    shards.check_once(run, held)
    shards.check_stages(run, held)
    world = _in_full_world(run, held)
    return {
        "run": f"{run.layout.world_size:,} ranks ({run.layout}), as one process",
        "process groups": _groups(run, world),
        "shards": _shards(run, held, world),
        "optimizer": _optimizer(run),
        "samples": _samples(run),
        "SLURM": _job(run),
        **_start(run),
        **_checkpoint(run, held),
    }


@dataclass(frozen=True)
class _World:
    """Ranks of the full world that this process has been; groups that each of them made, and was in."""

    ranks: list[int]
    made: int
    member: int


def _in_full_world(run: RunShape, held: list[RankShards]) -> _World:
    """Be some ranks of the full world: the first, one in the middle, the first of the last stage, and the last."""
    ranks = run.layout.world_size
    chosen = sorted({0, ranks // 2 - 1 if ranks > 1 else 0, ranks - ranks // run.layout.pipeline, ranks - 1})
    made = member = 0
    for rank in chosen:
        with as_rank(run, rank, ranks):
            groups.check_own_groups(run, rank)
            made, member = (max(pair) for pair in zip(groups_made(), (made, member), strict=True))
            shards.check_in_full_world(run, rank, RankShards.of(build_without_storage(run)), held)
    return _World(chosen, made, member)


def _groups(run: RunShape, world: _World) -> str:
    groups.check_all_groups(run)
    return (
        f"of every kind they have each rank once, and those of {_listed(world.ranks)} are as the estimates assume; "
        f"a rank makes {world.made:,} and is in {world.member}"
    )


def _shards(run: RunShape, held: list[RankShards], world: _World) -> str:
    places = [place for shard in held for place in shard.main]
    return (
        f"{len(places):,} parts on {len(held):,} ranks are the {len({place[0] for place in places}):,} tensors once: "
        f"{closed_forms.parameters(run.model).total:,} parameters; {_listed(world.ranks)} hold the same parts as their "
        f"counterparts there, and write none as further replicas"
    )


def _optimizer(run: RunShape) -> str:
    stages = [parameter_shards(run, stage) for stage in range(run.layout.pipeline)]
    largest = max(stages, key=lambda each: each.partition)
    kinds = {"dense": (largest.dense, largest.dense_replicas), "expert": (largest.experts, largest.expert_replicas)}
    divided = " and ".join(f"{count:,} {kind} ones over {ranks:,} ranks" for kind, (count, ranks) in kinds.items())
    return f"each rank has the parameters of the estimate; ZeRO {run.config.zero.stage} divides up to {divided}"


def _samples(run: RunShape) -> str:
    before, after = samples.check_training_order(run)
    validation = samples.check_validation(run)
    samples.check_tokens(run)
    return (
        f"each goes to one replica once per epoch (6 steps, two ends of an epoch, a resume from {before:,} to "
        f"{after:,} replicas), each of {validation:,} to validate on once, each token to one of {run.layout.context} "
        f"ranks; a rank keeps up to {size(files.order_bytes(run))} of their order, and 8 bytes per sample of a corpus"
    )


def _job(run: RunShape) -> str:
    ranks, on_node = run.layout.world_size, run.ranks_on_a_node
    if ranks % on_node:
        raise ConfigError(f"parallel.ranks_per_node is {on_node}: it must divide the number of ranks, {ranks:,}")
    longest = job.check_job(nodes := ranks // on_node, on_node)
    return (
        f"{nodes:,} nodes start each of {ranks:,} ranks once, by torchrun or as tasks; "
        f"the longest argument has {longest:,} of {job.LONGEST_ARGUMENT:,} bytes"
    )


def _start(run: RunShape) -> dict[str, str]:
    ranks, nodes = run.layout.world_size, run.layout.world_size // run.ranks_on_a_node
    modules = sum(getattr(module, "__file__", None) is not None for module in [*sys.modules.values()])
    opens = files.data_opens(run.config.data)
    return {
        "rendezvous": f"{ranks + nodes:,} connections to one store, by ranks and torchruns; {ranks + 2:,} entries of "
        "ours, of which one is the config that rank 0 has read",
        "start": f"ranks open files of the data {ranks * opens:,} times ({opens} each), and of Python about "
        f"{ranks * modules:,} times ({modules:,} each); {2 * ranks + nodes:,} log files",
    }


def _checkpoint(run: RunShape, held: list[RankShards]) -> dict[str, str]:
    plan = files.CheckpointPlan.of(run, held)
    plan.check()
    resume, (parts, lists) = files.Resume.of(run, held, plan), files.exchanged_before_save(run, held)
    large = (name for name, each in plan.sizes.items() if each >= _SHOWN)
    kinds = ", ".join(f"{plan.files[name]:,} {name} of {_bytes(plan.sizes[name])}" for name in large)
    return {
        "checkpoint": f"{plan.total_files:,} files, {size(plan.total_bytes)}: {kinds}",
        "before a save": f"a rank receives up to {parts:,} descriptions of parts, {size(lists)}",
        "resume": f"all ranks open files {resume.checked:,} times to check them and up to {resume.opened:,} times to "
        f"read tensors, {size(resume.read)}",
    }


def _bytes(count: int) -> str:
    return size(count) if count >= 2**20 else f"{count / 2**10:,.1f} KiB"


def _listed(ranks: list[int]) -> str:
    names = [f"{rank:,}" for rank in ranks]
    return f"ranks {', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else f"rank {names[0]}"
