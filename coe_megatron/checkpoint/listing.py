"""Which checkpoints a folder holds, and which of them are complete. Works with or without process groups."""

import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path

from coe_megatron.checkpoint import integrity
from coe_megatron.checkpoint.integrity import MANIFEST
from coe_megatron.checkpoint.metadata import METADATA, CheckpointMetadata
from coe_megatron.checkpoint.names import CheckpointName, partial_name, replaced_name, step_of
from coe_megatron.checkpoint.storage import Reader
from coe_megatron.checkpoint.tensor_index import TensorIndex
from coe_megatron.checkpoint.torch_file_check import rng_states_problem, saved_problem
from coe_megatron.distributed.collectives import all_gather, is_rank0, run_on_rank0, shard
from coe_megatron.errors import ConfigError, one_line
from coe_megatron.files import kind_of, remove, require_folder, to_disk

UNFINISHED = "its save was not finished"


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint, complete or not, by its name or its manifest."""
    return CheckpointName.parse(folder.name) is not None or os.path.lexists(folder / MANIFEST)


def checkpoints_of(folder: Path) -> Path:
    """The folder of checkpoints: `checkpoints/` in the folder of a run, otherwise this folder itself."""
    inner = folder / "checkpoints"
    return inner if kind_of(inner, "the folder of checkpoints") == "folder" else folder


def newest_first(folder: Path) -> list[Path]:
    """Checkpoints including unfinished ones, most recent step first; empty if there is no such folder.

    Raises:
        ConfigError: the folder cannot be read, or is not a folder.
    """
    if kind_of(folder, "the folder of checkpoints") is None:
        return []
    listed = os.listdir(require_folder(folder, "the folder of checkpoints"))
    found = [folder / name for name in listed if CheckpointName.parse(name)]
    return sorted(found, key=lambda path: (step_of(path), path.name), reverse=True)


def steps_after(folder: Path, step: int) -> set[int]:
    """Steps of finished checkpoints after `step`; a run that resumes at `step` has found them damaged. Collective."""
    listed = run_on_rank0(lambda: newest_first(folder))
    return {step_of(found) for found in listed if finished(found) and step_of(found) > step}


def unfinished(folder: Path) -> list[Path]:
    """The unfinished checkpoints that interrupted saves have left."""
    return [found for found in newest_first(folder) if not finished(found)]


def finished(checkpoint: Path) -> bool:
    """Whether its save was finished: only then does a checkpoint get its final name."""
    name = CheckpointName.parse(checkpoint.name)
    return name is None or name.finished


def rng_file(checkpoint: Path, rank: int) -> Path:
    """The file with the RNG states of a rank."""
    return checkpoint / "random" / f"{rank:05d}.pt"


def problem(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be used; None if it is complete. Collective, the same result on all ranks.

    This reads all bytes and also checks the contents that other commands rely on, because anyone can write a manifest
    that matches its files.
    """
    if not finished(checkpoint):
        return UNFINISHED
    return integrity.problem(checkpoint) or _content_problem(checkpoint)


def _content_problem(checkpoint: Path) -> str | None:
    """What in the files differs from what this project writes."""
    try:
        states = run_on_rank0(lambda: _require_files(checkpoint))
        reader = Reader(checkpoint / "tensors", run_on_rank0(lambda: TensorIndex.read(checkpoint / "tensors")))
    except ConfigError as error:
        return str(error)
    tensors = (reader.problem(*part) for part in shard(reader.parts()))
    rngs = (rng_states_problem(path) for path in shard(states))
    return next(iter(all_gather(list(islice(filter(None, chain(tensors, rngs)), 1)))), None)


def _require_files(checkpoint: Path) -> list[Path]:
    """Check the files other than tensors; returns the files of RNG states. Not collective."""
    metadata, common = CheckpointMetadata.read(checkpoint), checkpoint / "tensors" / "common.pt"
    states = sorted((checkpoint / "random").glob("*"))
    if metadata.optimizer_steps is not None:
        ranks = metadata.layout.world_size
        if len(states) != ranks:
            raise ConfigError(f"random has {len(states):,} files, but {METADATA} says {ranks:,} ranks")
        if missing := {rng_file(checkpoint, rank) for rank in range(ranks)} - {*states}:
            raise ConfigError(f"random/{min(missing).name} is missing")
    if os.path.lexists(common) and (found := saved_problem(common, lambda saved: saved == {})):
        raise ConfigError(found)
    return states


def latest_complete(folder: Path, up_to: int | None = None) -> Path | None:
    """The most recent complete checkpoint; skipped ones are reported on stderr. Collective.

    Args:
        up_to: considers only checkpoints up to this step.

    Returns:
        None if no save was ever finished.

    Raises:
        ConfigError: there are finished checkpoints, but none is complete.
    """
    damaged = []
    for checkpoint in run_on_rank0(lambda: newest_first(folder)):
        if up_to is not None and step_of(checkpoint) > up_to:
            continue
        found = problem(checkpoint)
        if found is None:
            return checkpoint
        if finished(checkpoint):
            damaged.append(f"{checkpoint.name}: {found}")
        if is_rank0():
            print(one_line(f"checkpoint {checkpoint} is skipped: {found}"), file=sys.stderr)
    if damaged:
        raise ConfigError(f"no checkpoint in {folder} is complete, the most recent is {damaged[0]}")
    return None


def find(source: Path) -> Path:
    """Resolve a path to a checkpoint: the path itself, or a run's most recent complete checkpoint. Collective.

    Raises:
        ConfigError: the checkpoint is not complete, or there is none.
    """
    if run_on_rank0(lambda: is_checkpoint(source)):
        if found := problem(source):
            raise ConfigError(f"checkpoint {source} is not complete: {found}")
        return source
    latest = latest_complete(run_on_rank0(lambda: checkpoints_of(source)))
    if latest is None:
        raise ConfigError(f"{source} holds no checkpoint: name one, or the folder of a run that saved one")
    return latest


def publish(partial: Path, final: Path) -> None:
    """Rename a written checkpoint to its final name, then delete the one that had this name, if any."""
    for path in (partial, *partial.rglob("*")):  # also folders, and files that other ranks wrote
        if _kind(path) in (stat.S_IFREG, stat.S_IFDIR):  # opening a pipe would block
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


@contextmanager
def unpublished(out: Path) -> Iterator[Path]:
    """A hidden folder to fill beside `out`, which is then published under that name; nothing is left after an error."""
    folder = out.absolute().with_name(partial_name(out.absolute().name))
    try:
        remove(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        yield folder
        publish(folder, out)
    except BaseException:
        remove(folder, ignore_errors=True)
        raise


def delete_between(folder: Path, first: int, last: int) -> None:
    """Delete the finished checkpoints of these steps, most recent first."""
    for found in newest_first(folder):
        if finished(found) and first <= step_of(found) <= last:
            delete(found)


def delete(checkpoint: Path) -> None:
    """Delete a checkpoint, its manifest first, so that a partly deleted one is never taken for complete."""
    if _kind(checkpoint) == stat.S_IFDIR:
        remove(checkpoint / MANIFEST)
    remove(checkpoint)


def _kind(path: Path) -> int | None:
    """The file type bits of a path, without following links; None if nothing is there."""
    try:
        return stat.S_IFMT(os.lstat(path).st_mode)
    except FileNotFoundError:
        return None
