"""Saves and loads a run: a folder of checkpoints, of which only complete ones are used.

    checkpoints/
      step-00000200/
        tensors/        weights and optimizer states, Megatron's distributed format (torch_dist)
        random/         RNG states, one file per rank
        state.json      the layout that saved it, and the state of the training loop
        complete.json   the manifest, written last: every other file with its size and SHA-256
      step-00000400.tmp/    a save that was not finished

A checkpoint is written under a temporary name and renamed when it is complete, so that a run killed during a save
resumes from the one before. All functions are collective, and all ranks must see the folder. In the same layout a
resumed run is bit-identical to an uninterrupted one; in another layout only the random numbers (dropout) differ.
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
from coe_megatron.checkpoint.integrity import MANIFEST, write_manifest
from coe_megatron.checkpoint.metadata import METADATA, CheckpointMetadata, SavedLayout
from coe_megatron.checkpoint.names import CheckpointName, name_of, step_of
from coe_megatron.checkpoint.storage import cause_of
from coe_megatron.distributed.collectives import Group, is_rank0, run_on_all, run_on_rank0
from coe_megatron.errors import ConfigError, one_line
from coe_megatron.files import remove, write_atomically
from coe_megatron.zero import optimizer_states
from coe_megatron.zero.engine import Engine


class CheckpointNotSaved(Exception):
    """At least one rank could not write its part of a checkpoint; earlier checkpoints are unchanged."""


def save(
    folder: Path,
    step: int,
    engine: Engine,
    state: dict[str, Any],
    keep: int,
    milestones: Collection[int] = (),
    background: Background | None = None,
) -> Path:
    """Save a run between two steps, then delete all but the most recent `keep` checkpoints up to this one.

    Checkpoints after `step` stay: a run that resumed from an earlier step has found them damaged. Checkpoints of the
    steps in `milestones` also stay and do not count towards `keep`; pass damaged ones there too.

    Args:
        folder: of this run's checkpoints; created if needed.
        step: steps done.
        state: of the training loop, as `load_latest` will return it; must be JSON values.
        background: writes while training continues; until it is done, the snapshot takes host memory (see
            `sharding.copy_to_host`). This waits for its previous task first, so that there is one snapshot at a time.

    Returns:
        The checkpoint's folder. An existing checkpoint of the same step is replaced.

    Raises:
        CheckpointNotSaved: on all ranks; with `background`, from its next `wait`.
    """
    final = folder / name_of(step)
    if background is not None:
        background.wait()
    snapshot = _Snapshot.take(engine, state)

    def write(group: Group = None) -> None:
        _write(snapshot, final, group)
        run_on_rank0(lambda: _prune(folder, step, keep, milestones), group)

    if background is None:
        _or_not_saved(final, write)
    else:
        background.start(lambda group: _or_not_saved(final, write, group))
    return final


def load_latest(folder: Path, engine: Engine) -> dict[str, Any] | None:
    """Resume from the most recent complete checkpoint: weights, optimizer states, RNG states.

    Unfinished and damaged checkpoints are reported on stderr and not deleted.

    Returns:
        The `state` that was saved with it; None if no save was ever finished.

    Raises:
        ConfigError: there are checkpoints, but none is complete; or the most recent complete one is of another model.
    """
    try:
        checkpoint = listing.latest_complete(folder)
    except ConfigError as error:
        raise ConfigError(f"{error}: choose another output, or delete that folder to start from scratch") from error
    if checkpoint is not None:
        return load(checkpoint, engine)
    if is_rank0() and listing.newest_first(folder):
        print(f"no save in {folder} was finished: the run starts from scratch", file=sys.stderr)
    return None


def load(checkpoint: Path, engine: Engine) -> dict[str, Any]:
    """Load a complete checkpoint: weights, optimizer states, RNG states. Returns the `state` saved with it.

    Raises:
        ConfigError: it is of another model, or holds weights only.
    """
    metadata = run_on_rank0(lambda: CheckpointMetadata.read(checkpoint))
    if metadata.optimizer_steps is None:
        raise ConfigError(f"checkpoint {checkpoint} holds weights only: start a run from it with training.warm_start")
    sharding.load_tensors(engine, checkpoint / "tensors")
    optimizer_states.set_steps(engine, metadata.optimizer_steps)
    if metadata.layout.same_ranks(_layout(engine)):  # otherwise the RNG states belong to no rank of this layout
        _load_rng_states(listing.rng_file(checkpoint, dist.get_rank()))
    return metadata.state


def load_weights(source: Path, engine: Engine) -> tuple[Path, dict[str, Any]]:
    """Load only the weights of another run, with their fp32 masters; optimizer moments and RNG states stay.

    Args:
        source: a checkpoint, or the folder of a run or its `checkpoints` for the most recent complete one.

    Returns:
        The checkpoint's folder, and the `state` that was saved with it.

    Raises:
        ConfigError: there is no complete checkpoint, or it is of another model.
    """
    checkpoint = listing.find(source)
    sharding.load_tensors(engine, checkpoint / "tensors", kinds=(optimizer_states.MASTER,))
    return checkpoint, run_on_rank0(lambda: CheckpointMetadata.read(checkpoint)).state


@dataclass(frozen=True)
class _Snapshot:
    """A copy of what this rank has to write, taken between two steps, in host memory."""

    tensors: sharding.Tensors
    rng: bytes
    metadata: CheckpointMetadata

    @classmethod
    def take(cls, engine: Engine, state: dict[str, Any]) -> "_Snapshot":
        rng = io.BytesIO()
        torch.save(sharding.rng_states(), rng)
        metadata = CheckpointMetadata(_layout(engine), optimizer_states.steps(engine), state)
        return cls(sharding.copy_to_host(engine), rng.getvalue(), metadata)


def _layout(engine: Engine) -> SavedLayout:
    return SavedLayout(
        world_size=dist.get_world_size(),
        tensor=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline=parallel_state.get_pipeline_model_parallel_world_size(),
        expert=parallel_state.get_expert_model_parallel_world_size(),
        expert_tensor=parallel_state.get_expert_tensor_parallel_world_size(),
        context=parallel_state.get_context_parallel_world_size(),
        virtual_pipeline=parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        zero_stage=engine.zero_optimization_stage(),
    )


def _or_not_saved(final: Path, write: Callable[..., None], *group: Group) -> None:
    """Call `write`; if it fails, delete the partial checkpoint and raise `CheckpointNotSaved`, a single line.

    A RuntimeError passes through: it means that another rank is gone, not that the disk is full, and a restart helps.
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
    run_on_all(lambda: write_atomically(listing.rng_file(partial, dist.get_rank()), snapshot.rng), group)
    run_on_rank0(lambda: write_atomically(partial / METADATA, snapshot.metadata.as_json()), group)
    write_manifest(partial, group)
    run_on_rank0(lambda: listing.publish(partial, final), group)


def _load_rng_states(path: Path) -> None:
    try:
        sharding.set_rng_states(torch.load(path, map_location="cpu", weights_only=True))
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:  # although the file has passed its check
        raise ConfigError(f"random/{path.name} of checkpoint {path.parents[1]} cannot be used: {error}") from error


def _partial(final: Path) -> Path:
    return final.with_name(str(CheckpointName(step_of(final), finished=False)))


def _make_empty(partial: Path) -> None:
    for unfinished in listing.unfinished(partial.parent):  # leftovers: no two runs write into the same folder
        remove(unfinished, ignore_errors=True)
    for part in ("tensors", "random"):
        (partial / part).mkdir(parents=True)


def _prune(folder: Path, step: int, keep: int, milestones: Collection[int]) -> None:
    """Delete checkpoints up to `step` that are older than the most recent `keep` with a manifest.

    One that cannot be deleted is reported and stays: the checkpoint that was just saved is complete all the same.
    """
    listed = [(entry, step_of(entry)) for entry in listing.newest_first(folder)]
    entries = [entry for entry, its_step in listed if its_step <= step and its_step not in milestones]
    complete = [entry for entry in entries if listing.finished(entry) and os.path.exists(entry / MANIFEST)]
    for entry in entries[entries.index(complete[keep - 1]) + 1 :] if len(complete) >= keep else []:
        try:
            listing.delete(entry)
        except OSError as error:
            print(one_line(f"checkpoint {entry} could not be deleted: {error}"), file=sys.stderr)
