"""Where a run's numbers go: metrics.jsonl (an object a logged step), TensorBoard, Weights & Biases. Rank 0 writes.

A full disk, or a folder that cannot be written for a while, costs no number: it waits in memory until it is written.
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
from coe_megatron.run.metrics_log import mend_metrics
from coe_megatron.run.output_check import METRICS, PREVIOUS_METRICS, TENSORBOARD, WANDB_ID

Values: TypeAlias = Mapping[str, Any]

_LONGEST_ID = 128
_GROUPS = {
    "loss": ("train_loss", "valid_loss", "valid_bits_per_byte", "valid", "aux_loss", "z_loss"),
    "optimizer": ("learning_rate", "grad_norm"),
    "speed": ("step_seconds", "tokens_per_second", "tflops", "mfu"),
    "progress": ("tokens", "eta_seconds"),
    "recovery": ("skipped_steps", "data_offset", "rollbacks"),
}


class Metrics(Protocol):
    """Takes the objects of logged steps, in their order; `values["step"]` says where each belongs."""

    def write(self, values: Values) -> None:
        """One object; numbers in nested objects count as `outer/inner` where names are flat.

        Raises:
            OSError: it is not written, and may be given again; not of what `open_metrics` returns.
        """

    def go_back(self, step: int) -> None:
        """Forget what lies beyond a step: the run goes on from there; raises as `write`."""

    def close(self) -> None:
        """Flush everything; of no use afterwards."""


def open_metrics(folder: Path, config: RunConfig, first_step: int = 0) -> Metrics:
    """Where the metrics of a run go: metrics.jsonl always, the rest as `logging` says.

    Args:
        folder: the run's folder; what lies there up to `first_step` is kept.
        first_step: steps after this one are written anew, so what lies beyond it, of a run that was killed some time
            after its checkpoint, is dropped. 0 begins anew; an old metrics.jsonl is kept as `metrics.previous.jsonl`.

    Raises:
        ConfigError: Weights & Biases cannot be reached; the message says why.
    """
    logging = config.logging
    opened: list[Metrics] = [JsonLines(folder / METRICS, first_step)]
    if logging.tensorboard:
        opened.append(TensorBoard(folder / TENSORBOARD, first_step))
    if logging.wandb:
        opened.append(WeightsAndBiases(folder, config))
    return Several(opened)


class Several:
    """Metrics that go to several places, to none as well; a place that cannot be written has them later."""

    def __init__(self, places: Sequence[Metrics] = ()) -> None:
        self._places = [(place, deque[Callable[[Metrics], None]]()) for place in places]
        self._said = False

    def write(self, values: Values) -> None:
        self._do(lambda place: place.write(values))

    def go_back(self, step: int) -> None:
        self._do(lambda place: place.go_back(step))

    def close(self) -> None:
        self._catch_up()
        for place, waiting in self._places:
            if waiting:
                print(f"{len(waiting)} logged steps could not be written: {type(place).__name__}", file=sys.stderr)
            place.close()

    def _do(self, action: Callable[[Metrics], None]) -> None:
        for _, waiting in self._places:
            waiting.append(action)
        self._catch_up()

    def _catch_up(self) -> None:
        """In order, and no place before the one ahead of it: they mostly lie on the same disk."""
        try:
            for place, waiting in self._places:
                while waiting:
                    waiting[0](place)
                    waiting.popleft()
        except OSError as error:
            if not self._said:
                print(f"metrics wait in memory until they can be written: {error}", file=sys.stderr)
            self._said = True
        else:
            self._said = False


class JsonLines:
    """A file with an object a line, each on the disk when `write` returns."""

    def __init__(self, path: Path, first_step: int) -> None:
        self._path = path
        if first_step:
            self.go_back(first_step)
        elif path.exists():
            path.replace(path.with_name(PREVIOUS_METRICS))
        if not path.exists():
            path.touch()

    def write(self, values: Values) -> None:
        line = (json.dumps(_finite(values), allow_nan=False) + "\n").encode()
        if not self._path.exists() and self._path.parent.exists():
            print(f"{self._path} was removed: it begins anew with step {values['step']}", file=sys.stderr)
        _append(self._path, line)

    def go_back(self, step: int) -> None:
        mend_metrics(self._path, up_to=step)

    def close(self) -> None:
        """Nothing is open."""


class TensorBoard:
    """Event files of the scalars, and of each router's N loads as a histogram.

    Without torch's SummaryWriter: that writes in a thread, whose traceback no caller can keep back on a full disk, and
    which may leave half a record. Each start, and each going back, has a file of its own, so that a damaged one costs
    no more than what is in it.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        self._folder = folder
        folder.mkdir(exist_ok=True)
        self.go_back(first_step)

    def write(self, values: Values) -> None:
        scalars = [scalar(name, value) for name, value in _scalars(values)]
        loads = [
            histogram(_place(part) + "load", torch.tensor(part["load"]), bins="auto")
            for part in values.get("routing", ())
        ]
        summaries = [value for summary in (*scalars, *loads) for value in summary.value]
        self._append(Event(step=values["step"], summary=Summary(value=summaries)))

    def go_back(self, step: int) -> None:
        """Begin another file; what others have beyond this step is not shown any more."""
        now = time.time()
        name = f"events.out.tfevents.{now:017.6f}.{platform.node()}.{os.getpid()}"  # read in the order of their names
        self._file = self._folder / name
        self._append(
            Event(step=step + 1, file_version="brain.Event:2"),
            Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)),
        )

    def close(self) -> None:
        """Nothing is open."""

    def _append(self, *events: Any) -> None:
        records = io.BytesIO()
        writer = RecordWriter(records)
        for event in events:
            event.wall_time = time.time()
            writer.write(event.SerializeToString())
        _append(self._file, records.getvalue())


class WeightsAndBiases:
    """The same scalars at Weights & Biases; a run that goes on goes on there too.

    Raises:
        ConfigError: the package is missing, or the service refuses.
    """

    def __init__(self, folder: Path, config: RunConfig) -> None:
        try:
            import wandb
        except ImportError:
            raise ConfigError("logging.wandb is true: install the package wandb for it, or set it to false") from None
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

    def go_back(self, step: int) -> None:
        """The service takes nothing back: it ignores steps that it has, until there are newer ones."""

    def close(self) -> None:
        self._run.finish()


def _identity(path: Path) -> str:
    """What the service knows a run by; kept in a file, made anew where that holds something else."""
    if path.exists():
        with path.open("rb") as file:
            content = file.read(_LONGEST_ID + 1)
        if re.fullmatch(rb"[\w-]{1,%d}" % _LONGEST_ID, content):
            return content.decode()
        set_aside(path, "holds no name of a run of Weights & Biases")
    write_atomically(path, made := token_hex(8))
    return made


def _append(path: Path, content: bytes) -> None:
    """Put content at a file's end, and on the disk; all of it or nothing.

    Raises:
        OSError: nothing of it is written.
    """
    with path.open("ab", buffering=0) as file:  # opened anew: the file system may have been away
        end = file.tell()
        try:
            while content:
                content = content[file.write(content) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(end)
            raise


def _finite(value: Any) -> Any:
    """None in place of every number that is not finite, which JSON cannot hold."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _place(part: Values) -> str:
    return f"routing_layer{part['layer']}/iteration{part['iteration']}/"


def _scalars(values: Values) -> Iterator[tuple[str, float]]:
    """The numbers of a logged step by tag; what stands before a tag's first slash is its group on a board."""
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
