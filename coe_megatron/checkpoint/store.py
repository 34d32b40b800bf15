"""Saves a run and takes it up again: a folder of checkpoints that are either whole or not counted.

    checkpoints/
      step-00000200/
        tensors/        weights and optimizer states, Megatron's distributed format (torch_dist)
        random/         the generators' states, a file a rank
        state.json      where the run stands, in the training loop's own words
        complete.json   written last: every other file with its size and SHA-256
      step-00000400.tmp/    a save that was not finished

A checkpoint is written under a temporary name and renamed when it is whole, so that a run killed in the middle finds
the one before. All functions are collective, and the folder must be seen by all ranks. A resumed run goes on bit by bit
as if it had never stopped, on the same layout; on another one only the random numbers (dropout) differ.
"""

import json
import os
import re
import shutil
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from coe_megatron.checkpoint import states
from coe_megatron.checkpoint.seal import SEAL, problem, seal, shared, write_json
from coe_megatron.durable import to_disk
from coe_megatron.zero import states as zero_states
from coe_megatron.zero.engine import Engine

_NAME = re.compile(r"step-(\d+)(\.tmp)?")


def save(
    folder: Path, step: int, engine: Engine, state: dict[str, Any], keep: int, milestones: Collection[int] = ()
) -> Path:
    """Save a run between two steps, and delete what is older than the newest `keep` checkpoints up to this one.

    What lies beyond `step` stays: a run that goes on from an earlier step found it damaged. So do checkpoints of the
    steps in `milestones`, which do not count as one of the newest.

    Args:
        folder: where the checkpoints of this run lie; made if needed.
        step: steps done.
        state: what the training loop wants back from `load_latest`; goes into JSON.

    Returns:
        The checkpoint's folder. One of the same step is replaced.
    """
    final = folder / f"step-{step:08d}"
    partial = final.with_suffix(".tmp")
    if dist.get_rank() == 0:
        _make_empty(partial)
    dist.barrier()
    _write(partial, engine, state)
    dist.barrier()
    seal(partial)
    if dist.get_rank() == 0:
        _publish(partial, final)
        _prune(folder, step, keep, milestones)
    dist.barrier()
    return final


def load_latest(folder: Path, engine: Engine) -> dict[str, Any] | None:
    """Take up the newest whole checkpoint: weights, optimizer states, generators.

    What is unfinished or damaged is named on stderr, and left where it is.

    Returns:
        The `state` that was saved with it; None if there is no whole checkpoint.

    Raises:
        ValueError: the checkpoint is whole but of another model.
    """
    checkpoint = _newest_whole(folder)
    return None if checkpoint is None else _read(checkpoint, engine)


def load_weights(source: Path, engine: Engine) -> tuple[Path, dict[str, Any]]:
    """Take up the weights of another run alone, its fp32 masters included; optimizer moments and generators stay.

    Args:
        source: a checkpoint, or the folder of a run or its `checkpoints` for the newest whole one.

    Returns:
        The checkpoint's folder, and the `state` that was saved with it.

    Raises:
        ValueError: there is no whole checkpoint, or it is of another model.
    """
    checkpoint: Path | None = source
    if _NAME.fullmatch(source.name):
        if trouble := problem(source):
            raise ValueError(f"checkpoint {source} is not whole: {trouble}")
    else:
        checkpoint = _newest_whole(source / "checkpoints" if (source / "checkpoints").is_dir() else source)
    if checkpoint is None:
        raise ValueError(f"{source} holds no checkpoint: name one, or the folder of a run that saved one")
    states.load_tensors(engine, checkpoint / "tensors", kinds=(zero_states.MASTER,))
    return checkpoint, json.loads((checkpoint / "state.json").read_text())["state"]


def _newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint of a folder that is whole; those passed over are named on stderr."""
    for checkpoint in shared(_newest_first(folder)):
        trouble = "saving it was not finished" if checkpoint.suffix else problem(checkpoint)
        if trouble is None:
            return checkpoint
        if dist.get_rank() == 0:
            print(f"checkpoint {checkpoint} is skipped: {trouble}", file=sys.stderr)
    return None


def _write(folder: Path, engine: Engine, state: dict[str, Any]) -> None:
    states.save_tensors(engine, folder / "tensors")
    with _random_file(folder, dist.get_rank()).open("wb") as file:
        torch.save(states.random_states(), file)
        file.flush()
        os.fsync(file.fileno())
    if dist.get_rank() == 0:
        facts = {"ranks": dist.get_world_size(), "optimizer_steps": zero_states.steps(engine), "state": state}
        write_json(folder / "state.json", facts)


def _read(checkpoint: Path, engine: Engine) -> dict[str, Any]:
    states.load_tensors(engine, checkpoint / "tensors")
    facts = json.loads((checkpoint / "state.json").read_text())
    zero_states.set_steps(engine, facts["optimizer_steps"])
    if facts["ranks"] == dist.get_world_size():  # otherwise no rank's generators are those of a rank that saved
        states.set_random_states(torch.load(_random_file(checkpoint, dist.get_rank()), weights_only=True))
    return facts["state"]


def _random_file(folder: Path, rank: int) -> Path:
    return folder / "random" / f"{rank:05d}.pt"


def _make_empty(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)  # of a save that was not finished
    for part in ("tensors", "random"):
        (partial / part).mkdir(parents=True)


def _publish(partial: Path, final: Path) -> None:
    """Give a sealed checkpoint its name; one that had it (damaged, or saved by an earlier attempt) makes room."""
    to_disk(partial)
    if final.exists():
        _delete(final)
    partial.rename(final)
    to_disk(final.parent)


def _prune(folder: Path, step: int, keep: int, milestones: Collection[int]) -> None:
    """Of what is not newer than `step`, leave the newest `keep` checkpoints with a seal, and what is among them."""
    entries = [entry for entry in _newest_first(folder) if _step(entry) <= step and _step(entry) not in milestones]
    sealed = [entry for entry in entries if not entry.suffix and (entry / SEAL).exists()]
    for entry in entries[entries.index(sealed[keep - 1]) + 1 :] if len(sealed) >= keep else []:
        _delete(entry)


def _delete(checkpoint: Path) -> None:
    """Delete a checkpoint so that at no moment a part of it passes for one."""
    (checkpoint / SEAL).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def _newest_first(folder: Path) -> list[Path]:
    """Checkpoints, unfinished ones among them, by falling step."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: (_step(path), path.name), reverse=True)


def _step(checkpoint: Path) -> int:
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None, checkpoint
    return int(match[1])
