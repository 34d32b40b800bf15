"""Paths of a study's runs: the folder OUTPUT/ARM/seed-S, and beside it the run's complete config and its log."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from coe_megatron.config import dump
from coe_megatron.files import (
    kind_of,
    require_file,
    require_folder,
    require_replaceable,
    require_writable,
    write_atomically,
)
from coe_megatron.study.plan.arms import Run, Study


def config_of(run: Run) -> Path:
    """Path of the file that `write_config` writes."""
    return Path(f"{run.config.output}.yaml")


def log_of(run: Run) -> Path:
    """Path of the log of all attempts of a run."""
    return Path(f"{run.config.output}.log")


def write_config(run: Run) -> Path:
    """Write the run's complete config to a file beside its folder; `pretrain_coe.py FILE` repeats the run.

    Raises:
        ConfigError: the path is not a file, or cannot be written.
        OSError: writing failed.
    """
    path = require_replaceable(config_of(run), "the run's config")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, dump(run.config))
    return path


def check_places(study: Study, tuning: Sequence[Run] = (), *, to_write: bool) -> None:
    """Check that the files of a study's runs, and of its tuning runs, can be read, and with `to_write` also written.

    Raises:
        ConfigError: one line that names the path and what is wrong with it.
    """
    _check(Path(study.settings.output), "output", "folder", to_write)
    for arm in study.arms:
        _check(Path(arm.config.output), f"the folder of arm {arm.name}", "folder", to_write)
    for run in (*tuning, *study.runs):
        whose = f"arm {run.title}"
        _check(Path(run.config.output), f"the folder of {whose}", "folder", to_write)
        _check(config_of(run), f"the config of {whose}", "file", to_write)
        if to_write:
            require_replaceable(config_of(run), f"the config of {whose}")
        _check(log_of(run), f"the log of {whose}", "file", to_write)


def _check(path: Path, name: str, kind: Literal["file", "folder"], to_write: bool) -> None:
    if kind_of(path, name) is not None:
        (require_folder if kind == "folder" else require_file)(path, name)
    if to_write:
        require_writable(path, name, kind)
