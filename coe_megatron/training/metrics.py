"""Writers of a run's metrics: metrics.jsonl (one object per logged step), TensorBoard, Weights & Biases. Rank 0 writes.

If a write fails (full disk, unavailable folder), the metrics wait in memory until they can be written.
"""

import io
import json
import math
import os
import platform
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from secrets import token_hex
from typing import Any, Protocol, TypeAlias

import torch
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]
from torch.utils.tensorboard.summary import histogram, scalar

from coe_megatron.config import RunConfig
from coe_megatron.errors import ConfigError
from coe_megatron.files import set_aside, write_atomically
from coe_megatron.run.metrics_log import repair_metrics
from coe_megatron.run.output_check import METRICS, PREVIOUS_METRICS, TENSORBOARD, WANDB_ID

Values: TypeAlias = Mapping[str, Any]

_MAX_ID_LENGTH = 128
_GROUPS = {
    "loss": ("train_loss", "valid_loss", "valid_bits_per_byte", "valid", "aux_loss", "z_loss"),
    "answers": ("answer_accuracy", "answer_problems", "answer_groups"),
    "optimizer": ("learning_rate", "grad_norm"),
    "speed": ("step_seconds", "tokens_per_second", "tflops", "mfu"),
    "progress": ("tokens", "eta_seconds"),
    "recovery": ("skipped_steps", "data_offset", "rollbacks"),
}


class Metrics(Protocol):
    """Writes the metrics of logged steps in order; `values["step"]` is the step."""

    def write(self, values: Values) -> None:
        """Write one object; writers with flat names call numbers in nested objects `outer/inner`.

        Raises:
            OSError: the object was not written and can be passed again; the writer of `open_metrics` never raises it.
        """

    def rewind(self, step: int) -> None:
        """Discard metrics after a step, from which the run continues; raises as `write`."""

    def close(self) -> None:
        """Flush everything and close; do not use the writer afterwards."""


def open_metrics(folder: Path, config: RunConfig, first_step: int = 0) -> Metrics:
    """Open the metrics of a run: metrics.jsonl always, the other writers as `logging` says.

    Args:
        folder: the run's folder; its metrics up to `first_step` are kept.
        first_step: the step from which the run resumes. Later metrics, of a run that was killed after its checkpoint,
            are discarded. 0 starts over; an old metrics.jsonl is kept as `metrics.previous.jsonl`.

    Raises:
        ConfigError: Weights & Biases cannot be reached; the message says why.
    """
    logging = config.logging
    opened: list[Metrics] = [JsonLines(folder / METRICS, first_step)]
    if logging.tensorboard:
        opened.append(TensorBoard(folder / TENSORBOARD, first_step))
    if logging.wandb:
        opened.append(WeightsAndBiases(folder, config))
    return CompositeMetrics(opened)


class CompositeMetrics:
    """Metrics with any number of writers; metrics that a writer cannot write now are written later."""

    def __init__(self, writers: Sequence[Metrics] = ()) -> None:
        self._writers = [(writer, deque[Callable[[Metrics], None]]()) for writer in writers]
        self._warned = False

    def write(self, values: Values) -> None:
        self._do(lambda writer: writer.write(values))

    def rewind(self, step: int) -> None:
        self._do(lambda writer: writer.rewind(step))

    def close(self) -> None:
        self._flush()
        for writer, pending in self._writers:
            if pending:
                print(f"{len(pending)} logged steps could not be written: {type(writer).__name__}", file=sys.stderr)
            writer.close()

    def _do(self, action: Callable[[Metrics], None]) -> None:
        for _, pending in self._writers:
            pending.append(action)
        self._flush()

    def _flush(self) -> None:
        """Write in order, and stop at the first writer that fails: the others mostly write to the same disk."""
        try:
            for writer, pending in self._writers:
                while pending:
                    pending[0](writer)
                    pending.popleft()
        except OSError as error:
            if not self._warned:
                print(f"metrics wait in memory until they can be written: {error}", file=sys.stderr)
            self._warned = True
        else:
            self._warned = False


class JsonLines:
    """A file with one object per line, each on disk when `write` returns."""

    def __init__(self, path: Path, first_step: int) -> None:
        self._path = path
        if first_step:
            self.rewind(first_step)
        elif path.exists():
            path.replace(path.with_name(PREVIOUS_METRICS))
        if not path.exists():
            path.touch()

    def write(self, values: Values) -> None:
        line = (json.dumps(_finite(values), allow_nan=False) + "\n").encode()
        if not self._path.exists() and self._path.parent.exists():
            print(f"{self._path} was removed: it starts again with step {values['step']}", file=sys.stderr)
        _append(self._path, line)

    def rewind(self, step: int) -> None:
        repair_metrics(self._path, up_to=step)

    def close(self) -> None:
        """No file is open."""


class TensorBoard:
    """Event files with the scalars, and with each router's N expert loads as a histogram.

    We do not use torch's SummaryWriter: it writes in a thread, prints an uncatchable traceback on a full disk, and may
    leave a partial record. Each start and each rollback has its own file, so that damage to one file loses no others.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        self._folder = folder
        folder.mkdir(exist_ok=True)
        self.rewind(first_step)

    def write(self, values: Values) -> None:
        scalars = [scalar(name, value) for name, value in _scalars(values)]
        loads = [
            histogram(_place(part) + "load", torch.tensor(part["load"]), bins="auto")
            for part in values.get("routing", ())
        ]
        summaries = [value for summary in (*scalars, *loads) for value in summary.value]
        self._append(Event(step=values["step"], summary=Summary(value=summaries)))

    def rewind(self, step: int) -> None:
        """Start a new file; TensorBoard no longer shows later steps of the other files."""
        now = time.time()
        name = f"events.out.tfevents.{now:017.6f}.{platform.node()}.{os.getpid()}"  # names define the order
        self._file = self._folder / name
        self._append(
            Event(step=step + 1, file_version="brain.Event:2"),
            Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)),
        )

    def close(self) -> None:
        """No file is open."""

    def _append(self, *events: Any) -> None:
        records = io.BytesIO()
        writer = RecordWriter(records)
        for event in events:
            event.wall_time = time.time()
            writer.write(event.SerializeToString())
        _append(self._file, records.getvalue())


class WeightsAndBiases:
    """Weights & Biases with the same scalars; a resumed run resumes there too.

    Raises:
        ConfigError: the package is missing, or the service refuses the run.
    """

    def __init__(self, folder: Path, config: RunConfig) -> None:
        try:
            import wandb
        except ImportError:
            raise ConfigError("logging.wandb is true: install the package wandb, or set it to false") from None
        identity = _identity(folder / WANDB_ID)
        try:
            theirs = wandb.setup().settings  # of WANDB_PROJECT, WANDB_NAME and so on
            self._run = wandb.init(
                project=theirs.project or "coe_megatron",
                name=theirs.run_name or folder.resolve().name,
                id=identity,
                resume="allow",
                dir=str(folder),
                config=asdict(config),
                settings=wandb.Settings(console="off", silent=True, init_timeout=60),
            )
        except wandb.Error as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"logging.wandb is true: {reason} (WANDB_MODE=offline needs no account)") from error

    def write(self, values: Values) -> None:
        self._run.log(dict(_scalars(values)), step=values["step"])

    def rewind(self, step: int) -> None:
        """The service cannot discard steps: it ignores repeated steps until there are newer ones."""

    def close(self) -> None:
        self._run.finish()


def _identity(path: Path) -> str:
    """The run's id at the service, stored in a file; created anew if the file has other content."""
    if path.exists():
        with path.open("rb") as file:
            content = file.read(_MAX_ID_LENGTH + 1)
        if re.fullmatch(rb"[\w-]{1,%d}" % _MAX_ID_LENGTH, content):
            return content.decode()
        set_aside(path, "contains no run id of Weights & Biases")
    write_atomically(path, made := token_hex(8))
    return made


def _append(path: Path, content: bytes) -> None:
    """Append content to a file and sync it to disk; all or nothing.

    Raises:
        OSError: nothing was written.
    """
    with path.open("ab", buffering=0) as file:  # reopened each time, as the file system may have been unavailable
        end = file.tell()
        try:
            while content:
                content = content[file.write(content) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(end)
            raise


def _finite(value: Any) -> Any:
    """Replace every number that is not finite by None, since JSON has no such numbers."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _place(part: Values) -> str:
    return f"routing_layer{part['layer']}/iteration{part['iteration']}/"


def _scalars(values: Values) -> Iterator[tuple[str, float]]:
    """The numbers of a logged step by tag; boards group them by the part before the first slash."""
    for key, value in values.items():
        if key == "routing":
            for part in value:
                numbers = {name: part[name] for name in part if name not in ("layer", "iteration", "losses")}
                yield from _flat({**numbers, **part["losses"]}, _place(part))
        elif key.startswith("routing_"):
            yield from _flat({key.removeprefix("routing_"): value}, "routing/")
        elif key != "step":
            group = next((group for group, keys in _GROUPS.items() if key in keys), None)
            yield from _flat({key: value}, f"{group}/" if group else "")


def _flat(values: Values, prefix: str) -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            yield prefix + key, value
