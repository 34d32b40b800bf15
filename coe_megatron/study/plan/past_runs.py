"""What the runs of a study have left in their folders: settings and final losses."""

import math
import time
from functools import lru_cache
from pathlib import Path

from coe_megatron.config import RunConfig, flat, load
from coe_megatron.errors import ConfigError
from coe_megatron.files import kind_of
from coe_megatron.run.metrics_log import read_metrics
from coe_megatron.run.status import status
from coe_megatron.study.plan.arms import Run

_DIVERGED = "Diverged("  # begins the reason of a run that gave up on its loss (`training.recovery`)


def used_settings(run: Run) -> RunConfig | None:
    """The settings of a started run; None if it has no config.yaml. ConfigError if the file is damaged."""
    path = Path(run.config.output) / "config.yaml"
    if kind_of(path, "config.yaml") is None:
        return None
    found = path.stat()
    return _settings(path, found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=1 << 14)
def _settings(path: Path, _written: int, _size: int) -> RunConfig:
    """A file's settings; read again if the file was written again."""
    return load(path)


def difference(used: RunConfig, wanted: RunConfig) -> str:
    """The first setting that differs, with both values; empty if there is none."""
    old, new = flat(used), flat(wanted)
    for key, value in new.items():
        if key != "output" and old.get(key) != value:
            return f"was run with {key} {old.get(key)}, but the study now has {value}"
    return ""


def changed(run: Run) -> str:
    """How the settings of a started run differ from the study's; empty if they are equal."""
    try:
        used = used_settings(run)
    except ConfigError as error:
        return f"has settings that cannot be read ({error})"
    return "has no config.yaml" if used is None else difference(used, run.config)


def final_loss(run: Run) -> float | None:
    """The final validation loss of a run with the study's settings, in nats per token.

    Infinite if the run has diverged; None if it is not finished, or its loss cannot be read.
    """
    folder = Path(run.config.output)
    found = status(folder, time.time())
    diverged = found.state == "failed" and (found.reason or "").startswith(_DIVERGED)
    if not (diverged or found.state == "finished") or changed(run):
        return None
    if diverged:
        return math.inf
    try:
        lines = read_metrics(folder / "metrics.jsonl")
    except (ValueError, OSError):
        return None
    if not lines or lines[-1]["step"] != run.config.training.steps:
        return None
    loss = lines[-1].get("valid_loss")
    return math.inf if loss is None else float(loss)
