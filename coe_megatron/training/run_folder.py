"""The folder of a run: config.yaml, run.json, the summary and the picture of the loss. Rank 0 alone writes it."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from coe_megatron.config import RunConfig, dump
from coe_megatron.training.metrics import read_metrics
from coe_megatron.training.picture import draw_loss

_PACKAGES = ("coe-megatron", "torch", "megatron-core", "deepspeed")


@dataclass(frozen=True)
class Outcome:
    """What a finished run came to; `summary()` says it to a person."""

    folder: Path
    facts: Mapping[str, Any]
    first: Mapping[str, Any]
    last: Mapping[str, Any]
    checkpoint: Path
    picture: Path

    def summary(self) -> str:
        """Lines for the terminal: what was trained, what it learned, how fast, and where everything lies."""
        parameters, entropy = self.facts["parameters"], self.facts["unigram_entropy"]
        rows = {
            "model": self.facts["model"],
            "parameters": f"{parameters['total']:,} in all, {parameters['active']:,} active for a token",
            "validation loss": f"{self.first['valid_loss']:.3f} at first, {self.last['valid_loss']:.3f} at step "
            f"{self.last['step']} (token frequencies alone: {entropy:.3f})",
            "speed": f"{self.last['tokens_per_second']:,.0f} tokens a second",
            "picture": self.picture,
            "metrics": self.folder / "metrics.jsonl",
            "TensorBoard": f"tensorboard --logdir {self.folder / 'tensorboard'}",
            "checkpoint": self.checkpoint,
        }
        width = max(map(len, rows))
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows.items())


def begin(folder: Path, config: RunConfig, facts: Mapping[str, Any]) -> None:
    """Make the folder and write down what is about to run, before the first step."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(dump(config))
    record = {
        "outcome": "running",
        "command": sys.argv,
        "host": platform.node(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in _PACKAGES},
        "git_commit": _git_commit(),
        **facts,
    }
    _write_json(folder / "run.json", record)


def end(folder: Path, outcome: str) -> None:
    """Note in run.json how the run ended: `finished`, `interrupted` or `failed: ...`."""
    record = json.loads((folder / "run.json").read_text())
    _write_json(folder / "run.json", {**record, "outcome": outcome})


def outcome(folder: Path, checkpoint: Path) -> Outcome:
    """Of a run that came to its last step: draw the loss, and gather what the summary says."""
    record = json.loads((folder / "run.json").read_text())
    lines = read_metrics(folder / "metrics.jsonl")
    evaluated = [line for line in lines if "valid_loss" in line]
    picture = draw_loss(lines, record["unigram_entropy"], record["model"], folder / "loss.png")
    return Outcome(folder, record, evaluated[0], evaluated[-1], checkpoint, picture)


def _write_json(path: Path, record: Mapping[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=2) + "\n")
    os.replace(temporary, path)


def _git_commit() -> str | None:
    """The commit of the code that runs; None outside a checkout."""
    root = Path(__file__).parent
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None
