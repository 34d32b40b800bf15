"""Status of runs, from their folders only: config.yaml, run.json, the end of metrics.jsonl. Without torch."""

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

_PARTS = {"checkpoints", "index", "profile", "tensorboard", "wandb"}  # subfolders of a run, which contain no runs
_BLOCK, _MAX_TAIL = 1 << 16, 1 << 27  # bytes of a metrics.jsonl: per read, and in total from its end
# A run on another host counts as dead after this silence, or after this many logging intervals, whichever is longer:
# evaluating, saving and starting take time too.
_SILENT_SECONDS, _SILENT_INTERVALS = 600, 10
_COLUMNS = {
    **dict.fromkeys(("run", "state"), "<"),
    **dict.fromkeys(("step", "train loss", "valid loss", "tokens/s", "ETA", "attempts", "written", "rollbacks"), ">"),
    "log": "<",
}
_LAST_MOMENT = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC).timestamp()
_STATES = {"waiting", "running", "finished", "interrupted", "failed", "died"}
_LONG = 1e9  # larger numbers are shown with an exponent
_OPTIONAL_COLUMN = "rollbacks"  # shown if a run has any


@dataclass(frozen=True)
class Status:
    """The status of a run; None means unknown.

    Attributes:
        state: `waiting` (started, no step yet), `running`, `finished`, `interrupted`, `failed`, `died`
            (without recording its end), `no run` (there is none in this folder) or `unreadable` (its run.json is
            damaged).
        reason: the error of a failed run.
        step, steps: the last logged step, and `training.steps`.
        train_loss, valid_loss: the most recent ones, in nats per counted token.
        eta_seconds: estimated time to the end of a running run.
        attempts: including the current one.
        rollbacks: number of rollbacks (`recovery`).
        written: time of the last write to metrics.jsonl or run.json, in seconds since 1970.
        log: the file with the stderr of the most recent attempt, on the host where it ran.
    """

    folder: str
    state: str
    reason: str | None = None
    step: int | None = None
    steps: int | None = None
    train_loss: float | None = None
    valid_loss: float | None = None
    tokens_per_second: float | None = None
    eta_seconds: float | None = None
    attempts: int | None = None
    rollbacks: int | None = None
    written: float | None = None
    log: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """As JSON values; times in ISO 8601."""
        written = None if self.written is None else _moment(self.written)
        return {**asdict(self), "written": written}


def find_runs(folder: Path) -> list[Path]:
    """The runs in a folder and below it, which are the folders with a run.json."""
    found = []
    for place, folders, files in os.walk(folder):
        if "run.json" in files:
            found.append(Path(place))
            folders[:] = set(folders) - _PARTS
    return sorted(found)


def status(folder: Path, now: float) -> Status:
    """The status of the run in a folder, at `now` seconds since 1970."""
    try:
        record = read_record(folder)
    except ValueError:
        return Status(str(folder), "unreadable")
    if not (attempts := record.get("attempts")):
        return Status(str(folder), "unreadable" if (folder / RECORD).exists() else "no run")
    attempt, training = attempts[-1], _training(folder / CONFIG)
    latest, evaluated = _last_steps(folder / METRICS)
    logged = _written(folder / METRICS)
    written = max(logged, _written(folder / RECORD))
    state, _, reason = attempt["outcome"].partition(": ")
    if state == "running":
        interval = (latest.get("step_seconds") or 0) * training.get("log_every", 0)
        if not _is_alive(folder, attempt, now - written, interval):
            state = "died"
        elif not latest or _moment(logged) < (attempt.get("began") or ""):
            state = "waiting"
    eta = latest.get("eta_seconds") if state == "running" else None
    return Status(
        str(folder),
        state if state in _STATES else "unreadable",
        reason=reason or None,
        step=latest.get("step"),
        steps=training.get("steps"),
        train_loss=latest.get("train_loss"),
        valid_loss=evaluated.get("valid_loss"),
        tokens_per_second=latest.get("tokens_per_second"),
        eta_seconds=None if eta is None else max(0.0, eta - (now - written)),
        attempts=len(attempts),
        rollbacks=len(record.get("rollbacks", [])),
        written=written,
        log=attempt.get("log"),
    )


def statuses(folders: Sequence[Path]) -> list[Status]:
    """The status of all runs in some folders; a folder without runs gets one entry that says so."""
    now = time.time()
    runs = dict.fromkeys(run for folder in folders for run in find_runs(folder) or [folder])
    return [status(run, now) for run in runs]


def table(rows: Sequence[Status], now: float) -> str:
    """A text table with one line per run, at `now` seconds since 1970, followed by the reasons of failures."""
    columns = dict(_COLUMNS)
    cells = [dict(zip(columns, _cells(row, now), strict=True)) for row in rows]
    if not any(row.rollbacks for row in rows):
        del columns[_OPTIONAL_COLUMN]
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
        _span(row.eta_seconds),
        as_text(row.attempts, "{}"),
        "-" if row.written is None else f"{_span(max(0.0, now - row.written))} ago",
        as_text(row.rollbacks, "{}"),
        one_line(as_text(row.log, "{}")),
    ]


def _is_alive(folder: Path, attempt: Mapping[str, Any], silent: float, interval: float) -> bool:
    """Whether a run without a recorded end is still running: by its lock, or else by how long it was silent."""
    held = lock.is_held(folder)
    if held or (held is False and attempt.get("host") == platform.node()):
        return bool(held)
    return silent < max(_SILENT_SECONDS, _SILENT_INTERVALS * interval)


def _last_steps(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The last logged step, and the last one with an evaluation; empty if there is none."""
    latest: dict[str, Any] = {}
    try:
        for line in _lines_from_the_end(require_file(path, path.name)):
            if latest and b'"valid_loss"' not in line:
                continue
            values = parse_line(line)
            latest = latest or values
            if "valid_loss" in values:
                return latest, values
    except (OSError, ValueError):  # what was read so far is still valid
        pass
    return latest, {}


def _lines_from_the_end(path: Path) -> Iterator[bytes]:
    """The lines of a file, last first, read lazily; skips an incomplete last line."""
    with path.open("rb") as file:
        end = position = file.seek(0, os.SEEK_END)
        tail: list[bytes] = []  # pieces of the line whose start is not read yet, last piece first
        in_complete_line = False
        while position > max(0, end - _MAX_TAIL):
            size = min(_BLOCK, position)
            position = file.seek(position - size)
            first, *lines = file.read(size).split(b"\n")
            if lines:
                lines[-1] += b"".join(reversed(tail))
                tail = []
                if not in_complete_line:  # the text after the last line break is still being written
                    lines.pop()
                    in_complete_line = True
                yield from reversed(lines)
            tail.append(first)
        if in_complete_line and position == 0:
            yield b"".join(reversed(tail))


def _training(path: Path) -> dict[str, int]:
    """`training.steps` and `training.log_every` of a config, without those that cannot be read."""
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
    """A time as run.json has it, clamped to the range that ISO 8601 can express."""
    seconds = min(max(seconds, 0.0), _LAST_MOMENT)
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def as_text(value: Any, form: str) -> str:
    """A number as text, with an exponent if it is large; - for None."""
    if isinstance(value, float) and abs(value) >= _LONG:
        form = "{:.3g}"
    return "-" if value is None else form.format(value)


def _span(seconds: float | None) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds is not None and seconds >= size:
            return f"{as_text(seconds / size, '{:.1f}')} {unit}"
    return as_text(seconds, "{:.0f} s")
