"""How runs stand, read from their folders alone: config.yaml, run.json, the end of metrics.jsonl. Without torch."""

import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from coe_megatron.config.load import read
from coe_megatron.errors import one_line
from coe_megatron.files import require_file
from coe_megatron.run import lock
from coe_megatron.run.metrics_log import parse_line
from coe_megatron.run.output_check import CONFIG, METRICS, RECORD
from coe_megatron.run.record import read_record
from coe_megatron.text import aligned

_PARTS = {"checkpoints", "index", "profile", "tensorboard", "wandb"}  # of a run's folder: no runs lie in them
_BLOCK, _FARTHEST = 1 << 16, 1 << 27  # bytes of a metrics.jsonl: read at once, and from its end at all
# A run on another machine has died when it was silent for so long, or for so many times what it takes from one logged
# step to the next: evaluating, saving and starting take time too.
_SILENT_SECONDS, _SILENT_INTERVALS = 600, 10
_COLUMNS = {
    **dict.fromkeys(("run", "state"), "<"),
    **dict.fromkeys(("step", "train loss", "valid loss", "tokens/s", "left", "starts", "written", "rolled back"), ">"),
    "log": "<",
}
_LAST_MOMENT = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC).timestamp()
_STATES = {"waiting", "running", "finished", "interrupted", "failed", "died"}
_LONG = 1e9  # from here on a number is shown with its exponent
_WHERE_ANY = "rolled back"  # a column that is there when a run has something to say in it


@dataclass(frozen=True)
class Status:
    """How one run stands; None is what is not known (yet).

    Attributes:
        state: `waiting` (started, not come to its steps yet), `running`, `finished`, `interrupted`, `failed`, `died`
            (without a word), `no run` (there is none in this folder) or `unreadable` (its run.json is damaged).
        reason: the error of a failed run.
        step, steps: done at the last logged step, and asked for.
        train_loss, valid_loss: the newest ones, in nats per counted token.
        seconds_left: of a run that goes on.
        starts: attempts so far, this one with them.
        rollbacks: how often the policy on losses has rolled it back.
        written: when metrics.jsonl or run.json was last written, in seconds since 1970.
        log: the file that the newest attempt's stderr goes to, on the machine where it ran.
    """

    folder: str
    state: str
    reason: str | None = None
    step: int | None = None
    steps: int | None = None
    train_loss: float | None = None
    valid_loss: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    starts: int | None = None
    rollbacks: int | None = None
    written: float | None = None
    log: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON; times in ISO 8601."""
        written = None if self.written is None else _moment(self.written)
        return {**asdict(self), "written": written}


def find_runs(folder: Path) -> list[Path]:
    """The runs in a folder and below it; a folder with a run.json is one."""
    found = []
    for place, folders, files in os.walk(folder):
        if "run.json" in files:
            found.append(Path(place))
            folders[:] = set(folders) - _PARTS
    return sorted(found)


def status(folder: Path, now: float) -> Status:
    """How the run in a folder stands, at `now` seconds since 1970."""
    try:
        record = read_record(folder)
    except ValueError:
        return Status(str(folder), "unreadable")
    if not (attempts := record.get("attempts")):
        return Status(str(folder), "unreadable" if (folder / RECORD).exists() else "no run")
    attempt, training = attempts[-1], _training(folder / CONFIG)
    newest, evaluated = _last_steps(folder / METRICS)
    logged = _written(folder / METRICS)
    written = max(logged, _written(folder / RECORD))
    state, _, reason = attempt["outcome"].partition(": ")
    if state == "running":
        interval = (newest.get("step_seconds") or 0) * training.get("log_every", 0)
        if not _lives(folder, attempt, now - written, interval):
            state = "died"
        elif not newest or _moment(logged) < (attempt.get("began") or ""):
            state = "waiting"
    left = newest.get("eta_seconds") if state == "running" else None
    return Status(
        str(folder),
        state if state in _STATES else "unreadable",
        reason=reason or None,
        step=newest.get("step"),
        steps=training.get("steps"),
        train_loss=newest.get("train_loss"),
        valid_loss=evaluated.get("valid_loss"),
        tokens_per_second=newest.get("tokens_per_second"),
        seconds_left=None if left is None else max(0.0, left - (now - written)),
        starts=len(attempts),
        rollbacks=len(record.get("rollbacks", [])),
        written=written,
        log=attempt.get("log"),
    )


def statuses(folders: Sequence[Path]) -> list[Status]:
    """How all runs in some folders stand; a folder without any has a row of its own, which says so."""
    now = time.time()
    runs = dict.fromkeys(run for folder in folders for run in find_runs(folder) or [folder])
    return [status(run, now) for run in runs]


def table(rows: Sequence[Status], now: float) -> str:
    """For a person: a line a run, at `now` seconds since 1970; below it why runs failed."""
    columns = dict(_COLUMNS)
    cells = [dict(zip(columns, _cells(row, now), strict=True)) for row in rows]
    if not any(row.rollbacks for row in rows):
        del columns[_WHERE_ANY]
    lines = aligned([list(columns), *([line[name] for name in columns] for line in cells)], "".join(columns.values()))
    failures = [one_line(f"{row.folder} failed: {row.reason}") for row in rows if row.reason is not None]
    return "\n".join([*lines, *([""] if failures else []), *failures])


def _cells(row: Status, now: float) -> list[str]:
    return [
        one_line(row.folder),
        row.state,
        as_text(row.step, "{:,}") + ("" if row.steps is None else f" of {row.steps:,}"),
        as_text(row.train_loss, "{:.3f}"),
        as_text(row.valid_loss, "{:.3f}"),
        as_text(row.tokens_per_second, "{:,.0f}"),
        _span(row.seconds_left),
        as_text(row.starts, "{}"),
        "-" if row.written is None else f"{_span(max(0.0, now - row.written))} ago",
        as_text(row.rollbacks, "{}"),
        one_line(as_text(row.log, "{}")),
    ]


def _lives(folder: Path, attempt: Mapping[str, Any], silent: float, interval: float) -> bool:
    """Whether a run that has not said how it ended goes on; its lock says so, where locks are seen everywhere."""
    held = lock.is_held(folder)
    if held or (held is False and attempt.get("host") == platform.node()):
        return bool(held)
    return silent < max(_SILENT_SECONDS, _SILENT_INTERVALS * interval)


def _last_steps(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The newest logged step, and the newest that was evaluated; empty where there is none."""
    newest: dict[str, Any] = {}
    try:
        for line in _lines_from_the_end(require_file(path, path.name)):
            if newest and b'"valid_loss"' not in line:
                continue
            values = parse_line(line)
            newest = newest or values
            if "valid_loss" in values:
                return newest, values
    except (OSError, ValueError):  # what was read so far is true all the same
        pass
    return newest, {}


def _lines_from_the_end(path: Path) -> Iterator[bytes]:
    """The lines of a file, the last first, reading no more than is asked for; one without an end is left out."""
    with path.open("rb") as file:
        end = position = file.seek(0, os.SEEK_END)
        tail: list[bytes] = []  # pieces of the line whose beginning is not read yet, the last piece first
        whole = False
        while position > max(0, end - _FARTHEST):
            size = min(_BLOCK, position)
            position = file.seek(position - size)
            first, *lines = file.read(size).split(b"\n")
            if lines:
                lines[-1] += b"".join(reversed(tail))
                tail = []
                if not whole:  # what follows the last line break is being written
                    lines.pop()
                    whole = True
                yield from reversed(lines)
            tail.append(first)
        if whole and position == 0:
            yield b"".join(reversed(tail))


def _training(path: Path) -> dict[str, int]:
    """Of the section `training` of a config `steps` and `log_every`; those that cannot be read are not there."""
    try:
        section = dict(OmegaConf.select(read(path), "training"))
    except (ValueError, TypeError, OmegaConfBaseException):
        return {}
    names = ("steps", "log_every")
    return {name: section[name] for name in names if type(section.get(name)) is int and 0 < section[name] < _LONG}


def _written(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _moment(seconds: float) -> str:
    """As run.json has it; of a file that says it is of another age the last moment that there is a name for."""
    seconds = min(max(seconds, 0.0), _LAST_MOMENT)
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def as_text(value: Any, form: str) -> str:
    """A number in a form for a person, with its exponent where the form would make it long; - for None."""
    if isinstance(value, float) and abs(value) >= _LONG:
        form = "{:.3g}"
    return "-" if value is None else form.format(value)


def _span(seconds: float | None) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds is not None and seconds >= size:
            return f"{as_text(seconds / size, '{:.1f}')} {unit}"
    return as_text(seconds, "{:.0f} s")
