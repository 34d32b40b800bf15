"""Saves a run and takes it up again: a folder of checkpoints that are either whole or not counted.

    checkpoints/
      step-00000200/
        tensors/        weights and optimizer states, Megatron's distributed format (torch_dist)
        random/         the generators' states, a file a rank
        state.json      the layout that saved, and where the run stands in the training loop's own words
        complete.json   written last: every other file with its size and SHA-256
      step-00000400.tmp/    a save that was not finished

A checkpoint is written under a temporary name and renamed when it is whole, so that a run killed in the middle finds
the one before. All functions are collective, and the folder must be seen by all ranks. A resumed run goes on bit by bit
as if it had never stopped, on the same layout; on another one only the random numbers (dropout) differ.
"""

import io
import os
import pickle
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed.checkpoint.api import CheckpointException

from coe_megatron.checkpoint import listing, sharding
from coe_megatron.checkpoint.background import Background
from coe_megatron.checkpoint.integrity import SEAL, seal
from coe_megatron.checkpoint.metadata import METADATA, CheckpointMetadata, SavedLayout
from coe_megatron.checkpoint.names import CheckpointName, name_of, step_of
from coe_megatron.checkpoint.storage import cause_of
from coe_megatron.distributed.collectives import Group, is_rank0, run_on_all, run_on_rank0
from coe_megatron.errors import ConfigError, one_line
from coe_megatron.files import remove, write_atomically
from coe_megatron.zero import optimizer_states
from coe_megatron.zero.engine import Engine


class CheckpointNotSaved(Exception):
    """A checkpoint could not be written, on one rank at least; those before it are as they were."""


def save(
    folder: Path,
    step: int,
    engine: Engine,
    state: dict[str, Any],
    keep: int,
    milestones: Collection[int] = (),
    background: Background | None = None,
) -> Path:
    """Save a run between two steps, and delete what is older than the newest `keep` checkpoints up to this one.

    What lies beyond `step` stays: a run that goes on from an earlier step found it damaged. So do checkpoints of the
    steps in `milestones`, which do not count as one of the newest; name there also what was found damaged.

    Args:
        folder: where the checkpoints of this run lie; made if needed.
        step: steps done.
        state: what the training loop wants back from `load_latest`; goes into JSON.
        background: writes while training goes on; until it is done the copies take host memory (`states.take_tensors`
            says how much). What it was given before is waited for first, so that there is one copy at a time.

    Returns:
        The checkpoint's folder. One of the same step is replaced.

    Raises:
        CheckpointNotSaved: on all ranks; by `background` the next time it is waited for.
    """
    final = folder / name_of(step)
    if background is not None:
        background.wait()
    snapshot = _Snapshot.take(engine, state)

    def write(group: Group = None) -> None:
        _write(snapshot, final, group)
        run_on_rank0(lambda: _prune(folder, step, keep, milestones), group)

    if background is None:
        _unless_not_saved(final, write)
    else:
        background.start(lambda group: _unless_not_saved(final, write, group))
    return final


def load_latest(folder: Path, engine: Engine) -> dict[str, Any] | None:
    """Take up the newest whole checkpoint: weights, optimizer states, generators.

    What is unfinished or damaged is named on stderr, and left where it is.

    Returns:
        The `state` that was saved with it; None if no save was ever finished.

    Raises:
        ConfigError: there are checkpoints, but none is whole; or the newest whole one is of another model.
    """
    try:
        checkpoint = listing.newest_whole(folder)
    except ConfigError as error:
        raise ConfigError(f"{error}: choose another output, or delete that folder to begin anew") from error
    if checkpoint is not None:
        return load(checkpoint, engine)
    if is_rank0() and listing.newest_first(folder):
        print(f"no save in {folder} was ever finished: the run begins anew", file=sys.stderr)
    return None


def load(checkpoint: Path, engine: Engine) -> dict[str, Any]:
    """Take up one whole checkpoint: weights, optimizer states, generators; returns the `state` saved with it.

    Raises:
        ConfigError: it is of another model, or holds weights alone.
    """
    facts = run_on_rank0(lambda: CheckpointMetadata.read(checkpoint))
    if facts.optimizer_steps is None:
        raise ConfigError(f"checkpoint {checkpoint} holds weights alone: begin a run with it as training.warm_start")
    sharding.load_tensors(engine, checkpoint / "tensors")
    optimizer_states.set_steps(engine, facts.optimizer_steps)
    if facts.layout.has_ranks_of(_layout(engine)):  # else no rank's generators suit one that saved
        _set_random_states(listing.random_file(checkpoint, dist.get_rank()))
    return facts.state


def load_weights(source: Path, engine: Engine) -> tuple[Path, dict[str, Any]]:
    """Take up the weights of another run alone, its fp32 masters included; optimizer moments and generators stay.

    Args:
        source: a checkpoint, or the folder of a run or its `checkpoints` for the newest whole one.

    Returns:
        The checkpoint's folder, and the `state` that was saved with it.

    Raises:
        ConfigError: there is no whole checkpoint, or it is of another model.
    """
    checkpoint = listing.find(source)
    sharding.load_tensors(engine, checkpoint / "tensors", kinds=(optimizer_states.MASTER,))
    return checkpoint, run_on_rank0(lambda: CheckpointMetadata.read(checkpoint)).state


@dataclass(frozen=True)
class _Snapshot:
    """A run between two steps, copied into this rank's memory: what it has to write."""

    tensors: sharding.Tensors
    random: bytes
    facts: CheckpointMetadata

    @classmethod
    def take(cls, engine: Engine, state: dict[str, Any]) -> "_Snapshot":
        random = io.BytesIO()
        torch.save(sharding.random_states(), random)
        facts = CheckpointMetadata(_layout(engine), optimizer_states.steps(engine), state)
        return cls(sharding.take_tensors(engine), random.getvalue(), facts)


def _layout(engine: Engine) -> SavedLayout:
    return SavedLayout(
        ranks=dist.get_world_size(),
        tensor=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline=parallel_state.get_pipeline_model_parallel_world_size(),
        expert=parallel_state.get_expert_model_parallel_world_size(),
        expert_tensor=parallel_state.get_expert_tensor_parallel_world_size(),
        zero_stage=engine.zero_optimization_stage(),
    )


def _unless_not_saved(final: Path, write: Callable[..., None], *group: Group) -> None:
    """Whatever is in the way of writing becomes one line; the cause stays with it, and room is made again.

    A RuntimeError is none of that: another rank is gone, which says nothing about the disk, and starting again helps.
    """
    try:
        write(*group)
    except (CheckpointException, OSError, ConfigError) as error:  # the last of a folder that cannot be read
        cause = cause_of(error) if isinstance(error, CheckpointException) else error
        if is_rank0():
            remove(_partial(final), ignore_errors=True)
        raise CheckpointNotSaved(one_line(f"checkpoint {final} could not be saved: {cause}")) from error


def _write(snapshot: _Snapshot, final: Path, group: Group) -> None:
    partial = _partial(final)
    run_on_rank0(lambda: _make_empty(partial), group)
    sharding.write_tensors(snapshot.tensors, partial / "tensors", group)
    run_on_all(lambda: write_atomically(listing.random_file(partial, dist.get_rank()), snapshot.random), group)
    run_on_rank0(lambda: write_atomically(partial / METADATA, snapshot.facts.as_json()), group)
    seal(partial, group)
    run_on_rank0(lambda: listing.publish(partial, final), group)


def _set_random_states(path: Path) -> None:
    try:
        sharding.set_random_states(torch.load(path, map_location="cpu", weights_only=True))
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:  # of a file that was looked into before
        raise ConfigError(f"random/{path.name} of checkpoint {path.parents[1]} cannot be used: {error}") from error


def _partial(final: Path) -> Path:
    return final.with_name(str(CheckpointName(step_of(final), finished=False)))


def _make_empty(partial: Path) -> None:
    for unfinished in listing.unfinished(partial.parent):  # they only take room: no two runs write into one folder
        remove(unfinished, ignore_errors=True)
    for part in ("tensors", "random"):
        (partial / part).mkdir(parents=True)


def _prune(folder: Path, step: int, keep: int, milestones: Collection[int]) -> None:
    """Of what is not newer than `step`, leave the newest `keep` checkpoints with a seal, and what is among them.

    What cannot be deleted is said and stays: the checkpoint that was just saved is whole all the same.
    """
    listed = [(entry, step_of(entry)) for entry in listing.newest_first(folder)]
    entries = [entry for entry, its_step in listed if its_step <= step and its_step not in milestones]
    sealed = [entry for entry in entries if listing.finished(entry) and os.path.exists(entry / SEAL)]
    for entry in entries[entries.index(sealed[keep - 1]) + 1 :] if len(sealed) >= keep else []:
        try:
            listing.delete(entry)
        except OSError as error:
            print(one_line(f"checkpoint {entry} could not be deleted: {error}"), file=sys.stderr)
