"""The folder of a run: config.yaml, run.json, the summary and the picture of the loss. Rank 0 alone writes it.

Files are written under another name and renamed. What is damaged when the run starts is set aside under a name of its
own and made anew: a run whose checkpoints are whole goes on. A finished run that has nothing to do leaves all as it is.
"""

import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
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
from coe_megatron.run.loss_plot import draw_loss, is_whole
from coe_megatron.run.metrics_log import mend_metrics, parse_line
from coe_megatron.run.output_check import (
    CHECKPOINTS,
    CONFIG,
    METRICS,
    PICTURE,
    RECORD,
    TENSORBOARD,
    require_output,
)
from coe_megatron.run.record import read_record
from coe_megatron.run.status import as_text
from coe_megatron.text import aligned_facts

_PACKAGES = ("coe-megatron", "torch", "megatron-core", "deepspeed")
_FINISHED = "finished"
_DIED = "died"  # without a word: it was killed, or the machine went down


class OutputLost(Exception):
    """The output folder was removed or moved while the run went on; its text is one line."""


_GIT_SECONDS = 5


@dataclass(frozen=True)
class Outcome:
    """What a finished run came to; `summary()` says it to a person.

    Attributes:
        facts: of run.json.
        evaluations: the lines of metrics.jsonl with a validation loss; none where the file was lost.
        checkpoint: the newest one; None if all were deleted meanwhile.
        picture: None if it could not be drawn.
    """

    folder: Path
    facts: Mapping[str, Any]
    evaluations: Sequence[Mapping[str, Any]]
    checkpoint: Path | None
    picture: Path | None

    def summary(self) -> str:
        """Lines for the terminal: what was trained, what it learned, how fast, and where everything lies."""
        parameters = self.facts["parameters"]
        rows = {
            "model": self.facts["model"],
            "parameters": f"{parameters['total']:,} in all, {parameters['active']:,} active for a token",
            **self._learned(),
            "picture": self.picture or "none",
            "metrics": self.folder / METRICS,
            "TensorBoard": f"tensorboard --logdir {self.folder / TENSORBOARD}",
            "checkpoint": self.checkpoint or "none",
        }
        return aligned_facts(rows)

    def _learned(self) -> dict[str, str]:
        if not self.evaluations:
            return {"validation loss": "not known: metrics.jsonl has none"}
        first, last = self.evaluations[0], self.evaluations[-1]
        best = min(self.evaluations, key=lambda line: line["valid_loss"])
        speed = last.get("tokens_per_second")
        losses = [line["valid_loss"] for line in (first, last, best)] + [self.facts["unigram_entropy"]]
        at_first, at_last, lowest, entropy = (as_text(loss, "{:.3f}") for loss in losses)
        return {
            "validation loss": f"{at_first} at first, {at_last} at step {last['step']}, best {lowest} at step "
            f"{best['step']} (token frequencies alone: {entropy})",
            "speed": "not known" if speed is None else f"{as_text(speed, '{:,.0f}')} tokens a second",
        }


def begin(config: RunConfig, logs: Path | None = None) -> "RunFolder":
    """Make the output folder, lock it and note this attempt in run.json, before anything costs time.

    Args:
        logs: where whoever started this rank keeps its logs.

    Raises:
        ConfigError: the folder cannot be made or written.
        FolderInUse: another run has locked it; its files stay as they are.
    """
    folder = Path(config.output)
    require_output(config)
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = folder_lock.take(folder)
    except OSError as error:
        raise _unusable(folder, error) from error
    try:
        return RunFolder(config, lock, _attempt(logs), made)
    except BaseException as error:
        lock.close()
        if isinstance(error, OSError):
            raise _unusable(folder, error) from error
        raise


class RunFolder:
    """A run's folder for as long as this process has it locked: as a context, or until `close`.

    What run.json holds is kept in memory, so that it is whole whatever happens to the file meanwhile.

    Args:
        lock: of the folder.
        attempt: what run.json is to say of this attempt.
        made: the folder was not there before.
    """

    def __init__(self, config: RunConfig, lock: TextIO, attempt: dict[str, Any], made: bool) -> None:
        self.path, self._lock, self._made = Path(config.output), lock, made
        self._new = set[str]()  # files that were not there before
        self._record = self._read()
        attempts = [{**old, "outcome": _DIED} if old["outcome"] == "running" else old for old in self._attempts]
        finished = bool(attempts) and attempts[-1]["outcome"] == _FINISHED
        self._record["attempts"] = [*attempts, attempt]
        # As the records have it there is nothing to do: they stay as they are unless it turns out otherwise.
        self._untouched = finished and max(self._steps(), default=-1) >= config.training.steps
        if not self._untouched:
            self._replace(RECORD, self._as_json())
        if not (self.path / CHECKPOINTS).exists():  # otherwise the checkpoints' config stays until it is compared
            self._has_config()
            self._replace(CONFIG, dump(config))

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the folder free."""
        self._lock.close()

    def require_present(self) -> None:
        """To be called before a write, so that nothing is made anew where the folder was.

        Raises:
            OutputLost: it was removed or moved since the run began.
        """
        if not folder_lock.is_in_place(self._lock, self.path):
            raise OutputLost(
                f"output is {self.path}: it was removed or moved while the run went on, and nothing is written there "
                "any more; move it back and give the same command to go on from its newest checkpoint"
            )

    def describe(self, facts: Mapping[str, Any], config: RunConfig, done: bool) -> None:
        """Add to run.json what is known once data and model stand; config.yaml is from now on this attempt's.

        Args:
            done: no step is left to do; the records of a run that has finished are not touched then.
        """
        known = all(self._record.get(name) is not None for name in facts)
        self._untouched = self._untouched and done and known
        has_config = self._has_config()
        if not self._untouched:
            self.note(facts)
        if not self._untouched or not has_config:
            self._try_to_replace(CONFIG, dump(config))

    def note(self, facts: Mapping[str, Any]) -> None:
        """Add to run.json what has happened on the way; where the disk does not take it, that is said and no error."""
        self._record |= facts
        self._try_to_replace(RECORD, self._as_json())

    def withdraw(self) -> None:
        """Forget this attempt, which was refused before it began; what it made in the folder goes too."""
        if self._untouched or not folder_lock.is_in_place(self._lock, self.path):
            return
        if earlier := self._attempts[:-1]:
            return self.note({"attempts": earlier})
        for name in (*self._new, folder_lock.NAME):
            (self.path / name).unlink(missing_ok=True)
        if self._made:
            with suppress(OSError):  # there is something else in it
                self.path.rmdir()

    def end(self, outcome: str) -> None:
        """Note in run.json how this attempt ended: `finished`, `interrupted` or `failed: ...`."""
        if self._untouched or not folder_lock.is_in_place(self._lock, self.path):
            return
        *earlier, last = self._attempts
        self.note({"attempts": [*earlier, {**last, "outcome": outcome, "ended": _now()}]})

    def finish(self) -> Outcome:
        """Of a run that came to its last step: note it, draw the loss, and gather what the summary says.

        Raises:
            OutputLost: the folder is gone.
        """
        self.require_present()
        self.end(_FINISHED)
        lines = [parse_line(line) for line in self._logged()]
        evaluations = [line for line in lines if line.get("valid_loss") is not None]
        steps = self._steps()
        newest = self.path / CHECKPOINTS / name_of(steps[-1]) if steps else None
        return Outcome(self.path, self._record, evaluations, newest, self._picture(lines))

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
        return json.dumps(self._record, indent=2, allow_nan=False) + "\n"  # `read_record` takes nothing else

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
        """Whether there is a config.yaml that can be used; one that cannot is set aside."""
        try:
            return _saved_config(self.path) is not None
        except ConfigError as error:
            set_aside(self.path / CONFIG, f"cannot be used ({error})")
            return False

    def _steps(self) -> list[int]:
        return finished_steps(self.path / CHECKPOINTS)

    def _logged(self) -> list[bytes]:
        try:
            return mend_metrics(self.path / METRICS)
        except (OSError, ConfigError) as error:
            print(f"{self.path / METRICS} cannot be read: {error}", file=sys.stderr)
            return []

    def _picture(self, lines: list[dict[str, Any]]) -> Path | None:
        """The picture of the loss; of an untouched run the one that is there, if it is whole."""
        path = self.path / PICTURE
        try:
            if self._untouched and path.exists():
                if is_whole(path):
                    return path
                set_aside(path, "is no whole picture")
            return draw_loss(lines, self._record["unigram_entropy"], self._record["model"], path)
        except OSError as error:
            print(f"{path} cannot be written: {error.strerror}", file=sys.stderr)
            return None


def check_same_run(folder: Path, config: RunConfig, tokenizer_size: int) -> str:
    """Refuse to go on from checkpoints that another config made; returns what a user should know, if anything.

    Args:
        tokenizer_size: pieces; an embedding of as many rows as `model.vocab_size` null gives is no other one.

    Raises:
        ConfigError: names a setting that differs, its value then and now.
    """
    try:
        saved = _saved_config(folder)
    except ConfigError as error:
        return f"; settings could not be compared with those of its checkpoints ({error})"
    if saved is None:
        return ""
    then, now = flat(saved), flat(config)
    if _rows(saved, tokenizer_size) == _rows(config, tokenizer_size):
        then["model.vocab_size"] = config.model.vocab_size
    for name, value in now.items():
        if then.get(name) != value and not may_change(name):
            raise ConfigError(
                f"{name} is {shown(value)}: the checkpoints in {folder} were made with {shown(then.get(name))}; "
                "choose another output, or that value"
            )
    was, steps = then["training.steps"], config.training.steps
    if was == steps or config.optimizer.decay == "constant":
        return ""
    return f"; training.steps was {was} and is {steps}, so that the learning rate is another from here on"


def _rows(config: RunConfig, tokenizer_size: int) -> int:
    return config.model.vocab_size or padded_vocabulary(config, tokenizer_size)


def _saved_config(folder: Path) -> RunConfig | None:
    """The config.yaml in a run's folder; None if there is none.

    Raises:
        ConfigError: it cannot be used.
    """
    return load(folder / CONFIG) if (folder / CONFIG).exists() else None


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
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False, timeout=_GIT_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):  # git is not installed, or its file system hangs
        return None
    return found.stdout.strip() or None
