"""Which checkpoints a folder holds, and which of them are whole. Without process groups this process is alone."""

import os
import re
import shutil
import sys
from pathlib import Path

from coe_megatron.checkpoint.seal import SEAL, problem
from coe_megatron.checkpoint.storage import refusal
from coe_megatron.files import to_disk
from coe_megatron.parallel.collective import am_first, from_first

_NAME = re.compile(r"step-(\d+)(\.tmp)?")
UNFINISHED = "saving it was not finished"


def name_of(step: int) -> str:
    """The name of a checkpoint's folder."""
    return f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None, checkpoint
    return int(match[1])


def is_checkpoint(folder: Path) -> bool:
    """A checkpoint by its name or by its seal, whole or not."""
    return _NAME.fullmatch(folder.name) is not None or (folder / SEAL).exists()


def checkpoints_of(folder: Path) -> Path:
    """Where the checkpoints lie: in the folder of a run, or in this very folder."""
    return folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder


def newest_first(folder: Path) -> list[Path]:
    """Checkpoints, unfinished ones among them, by falling step."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: (step_of(path), path.name), reverse=True)


def steps_beyond(folder: Path, step: int) -> set[int]:
    """Steps of the finished checkpoints that are newer than one: a run that goes on from it has found them damaged.

    Collective, as all here that asks the disk for all ranks.
    """
    listed = from_first(lambda: newest_first(folder))
    return {step_of(found) for found in listed if finished(found) and step_of(found) > step}


def unfinished(folder: Path) -> list[Path]:
    """What saves that were not finished have left."""
    return [found for found in newest_first(folder) if not finished(found)]


def finished(checkpoint: Path) -> bool:
    """It got its name, so that all of it was there once."""
    match = _NAME.fullmatch(checkpoint.name)
    return match is None or match[2] is None


def trouble(checkpoint: Path) -> str | None:
    """Why a checkpoint is not to be used, None if it is whole; collective, the same answer on all ranks."""
    if not finished(checkpoint):
        return UNFINISHED
    return problem(checkpoint) or from_first(lambda: refusal(checkpoint / "tensors"))


def newest_whole(folder: Path, up_to: int | None = None) -> Path | None:
    """The newest checkpoint that is whole; those passed over are named on stderr. Collective.

    Args:
        up_to: looks at this step and those before it alone.

    Returns:
        None if no save was ever finished.

    Raises:
        ValueError: there are finished checkpoints, and none is whole.
    """
    damaged = []
    for checkpoint in from_first(lambda: newest_first(folder)):
        if up_to is not None and step_of(checkpoint) > up_to:
            continue
        found = trouble(checkpoint)
        if found is None:
            return checkpoint
        if finished(checkpoint):
            damaged.append(f"{checkpoint.name}: {found}")
        if am_first():
            print(f"checkpoint {checkpoint} is skipped: {found}", file=sys.stderr)
    if damaged:
        raise ValueError(f"no checkpoint in {folder} is whole, the newest is {damaged[0]}")
    return None


def find(source: Path) -> Path:
    """The checkpoint that is meant by a checkpoint, or by the folder of a run (the newest whole one). Collective.

    Raises:
        ValueError: it is not whole, or there is none.
    """
    if from_first(lambda: is_checkpoint(source)):
        if found := trouble(source):
            raise ValueError(f"checkpoint {source} is not whole: {found}")
        return source
    newest = newest_whole(from_first(lambda: checkpoints_of(source)))
    if newest is None:
        raise ValueError(f"{source} holds no checkpoint: name one, or the folder of a run that saved one")
    return newest


def publish(partial: Path, final: Path) -> None:
    """Give a sealed checkpoint its name; one that had it (damaged, or saved by an earlier attempt) goes after that."""
    for path in (partial, *partial.rglob("*")):  # names as well, and what others wrote
        to_disk(path)
    aside = final.with_name(f".{final.name}.replaced")
    if final.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(final, aside)
    try:
        os.rename(partial, final)
    except BaseException:
        if aside.exists() and not final.exists():
            os.rename(aside, final)
        raise
    to_disk(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def delete_between(folder: Path, first: int, last: int) -> None:
    """Delete the finished checkpoints of these steps, the newest first."""
    for found in newest_first(folder):
        if finished(found) and first <= step_of(found) <= last:
            delete(found)


def delete(checkpoint: Path) -> None:
    """Delete a checkpoint so that at no moment a part of it passes for one."""
    (checkpoint / SEAL).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)
