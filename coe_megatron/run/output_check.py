"""Whether a run can have its output folder: every part of it looked at before anything costs time. Without torch.

Nothing is written, so that `--dry-run` says the same. What is looked at is of which kind each part is and whether it
can be written, not what it holds.
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
CONFIG, RECORD, LOCK, METRICS, PICTURE = "config.yaml", "run.json", "run.lock", "metrics.jsonl", "loss.png"
PREVIOUS_METRICS = "metrics.previous.jsonl"
REPLACED = (CONFIG, RECORD, METRICS, PICTURE)  # by way of a temporary file beside it


def require_output(config: RunConfig) -> None:
    """Refuse an output folder that cannot be written, or holds something else where the run has a part of its own.

    Raises:
        ConfigError: one line that names the folder, or the part of it, and says what is wrong.
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
    except OSError as error:  # it changes while it is looked at
        raise problem(folder, "output", error) from error


def _require_parts(folder: Path, config: RunConfig) -> None:
    for name in (CONFIG, RECORD, LOCK, METRICS, PREVIOUS_METRICS, PICTURE, WANDB_ID):
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
    """Refuse what is no folder where a checkpoint will be saved, or deleted: it would be in the way of that."""
    try:
        found = kind_of(path, _part(path))
    except ConfigError as error:
        raise ConfigError(f"{error}; move it away") from None
    if found not in ("folder", None):
        raise problem(path, _part(path), f"it is a {found}, where a folder is needed; move it away")


def _require_known_checkpoints(folder: Path, names: Sequence[str]) -> None:
    """Refuse checkpoints under other names alone: to begin over them would lose what was trained."""
    others = [name for name in names if CheckpointName.parse(name) is None and not _is_no_checkpoint(folder / name)]
    if not others or any(map(is_finished, names)):
        return
    more = f" and {len(others) - 1} more" if len(others) > 1 else ""
    raise ConfigError(
        f"output is {folder.parent}: it has no checkpoint step-N, but {folder / others[0]}{more}; rename it "
        f"{_way_back(folder / others[0])} to go on from it, or choose another output (training.warm_start begins with "
        "its weights)"
    )


def _require_own_config(folder: Path) -> None:
    """Refuse to write over a config.yaml that no run has written: a run writes its record first."""
    if kind_of(folder / CONFIG, CONFIG) and not kind_of(folder / RECORD, RECORD) and not any(_checkpoints(folder)):
        raise ConfigError(
            f"output is {folder}: {folder / CONFIG} is no run's ({RECORD} and checkpoints are missing), and the run "
            "would write its own there; move it, or choose another output"
        )


def _checkpoints(folder: Path) -> list[str]:
    place = folder / CHECKPOINTS
    return [] if kind_of(place, _part(place)) is None else os.listdir(place)


def _is_no_checkpoint(path: Path) -> bool:
    """Hidden files are a file system's or a file browser's; a hidden folder may be a checkpoint that was replaced."""
    hidden = path.name.startswith(".") and not os.path.exists(path / "state.json")
    return hidden or path.name == "lost+found"


def _way_back(checkpoint: Path) -> str:
    """The name that it had, as its state.json knows the step."""
    path = checkpoint / "state.json"
    try:
        step = parse_json(read_limited(path, path.name, JSON_BYTES))["state"]["step"]
        return f"back to {name_of(TypeAdapter(NonNegativeInt).validate_python(step, strict=True))}"
    except (ValueError, TypeError, LookupError):
        return "back to step-N, N being its step"
