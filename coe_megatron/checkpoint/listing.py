"""Which checkpoints a folder holds, and which of them are whole. Without process groups this process is alone."""

import os
import stat
import sys
from itertools import chain, islice
from pathlib import Path

from coe_megatron.checkpoint.integrity import SEAL, problem
from coe_megatron.checkpoint.metadata import METADATA, CheckpointMetadata
from coe_megatron.checkpoint.names import CheckpointName, replaced_name, step_of
from coe_megatron.checkpoint.storage import Reader
from coe_megatron.checkpoint.tensor_index import Listed
from coe_megatron.checkpoint.torch_file_check import generators_problem, saved_problem
from coe_megatron.distributed.collectives import all_gather, is_rank0, run_on_rank0, shard
from coe_megatron.errors import ConfigError, one_line
from coe_megatron.files import kind_of, remove, require_folder, to_disk

UNFINISHED = "saving it was not finished"


def is_checkpoint(folder: Path) -> bool:
    """A checkpoint by its name or by its seal, whole or not."""
    return CheckpointName.parse(folder.name) is not None or os.path.lexists(folder / SEAL)


def checkpoints_of(folder: Path) -> Path:
    """Where the checkpoints lie: in the folder of a run, or in this very folder."""
    inner = folder / "checkpoints"
    return inner if kind_of(inner, "the folder of checkpoints") == "folder" else folder


def newest_first(folder: Path) -> list[Path]:
    """Checkpoints, unfinished ones among them, by falling step; none of a folder that is not there.

    Raises:
        ConfigError: the folder cannot be read, or is none.
    """
    if kind_of(folder, "the folder of checkpoints") is None:
        return []
    listed = os.listdir(require_folder(folder, "the folder of checkpoints"))
    found = [folder / name for name in listed if CheckpointName.parse(name)]
    return sorted(found, key=lambda path: (step_of(path), path.name), reverse=True)


def steps_beyond(folder: Path, step: int) -> set[int]:
    """Steps of the finished checkpoints that are newer than one: a run that goes on from it has found them damaged.

    Collective, as all here that asks the disk for all ranks.
    """
    listed = run_on_rank0(lambda: newest_first(folder))
    return {step_of(found) for found in listed if finished(found) and step_of(found) > step}


def unfinished(folder: Path) -> list[Path]:
    """What saves that were not finished have left."""
    return [found for found in newest_first(folder) if not finished(found)]


def finished(checkpoint: Path) -> bool:
    """It got its name, so that all of it was there once."""
    name = CheckpointName.parse(checkpoint.name)
    return name is None or name.finished


def random_file(checkpoint: Path, rank: int) -> Path:
    """Where the states of a rank's generators lie."""
    return checkpoint / "random" / f"{rank:05d}.pt"


def trouble(checkpoint: Path) -> str | None:
    """Why a checkpoint is not to be used, None if it is whole; collective, the same answer on all ranks.

    All its bytes are read, and looked through for what other commands rely on: a list of files that fits them may
    have been made by anyone.
    """
    if not finished(checkpoint):
        return UNFINISHED
    return problem(checkpoint) or _foreign(checkpoint)


def _foreign(checkpoint: Path) -> str | None:
    """What in the files is not as we write it."""
    try:
        states = run_on_rank0(lambda: _require_files(checkpoint))
        reader = Reader(checkpoint / "tensors", run_on_rank0(lambda: Listed.read(checkpoint / "tensors")))
    except ConfigError as error:
        return str(error)
    found = (reader.problem(*part) for part in shard(reader.parts()))
    also = (generators_problem(path) for path in shard(states))
    return next(iter(all_gather(list(islice(filter(None, chain(found, also)), 1)))), None)


def _require_files(checkpoint: Path) -> list[Path]:
    """Look at what there is besides tensors; returns the files of generators' states. On one rank."""
    facts, common = CheckpointMetadata.read(checkpoint), checkpoint / "tensors" / "common.pt"
    states = sorted((checkpoint / "random").glob("*"))
    if facts.optimizer_steps is not None:
        ranks = facts.layout.ranks
        if len(states) != ranks:
            raise ConfigError(f"random has {len(states):,} files, and {METADATA} tells of {ranks:,} ranks")
        if missing := {random_file(checkpoint, rank) for rank in range(ranks)} - {*states}:
            raise ConfigError(f"random/{min(missing).name} is missing")
    if os.path.lexists(common) and (found := saved_problem(common, lambda saved: saved == {})):
        raise ConfigError(found)
    return states


def newest_whole(folder: Path, up_to: int | None = None) -> Path | None:
    """The newest checkpoint that is whole; those passed over are named on stderr. Collective.

    Args:
        up_to: looks at this step and those before it alone.

    Returns:
        None if no save was ever finished.

    Raises:
        ConfigError: there are finished checkpoints, and none is whole.
    """
    damaged = []
    for checkpoint in run_on_rank0(lambda: newest_first(folder)):
        if up_to is not None and step_of(checkpoint) > up_to:
            continue
        found = trouble(checkpoint)
        if found is None:
            return checkpoint
        if finished(checkpoint):
            damaged.append(f"{checkpoint.name}: {found}")
        if is_rank0():
            print(one_line(f"checkpoint {checkpoint} is skipped: {found}"), file=sys.stderr)
    if damaged:
        raise ConfigError(f"no checkpoint in {folder} is whole, the newest is {damaged[0]}")
    return None


def find(source: Path) -> Path:
    """The checkpoint that is meant by a checkpoint, or by the folder of a run (the newest whole one). Collective.

    Raises:
        ConfigError: it is not whole, or there is none.
    """
    if run_on_rank0(lambda: is_checkpoint(source)):
        if found := trouble(source):
            raise ConfigError(f"checkpoint {source} is not whole: {found}")
        return source
    newest = newest_whole(run_on_rank0(lambda: checkpoints_of(source)))
    if newest is None:
        raise ConfigError(f"{source} holds no checkpoint: name one, or the folder of a run that saved one")
    return newest


def publish(partial: Path, final: Path) -> None:
    """Give a sealed checkpoint its name; one that had it (damaged, or saved by an earlier attempt) goes after that."""
    for path in (partial, *partial.rglob("*")):  # names as well, and what others wrote
        if _kind(path) in (stat.S_IFREG, stat.S_IFDIR):  # a pipe would be waited for
            to_disk(path)
    aside = final.with_name(replaced_name(final.name))
    if os.path.lexists(final):
        remove(aside, ignore_errors=True)
        os.rename(final, aside)
    try:
        os.rename(partial, final)
    except BaseException:
        if os.path.lexists(aside) and not os.path.lexists(final):
            os.rename(aside, final)
        raise
    to_disk(final.parent)
    remove(aside, ignore_errors=True)


def delete_between(folder: Path, first: int, last: int) -> None:
    """Delete the finished checkpoints of these steps, the newest first."""
    for found in newest_first(folder):
        if finished(found) and first <= step_of(found) <= last:
            delete(found)


def delete(checkpoint: Path) -> None:
    """Delete a checkpoint so that at no moment a part of it passes for one; what is none is removed as well."""
    if _kind(checkpoint) == stat.S_IFDIR:
        remove(checkpoint / SEAL)
    remove(checkpoint)


def _kind(path: Path) -> int | None:
    """The kind in the mode of what is at a path, links not followed; None if nothing is."""
    try:
        return stat.S_IFMT(os.lstat(path).st_mode)
    except FileNotFoundError:
        return None
