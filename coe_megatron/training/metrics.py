"""Where a run's numbers go: metrics.jsonl (an object a logged step) and TensorBoard. Rank 0 alone writes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter


class MetricsWriter:
    """Appends to `metrics.jsonl` and `tensorboard/` in a run's folder; what lies behind `first_step` is kept.

    Args:
        folder: the run's folder; None writes nowhere (ranks other than 0).
        first_step: steps after this one are written anew, so lines beyond it, of a run that was killed some time after
            its checkpoint, are dropped. 0 begins anew; an old file is then kept as `metrics.previous.jsonl`.
    """

    def __init__(self, folder: Path | None, first_step: int = 0) -> None:
        self._lines, self._board = None, None
        if folder is None:
            return
        path = folder / "metrics.jsonl"
        _keep_until(path, first_step)
        self._lines = path.open("a", buffering=1)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def write(self, values: Mapping[str, Any]) -> None:
        """One object; `values["step"]` is its place in TensorBoard, where the N loads of a router are a histogram."""
        if self._lines is None or self._board is None:
            return
        self._lines.write(json.dumps(values) + "\n")
        for name, value in _scalars(values):
            if name != "step":
                self._board.add_scalar(name, value, values["step"])
        for part in values.get("routing", ()):
            self._board.add_histogram(_place(part) + "load", torch.tensor(part["load"]), values["step"], bins="auto")

    def close(self) -> None:
        """Flush everything; the writer is of no use afterwards."""
        if self._lines is not None and self._board is not None:
            self._lines.close()
            self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl; none if the file is missing, and a last line that was cut off is left out."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _keep_until(path: Path, step: int) -> None:
    """Cut the file after a step; whenever the process dies, either the old or the new file is there."""
    if step == 0:
        if path.exists():
            path.replace(path.with_suffix(".previous.jsonl"))
        return
    cut = path.with_suffix(".cut.jsonl")
    cut.write_text("".join(json.dumps(line) + "\n" for line in read_metrics(path) if line["step"] <= step))
    cut.replace(path)


def _place(part: Mapping[str, Any]) -> str:
    return f"routing/layer{part['layer']}/iteration{part['iteration']}/"


def _scalars(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for key, value in values.items():
        if key == "routing":
            for part in value:
                numbers = {name: part[name] for name in part if name not in ("layer", "iteration", "losses")}
                found += _scalars({**numbers, **part["losses"]}, _place(part))
        elif isinstance(value, Mapping):
            found += _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            found.append((prefix + key, value))
    return found
