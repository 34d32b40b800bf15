"""How fast a finished run was, out of its own files: what other runs will take follows by ratios of FLOPs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from coe_megatron.config import RunConfig, load
from coe_megatron.errors import ConfigError
from coe_megatron.study.amounts import Amounts, Speed, evaluations, saves
from coe_megatron.training.logged import read_metrics

_FEWEST = 3  # logged steps; the first is left out, for it has what a process does but once


def calibrate(folder: Path, half_rows: float) -> Speed:
    """The speed of the run in a folder.

    A step's time is the median over the logged steps but the first. Start-up and checkpoints are told apart only where
    one attempt made the whole run; they count as nothing otherwise.

    Args:
        half_rows: of its kind of device (see `forecast.devices.Device`).

    Raises:
        ConfigError: there is no run in the folder, or too little of one.
    """
    record, lines = _read(folder)
    config = _with_vocabulary(load(folder / "config.yaml"), record)
    logged = [line for line in lines if line.get("step_seconds")]
    if len(logged) < _FEWEST:
        raise ConfigError(
            f"--calibration is {folder}: its metrics.jsonl has {len(logged)} logged steps, {_FEWEST} or more are needed"
        )
    amounts = Amounts()
    a_step = median(line["step_seconds"] for line in logged[1:])
    flops = amounts.weighted_flops(config, half_rows)
    rate = flops * config.training.global_batch * config.model.seq_length / a_step / record["ranks"]
    attempts = record["attempts"]
    if len(attempts) > 1 or attempts[0]["outcome"] != "finished" or "ended" not in attempts[0]:
        return Speed(rate, half_rows)
    a_pass = flops / 3 * amounts.evaluated(config) / rate / record["ranks"]
    a_save = _seconds_a_save(config, lines, a_pass)
    known = seconds_in_steps(logged) + evaluations(config) * a_pass + saves(config) * a_save
    return Speed(rate, half_rows, max(0.0, _took(attempts[0]) - known), a_save)


def _read(folder: Path) -> tuple[Mapping[str, Any], list[dict[str, Any]]]:
    try:
        record = json.loads((folder / "run.json").read_text())
        lines = read_metrics(folder / "metrics.jsonl")
        if all(record.get(name) for name in ("attempts", "ranks", "parameters")):
            return record, lines
    except (OSError, ValueError, AttributeError):
        raise ConfigError(f"--calibration is {folder}: it must be the folder of a run") from None
    raise ConfigError(f"--calibration is {folder}: its run.json tells of no step")


def _with_vocabulary(config: RunConfig, record: Mapping[str, Any]) -> RunConfig:
    """The config with the rows of the embedding that the run had, wherever its data may be now."""
    rows = record["parameters"]["embedding"] // config.model.hidden_size
    return replace(config, model=replace(config.model, vocab_size=rows))


def seconds_in_steps(logged: Sequence[Mapping[str, Any]]) -> float:
    """Seconds that the lines of logged steps tell of, without evaluations and checkpoints."""
    before = [0, *(line["step"] for line in logged)]
    return sum((line["step"] - earlier) * line["step_seconds"] for line, earlier in zip(logged, before, strict=False))


def _seconds_a_save(config: RunConfig, lines: Sequence[Mapping[str, Any]], a_pass: float) -> float:
    """What steps and evaluations leave of the time until a late step, over the checkpoints of that time.

    `eta_seconds` is the time since before the first evaluation, over the steps done, times those left.
    """
    steps, training = config.training.steps, config.training
    last = max((line["step"] for line in lines if line.get("eta_seconds")), default=0)
    done = [line for line in lines if 0 < line["step"] <= last]
    saved = len({step for step in range(1, last) if step % training.save_every == 0 or step in training.milestones})
    if not saved:
        return 0.0
    took = done[-1]["eta_seconds"] * last / (steps - last)
    evaluated = 1 + sum("valid_loss" in line for line in done[:-1])
    return max(0.0, took - seconds_in_steps(done) - evaluated * a_pass) / saved


def _took(attempt: Mapping[str, str]) -> float:
    began, ended = (datetime.fromisoformat(attempt[name]) for name in ("began", "ended"))
    return (ended - began).total_seconds()
