"""Whether the disk will take a run's checkpoints: asked before the run costs anything, and before a checkpoint is lost.

Without torch. A quota shows in no number that a file system gives; only writing meets it.
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

_PROBE = ".room"
_PROBE_BYTES = 1 << 16
_MARGIN = 1.05  # for what is written beside a checkpoint: metrics, TensorBoard


def require(run: RunShape) -> str:
    """Before a run begins: its folder takes what is written, and at least one checkpoint; called by one process.

    Returns:
        A warning if there is not room for all checkpoints that the run will keep, else nothing.

    Raises:
        ConfigError: it does not; one line with the folder, and bytes needed and free.
    """
    config, one = run.config, checkpoint_bytes(run)
    folder = Path(config.output)
    try:
        reason, available, done = _refusal(folder), _free(folder), finished_steps(folder / "checkpoints")
    except OSError as error:
        raise ConfigError(f"output is {folder}: {error}") from error
    if reason:
        raise ConfigError(f"output is {folder}: {reason}")
    if not (more := _checkpoints_to_come(config, done)):
        return ""
    if available < one * _MARGIN:
        raise ConfigError(f"output is {folder}: {_too_little(one, available)}; make room, or choose another output")
    if available >= more * one * _MARGIN:
        return ""
    return (
        f"output is {folder}: {_too_little(one, available)}; the run will have {more} more there at once "
        "(training.keep_checkpoints, training.milestones, and the one being written)"
    )


def trouble(folder: Path, needed: int) -> str:
    """Why a run's folder will not take a checkpoint of `needed` bytes; nothing if it will, as far as can be seen."""
    try:
        if reason := _refusal(folder):
            return reason
        available = _free(folder)
    except OSError as error:
        return f"{folder} cannot be read: {error.strerror}"
    return "" if available >= needed else f"{folder}: {_too_little(needed, available)}"


def _checkpoints_to_come(config: RunConfig, done: list[int]) -> int:
    """By how many more there will be at most than there are now."""
    training, newest = config.training, max(done, default=0)
    milestones = [step for step in training.milestones if step > newest]
    saves = -(-training.steps // training.save_every) - newest // training.save_every
    most = training.keep_checkpoints + 1 + len(milestones) - len(done)
    return 0 if newest >= training.steps else max(1, min(most, saves + len(milestones)))


def _refusal(folder: Path) -> str:
    """Why nothing can be written: of a full disk, a quota, or a file system that has become read-only."""
    place = _where(folder)
    try:
        with TemporaryFile(dir=place, prefix=_PROBE) as file:
            file.write(os.urandom(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return f"{place} cannot be written: {error.strerror}"
    return ""


def _where(folder: Path) -> Path:
    """Where the checkpoints lie, which may be on another disk than the run's folder."""
    checkpoints = folder / "checkpoints"
    return checkpoints if checkpoints.is_dir() else folder


def _free(folder: Path) -> int:
    """Bytes free to this user, with those of unfinished saves, which the next one clears away."""
    place = _where(folder)
    return shutil.disk_usage(place).free + sum(_held(found) for found in place.iterdir() if _is_unfinished(found.name))


def _is_unfinished(name: str) -> bool:
    found = CheckpointName.parse(name)
    return found is not None and not found.finished


def _held(folder: Path) -> int:
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*"))


def _too_little(needed: int, available: int) -> str:
    return f"a checkpoint takes {needed:,} bytes ({size(needed)}), and {available:,} ({size(available)}) are free"
