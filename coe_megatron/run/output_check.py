"""Checks every part of a run's output folder before anything costs time. Without torch.

This writes nothing, so `--dry-run` gives the same result. It checks the kind of each part and whether it is writable,
not its contents.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import NonNegativeInt, TypeAdapter

from coe_megatron.checkpoint.names import CheckpointName, is_finished, is_ours, name_of
from coe_megatron.config import RunConfig
from coe_megatron.errors import ConfigError
from coe_megatron.files import kind_of, problem, read_limited, require_file, require_folder, require_writable
from coe_megatron.parsing import JSON_BYTES, parse_json

CHECKPOINTS, INDEX, PROFILE, STACKS = "checkpoints", "index", "profile", "stacks"
TENSORBOARD, WANDB, WANDB_ID = "tensorboard", "wandb", "wandb-id"
CONFIG, RECORD, LOCK, METRICS, LOSS_PLOT = "config.yaml", "run.json", "run.lock", "metrics.jsonl", "loss.png"
PREVIOUS_METRICS = "metrics.previous.jsonl"
REPLACED = (CONFIG, RECORD, METRICS, LOSS_PLOT)  # through a temporary file next to it


def require_output(config: RunConfig) -> None:
    """Refuse an output folder that is not writable, or in which something else takes the place of a part of the run.

    Raises:
        ConfigError: one line that names the folder or its part, and the problem.
    """
    folder = Path(config.output)
    require_writable(folder, "output", "folder")
    if kind_of(folder, "output") is None:
        return
    try:
        require_folder(folder, "output")
        _require_parts(folder, config)
        _require_checkpoints(folder / CHECKPOINTS)
        _require_own_config(folder)
    except OSError as error:  # the folder changes during the check
        raise problem(folder, "output", error) from error


def _require_parts(folder: Path, config: RunConfig) -> None:
    for name in (CONFIG, RECORD, LOCK, METRICS, PREVIOUS_METRICS, LOSS_PLOT, WANDB_ID):
        _require_file(folder / name)
    for name in REPLACED:
        _require_file(folder / f"{name}.tmp")
    for part in _folders(config):
        _require_folder(folder / part)
    for stack in (folder / STACKS).glob("rank-*.txt"):
        _require_file(stack)


def _folders(config: RunConfig) -> Iterator[str]:
    yield from (CHECKPOINTS, STACKS)
    if config.data.samples == "packed":
        yield INDEX
    if config.logging.tensorboard:
        yield TENSORBOARD
    if config.logging.wandb:
        yield WANDB
    if config.profile.first_step is not None:
        yield PROFILE


def _require_file(path: Path) -> None:
    if kind_of(path, _part(path)) is not None:
        require_file(path, _part(path))
    require_writable(path, _part(path), "file")


def _require_folder(path: Path) -> None:
    if kind_of(path, _part(path)) is not None:
        require_folder(path, _part(path))
    require_writable(path, _part(path), "folder")


def _part(path: Path) -> str:
    return f"{path.name} in output"


def _require_checkpoints(folder: Path) -> None:
    if kind_of(folder, _part(folder)) is None:
        return
    names = sorted(os.listdir(folder))
    for name in filter(is_ours, names):
        _require_checkpoint_folder(folder / name)
    _require_known_checkpoints(folder, names)


def _require_checkpoint_folder(path: Path) -> None:
    """Refuse something other than a folder under a checkpoint's name: saving or deleting would fail on it."""
    try:
        found = kind_of(path, _part(path))
    except ConfigError as error:
        raise ConfigError(f"{error}; move it away") from None
    if found not in ("folder", None):
        raise problem(path, _part(path), f"it is a {found}, where a folder is needed; move it away")


def _require_known_checkpoints(folder: Path, names: Sequence[str]) -> None:
    """Refuse a folder whose checkpoints all have other names: a new run there would overlook them."""
    others = [name for name in names if CheckpointName.parse(name) is None and not _is_no_checkpoint(folder / name)]
    if not others or any(map(is_finished, names)):
        return
    more = f" and {len(others) - 1} more" if len(others) > 1 else ""
    raise ConfigError(
        f"output is {folder.parent}: it has no checkpoint step-N, but {folder / others[0]}{more}; rename it "
        f"{_original_name(folder / others[0])} to resume from it, or choose another output (training.warm_start starts "
        "from its weights)"
    )


def _require_own_config(folder: Path) -> None:
    """Refuse to overwrite a config.yaml that no run has written: a run writes its record first."""
    if kind_of(folder / CONFIG, CONFIG) and not kind_of(folder / RECORD, RECORD) and not any(_checkpoints(folder)):
        raise ConfigError(
            f"output is {folder}: {folder / CONFIG} belongs to no run ({RECORD} and checkpoints are missing) and the "
            "run would overwrite it; move it, or choose another output"
        )


def _checkpoints(folder: Path) -> list[str]:
    place = folder / CHECKPOINTS
    return [] if kind_of(place, _part(place)) is None else os.listdir(place)


def _is_no_checkpoint(path: Path) -> bool:
    """Hidden files belong to file systems and browsers; a hidden folder may be a checkpoint that was replaced."""
    hidden = path.name.startswith(".") and not os.path.exists(path / "state.json")
    return hidden or path.name == "lost+found"


def _original_name(checkpoint: Path) -> str:
    """The original name of a checkpoint, by the step in its state.json."""
    path = checkpoint / "state.json"
    try:
        step = parse_json(read_limited(path, path.name, JSON_BYTES))["state"]["step"]
        return f"back to {name_of(TypeAdapter(NonNegativeInt).validate_python(step, strict=True))}"
    except (ValueError, TypeError, LookupError):
        return "back to step-N, N being its step"
