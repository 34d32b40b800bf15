"""Whether the lines of a metrics.jsonl hold what studies read of them: a file may have been cut or overwritten."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

_Number = Annotated[float, Field(gt=-1e18, lt=1e18)]  # what arithmetic and figures take; neither NaN nor infinite
_Amount = Annotated[float, Field(ge=0, lt=1e18)]


class _Read(BaseModel):
    model_config = ConfigDict(strict=True)


class _Memory(_Read):
    peak: _Amount


class _Line(_Read):
    """Every line; null stands for a number that was not finite."""

    step: Annotated[int, Field(ge=0, lt=10**18)]
    tokens: _Amount = 0.0
    valid_loss: _Number | None = None
    train_loss: _Number | None = None
    step_seconds: _Amount = 0.0
    eta_seconds: _Amount | None = None
    routing_entropy: _Number | None = None
    routing_load_max_over_mean: _Number | None = None
    routing_dead_experts: _Number | None = None
    routing_dropped: _Number | None = None
    routing_overlap: _Number | None = None
    memory: _Memory | None = None


class _Place(_Read):
    """A layer in an iteration; loads have a number for each of N experts, pairs N by N."""

    layer: Annotated[int, Field(ge=1)]
    iteration: Annotated[int, Field(ge=1)]
    load: list[_Amount]
    state_norm: _Amount | None
    increment_over_state: _Amount | None
    pairs: list[list[_Amount]] | None = None


class _LastStep(_Read):
    tokens: _Amount
    step_seconds: _Amount
    tokens_per_second: _Amount | None
    tflops: _Amount | None
    train_loss: _Number | None
    memory: _Memory
    routing: Annotated[list[_Place], Field(min_length=1)]


def damage(lines: Sequence[Any]) -> str:
    """What is wrong with the lines of a run, in one line; empty if nothing is."""
    for number, line in enumerate(lines, 1):
        if said := _said(_Line, line):
            return f"line {number}: {said}"
    for number, (before, after) in enumerate(pairwise(lines), 2):
        if after["step"] <= before["step"]:
            return f"line {number}: step is {after['step']}, after {before['step']}"
    return ""


def damage_at_the_end(lines: Sequence[Mapping[str, Any]], experts: int) -> str:
    """What is wrong with the lines of a finished run besides, of which the last step has what routers did; else empty.

    Args:
        experts: that a layer has.
    """
    steps = [line for line in lines if "step_seconds" in line]
    if not steps:
        return "no line is of a step"
    for line in lines:
        needed = {"tokens"} | ({"memory"} if "step_seconds" in line else set())
        if lacking := needed - line.keys():
            return f"step {line['step']}: {min(lacking)} is missing"
    if said := _said(_LastStep, steps[-1]):
        return f"step {steps[-1]['step']}: {said}"
    for place in steps[-1]["routing"]:
        rows = [place["load"], *(place.get("pairs") or [])]
        if {len(row) for row in rows} != {experts} or len(rows) not in (1, experts + 1):
            return f"step {steps[-1]['step']}: routing is not that of {experts} experts"
    return ""


def _said(kind: type[_Read], line: Any) -> str:
    if not isinstance(line, dict):
        return "it is no object"
    try:
        kind.model_validate(line)
    except ValidationError as error:
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}"
    return ""
