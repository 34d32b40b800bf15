"""Where a run's numbers go: metrics.jsonl (an object a logged step), TensorBoard, Weights & Biases. Rank 0 writes.

A full disk, or a folder that cannot be written for a while, costs no number: it waits in memory until it is written.
"""

import json
import math
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from secrets import token_hex
from typing import Any, Protocol, TypeAlias

import torch
from torch.utils.tensorboard import SummaryWriter

from coe_megatron.config import RunConfig
from coe_megatron.config.settings import WandbSettings
from coe_megatron.errors import ConfigError

Values: TypeAlias = Mapping[str, Any]

_GROUPS = {
    "loss": ("train_loss", "valid_loss", "valid_bits_per_byte", "valid", "aux_loss", "z_loss"),
    "optimizer": ("learning_rate", "grad_norm"),
    "speed": ("step_seconds", "tokens_per_second", "tflops", "mfu"),
    "progress": ("tokens", "eta_seconds"),
    "recovery": ("left_out", "passed_over", "rollbacks"),
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
    opened: list[Metrics] = [JsonLines(folder / "metrics.jsonl", first_step)]
    if logging.tensorboard:
        opened.append(TensorBoard(folder / "tensorboard", first_step))
    if logging.wandb is not None:
        opened.append(WeightsAndBiases(folder, logging.wandb, config))
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
    """A file with an object a line, each on its way to the disk when `write` returns."""

    def __init__(self, path: Path, first_step: int) -> None:
        self._path = path
        if first_step:
            self.go_back(first_step)
        elif path.exists():
            path.replace(path.with_suffix(".previous.jsonl"))
        if not path.exists():
            path.touch()

    def write(self, values: Values) -> None:
        line = (json.dumps(_finite(values), allow_nan=False) + "\n").encode()
        with self._path.open("ab", buffering=0) as file:  # opened anew: its folder may have come back
            end = file.tell()
            try:
                while line:
                    line = line[file.write(line) :]
            except OSError:
                file.truncate(end)  # no line is torn
                raise

    def go_back(self, step: int) -> None:
        if self._path.exists():
            os.truncate(self._path, _end_of(self._path, step))

    def close(self) -> None:
        """Nothing is open."""


class TensorBoard:
    """Event files of the scalars, and of each router's N loads as a histogram."""

    def __init__(self, folder: Path, first_step: int) -> None:
        self._open: Callable[[int], SummaryWriter] = lambda first: SummaryWriter(str(folder), purge_step=first)
        self._board: SummaryWriter | None = self._open(first_step + 1)

    def write(self, values: Values) -> None:
        board = self._board = self._board or self._open(values["step"])
        try:
            for name, value in _scalars(values):
                board.add_scalar(name, value, values["step"])
            for part in values.get("routing", ()):
                board.add_histogram(_place(part) + "load", torch.tensor(part["load"]), values["step"], bins="auto")
            board.flush()
        except OSError:
            self._board = None  # its thread has ended; another file goes on with this step
            raise

    def go_back(self, step: int) -> None:
        self.close()
        self._board = self._open(step + 1)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


class WeightsAndBiases:
    """The same scalars at Weights & Biases; a run that goes on goes on there too.

    Raises:
        ConfigError: the package is missing, or the service refuses.
    """

    def __init__(self, folder: Path, settings: WandbSettings, config: RunConfig) -> None:
        try:
            import wandb
        except ImportError:
            raise ConfigError("logging.wandb is set: install the package wandb for it, or set it to null") from None
        identity = folder / "wandb-id"
        if not identity.exists():
            identity.write_text(token_hex(8))
        try:
            self._run = wandb.init(
                project=settings.project,
                name=settings.name or folder.resolve().name,
                entity=settings.entity,
                mode=settings.mode,
                id=identity.read_text(),
                resume="allow",
                dir=str(folder),
                config=asdict(config),
                settings=wandb.Settings(console="off", silent=True, init_timeout=60),
            )
        except wandb.Error as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"logging.wandb is set: {reason} (mode: offline needs no account)") from error

    def write(self, values: Values) -> None:
        self._run.log(dict(_scalars(values)), step=values["step"])

    def go_back(self, step: int) -> None:
        """The service takes nothing back: it ignores steps that it has, until there are newer ones."""

    def close(self) -> None:
        self._run.finish()


def _end_of(path: Path, step: int) -> int:
    """Where in a metrics.jsonl the lines of this step and those before it end, in bytes."""
    end = 0
    for line in path.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n") or json.loads(line)["step"] > step:
            break
        end += len(line)
    return end


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
