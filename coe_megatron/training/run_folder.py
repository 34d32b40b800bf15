"""The folder of a run: config.yaml, run.json, the summary and the picture of the loss. Rank 0 alone writes it."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

from coe_megatron.config import RunConfig, dump, flat, load
from coe_megatron.errors import ConfigError
from coe_megatron.training import folder_lock
from coe_megatron.training.logged import read_metrics
from coe_megatron.training.picture import draw_loss

_PACKAGES = ("coe-megatron", "torch", "megatron-core", "deepspeed")
# What may differ between the attempts of one run: it changes what is shown and kept, how far the run goes, or how the
# work is divided.
_FREE = {
    "output",
    "data.path",  # checkpoints remember the text and its weights themselves
    "data.blend",
    "moe.recompute",
    "training.steps",
    "training.micro_batch",  # another layout may need another, and a step takes the same samples
    "training.log_every",
    "training.evaluate_every",
    "training.save_every",
    "training.keep_checkpoints",
    "training.milestones",
    "training.background_saving",
}
# Any layout and ZeRO stage reads the checkpoints of any other.
_FREE_SECTIONS = ("data.validation", "logging.", "parallel.", "profile.", "recovery.", "zero.")


_DIED = "died"  # without a word: it was killed, or the machine went down


@dataclass(frozen=True)
class Outcome:
    """What a finished run came to; `summary()` says it to a person."""

    folder: Path
    facts: Mapping[str, Any]
    evaluations: list[Mapping[str, Any]]
    checkpoint: Path
    picture: Path

    def summary(self) -> str:
        """Lines for the terminal: what was trained, what it learned, how fast, and where everything lies."""
        parameters, entropy = self.facts["parameters"], self.facts["unigram_entropy"]
        first, last = self.evaluations[0], self.evaluations[-1]
        best = min(self.evaluations, key=lambda line: line["valid_loss"])
        rows = {
            "model": self.facts["model"],
            "parameters": f"{parameters['total']:,} in all, {parameters['active']:,} active for a token",
            "validation loss": f"{first['valid_loss']:.3f} at first, {last['valid_loss']:.3f} at step {last['step']}, "
            f"best {best['valid_loss']:.3f} at step {best['step']} (token frequencies alone: {entropy:.3f})",
            "speed": f"{last['tokens_per_second']:,.0f} tokens a second",
            "picture": self.picture,
            "metrics": self.folder / "metrics.jsonl",
            "TensorBoard": f"tensorboard --logdir {self.folder / 'tensorboard'}",
            "checkpoint": self.checkpoint,
        }
        width = max(map(len, rows))
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows.items())


def begin(folder: Path, config: RunConfig, logs: Path | None = None) -> TextIO:
    """Make the folder, lock it and note this attempt in run.json, before anything costs time.

    Args:
        logs: where whoever started this rank keeps its logs.

    Returns:
        The lock, to be closed when the attempt is over.

    Raises:
        ConfigError: the folder cannot be made or written.
        FolderInUse: another run has locked it; its files stay as they are.
    """
    attempt = {
        "outcome": "running",
        "began": _now(),
        "command": sys.argv,
        "host": platform.node(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in _PACKAGES},
        "git_commit": _git_commit(),
        "log": _log(logs),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = folder_lock.take(folder)
        record = _read(folder)
        earlier = [{**old, "outcome": _DIED} if old["outcome"] == "running" else old for old in _attempts(record)]
        _write(folder, {**record, "attempts": [*earlier, attempt]})
        if not (folder / "checkpoints").exists():  # otherwise the checkpoints' config stays until it is compared
            (folder / "config.yaml").write_text(dump(config))
        return lock
    except OSError as error:
        raise ConfigError(f"output is {folder}: cannot be written: {error.strerror}") from error


def describe(folder: Path, facts: Mapping[str, Any], config: RunConfig) -> None:
    """Add to run.json what is known once data and model stand; config.yaml is from now on this attempt's."""
    _write(folder, {**_read(folder), **facts})
    (folder / "config.yaml").write_text(dump(config))


def note(folder: Path, facts: Mapping[str, Any]) -> None:
    """Add to run.json what has happened on the way; where the disk does not take it, that is said and no error."""
    try:
        _write(folder, {**_read(folder), **facts})
    except OSError as error:
        print(f"{folder / 'run.json'} cannot be written: {error.strerror}", file=sys.stderr)


def withdraw(folder: Path) -> None:
    """Forget this attempt, which was refused before it began; a folder that it made goes too."""
    record = _read(folder)
    if attempts := _attempts(record)[:-1]:
        return _write(folder, {**record, "attempts": attempts})
    for name in ("run.json", "config.yaml", folder_lock.NAME):
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):  # there is something else in it
        folder.rmdir()


def end(folder: Path, outcome: str) -> None:
    """Note in run.json how this attempt ended: `finished`, `interrupted` or `failed: ...`."""
    if attempts := _attempts(_read(folder)):  # else somebody has removed the folder
        note(folder, {"attempts": [*attempts[:-1], {**attempts[-1], "outcome": outcome, "ended": _now()}]})


def finish(folder: Path) -> Outcome:
    """Of a run that came to its last step: note it, draw the loss, and gather what the summary says."""
    end(folder, "finished")
    record, lines = _read(folder), read_metrics(folder / "metrics.jsonl")
    picture = draw_loss(lines, record["unigram_entropy"], record["model"], folder / "loss.png")
    newest = max(path for path in (folder / "checkpoints").glob("step-*") if not path.suffix)
    return Outcome(folder, record, [line for line in lines if line.get("valid_loss") is not None], newest, picture)


def check_same_run(folder: Path, config: RunConfig) -> str:
    """Refuse to go on from checkpoints that another config made; returns what a user should know, if anything.

    Raises:
        ConfigError: names a setting that differs, its value then and now; or the checkpoints' config cannot be read.
    """
    if not (folder / "config.yaml").exists():
        return ""
    try:
        saved = load(folder / "config.yaml")
    except ConfigError as error:
        raise ConfigError(f"output is {folder}: the config.yaml of its checkpoints cannot be used: {error}") from error
    then, now = flat(saved), flat(config)
    for name, value in now.items():
        if then.get(name) != value and name not in _FREE and not name.startswith(_FREE_SECTIONS):
            raise ConfigError(
                f"{name} is {value}: the checkpoints in {folder} were made with {then.get(name)}; "
                "choose another output, or that value"
            )
    was, steps = then["training.steps"], config.training.steps
    if was == steps or config.optimizer.decay == "constant":
        return ""
    return f"; training.steps was {was} and is {steps}, so that the learning rate is another from here on"


def _attempts(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    return record.get("attempts", [])


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _write(folder: Path, record: Mapping[str, Any]) -> None:
    temporary = folder / "run.json.tmp"
    temporary.write_text(json.dumps(record, indent=2) + "\n")
    os.replace(temporary, folder / "run.json")


def _log(logs: Path | None) -> str | None:
    """The file that stderr goes to, by way of a pipe too if it has torchrun's name for it; None if it is not known."""
    places = (Path("/proc/self/fd/2").resolve(), *([logs / "stderr.log"] if logs else []))
    return next((str(place) for place in places if place.is_file()), None)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _git_commit() -> str | None:
    """The commit of the code that runs; None where it does not lie in a checkout of its own."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # git is not installed
        return None
    return found.stdout.strip() or None
