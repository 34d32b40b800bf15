"""Whether the disk will take a run's checkpoints: asked before the run costs anything, and before it costs a checkpoint.

Without torch. A quota shows in no number that a file system gives; only writing meets it.
"""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from coe_megatron.config import ConfigError, RunConfig
from coe_megatron.config.layout import layout
from coe_megatron.forecast.checkpoint import checkpoint_bytes
from coe_megatron.forecast.cost import size, vocabulary

_PROBE = ".room"
_PROBE_BYTES = 1 << 16
_MARGIN = 1.05  # for what is written beside a checkpoint: metrics, TensorBoard


def require(config: RunConfig) -> str:
    """Before a run begins: its folder takes what is written, and at least one checkpoint; called by one process.

    Returns:
        A warning if there is not room for all checkpoints that the run will keep, else nothing.

    Raises:
        ConfigError: it does not; one line with the folder, and bytes needed and free.
    """
    folder, training = Path(config.output), config.training
    done = _steps_saved(folder)
    if reason := _refusal(folder):
        raise ConfigError(f"output is {folder}: {reason}")
    if max(done, default=0) >= training.steps:
        return ""  # nothing will be saved
    one = checkpoint_bytes(config, vocabulary(config), layout(config).ranks)
    available = _free(folder)
    if available < one * _MARGIN:
        raise ConfigError(f"output is {folder}: {_too_little(one, available)}; make room, or choose another output")
    kept = training.keep_checkpoints + 1 + len([step for step in training.milestones if step > max(done, default=0)])
    saves = (training.steps - max(done, default=0)) // training.save_every + 1 + len(training.milestones)
    needed = one * min(max(1, kept - len(done)), saves)
    if available >= needed * _MARGIN:
        return ""
    return (
        f"{folder} has {size(available)} free: a checkpoint takes {size(one)}, and {size(needed)} more will be needed "
        f"for those that are kept (training.keep_checkpoints is {training.keep_checkpoints}) and the one being written"
    )


def trouble(folder: Path, needed: int) -> str:
    """Why a run's folder will not take a checkpoint of `needed` bytes, in words; nothing if it will as far as is seen."""
    try:
        if reason := _refusal(folder):
            return reason
        available = _free(folder)
    except OSError as error:
        return f"{folder} cannot be read: {error.strerror}"
    return "" if available >= needed else f"{folder}: {_too_little(needed, available)}"


def _refusal(folder: Path) -> str:
    """Why nothing can be written: of a full disk, a quota, or a file system that has become read-only."""
    probe = _where(folder) / _PROBE
    try:
        try:
            with probe.open("wb") as file:
                file.write(os.urandom(_PROBE_BYTES))
                file.flush()
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        return f"{probe.parent} cannot be written: {error.strerror}"
    return ""


def _where(folder: Path) -> Path:
    """Where the checkpoints lie, which may be on another disk than the run's folder."""
    checkpoints = folder / "checkpoints"
    return checkpoints if checkpoints.is_dir() else folder


def _free(folder: Path) -> int:
    """Bytes free to this user, with those of unfinished saves, which the next one clears away."""
    place = _where(folder)
    return shutil.disk_usage(place).free + sum(map(_held, place.glob("step-*.tmp")))


def _held(folder: Path) -> int:
    return sum(_blocks(folder.rglob("*")))


def _blocks(paths: Iterable[Path]) -> Iterable[int]:
    return (path.stat().st_blocks * 512 for path in paths)


def _steps_saved(folder: Path) -> list[int]:
    """Steps of the finished checkpoints, by their names."""
    names = [path.name for path in (folder / "checkpoints").glob("step-*") if not path.suffix]
    return [int(name.removeprefix("step-")) for name in names]


def _too_little(needed: int, available: int) -> str:
    return f"a checkpoint takes {needed:,} bytes ({size(needed)}), and {available:,} ({size(available)}) are free"
