"""Checks that the disk has space for a run's checkpoints, before the run starts and before each save. Without torch.

No file system reports a user's quota, so this also tries to write.
"""

import os
import shutil
from pathlib import Path
from tempfile import TemporaryFile

from coe_megatron.checkpoint.names import CheckpointName, finished_steps
from coe_megatron.config import RunConfig
from coe_megatron.errors import ConfigError
from coe_megatron.estimate.checkpoint_size import checkpoint_bytes
from coe_megatron.estimate.run_estimate import size
from coe_megatron.estimate.run_shape import RunShape

_PROBE = ".disk-probe"
_PROBE_BYTES = 1 << 16
_MARGIN = 1.05  # for other files of the run: metrics, TensorBoard


def require(run: RunShape) -> str:
    """Check that the run's folder is writable and has space for at least one checkpoint. One process calls this.

    Returns:
        A warning if there is no space for all checkpoints that the run will keep, otherwise an empty string.

    Raises:
        ConfigError: it is not writable or has too little space; one line with the folder, bytes needed and free.
    """
    config, one = run.config, checkpoint_bytes(run)
    folder = Path(config.output)
    try:
        reason, available, done = _write_problem(folder), _free(folder), finished_steps(folder / "checkpoints")
    except OSError as error:
        raise ConfigError(f"output is {folder}: {error}") from error
    if reason:
        raise ConfigError(f"output is {folder}: {reason}")
    if not (more := _checkpoints_to_come(config, done)):
        return ""
    if available < one * _MARGIN:
        raise ConfigError(
            f"output is {folder}: {_too_little(one, available)}; free some space, or choose another output"
        )
    if available >= more * one * _MARGIN:
        return ""
    return (
        f"output is {folder}: {_too_little(one, available)}; the run will store up to {more} more at the same time "
        "(training.keep_checkpoints, training.milestones, and one being written)"
    )


def problem(folder: Path, needed: int) -> str:
    """Why a checkpoint of `needed` bytes cannot be written; empty if no problem is found."""
    try:
        if reason := _write_problem(folder):
            return reason
        available = _free(folder)
    except OSError as error:
        return f"{folder} cannot be read: {error.strerror}"
    return "" if available >= needed else f"{folder}: {_too_little(needed, available)}"


def _checkpoints_to_come(config: RunConfig, done: list[int]) -> int:
    """The largest number of checkpoints that will exist in addition to those there now."""
    training, latest = config.training, max(done, default=0)
    milestones = [step for step in training.milestones if step > latest]
    saves = -(-training.steps // training.save_every) - latest // training.save_every
    largest = training.keep_checkpoints + 1 + len(milestones) - len(done)
    return 0 if latest >= training.steps else max(1, min(largest, saves + len(milestones)))


def _write_problem(folder: Path) -> str:
    """Why nothing can be written (full disk, quota, read-only file system); empty if something can."""
    place = _checkpoint_folder(folder)
    try:
        with TemporaryFile(dir=place, prefix=_PROBE) as file:
            file.write(os.urandom(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return f"{place} cannot be written: {error.strerror}"
    return ""


def _checkpoint_folder(folder: Path) -> Path:
    """The folder of the checkpoints, which may be on another disk than the run's folder."""
    checkpoints = folder / "checkpoints"
    return checkpoints if checkpoints.is_dir() else folder


def _free(folder: Path) -> int:
    """Bytes free for this user, including those of unfinished saves, which the next save deletes."""
    place = _checkpoint_folder(folder)
    return shutil.disk_usage(place).free + sum(
        _allocated_bytes(found) for found in place.iterdir() if _is_unfinished(found.name)
    )


def _is_unfinished(name: str) -> bool:
    found = CheckpointName.parse(name)
    return found is not None and not found.finished


def _allocated_bytes(folder: Path) -> int:
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*"))


def _too_little(needed: int, available: int) -> str:
    return f"a checkpoint takes {needed:,} bytes ({size(needed)}), and {available:,} ({size(available)}) are free"
