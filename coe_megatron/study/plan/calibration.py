"""Measures the speed of a finished run from its files: how many times longer than predicted its steps took."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

from pydantic import AwareDatetime, BaseModel, Field, ValidationError

from coe_megatron.config import RunConfig, load
from coe_megatron.config.settings import Count
from coe_megatron.errors import ConfigError
from coe_megatron.estimate.machine import Machine
from coe_megatron.estimate.run_time import evaluations
from coe_megatron.files import problem, read_limited, require_file, require_folder
from coe_megatron.parsing import JSON_BYTES, first_of, parse_json
from coe_megatron.run.metrics_check import find_damaged_times
from coe_megatron.run.metrics_log import read_metrics
from coe_megatron.study.plan.amounts import Amounts, Speed

_MAX_RATE = 1e21  # FLOP/s, far above that of any rank
_MIN_STEPS = 3  # logged steps; the first is excluded, since it includes one-time costs of a process


class _Attempt(BaseModel):
    outcome: str
    began: AwareDatetime | None = None
    ended: AwareDatetime | None = None


class _Parameters(BaseModel):
    embedding: Annotated[int, Field(ge=1, lt=10**18)]


class _Record(BaseModel):
    """The keys of a run.json that we use."""

    attempts: Annotated[list[_Attempt], Field(min_length=1)]
    ranks: Count
    parameters: _Parameters


def calibrate(folder: Path, machine: Machine) -> Speed:
    """The speed of the run in a folder.

    The time of a step is the median over logged steps, except the first. Start-up and checkpoints can be measured only
    if a single attempt completed the run; otherwise they are the machine's.

    Args:
        machine: what it ran on.

    Raises:
        ConfigError: the folder has no run, too few logged steps, or impossible times.
    """
    record, lines = _read(folder)
    try:
        config = _with_vocabulary(load(folder / "config.yaml", world_size=record.ranks), record)
    except ConfigError as error:
        raise ConfigError(f"--calibration is {folder}: its config.yaml cannot be used: {error}") from None
    logged = [line for line in lines if (line.get("step_seconds") or 0) > 0]
    if len(logged) < _MIN_STEPS:
        raise ConfigError(
            f"--calibration is {folder}: its metrics.jsonl has {len(logged)} logged steps; {_MIN_STEPS} are needed"
        )
    run = Amounts(Speed(machine)).run(config, record.ranks)
    step_seconds, predicted = median(line["step_seconds"] for line in logged[1:]), run.seconds
    rate = run.of("flops") / config.training.steps / step_seconds / record.ranks
    if not 1 <= rate < _MAX_RATE:
        raise ConfigError(
            f"--calibration is {folder}: its metrics.jsonl is damaged ({step_seconds:.3g} s per step on "
            f"{record.ranks:,} ranks would be {rate:.3g} FLOP/s per rank)"
        )
    factor, only = step_seconds / run.step.total, record.attempts[0]
    if len(record.attempts) > 1 or only.outcome != "finished" or only.began is None or only.ended is None:
        return Speed(machine, factor)
    evaluating = factor * predicted.evaluations
    save_seconds = _save_seconds(config, lines, evaluating / evaluations(config.training))
    known = seconds_in_steps(logged) + evaluating + run.checkpoints * save_seconds
    startup = max(0.0, (only.ended - only.began).total_seconds() - known)
    return Speed(machine, factor, startup, save_seconds)


def _read(folder: Path) -> tuple[_Record, list[dict[str, Any]]]:
    name = "--calibration"
    require_folder(folder, name)
    content = read_limited(folder / "run.json", name, JSON_BYTES)
    require_file(folder / "metrics.jsonl", name)
    try:
        record = parse_json(content)
        lines = read_metrics(folder / "metrics.jsonl")
    except (OSError, ValueError) as error:
        raise problem(folder, name, f"it must be the folder of a run ({error})") from None
    if not isinstance(record, dict) or not all(record.get(each) for each in ("attempts", "ranks", "parameters")):
        raise problem(folder, name, "its run.json has no attempt with a step")
    if reason := find_damaged_times(lines):
        raise problem(folder, name, f"its metrics.jsonl is damaged ({reason})")
    try:
        return _Record.model_validate(record), lines
    except ValidationError as error:
        raise problem(folder, name, f"its run.json is damaged ({first_of(error)})") from None


def _with_vocabulary(config: RunConfig, record: _Record) -> RunConfig:
    """The config with the run's vocabulary size, so that its data are not needed."""
    rows = max(1, record.parameters.embedding // config.model.hidden_size)
    return replace(config, model=replace(config.model, vocab_size=rows))


def seconds_in_steps(logged: Sequence[Mapping[str, Any]]) -> float:
    """Total seconds in steps, from the lines of logged steps, without evaluations and checkpoints."""
    before = [0, *(line["step"] for line in logged)]
    return sum((line["step"] - earlier) * line["step_seconds"] for line, earlier in zip(logged, before, strict=False))


def _save_seconds(config: RunConfig, lines: Sequence[Mapping[str, Any]], evaluation_seconds: float) -> float:
    """Seconds per checkpoint: the time until a late step, less steps and evaluations, divided by checkpoints.

    `eta_seconds` is the time since the first evaluation started, divided by the steps done, times the steps left.
    """
    steps, every = config.training.steps, config.training.save_every
    timed = [line for line in lines if (line.get("step_seconds") or 0) > 0 and 0 < line["step"] < steps]
    last = max((line["step"] for line in timed if line.get("eta_seconds")), default=0)
    done = [line for line in timed if line["step"] <= last]
    saved = (last - 1) // every + sum(step % every > 0 and step < last for step in set(config.training.milestones))
    if last == 0 or saved == 0:
        return 0.0
    took = done[-1]["eta_seconds"] * last / (steps - last)
    evaluated = 1 + sum("valid_loss" in line and 0 < line["step"] < last for line in lines)
    return max(0.0, took - seconds_in_steps(done) - evaluated * evaluation_seconds) / saved
