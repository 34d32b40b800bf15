"""The folder of a run: config.yaml, run.json, the summary and the loss plot. Only rank 0 writes it.

Files are written under a temporary name and renamed. A file that is damaged when the run starts is renamed out of the
way and replaced, so that a run with complete checkpoints can resume. A finished run with nothing to do changes no file.
"""

import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

from coe_megatron.checkpoint.names import finished_steps, name_of
from coe_megatron.config import RunConfig, dump, flat, load
from coe_megatron.config.load import shown
from coe_megatron.config.settings import may_change
from coe_megatron.errors import ConfigError
from coe_megatron.estimate.run_shape import padded_vocabulary
from coe_megatron.files import set_aside, write_atomically
from coe_megatron.run import lock as folder_lock
from coe_megatron.run.loss_plot import draw_loss, is_complete_png
from coe_megatron.run.metrics_log import parse_line, repair_metrics
from coe_megatron.run.output_check import (
    CHECKPOINTS,
    CONFIG,
    LOSS_PLOT,
    METRICS,
    RECORD,
    TENSORBOARD,
    require_output,
)
from coe_megatron.run.record import read_record
from coe_megatron.run.status import as_text
from coe_megatron.text import aligned_facts

_PACKAGES = ("coe-megatron", "torch", "megatron-core", "deepspeed")
_FINISHED = "finished"
_DIED = "died"  # without a record of its end: it was killed, or the machine went down


class OutputLost(Exception):
    """The output folder was removed or moved during the run; its text is one line."""


_GIT_SECONDS = 5


@dataclass(frozen=True)
class Outcome:
    """The result of a finished run.

    Attributes:
        record: the contents of run.json.
        evaluations: the lines of metrics.jsonl with a validation loss; empty if the file was lost.
        checkpoint: the most recent one; None if all were deleted.
        loss_plot: None if it could not be drawn.
    """

    folder: Path
    record: Mapping[str, Any]
    evaluations: Sequence[Mapping[str, Any]]
    checkpoint: Path | None
    loss_plot: Path | None

    def summary(self) -> str:
        """Lines for the terminal: the model, its validation loss, the speed, and the files."""
        parameters = self.record["parameters"]
        rows = {
            "model": self.record["model"],
            "parameters": f"{parameters['total']:,} in all, {parameters['active']:,} active per token",
            **self._results(),
            "loss plot": self.loss_plot or "none",
            "metrics": self.folder / METRICS,
            "TensorBoard": f"tensorboard --logdir {self.folder / TENSORBOARD}",
            "checkpoint": self.checkpoint or "none",
        }
        return aligned_facts(rows)

    def _results(self) -> dict[str, str]:
        if not self.evaluations:
            return {"validation loss": "unknown: metrics.jsonl has none"}
        first, last = self.evaluations[0], self.evaluations[-1]
        best = min(self.evaluations, key=lambda line: line["valid_loss"])
        speed = last.get("tokens_per_second")
        losses = [line["valid_loss"] for line in (first, last, best)] + [self.record["unigram_entropy"]]
        at_first, at_last, lowest, entropy = (as_text(loss, "{:.3f}") for loss in losses)
        return {
            "validation loss": f"{at_first} at first, {at_last} at step {last['step']}, best {lowest} at step "
            f"{best['step']} (token frequencies alone: {entropy})",
            "speed": "unknown" if speed is None else f"{as_text(speed, '{:,.0f}')} tokens per second",
        }


def begin(config: RunConfig, logs: Path | None = None) -> "RunFolder":
    """Create and lock the output folder and record this attempt in run.json, before anything costs time.

    Args:
        logs: the folder in which the launcher keeps this rank's logs.

    Raises:
        ConfigError: the folder cannot be created or written.
        FolderInUse: another run has locked it; its files do not change.
    """
    folder = Path(config.output)
    require_output(config)
    created = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = folder_lock.take(folder)
    except OSError as error:
        raise _unusable(folder, error) from error
    try:
        return RunFolder(config, lock, _attempt(logs), created)
    except BaseException as error:
        lock.close()
        if isinstance(error, OSError):
            raise _unusable(folder, error) from error
        raise


class RunFolder:
    """A run's folder, locked by this process: a context manager, or until `close`.

    The contents of run.json are kept in memory, so that it stays complete whatever happens to the file.

    Args:
        lock: of the folder.
        attempt: the entry of this attempt in run.json.
        created: the folder did not exist before.
    """

    def __init__(self, config: RunConfig, lock: TextIO, attempt: dict[str, Any], created: bool) -> None:
        self.path, self._lock, self._created = Path(config.output), lock, created
        self._new = set[str]()  # files that did not exist before
        self._record = self._read()
        attempts = [{**old, "outcome": _DIED} if old["outcome"] == "running" else old for old in self._attempts]
        finished = bool(attempts) and attempts[-1]["outcome"] == _FINISHED
        self._record["attempts"] = [*attempts, attempt]
        # According to run.json there is nothing to do, so nothing is written unless this turns out to be wrong.
        self._unchanged = finished and max(self._steps(), default=-1) >= config.training.steps
        if not self._unchanged:
            self._replace(RECORD, self._as_json())
        if not (self.path / CHECKPOINTS).exists():  # otherwise config.yaml stays until it is compared
            self._has_config()
            self._replace(CONFIG, dump(config))

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock."""
        self._lock.close()

    def require_present(self) -> None:
        """Call this before a write, so that nothing is created where the folder was.

        Raises:
            OutputLost: the folder was removed or moved during the run.
        """
        if not folder_lock.is_in_place(self._lock, self.path):
            raise OutputLost(
                f"output is {self.path}: it was removed or moved during the run, and nothing more is written there; "
                "move it back and repeat the command to resume from its most recent checkpoint"
            )

    def describe(self, entries: Mapping[str, Any], config: RunConfig, done: bool) -> None:
        """Add to run.json what is known once data and model exist, and write this attempt's config.yaml.

        Args:
            done: no step is left to do; the files of a finished run do not change then.
        """
        known = all(self._record.get(name) is not None for name in entries)
        self._unchanged = self._unchanged and done and known
        has_config = self._has_config()
        if not self._unchanged:
            self.record(entries)
        if not self._unchanged or not has_config:
            self._try_to_replace(CONFIG, dump(config))

    def record(self, entries: Mapping[str, Any]) -> None:
        """Add entries to run.json; a write error is only reported on stderr."""
        self._record |= entries
        self._try_to_replace(RECORD, self._as_json())

    def withdraw(self) -> None:
        """Remove this attempt, which was refused before it began, from run.json, and the files that it created."""
        if self._unchanged or not folder_lock.is_in_place(self._lock, self.path):
            return
        if earlier := self._attempts[:-1]:
            return self.record({"attempts": earlier})
        for name in (*self._new, folder_lock.NAME):
            (self.path / name).unlink(missing_ok=True)
        if self._created:
            with suppress(OSError):  # the folder is not empty
                self.path.rmdir()

    def end(self, outcome: str) -> None:
        """Record in run.json how this attempt ended: `finished`, `interrupted` or `failed: ...`."""
        if self._unchanged or not folder_lock.is_in_place(self._lock, self.path):
            return
        *earlier, last = self._attempts
        self.record({"attempts": [*earlier, {**last, "outcome": outcome, "ended": _now()}]})

    def finish(self) -> Outcome:
        """Record that the run has finished, draw the loss plot, and collect what the summary needs.

        Raises:
            OutputLost: the folder is gone.
        """
        self.require_present()
        self.end(_FINISHED)
        lines = [parse_line(line) for line in self._logged()]
        evaluations = [line for line in lines if line.get("valid_loss") is not None]
        steps = self._steps()
        latest = self.path / CHECKPOINTS / name_of(steps[-1]) if steps else None
        return Outcome(self.path, self._record, evaluations, latest, self._draw_loss_plot(lines))

    @property
    def _attempts(self) -> list[dict[str, Any]]:
        return self._record.get("attempts", [])

    def _read(self) -> dict[str, Any]:
        try:
            return read_record(self.path)
        except ValueError as error:
            set_aside(self.path / RECORD, f"cannot be used ({error})")
            return {}

    def _as_json(self) -> str:
        return json.dumps(self._record, indent=2, allow_nan=False) + "\n"  # `read_record` accepts only finite numbers

    def _replace(self, name: str, content: str) -> None:
        if not (self.path / name).exists():
            self._new.add(name)
        write_atomically(self.path / name, content)

    def _try_to_replace(self, name: str, content: str) -> None:
        try:
            self._replace(name, content)
        except OSError as error:
            print(f"{self.path / name} cannot be written: {error.strerror}", file=sys.stderr)

    def _has_config(self) -> bool:
        """Whether there is a valid config.yaml; an invalid one is renamed out of the way."""
        try:
            return _saved_config(self.path) is not None
        except ConfigError as error:
            set_aside(self.path / CONFIG, f"cannot be used ({error})")
            return False

    def _steps(self) -> list[int]:
        return finished_steps(self.path / CHECKPOINTS)

    def _logged(self) -> list[bytes]:
        try:
            return repair_metrics(self.path / METRICS)
        except (OSError, ConfigError) as error:
            print(f"{self.path / METRICS} cannot be read: {error}", file=sys.stderr)
            return []

    def _draw_loss_plot(self, lines: list[dict[str, Any]]) -> Path | None:
        """Draw the loss plot; for a finished run keep the existing one, if it is complete."""
        path = self.path / LOSS_PLOT
        try:
            if self._unchanged and path.exists():
                if is_complete_png(path):
                    return path
                set_aside(path, "is not a complete PNG")
            return draw_loss(lines, self._record["unigram_entropy"], self._record["model"], path)
        except OSError as error:
            print(f"{path} cannot be written: {error.strerror}", file=sys.stderr)
            return None


def check_same_run(folder: Path, config: RunConfig, tokenizer_size: int) -> str:
    """Refuse to resume from checkpoints of another config; returns a remark for the user, possibly empty.

    Args:
        tokenizer_size: number of pieces; an explicit `model.vocab_size` equal to the default for it is no difference.

    Raises:
        ConfigError: names a setting that differs, with its earlier and present value.
    """
    try:
        saved = _saved_config(folder)
    except ConfigError as error:
        return f"; its settings could not be compared with those of its checkpoints ({error})"
    if saved is None:
        return ""
    then, now = flat(saved), flat(config)
    if _rows(saved, tokenizer_size) == _rows(config, tokenizer_size):
        then["model.vocab_size"] = config.model.vocab_size
    for name, value in now.items():
        if then.get(name) != value and not may_change(name):
            raise ConfigError(
                f"{name} is {shown(value)}: the checkpoints in {folder} were made with {shown(then.get(name))}; "
                "choose another output, or use that value"
            )
    was, steps = then["training.steps"], config.training.steps
    if was == steps or config.optimizer.decay == "constant":
        return ""
    return f"; training.steps was {was} and is now {steps}, which changes the learning rate schedule from here on"


def _rows(config: RunConfig, tokenizer_size: int) -> int:
    return config.model.vocab_size or padded_vocabulary(config, tokenizer_size)


def _saved_config(folder: Path) -> RunConfig | None:
    """The config.yaml in a run's folder; None if there is none.

    Raises:
        ConfigError: it cannot be used.
    """
    path = folder / CONFIG
    if not path.exists():
        return None
    config, (*_, last) = load(path), fields(RunConfig)
    if f"\n{last.name}:" not in path.read_text():  # the beginning of a config is one too, with defaults for the rest
        raise ConfigError(f"{path} ends before its section {last.name}")
    return config


def _unusable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(f"output is {folder}: cannot be written: {error.strerror}")


def _attempt(logs: Path | None) -> dict[str, Any]:
    return {
        "outcome": "running",
        "began": _now(),
        "command": sys.argv,
        "host": platform.node(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in _PACKAGES},
        "git_commit": _git_commit(),
        "log": _log(logs),
    }


def _log(logs: Path | None) -> str | None:
    """The file that stderr is written to, also through torchrun's pipe; None if it is unknown."""
    places = (Path("/proc/self/fd/2").resolve(), *([logs / "stderr.log"] if logs else []))
    return next((str(place) for place in places if place.is_file()), None)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _git_commit() -> str | None:
    """The git commit of the running code; None if it is not in a git checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False, timeout=_GIT_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):  # git is not installed, or its file system hangs
        return None
    return found.stdout.strip() or None
